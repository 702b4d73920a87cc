"""`apply_mistral_kernels` with checkpoints, PEFT, Liger, accelerate, gradient checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.patching_cases import (  # noqa: E402
    OPS,
    VOCAB,
    Operators,
    assert_close,
    assert_identical,
    attributes,
    make,
    make_batch,
    relative_error,
    train_step,
)

from mistral_kernels.integrations.patch_handle import PARTS  # noqa: E402
from mistral_kernels.integrations.patching import apply_mistral_kernels  # noqa: E402


def test_base_model() -> None:
    model, ids = make().model, torch.randint(VOCAB, (2, 19))
    expected = model(ids).last_hidden_state
    before = attributes(model)
    with apply_mistral_kernels(model), Operators() as operators:
        actual = model(ids).last_hidden_state
    assert relative_error(actual, expected) < 2e-5
    assert operators.counts["rms_norm_forward"] == 5
    assert operators.counts["rotary"] == 2
    assert_identical(model, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Check that the recomputation in backward, outside the model's forward, runs our kernels."""
    model, batch = make(), make_batch()
    expected = train_step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with apply_mistral_kernels(model), Operators() as operators:
        actual = train_step(model, batch)
    assert_close(actual, expected)
    assert operators.counts["rms_norm_forward"] == 2 * 4 + 1


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_after_patching(assign: bool) -> None:
    source, batch = make(), make_batch()
    expected = train_step(source, batch)
    if assign:
        with torch.device("meta"):
            model = make_on_meta()
    else:
        model = make(seed=1)
    apply_mistral_kernels(model)
    model.load_state_dict(source.state_dict(), assign=assign)
    if assign:
        model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    assert_close(train_step(model, batch), expected)


def make_on_meta() -> Any:
    return transformers.MistralForCausalLM(make().config).train()


def test_saving_and_copying_a_patched_model(tmp_path: Path) -> None:
    model, batch = make(), make_batch()
    expected = train_step(model, batch)
    model.save_pretrained(tmp_path / "plain")
    handle = apply_mistral_kernels(model)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in files:
        plain, patched = ((tmp_path / x / name).read_bytes() for x in ("plain", "patched"))
        assert plain == patched, name
    assert model.state_dict().keys() == make().state_dict().keys()
    assert model.config._attn_implementation == "mistral_kernels"

    same_kind = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(same_kind) is type(model)
    twin = copy.deepcopy(model)
    assert_close(train_step(twin, batch), expected)
    handle.undo()
    assert model.config._attn_implementation == same_kind.config._attn_implementation == "eager"
    assert_close(train_step(twin, batch), expected)
    with apply_mistral_kernels(twin) as other, Operators() as operators:
        assert_close(train_step(twin, batch), expected)
    assert set(other.changed) == set(PARTS)
    assert operators.counts["swiglu_forward"] == 2


def with_lora(model: Any, *targets: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return wrapped


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when: str) -> None:
    targets = ("q_proj", "v_proj", "gate_proj", "down_proj")
    batch = make_batch()
    expected = train_step(with_lora(make(), *targets), batch)
    model = make()
    before = attributes(model)
    handle = apply_mistral_kernels(model) if when == "before" else None
    wrapped = with_lora(model, *targets)
    if handle is None:
        before = attributes(model)
        handle = apply_mistral_kernels(wrapped)
    assert set(handle.changed) == set(PARTS)
    with Operators() as operators:
        assert_close(train_step(wrapped, batch), expected)
    assert all(operators.counts[name] for name in OPS.values())
    ids = batch["input_ids"][:1, :5]
    generated = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    handle.undo()
    assert torch.equal(
        generated, wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    )
    if when == "after":
        assert_identical(model, before)
    for name, module in model.named_modules():
        assert vars(module).get("forward") is before.get(name, {}).get("forward"), name
        assert vars(module).get("config") is before.get(name, {}).get("config"), name


def test_peft_on_lm_head() -> None:
    batch = make_batch()
    expected = train_step(with_lora(make(), "lm_head"), batch)
    model = make()
    apply_mistral_kernels(model)
    wrapped = with_lora(model, "lm_head")
    assert_close(train_step(wrapped, batch), expected)
    assert wrapped(**batch).logits is not None
    handle = apply_mistral_kernels(with_lora(make(), "lm_head"))
    assert handle.skipped == {"cross_entropy": ["lm_head is a peft.tuners.lora.layer.Linear"]}


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import Liger, and undo its replacements in transformers' modules afterwards."""
    reason = "liger-kernel is not installed"
    try:
        module = pytest.importorskip("liger_kernel.transformers", reason=reason)
        assert module.apply_liger_kernel_to_mistral  # a lazy import
    except ImportError as error:  # Liger does not support older versions of transformers
        pytest.skip(str(error))
    modeling = __import__("importlib").import_module(make().__module__)
    for name in ("MistralRMSNorm", "MistralMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    return module


def test_liger_first(liger: Any) -> None:
    """Apply Liger to an instance and to the classes before patching.

    Liger's own kernels need a GPU and are therefore not run.
    """
    batch = make_batch()
    expected = train_step(make(), batch)
    model = make()
    liger.apply_liger_kernel_to_mistral(model=model)
    before = attributes(model)
    assert "LigerRMSNorm" in repr(model.model.norm.forward)
    handle = apply_mistral_kernels(model)
    assert set(handle.changed) == set(PARTS)
    assert_close(train_step(model, batch), expected)
    handle.undo()
    assert_identical(model, before)

    built = make()
    assert type(built.model.norm) is liger.LigerRMSNorm
    assert set(apply_mistral_kernels(built).changed) == set(PARTS)
    assert_close(train_step(built, batch), expected)


def test_liger_applied_after_our_patches(liger: Any) -> None:
    model, batch = make(), make_batch()
    expected = train_step(model, batch)
    before = attributes(model)
    handle = apply_mistral_kernels(model)
    liger.apply_liger_kernel_to_mistral(model=model, rope=False)
    by_liger = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with apply_mistral_kernels(model) as again:
        assert again.skipped == {part: ["already applied"] for part in ("attention", "rotary")}
        assert set(again.changed) == {"rms_norm", "swiglu", "cross_entropy"}
        assert_close(train_step(model, batch), expected)
    with pytest.warns(
        UserWarning,
        match=r"RMSNorm.forward: replaced after apply_mistral_kernels \(8 attributes\); undo",
    ):
        handle.undo()
    for name, module in model.named_modules():
        if name.endswith(("norm", "mlp")) or not name:
            assert vars(module)["forward"] is by_liger[name], name
        else:
            assert vars(module).get("forward") is before[name].get("forward"), name


def test_accelerate_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, batch = make(), make_batch()
    expected = train_step(model, batch)
    seen = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    for module in (model.model.norm, model.model.layers[0].mlp, model.model, model):
        hooks.add_hook_to_module(module, Hook())
    before = attributes(model)
    with apply_mistral_kernels(model), Operators() as operators:
        assert_close(train_step(model, batch), expected)
    assert len(seen) == 4
    assert operators.counts["rms_norm_forward"] == 5
    assert_identical(model, before)
