"""attn_implementation="mistral_kernels": what eager attention gives, and what it costs."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import Allocations
from helpers import assert_as_accurate, assert_same_text, unpadded
from torch import Tensor
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers", reason="transformers is absent")

from transformers import masking_utils  # noqa: E402

from mistral_kernels.integrations import mask, transformers_attention  # noqa: E402
from mistral_kernels.integrations.transformers import register  # noqa: E402
from mistral_kernels.integrations.transformers_attention import attend  # noqa: E402

W = 8
VOCAB = 97
# A forward pass' cache and its mask's arguments: both renamed in the course of transformers 5.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.MistralForCausalLM.forward).parameters
)
OLDER = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # attention is far from uniform
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": W}),
    "no window": ("Mistral", {"sliding_window": None}),
    "llama": ("Llama", {}),
    # A window in every other layer, and a softcap.
    "gemma2": ("Gemma2", {"sliding_window": W, "query_pre_attn_scalar": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 1}),
}
# Padding on either side of each of three rows.
PADDING: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "none": ((0, 0, 0), (0, 0, 0)),
    "left": ((2, 0, 4), (0, 0, 0)),
    "right": ((0, 0, 0), (3, 0, 1)),
    "both": ((2, 0, 1), (0, 3, 2)),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    register()  # twice is once


@pytest.fixture
def no_whole_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention, which takes masks of queries by keys, is not called."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a whole mask was made")

    monkeypatch.setattr(transformers_attention, "sdpa_attention_forward", refuse)


def make_model(name: str = "mistral", **changes: Any) -> Any:
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def both(model: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What a call gives with our attention, and with eager's."""
    model.set_attn_implementation("mistral_kernels")
    ours = call(*args, **kwargs)
    model.set_attn_implementation("eager")
    return ours, call(*args, **kwargs)


def both_logits(model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    ours, eager = both(model, model, ids, **given)
    return ours.logits, eager.logits


def batch(seqlen: int, padding: str = "none") -> tuple[Tensor, Tensor]:
    """ids and attention_mask of three rows; a row shorter than its padding keeps a token."""
    ids = torch.randint(1, VOCAB, (3, seqlen))
    attention_mask = torch.ones_like(ids)
    for row, left, right in zip(attention_mask, *PADDING[padding]):
        row[: min(left, seqlen - 1)] = 0
        if right:
            row[max(seqlen - right, int(row.argmax()) + 1) :] = 0
    return ids.masked_fill(attention_mask == 0, 0), attention_mask


def positions_of(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(ours: Tensor, eager: Tensor, tolerance: float = 5e-5) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - eager).norm() <= tolerance * eager.norm()


# Whole forward passes.


@pytest.mark.usefixtures("no_whole_mask")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name: str, padding: str) -> None:
    model = make_model(name)
    for seqlen in (1, 2, W - 1, W, W + 1, 3 * W + 5):
        ids, attention_mask = batch(seqlen, padding)
        real = attention_mask.bool()
        given = {"attention_mask": attention_mask, "position_ids": positions_of(attention_mask)}
        for use_cache in (True, False):
            ours, eager = both_logits(model, ids, **given, use_cache=use_cache)
            assert torch.isfinite(ours).all()
            assert_close(ours[real], eager[real])
    if padding == "none":
        ours, eager = both_logits(model, ids)
        assert_close(ours, eager)


@torch.no_grad()
def test_masks_that_only_pytorch_serves() -> None:
    """With holes, or given whole: bool, or float with -inf or any bias."""
    model = make_model()
    seqlen = 2 * W + 3
    ids, attention_mask = batch(seqlen, "left")
    attention_mask[:, W] = 0
    attention_mask[1, 3] = 0
    visible = torch.rand(3, 1, seqlen, seqlen) < 0.7
    visible |= torch.eye(seqlen, dtype=torch.bool)
    bias = torch.randn(3, 1, seqlen, seqlen)
    real = attention_mask.bool()
    ours, eager = both_logits(model, ids, attention_mask=attention_mask)
    assert_close(ours[real], eager[real])
    for whole in (torch.zeros_like(bias).masked_fill(~visible, -torch.inf), bias):
        ours, eager = both_logits(model, ids, attention_mask=whole)
        assert_close(ours, eager)
        if whole is not bias:
            model.set_attn_implementation("mistral_kernels")
            assert_close(model(ids, attention_mask=visible).logits, eager)


