"""Costs of attn_implementation="mistral_kernels", under torch.compile, tracing and meta tensors."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.allocations import Allocations
from support.helpers import assert_same_text, unpadded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.transformers_cases import (  # noqa: E402
    CACHE,
    OLD_MASKS,
    PADDING,
    VOCAB,
    W,
    assert_close,
    batch,
    both,
    check_gradients,
    gradients,
    make_model,
    new_cache,
    packed_positions,
)

from mistral_kernels.integrations.transformers import register  # noqa: E402


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


# Memory and synchronization


@pytest.mark.parametrize("name", ["mistral", "no window"])
def test_memory_is_not_quadratic(name: str) -> None:
    """Test causal, windowed, padded and packed batches; forward, backward, and over both caches."""
    seqlen = 1280  # its square exceeds the number of elements of any other tensor in the model
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
    """Counter of the integration's reads of tensor values, each of which waits for a GPU.

    Reads in `ops/` are not counted: the torch backend makes them, which only runs on CPU tensors.
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
def test_device_reads(kind: str, name: str) -> None:
    """Check that a step without padding reads no value; others read per mask, not per layer."""
    model = make_model(name, num_hidden_layers=6)
    model.set_attn_implementation("mistral_kernels")
    masks = 2 if name == "gemma2" else 1
    for padding in ("none", "left"):
        ids, attention_mask = batch(2 * W, padding)
        cache = new_cache(kind, model, 4 * W)
        for end in (W + 2, W + 3, W + 4):
            begin = 0 if end == W + 2 else end - 1
            given = {} if padding == "none" else {"attention_mask": attention_mask[:, :end]}
            if OLD_MASKS:
                given["cache_position"] = torch.arange(begin, end)
            with Reads() as reads:
                model(ids[:, begin:end], **{CACHE: cache}, **given)
            if begin:
                assert reads.count == (0 if padding == "none" else masks)
            elif not OLD_MASKS:  # a prompt also reads whether its positions pack the batch
                assert reads.count == masks


# torch.compile


@pytest.mark.parametrize(
    "case",
    ["packed", *(pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "masked"))],
)
def test_compiled_training(case: str) -> None:
    """Compile training as one graph, with plain, padded and packed batches."""
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


@pytest.mark.skipif(OLD_MASKS, reason="this transformers creates full masks while compiling")
@torch.no_grad()
def test_compiled_packed_over_a_cache() -> None:
    """Raise for a packed batch, which a trace cannot divide into sequences."""
    model = make_model(num_hidden_layers=1)
    model.set_attn_implementation("mistral_kernels")
    ids = torch.randint(1, VOCAB, (1, 3 * W))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = torch.arange(3 * W)[None]
    assert_close(compiled(ids, position_ids=positions).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match=r"^position_ids of a packed batch are not supported"):
        compiled(ids, position_ids=packed_positions((W, 2 * W)))


@torch.no_grad()
def test_compiled_static_decoding() -> None:
    """Decode every step with one graph."""
    model = make_model("llama", num_hidden_layers=1)
    ids, _ = batch(3 * W)
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("mistral_kernels")
    cache = new_cache("static", model, 4 * W)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    prompt = 2 * W
    assert_close(model(ids[:, :prompt], **{CACHE: cache}).logits, expected[:, :prompt])
    for i in range(prompt, 3 * W):
        given = {"cache_position": torch.tensor([i])} if OLD_MASKS else {}
        logits = compiled(ids[:, i : i + 1], **{CACHE: cache}, **given).logits
        assert_close(logits[:, 0], expected[:, i])
    assert counter.frame_count == 1


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_kernels_generate(kind: str, triton_backend: None, device: torch.device) -> None:
    model = make_model().to(device)
    ids, attention_mask = (x.to(device) for x in batch(W + 3, "left"))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    if kind == "static":  # on a GPU `generate` compiles the model for static caches
        options |= {"cache_implementation": "static", "disable_compile": True}
    given = {"attention_mask": attention_mask, "pad_token_id": 0}
    texts = both(model, model.generate, ids, **given, **options)
    ours, eager = (unpadded(text, attention_mask) for text in texts)
    assert_same_text(ours, eager, lambda ids: model(ids.to(device)).logits)


@pytest.mark.long
@pytest.mark.kernels
@pytest.mark.parametrize("case", ["left", "packed"])
def test_kernels_gradients(case: str, triton_backend: None, device: torch.device) -> None:
    check_gradients("mistral", case, device)


# Tensors without values


def skip_if_it_fails(call: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call with eager attention; skip the test if the call raises."""
    try:
        return call(*args)
    except Exception as error:
        pytest.skip(f"eager attention does not support it: {error}")


class LogitsModel(nn.Module):
    """Model that returns only its logits: `torch.jit.trace` requires a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("padding", [None, *PADDING])
@torch.no_grad()
def test_jit_trace(padding: str | None) -> None:
    model = LogitsModel(make_model())
    for seqlen in (W - 2, 6 * W):
        ids, attention_mask = batch(seqlen, padding or "none")
        given = (ids,) if padding is None else (ids, attention_mask)
        model.model.set_attn_implementation("eager")
        eager = skip_if_it_fails(torch.jit.trace, model, given)(*given)
        model.model.set_attn_implementation("mistral_kernels")
        traced = torch.jit.trace(model, given)
        real = attention_mask.bool()
        assert_close(traced(*given)[real], eager[real])


@pytest.mark.parametrize("padding", [None, *PADDING])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", ["fake", "meta"])
@torch.no_grad()
def test_fake_and_meta_tensors(kind: str, use_cache: bool, padding: str | None) -> None:
    ids, attention_mask = batch(5 * W, padding or "none")
    model = make_model("gemma2")
    if kind == "meta":
        model, ids, attention_mask = (x.to("meta") for x in (model, ids, attention_mask))
    given = {} if padding is None else {"attention_mask": attention_mask}

    def run() -> Tensor:
        fake = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else nullcontext()
        with fake:
            return model(ids, use_cache=use_cache, **given).logits

    model.set_attn_implementation("eager")
    skip_if_it_fails(run)
    model.set_attn_implementation("mistral_kernels")
    logits = run()
    assert logits.shape == (3, 5 * W, VOCAB)
    assert isinstance(logits, FakeTensor) if kind == "fake" else logits.is_meta
