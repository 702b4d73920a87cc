"""`apply_mistral_kernels`: copies of a patched model are patched, pickles are not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.patching_cases import (  # noqa: E402
    OPS,
    VOCAB,
    Operators,
    make,
    make_batch,
    relative_error,
    train_step,
)

from mistral_kernels.integrations.patch_handle import PARTS  # noqa: E402
from mistral_kernels.integrations.patching import apply_mistral_kernels  # noqa: E402


def real_logits(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the logits of the tokens that are not padding.

    No cache is used: a copied layer has the index of its original, and both would write to the same
    layer of the cache.
    """
    with torch.no_grad():
        logits = model(ids, attention_mask=attention_mask, use_cache=False).logits
    return logits[attention_mask.bool()]


def padded_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCAB, (2, 19))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :5] = 0
    return ids, attention_mask


def active_parts(model: nn.Module) -> set[str]:
    """Return the parts whose operators run in a training step."""
    with Operators() as operators:
        train_step(model, make_batch(), use_cache=False)
    return {part for part in PARTS if operators.counts[OPS[part]]}


def scaled(model: Any) -> Any:
    """Scale the weights of the model, in place of a training step."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_patched_on_its_own_weights(how: str) -> None:
    model, given = make(), padded_batch()
    expected, changed = real_logits(model, *given), real_logits(scaled(make()), *given)
    handle = apply_mistral_kernels(model)
    twin = scaled(COPIES[how](model))
    for on in (True, False):
        assert relative_error(real_logits(twin, *given), changed) < 2e-5
        assert relative_error(real_logits(model, *given), expected) < 2e-5
        assert active_parts(twin) == active_parts(model) == (set(PARTS) if on else set())
        handle.undo()
    with apply_mistral_kernels(twin) as other:
        assert set(other.changed) == set(PARTS)
        assert not other.skipped
        assert active_parts(twin) == set(PARTS)
        assert active_parts(model) == set()
        assert relative_error(real_logits(twin, *given), changed) < 2e-5
    assert active_parts(twin) == set()


@pytest.mark.parametrize("name", ["", "self_attn", "mlp", "input_layernorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_layer(name: str, dtype: torch.dtype) -> None:
    """Put the copy in place of its original, and in place of an unpatched model's layer."""
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    model, given = make().to(dtype), padded_batch()
    expected = real_logits(model, *given)
    handle = apply_mistral_kernels(model)
    path = f"model.layers.1.{name}".rstrip(".")
    twin = copy.deepcopy(model.get_submodule(path))
    other = make().to(dtype)
    other.set_submodule(path, copy.deepcopy(twin))
    model.set_submodule(path, twin)
    assert relative_error(real_logits(other, *given), expected) < tolerance
    for _ in range(2):
        assert relative_error(real_logits(model, *given), expected) < tolerance
        handle.undo()
    assert relative_error(real_logits(other, *given), expected) < tolerance


def test_a_second_call_patches_replaced_layers() -> None:
    model, given = make(), padded_batch()
    expected = real_logits(model, *given)
    first = apply_mistral_kernels(model)
    model.model.layers[1] = make().model.layers[1]
    with pytest.raises(
        ValueError, match=r"^attention_mask must be used with attn_implementation='"
    ):
        real_logits(model, *given)
    second = apply_mistral_kernels(model)
    assert second.changed == {
        "attention": ["model.layers.1.self_attn"],
        "rms_norm": ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"],
        "rotary": ["model.layers.1.self_attn"],
        "swiglu": ["model.layers.1.mlp"],
    }
    assert second.skipped == {part: ["already applied"] for part in PARTS}
    assert relative_error(real_logits(model, *given), expected) < 2e-5
    for handle in (second, first):
        handle.undo()
    assert torch.equal(real_logits(model, *given), expected)