@pytest.mark.usefixtures("no_whole_mask")
@torch.no_grad()
def test_a_row_of_padding_alone() -> None:
    model = make_model()
    ids, attention_mask = batch(2 * W, "left")
    attention_mask[0] = 0
    for given in ({}, {"use_cache": False}):
        ours, eager = both_logits(model, ids, attention_mask=attention_mask, **given)
        real = attention_mask.bool()
        assert torch.isfinite(ours).all()
        assert_close(ours[real], eager[real])


def packed_positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def gradients(
    model: Any, ids: Tensor, real: Tensor, given: dict[str, Any], forward: Any = None
) -> dict[str, Tensor]:
    """Of a random function of the real tokens' logits: the weights' gradients, and the logits."""
    model.zero_grad()
    run = model if forward is None else forward
    logits = run(ids, use_cache=False, **given).logits[real]
    generator = torch.Generator().manual_seed(7)
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.device))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.usefixtures("no_whole_mask")
@pytest.mark.parametrize("case", [*PADDING, "packed", "packed rows"])
@pytest.mark.parametrize("name", ["mistral", "no window", "gemma2", "checkpointing"])
def test_gradients(name: str, case: str) -> None:
    check_gradients(name, case, torch.device("cpu"))


def check_gradients(name: str, case: str, device: torch.device) -> None:
    model = make_model("mistral" if name == "checkpointing" else name).to(device).train()
    if name == "checkpointing":
        model.gradient_checkpointing_enable()
    ids, attention_mask = batch(3 * W + 1, case if case in PADDING else "none")
    real = attention_mask.bool()
    given = {"attention_mask": attention_mask, "position_ids": positions_of(attention_mask)}
    if case == "packed":
        ids, real = ids[:1], real[:1]
        given = {"position_ids": packed_positions((3, 1, 2 * W, W - 3))}
    elif case == "packed rows":
        ends = ((25,), (3, 1, 12, 9), (8, 17))
        given = {"position_ids": torch.cat([packed_positions(lengths) for lengths in ends])}
    ids, real = ids.to(device), real.to(device)
    given = {key: x.to(device) for key, x in given.items()}
    ours, eager = both(model, gradients, model, ids, real, given)
    assert ours.keys() == eager.keys() and len(ours) > 10
    for key in eager:
        assert_close(ours[key], eager[key], 1e-4)


@pytest.mark.usefixtures("no_whole_mask")
@pytest.mark.parametrize("tell_positions", [False, True])
def test_cu_seqlens_of_the_collator(tell_positions: bool) -> None:
    """With transformers' keywords for packed batches, positions may be told or not."""
    model = make_model().train()
    lengths = (3, 1, 2 * W, W - 3)
    ids, real = torch.randint(1, VOCAB, (1, sum(lengths))), torch.ones(1, sum(lengths)) > 0
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cu_seqlens = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    longest = {"max_length_q": 2 * W, "max_length_k": 2 * W}
    positions = {"position_ids": packed_positions(lengths)}
    model.set_attn_implementation("eager")
    eager = gradients(model, ids, real, positions)
    model.set_attn_implementation("mistral_kernels")
    given = {**cu_seqlens, **longest, **(positions if tell_positions else {})}
    ours = gradients(model, ids, real, given)
    for key in eager:
        assert_close(ours[key], eager[key], 1e-4)


@torch.no_grad()
def test_bfloat16() -> None:
    model = make_model()
    ids, attention_mask = batch(3 * W, "left")
    real = attention_mask.bool()
    model.set_attn_implementation("eager")
    model.double()
    exact = torch.cat([model(row[shown][None]).logits[0] for row, shown in zip(ids, real)])
    model.bfloat16()
    ours, eager = both_logits(model, ids, attention_mask=attention_mask)
    assert_as_accurate(ours[real], eager[real], exact, "logits")
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = both_logits(model, ids, attention_mask=attention_mask)
    assert_as_accurate(ours[real], eager[real], exact, "logits under autocast")


# Over caches.


def new_cache(kind: str, model: Any, max_length: int) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=max_length)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_step_over_a_cache(name: str, kind: str, padding: str) -> None:
    """A prompt shorter and longer than the window, then tokens singly: the logits of one pass."""
    model = make_model(name)
    total = 4 * W
    ids, attention_mask = batch(total, padding)
    positions = positions_of(attention_mask)
    model.set_attn_implementation("eager")
    real = attention_mask.bool()
    expected = model(ids, attention_mask=attention_mask, position_ids=positions).logits
    model.set_attn_implementation("mistral_kernels")
    for prompt in (W - 3, 2 * W + 1):
        cache = new_cache(kind, model, total + 3)
        begin = 0
        for end in (prompt, *range(prompt + 1, total + 1)):
            given = {"position_ids": positions[:, begin:end]}
            if padding != "none":
                given["attention_mask"] = attention_mask[:, :end]
            if OLDER:
                given["cache_position"] = torch.arange(begin, end)
            logits = model(ids[:, begin:end], **{CACHE: cache}, **given).logits
            shown = real[:, begin:end]
            assert torch.isfinite(logits).all()
            assert_close(logits[shown], expected[:, begin:end][shown])
            begin = end


