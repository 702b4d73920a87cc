"""`apply_mistral_kernels`: a patched model computes the same; the handle lists skipped parts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.helpers import assert_same_text, unpadded
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.patching_cases import (  # noqa: E402
    GEMMAS,
    LLAMAS,
    OPS,
    VOCAB,
    Operators,
    assert_close,
    assert_identical,
    attributes,
    logits,
    make,
    make_batch,
    only,
    relative_error,
    train_step,
)

from mistral_kernels.integrations.patch_handle import PARTS  # noqa: E402
from mistral_kernels.integrations.patching import apply_mistral_kernels  # noqa: E402


@pytest.mark.parametrize("part", [*PARTS, "all"])
@pytest.mark.parametrize("family", LLAMAS + GEMMAS)
def test_values_and_gradients(family: str, part: str) -> None:
    model, batch = make(family), make_batch()
    expected = train_step(model, batch)
    expected["logits"] = logits(model, batch["input_ids"])
    handle = apply_mistral_kernels(model, **(only(part) if part != "all" else {}))
    with Operators() as operators:
        actual = train_step(model, batch)
    actual["logits"] = logits(model, batch["input_ids"])
    assert_close(actual, expected)

    parts = set(PARTS if part == "all" else [part])
    parts -= {"rms_norm", "swiglu"} if family in GEMMAS else set()
    assert set(handle.changed) == parts
    assert {name for name in OPS if operators.counts[OPS[name]]} == parts
    norms = 9 if family == "Qwen3" else 5
    assert operators.counts["rms_norm_forward"] == (norms if "rms_norm" in parts else 0)
    assert operators.counts["rotary"] == (4 if "rotary" in parts else 0)  # forward and backward


def summed_errors(
    actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[float, float]:
    """Return the summed relative errors of ours and of eager; check each error of ours."""
    assert actual.keys() == exact.keys()
    errors = [[relative_error(x[name], exact[name]) for x in (actual, plain)] for name in exact]
    for name, (ours, theirs) in zip(exact, errors, strict=True):
        assert ours <= 2 * theirs + 2 * torch.finfo(torch.bfloat16).eps, name
    ours, theirs = map(sum, zip(*errors, strict=True))
    return ours, theirs


@pytest.mark.parametrize("family", ["Mistral", "Qwen3", "Gemma2"])
def test_bfloat16_is_as_accurate_as_eager(family: str) -> None:
    """Compare sums over three models, since the errors of a single model vary too much."""
    errors = []
    for _ in range(3):
        model, batch = make(family).bfloat16(), make_batch()
        exact = train_step(copy.deepcopy(model).double(), batch)
        plain = train_step(model, batch)
        apply_mistral_kernels(model)
        errors.append(summed_errors(train_step(model, batch), plain, exact))
    ours, theirs = map(sum, zip(*errors, strict=True))
    assert ours <= 1.2 * theirs


@pytest.mark.slow
@pytest.mark.kernels
def test_on_executed_kernels(triton_backend: None, device: torch.device) -> None:
    model = make(num_hidden_layers=1).to(device)
    batch = {name: x.to(device) for name, x in make_batch(9).items()}
    expected = train_step(model, batch)
    with apply_mistral_kernels(model):
        actual = train_step(model, batch)
    assert_close(actual, expected)


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_ropes(rope: str) -> None:
    """Include texts longer than the trained length, which change the dynamic tables."""
    scaling: dict[str, Any] = {"rope_type": rope, "factor": 4.0, "rope_theta": 100.0}
    if rope in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = 8
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    options = {"rope_scaling": scaling, "max_position_embeddings": 16}
    model, twin = make("Llama", **options), make("Llama", **options)
    apply_mistral_kernels(model, **only("rotary"))
    for seqlen in (9, 40, 9):
        ids = make_batch(seqlen)["input_ids"]
        assert relative_error(logits(model, ids), logits(twin, ids)) < 2e-5, seqlen


@pytest.mark.parametrize("family", LLAMAS)
def test_generation(family: str) -> None:
    model = make(family).eval()
    ids = torch.randint(1, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    with apply_mistral_kernels(model), Operators() as operators:
        dynamic = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
    for actual in (dynamic, static):
        texts = (unpadded(x, mask) for x in (actual, expected))
        assert_same_text(*texts, lambda ids: model(ids).logits)
    assert operators.counts["rms_norm_forward"]
    assert operators.counts["rotary"]


# Reports of patched and skipped parts


def test_repr_lists_changed_modules_and_reasons_for_skipped_parts() -> None:
    model = make("Gemma2")
    handle = apply_mistral_kernels(model, cross_entropy=False)
    assert repr(handle) == (
        "mistral_kernels in Gemma2ForCausalLM:\n"
        "  attention: 4 changed: Gemma2ForCausalLM, model, model.layers.*.self_attn\n"
        "  rms_norm: skipped: Gemma2RMSNorm multiplies by 1 + weight\n"
        "  rotary: 3 changed: model.layers.*.self_attn, model.rotary_emb\n"
        f"  swiglu: skipped: Gemma2MLP has {type(model.model.layers[0].mlp.act_fn).__name__}, "
        "not SiLU"
    )
    again = apply_mistral_kernels(model, **only("rotary", "cross_entropy"))
    assert repr(again) == (
        "mistral_kernels in Gemma2ForCausalLM:\n"
        "  rotary: skipped: already applied\n"
        "  cross_entropy: 1 changed: Gemma2ForCausalLM"
    )
    handle.undo()
    assert repr(handle).startswith("mistral_kernels in Gemma2ForCausalLM, undone:\n")


def test_unsupported_parts_are_skipped_with_a_reason() -> None:
    model = make("Mistral", attention_dropout=0.1, hidden_act="gelu")
    model.lm_head = nn.Linear(48, VOCAB)
    handle = apply_mistral_kernels(model)
    assert set(handle.changed) == {"rms_norm", "rotary"}
    activation = type(model.model.layers[0].mlp.act_fn).__name__
    assert handle.skipped == {
        "attention": ["config.attention_dropout is 0.1; it must be 0"],
        "swiglu": [f"MistralMLP has {activation}, not SiLU"],
        "cross_entropy": ["lm_head has a bias"],
    }
    wide = make("Llama").model
    for layer in wide.layers:
        layer.self_attn.head_dim = 512
    handle = apply_mistral_kernels(wide, **only("attention", "cross_entropy"))
    assert not handle.changed
    assert handle.skipped == {
        "attention": ["head_dim is 512; it must be at most 256"],
        "cross_entropy": ["LlamaModel has no lm_head"],
    }


def test_unsupported_models_raise() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)
    model = transformers.GPT2LMHeadModel(config)
    types = "gemma, gemma2, gemma3_text, llama, mistral, qwen2, qwen3"
    with pytest.raises(ValueError, match=f"^model must be of type {types}, got 'gpt2'$"):
        apply_mistral_kernels(model)
    with pytest.raises(TypeError) as error:
        apply_mistral_kernels(nn.Linear(2, 2))
    assert str(error.value) == (
        "model must be a transformers PreTrainedModel or contain one, got Linear"
    )


# The loss


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
def test_loss_supports_the_keywords_of_transformers(family: str) -> None:
    model, batch = make(family), make_batch()
    shifted = batch["labels"].roll(-1, 1)
    cases: list[dict[str, Any]] = [
        {},
        {"num_items_in_batch": 17},
        {"num_items_in_batch": torch.tensor(17)},
        {"shift_labels": shifted},
        {"ignore_index": 5},
    ]
    for options in cases:
        labels = batch["labels"].clamp(min=0) if "ignore_index" in options else batch["labels"]
        given = {**batch, "labels": labels}
        expected = train_step(model, given, **options)
        with apply_mistral_kernels(model, **only("cross_entropy")):
            assert_close(train_step(model, given, **options), expected)
            assert model(**given, **options).logits is None


def test_loss_runs_in_the_model_if_logits_are_needed() -> None:
    model, batch = make(), make_batch()
    ids, labels = batch["input_ids"], batch["labels"]
    with apply_mistral_kernels(model, **only("cross_entropy")):
        assert model(ids, None, None, None, None, labels).logits is None  # by position
        assert model(ids).logits.shape == (2, 23, VOCAB)
        assert model(ids, labels=labels, return_dict=False)[1].shape == (2, 23, VOCAB)
        kept = model(ids, labels=labels[:, -4:], logits_to_keep=4)
        assert kept.logits.shape == (2, 4, VOCAB)
        outputs = model(ids, labels=labels, use_cache=True, output_hidden_states=True)
        assert outputs.logits is None
        assert len(outputs.hidden_states) == 3
        assert outputs.past_key_values.get_seq_length() == 23
        model.eval()
        assert model(**batch).logits.shape == (2, 23, VOCAB)
        model.train()
        model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
        assert model(**batch).loss.item() == 42
    handle = apply_mistral_kernels(model, **only("cross_entropy"))
    reason = "loss_function is not transformers' ForCausalLMLoss"
    assert handle.skipped == {"cross_entropy": [reason]}


def test_loss_runs_in_a_wrapped_forward() -> None:
    """Wrap the forward as accelerate does for mixed precision."""
    model, batch = make(), make_batch()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    expected = train_step(model, batch)
    before = attributes(model)
    with apply_mistral_kernels(model) as handle:
        reason = "the forward of MistralForCausalLM was replaced by other code"
        assert handle.skipped == {"cross_entropy": [reason]}
        assert apply_mistral_kernels(model).skipped["cross_entropy"] == [reason]
        assert_close(train_step(model, batch), expected)
        assert model(**batch).logits is not None
    assert_identical(model, before)


def test_classes_of_other_packages_with_the_same_name_are_skipped() -> None:
    class MistralMLP(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = make()
    model.model.layers[0].mlp = MistralMLP()
    handle = apply_mistral_kernels(model, **only("swiglu"))
    assert handle.changed == {"swiglu": ["model.layers.1.mlp"]}
    assert handle.skipped == {"swiglu": [f"{__name__}.MistralMLP is not supported"]}


def test_loss_runs_in_the_model_if_lm_head_has_hooks() -> None:
    model, batch, seen = make(), make_batch(), []
    with apply_mistral_kernels(model):
        hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        assert model(**batch).logits is not None
        assert seen
        hook.remove()
        assert model(**batch).logits is None


def test_autocast() -> None:
    """Check that the patched model's errors are at most 1.3 times those of the unpatched model."""
    model, batch = make("Qwen3"), make_batch()
    exact = train_step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = train_step(model, batch)
        apply_mistral_kernels(model)
        actual = train_step(model, batch)
    ours, theirs = summed_errors(actual, plain, exact)
    assert ours <= 1.3 * theirs


# torch.compile


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_gives_one_graph_and_undo_recompiles(dynamic: bool) -> None:
    torch._dynamo.reset()
    model, batches = make(num_hidden_layers=1), [make_batch(), make_batch(31)][: 1 + dynamic]
    expected = [train_step(model, batch) for batch in batches]
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    with apply_mistral_kernels(model):
        for batch, results in zip(batches, expected, strict=True):
            assert_close(train_step(compiled, batch), results)
        assert counters["unique_graphs"] == 1
        assert compiled(**batch).logits is None
    assert_close(train_step(compiled, batches[0]), expected[0])
    assert compiled(**batches[0]).logits is not None
    assert counters["unique_graphs"] == 2


def test_no_warning_in_ordinary_use() -> None:
    model, batch = make(), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply_mistral_kernels(model):
            train_step(model, batch)