def saved(model: Any) -> Any:
    """Save the model with `torch.save` and return it as `torch.load` reads it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3"])
def test_a_pickle_is_an_unpatched_model(family: str) -> None:
    model, given = make(family), padded_batch()
    expected = real_logits(model, *given)
    handle = apply_mistral_kernels(model)
    content = pickle.dumps(model)
    # The pickle can be loaded if this package is not installed.
    assert b"mistral_kernels" not in content
    assert b"mistral_kernels" not in pickle.dumps(model.config)
    for twin in (pickle.loads(content), saved(model)):
        assert active_parts(twin) == set()
        assert torch.equal(real_logits(twin, *given), expected)
        assert type(twin.config) is type(make(family).config)
        assert twin.config is twin.model.config is twin.model.rotary_emb.config
        assert twin.config._attn_implementation == "eager"
        with apply_mistral_kernels(twin):
            assert active_parts(twin) == set(handle.changed)
        assert active_parts(twin) == set()
    assert active_parts(model) == set(handle.changed)
    assert not pickle.loads(pickle.dumps(handle)).on


def test_copies_of_the_config() -> None:
    """Check that a shallow copy is unpatched, and that a deep copy stays patched until `undo`."""
    model = make()
    handle = apply_mistral_kernels(model)
    shallow, deep = copy.copy(model.config), copy.deepcopy(model.config)
    assert shallow._attn_implementation == "eager"
    assert deep._attn_implementation == "mistral_kernels"
    shallow.use_cache = deep.use_cache = False
    assert model.config.use_cache
    model.config.use_cache = False
    handle.undo()
    assert deep._attn_implementation == "eager"
    assert not model.config.use_cache


def test_two_models_that_share_a_config() -> None:
    config, given = make().config, padded_batch()
    models = [transformers.MistralForCausalLM(config).train() for _ in range(2)]
    expected = [real_logits(model, *given) for model in models]
    handles = [apply_mistral_kernels(models[0])]
    assert [active_parts(model) for model in models] == [set(PARTS), set()]
    handles.append(apply_mistral_kernels(models[1]))
    assert [active_parts(model) for model in models] == [set(PARTS), set(PARTS)]
    handles[0].undo()
    assert [active_parts(model) for model in models] == [set(), set(PARTS)]
    handles[1].undo()
    assert config._attn_implementation == "eager"
    for model, logits in zip(models, expected, strict=True):
        assert torch.equal(real_logits(model, *given), logits)


def test_a_handle_does_not_keep_its_model_alive() -> None:
    model = make()
    hooked = model.model.norm.forward
    model.model.norm.forward = hooked  # a bound method, as from an earlier patch
    handle = apply_mistral_kernels(model)
    train_step(model, make_batch())
    gone = weakref.ref(model.model.layers[0].mlp)
    del model, hooked
    gc.collect()
    assert gone() is None
    handle.undo()


@pytest.mark.parametrize("saved", [["self_attn"], ["mlp"], ["norm", "input_layernorm"]])
@pytest.mark.parametrize("when", ["before", "after"])
def test_modules_that_peft_saves(when: str, saved: list[str]) -> None:
    """Check modules of `modules_to_save`, of which PEFT trains deep copies."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    target = "q_proj" if "mlp" in saved else "down_proj"
    options = {"modules_to_save": saved, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=2, target_modules=[target], **options)
    model, given = make(), padded_batch()
    expected = real_logits(model, *given)
    handle = apply_mistral_kernels(model) if when == "before" else None
    wrapped = peft.get_peft_model(model, config)
    handle = handle or apply_mistral_kernels(wrapped)
    for on in (True, False):
        assert relative_error(real_logits(wrapped, *given), expected) < 2e-5
        assert active_parts(wrapped) == (set(PARTS) if on else set())
        handle.undo()
    handle = apply_mistral_kernels(wrapped)
    merged = wrapped.merge_and_unload()
    for _ in range(2):
        assert relative_error(real_logits(merged, *given), expected) < 2e-5
        handle.undo()


def test_unwrapped_by_accelerate() -> None:
    """Let accelerate wrap the forward for mixed precision and remove its wrappers again."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, given = make(), padded_batch()
    expected = real_logits(model, *given)
    handle = apply_mistral_kernels(model)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare_model(model)
        assert prepared(**make_batch()).logits is None
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert unwrapped is model
    assert unwrapped(**make_batch()).logits is None
    for _ in range(2):
        assert relative_error(real_logits(model, *given), expected) < 2e-5
        handle.undo()
    assert active_parts(model) == set()