@pytest.mark.usefixtures("no_whole_mask")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_over_a_cache(name: str) -> None:
    """Chunks of few and of many queries, within a window and across it, with padding."""
    model = make_model(name)
    sizes = (2, 5, 20, 1, 17, 3)
    total = sum(sizes)
    ids, attention_mask = batch(total, "left")
    positions = positions_of(attention_mask)
    real = attention_mask.bool()
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=attention_mask, position_ids=positions).logits
    model.set_attn_implementation("mistral_kernels")
    cache = new_cache("dynamic", model, total)
    begin = 0
    for size in sizes:
        end = begin + size
        given = {"attention_mask": attention_mask[:, :end], "position_ids": positions[:, begin:end]}
        logits = model(ids[:, begin:end], **{CACHE: cache}, **given).logits
        shown = real[:, begin:end]
        assert_close(logits[shown], expected[:, begin:end][shown])
        begin = end


MODES: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "llama", "gemma2"])
def test_generate(name: str, kind: str, padding: str, mode: str) -> None:
    """The traps: total length below the window and past it, padding, unfilled static caches."""
    model = make_model(name).double()
    for seqlen, new in ((3, 4), (5, 2 * W), (2 * W + 5, 6)):
        ids, attention_mask = batch(seqlen, padding)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, **MODES[mode]}
        if kind == "static":
            options["cache_implementation"] = "static"
        given = {"attention_mask": attention_mask, "pad_token_id": 0}
        ours, eager = both(model, model.generate, ids, **given, **options)
        assert torch.equal(ours, eager)
        assert ours.shape[1] == seqlen + new


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_assisted_generation(name: str, draft: str) -> None:
    if OLDER and name == "mistral":
        pytest.skip("these transformers cannot go back in a sliding cache")
    model = make_model(name).double()
    assistant = make_model(name, num_hidden_layers=1).double()
    ids = torch.randint(1, VOCAB, (1, 4)).repeat(1, 3)
    options: dict[str, Any] = {"assistant_model": assistant}
    if draft == "lookup":
        options = {"prompt_lookup_num_tokens": 3}

    def run() -> Tensor:
        assistant.set_attn_implementation(model.config._attn_implementation)
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}
        return model.generate(
            ids, max_new_tokens=2 * W, do_sample=False, eos_token_id=VOCAB - 1, **given
        )

    ours, eager = both(model, run)
    assert torch.equal(ours, eager)


# What it costs.


@pytest.mark.parametrize("name", ["mistral", "no window"])
def test_no_queries_by_keys(name: str) -> None:
    """Causal, windowed, padded and packed; forward, backward, and over either cache."""
    seqlen = 1280  # whose square is more than the largest of what follows it
    model = make_model(name).train()
    model.set_attn_implementation("mistral_kernels")
    ids, attention_mask = batch(seqlen, "left")
    packed = {"position_ids": packed_positions((seqlen - 300, 300)).expand(3, -1)}
    for given in ({}, {"attention_mask": attention_mask}, packed):
        with Allocations() as forward:
            logits = model(ids, **given, use_cache=False).logits
        with Allocations() as backward:
            logits.sum().backward()
        assert forward.largest_new < seqlen * seqlen
        assert backward.largest_new < seqlen * seqlen
    model.eval()
    for kind in ("dynamic", "static"):
        cache = new_cache(kind, model, seqlen + 8)
        prompt = {"attention_mask": attention_mask, CACHE: cache, "logits_to_keep": 1}
        later = torch.cat([attention_mask, attention_mask[:, -1:]], dim=1)
        with torch.no_grad(), Allocations() as steps:
            model(ids, **prompt)
            model(ids[:, :1], **prompt | {"attention_mask": later})
        assert steps.largest_new < seqlen * seqlen


class Reads(TorchFunctionMode):
    """Counts the looks at values, each a wait for a GPU, that the integration makes.

    (The torch backend reads CPU tensors in its own files; no other device has it.)
    """

    NAMES = ("tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            callers = [frame.filename for frame in traceback.extract_stack()[:-1]]
            ours = [name.partition("mistral_kernels/")[2] for name in callers if PACKAGE in name]
            self.count += bool(ours) and not ours[-1].startswith("ops/")
        return func(*args, **(kwargs or {}))


PACKAGE = "/mistral_kernels/"


@pytest.mark.parametrize("name", ["mistral", "llama", "gemma2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_looks_at_the_device(kind: str, name: str) -> None:
    """A step without padding makes none, and with padding one for each mask, not for each layer."""
    model = make_model(name, num_hidden_layers=6)
    model.set_attn_implementation("mistral_kernels")
    masks = 2 if name == "gemma2" else 1
    for padding in ("none", "left"):
        ids, attention_mask = batch(2 * W, padding)
        cache = new_cache(kind, model, 4 * W)
        for end in (W + 2, W + 3, W + 4):
            begin = 0 if end == W + 2 else end - 1
            given = {} if padding == "none" else {"attention_mask": attention_mask[:, :end]}
            if OLDER:
                given["cache_position"] = torch.arange(begin, end)
            with Reads() as reads:
                model(ids[:, begin:end], **{CACHE: cache}, **given)
            if begin or not OLDER:
                assert reads.count == (0 if padding == "none" else masks)


# Compiled.


@pytest.mark.parametrize(
    "case",
    ["packed", *(pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "masked"))],
)
def test_compiled_training(case: str) -> None:
    """One graph; and where padding cannot be told from data, no packed batch goes unseen."""
    model = make_model(num_hidden_layers=1).train()
    ids, attention_mask = batch(3 * W + 1, "left" if case == "masked" else "none")
    real = attention_mask.bool()
    given: dict[str, Any] = {}
    if case == "packed":
        given["position_ids"] = packed_positions((3, W + 6, W)).expand(3, -1)
    elif case == "masked":
        given["attention_mask"] = attention_mask
    model.set_attn_implementation("eager")
    eager = gradients(model, ids, real, given)
    model.set_attn_implementation("mistral_kernels")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = gradients(model, ids, real, given, compiled)
    for key in eager:
        assert_close(ours[key], eager[key], 1e-4)


@torch.no_grad()
def test_compiled_static_decoding() -> None:
    """One graph serves every step."""
    model = make_model("llama", num_hidden_layers=1)
    ids, _ = batch(3 * W)
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("mistral_kernels")
    cache = new_cache("static", model, 4 * W)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    prompt = 2 * W
    assert_close(model(ids[:, :prompt], **{CACHE: cache}).logits, expected[:, :prompt])
    for i in range(prompt, 3 * W):
        given = {"cache_position": torch.tensor([i])} if OLDER else {}
        logits = compiled(ids[:, i : i + 1], **{CACHE: cache}, **given).logits
        assert_close(logits[:, 0], expected[:, i])
    assert counter.frame_count == 1


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_kernels_generate(kind: str, triton_backend: None, device: torch.device) -> None:
    model = make_model().to(device)
    ids, attention_mask = (x.to(device) for x in batch(W + 3, "left"))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    if kind == "static":  # on a GPU `generate` would compile what runs over it
        options |= {"cache_implementation": "static", "disable_compile": True}
    given = {"attention_mask": attention_mask, "pad_token_id": 0}
    texts = both(model, model.generate, ids, **given, **options)
    ours, eager = (unpadded(text, attention_mask) for text in texts)
    assert_same_text(ours, eager, lambda ids: model(ids.to(device)).logits)


@pytest.mark.kernels
@pytest.mark.parametrize("case", ["left", "packed"])
def test_kernels_gradients(case: str, triton_backend: None, device: torch.device) -> None:
    check_gradients("mistral", case, device)


# The switch itself, and what it refuses.


def test_from_pretrained_and_back(tmp_path: Any) -> None:
    make_model().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="mistral_kernels"
    ).eval()
    ids, _ = batch(2 * W)
    with torch.no_grad():
        ours = model(ids).logits
        for name in ("sdpa", "eager", "mistral_kernels"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert_close(model(ids).logits, ours)
    assert torch.equal(model(ids).logits, ours)


def layer(model: Any) -> tuple[Any, Tensor, Tensor]:
    module = model.model.layers[0].self_attn
    return module, torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dropout": 0.1},
            "dropout is not supported, got 0.1: set config.attention_dropout = 0, or use "
            "attn_implementation='sdpa'",
        ),
        (
            {"s_aux": torch.zeros(4)},
            "s_aux is not supported: for attention sinks use attn_implementation='eager'",
        ),
        (
            {"position_bias": torch.zeros(1)},
            "position_bias is not supported: use attn_implementation='sdpa'",
        ),
        (
            {"head_mask": torch.ones(4)},
            "head_mask is not supported: use attn_implementation='eager'",
        ),
        (
            {"output_attentions": True},
            "output_attentions is not supported: the weights are never formed; use "
            "attn_implementation='eager'",
        ),
        (
            {"cache": object()},
            "cache is not supported: for paged caches use attn_implementation='sdpa'",
        ),
    ],
)
def test_what_is_not_supported(given: dict[str, Any], message: str) -> None:
    module, q, kv = layer(make_model())
    with pytest.raises(NotImplementedError) as error:
        attend(module, q, kv, kv, None, sliding_window=None, **given)
    assert str(error.value) == message


def test_dropout_of_a_model() -> None:
    model = make_model(attention_dropout=0.5)
    model.set_attn_implementation("mistral_kernels")
    ids, _ = batch(5)
    model(ids)
    with pytest.raises(NotImplementedError, match="^dropout is not supported, got 0.5: set config"):
        model.train()(ids)


def test_a_layer_that_does_not_name_its_window() -> None:
    """As of models whose windows only the mask knows: silence would mean no window."""
    module, q, kv = layer(make_model())
    with pytest.raises(NotImplementedError) as error:
        attend(module, q, kv, kv, None)
    assert str(error.value) == (
        f"MistralAttention does not say whether config.sliding_window={W} is this layer's: use "
        "attn_implementation='sdpa'"
    )


def test_bad_input() -> None:
    module, q, kv = layer(make_model())
    wide = torch.randn(1, 1, 5, 264)
    with pytest.raises(ValueError, match="^query's head_dim must be at most 256, got 264$"):
        attend(module, wide, wide, wide, None, sliding_window=None)
    numbers = torch.ones(1, 1, 5, 5, dtype=torch.int32)
    with pytest.raises(ValueError) as error:
        attend(module, q, kv, kv, numbers, sliding_window=None)
    assert str(error.value) == (
        "attention_mask must be 4-D, bool or float, or transformers' 2-D mask, got (1, 1, 5, 5) of "
        "torch.int32"
    )
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    descriptor = mask.make([1], 0, 0, 1, "cpu")
    with pytest.raises(ValueError) as error:
        attend(module, q, kv, kv, descriptor, sliding_window=None, cu_seq_lens_q=offsets)
    assert str(error.value) == "cu_seq_lens_q divides a packed batch, which has no attention_mask"


def test_bidirectional() -> None:
    module, q, kv = layer(make_model())
    module.is_causal = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, *(kv.repeat_interleave(2, dim=1),) * 2
    ).transpose(1, 2)
    out, _ = attend(module, q, kv, kv, None, sliding_window=None)
    assert_close(out, expected)
    out, _ = attend(make_model().model.layers[0].self_attn, q, kv, kv, None, is_causal=False)
    assert_close(out, expected)


def test_what_a_mask_becomes() -> None:
    """Patterns that are not causal, or more than causal, are made by transformers."""

    def make(function: Any, **given: Any) -> Tensor | None:
        sizes: dict[str, Any] = {"batch_size": 1, "kv_length": 6}
        if OLDER:
            sizes["cache_position"] = torch.arange(6)
        else:
            sizes["q_length"] = 6
        return mask.create_mask(**sizes, mask_function=function, **given)

    causal, sliding = (
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
    )
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    assert make(causal) is None
    assert make(sliding, local_size=3) is None

    def odd(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx % 2 == 1

    chunked = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()
    for function, expected in (
        (odd, (torch.arange(6) % 2 == 1).expand(6, 6)),
        (masking_utils.and_masks(causal, odd), lower & (torch.arange(6) % 2 == 1)),
        (masking_utils.or_masks(causal, odd), lower | (torch.arange(6) % 2 == 1)),
        (chunked, lower & blocks),
        (masking_utils.sliding_window_overlay(3), ~lower.tril(-3)),
    ):
        made = make(function)
        assert made is not None
        assert torch.equal(made[0, 0], expected)


def test_an_old_or_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = "mistral_kernels.integrations.transformers needs transformers >= 4.56"
    name = "mistral_kernels.integrations.versions"
    versions = importlib.import_module(name)
    old = types.ModuleType("transformers")
    old.__version__ = "4.40.1"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ImportError) as error:
        importlib.reload(versions)
    assert str(error.value) == f"{needs}, found 4.40.1; run pip install -U transformers"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as error:
        importlib.reload(versions)
    assert str(error.value) == f"{needs}; run pip install 'mistral_kernels[hf]'"
