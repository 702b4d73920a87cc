"""Decode engines: operators of a step, capture and replay, independence of other sequences."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from support.graph_stand_in import GraphStandIn
from support.small_checkpoints import SMALL, varied_model
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mistral_kernels import MistralForCausalLM, RollingCache, Sampler
from mistral_kernels.model.engine import CudaGraphEngine, ModuleEngine
from mistral_kernels.model.sampling import NextTokens
from mistral_kernels.ops import extension

W = SMALL.sliding_window
EOS = 2


@pytest.fixture
def model() -> MistralForCausalLM:
    return varied_model(SMALL)


def random_ids(n: int) -> list[int]:
    return torch.randint(3, SMALL.vocab_size, (n,)).tolist()


class Record(TorchDispatchMode):
    """Record of the operators called in a block, with the shapes of their inputs and outputs.

    With `inside`, the record also contains the operators that this package's operators call.
    """

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.inside = inside
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside and func.namespace == "mistral_kernels":
            with self:
                # Not the CPU dispatch key: csrc's kernels call Python below this mode.
                result = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        described = tree_map(
            lambda x: (tuple(x.shape), x.stride(), str(x.dtype)) if isinstance(x, Tensor) else x,
            (args, kwargs, result),
        )
        self.calls.append((str(func), str(described)))
        return result


def set_position(cache: RollingCache, position: int) -> None:
    """Set the host length of sequence i to `position + i`."""
    cache.host_lengths = [position + i for i in range(cache.batch)]


SAMPLERS = [
    Sampler(0),
    Sampler(0.7, top_k=5, top_p=0.9, min_p=0.01),
    Sampler(1.0, repetition_penalty=1.3),
]
POSITIONS = (1, W - 1, W, W + 1, 5 * W, 1000)  # before, at and after the wrap


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "truncated", "penalized"])
@torch.inference_mode()
def test_a_step_has_the_same_operators_at_every_position(sampler: Sampler) -> None:
    """The operators and shapes do not depend on the position, and the host reads no tensor.

    The tensors are meta tensors, which have no values: reading one on the host raises an error.
    """
    model = MistralForCausalLM(SMALL).to("meta").eval()
    seen = None
    if sampler.repetition_penalty != 1.0:
        seen = torch.zeros(2, SMALL.vocab_size, dtype=torch.bool, device="meta")
    cache = RollingCache(SMALL, 2, 4096, torch.float32, "meta")
    newest = NextTokens(sampler, 2, model.device, seen)
    engine = ModuleEngine(model, cache, newest)
    model.model.rotary_tables(2048, model.device)
    records = []
    for position in POSITIONS:
        set_position(cache, position)
        with Record() as record:
            engine.step(newest.token_ids)
        assert cache.host_lengths == [position + 1, position + 2]
        records.append(record.calls)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        newest.token_ids.tolist()  # a read in a step would have raised the same error
    names = {name for name, _ in records[0]}
    assert {"mistral_kernels.cached_attention.default", "aten.max.dim_max"} <= names
    assert all(record == records[0] for record in records[1:])


# Operators that launch no kernel: they make views, allocate memory (which the tests fill), or read
# CPU tensors on the host.
FREE = [
    "alias",
    "as_strided",
    "atleast_1d",
    "contiguous",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "fill_",
    "flatten",
    "new_empty",
    "permute",
    "promote_types",
    "reshape",
    "resolve_conj",
    "resolve_neg",
    "select",
    "slice",
    "split_with_sizes",
    "squeeze",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
    "item",
    "split",
    "is_inference",
]


@torch.inference_mode()
def test_a_layer_launches_nine_kernels(triton_backend: None, device: torch.device) -> None:
    """The nine are two norms with residual, four products, SwiGLU, cache update and attention.

    The operators and shapes, also inside the package's operators, are the same at every position.
    Each of the package's operators launches one kernel, also attention over split keys.
    """
    triton = pytest.importorskip("triton")
    # The window is wide enough that keys are split over programs.
    config = dataclasses.replace(SMALL, sliding_window=300)
    model = MistralForCausalLM(config).to(device).eval()
    cache = model.new_cache(2, 300)
    newest = NextTokens(Sampler(0), 2, device)
    engine = ModuleEngine(model, cache, newest)
    launches: list[str] = []
    hook = triton.knobs.runtime.launch_enter_hook
    records = []
    engine.step(newest.token_ids)

    def launched(metadata: Any) -> None:
        launches.append(metadata.get()["name"])

    hook.add(launched)
    try:
        for position in (1, 299, 300, 1000):
            set_position(cache, position)
            cache.lengths.copy_(torch.tensor(cache.host_lengths))
            del launches[:]
            with Record(inside=True) as record:
                engine.step(newest.token_ids)
            records.append(record.calls)
            kernels = Counter(launches)
    finally:
        hook.remove(launched)
    assert all(record == records[0] for record in records)
    layers = config.num_hidden_layers
    assert kernels == {
        "_forward_kernel": 3 * layers + 1,  # RMSNorm and SwiGLU
        "_update_kernel": layers,
        "_decode_kernel": layers,
    }
    others = Counter(name.rsplit(".", 1)[0] for name, _ in records[0] if "mistral" not in name)
    launching = {name: n for name, n in others.items() if name.removeprefix("aten.") not in FREE}
    assert launching["aten.linear"] == 4 * layers + 1
    per_layer = (sum(kernels.values()) - 1 + launching["aten.linear"] - 1) / layers
    print(f"{per_layer:g} launches per layer, and {launching} per step")
    assert per_layer == 9
    # Outside the layers: the embedding, one norm, one product, the argmax, the update of lengths.
    assert sum(launching.values()) - launching["aten.linear"] <= 4


def stream(model: MistralForCausalLM, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    steps = model.stream(prompts, **options)
    return [[token for token in text if token is not None] for text in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(None, id="greedy", marks=pytest.mark.slow), pytest.param(0.9, id="drawn")],
)
def test_replayed_steps_generate_the_same_text(
    sampler: float | None, model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run one step, capture one, and replay the others until every layer's ring has wrapped."""
    prompts = [random_ids(3), random_ids(W + 4)]

    def options() -> dict[str, Any]:
        draw = sampler and Sampler(sampler, generator=torch.Generator().manual_seed(5))
        return {"max_new_tokens": 6 * W, "sampler": draw, "eos_token_ids": ()}

    expected = stream(model, prompts, **options())
    stand_in = GraphStandIn(monkeypatch)
    assert stream(model, prompts, **options()) == expected
    assert (stand_in.captures, stand_in.replays) == (1, 6 * W - 2)


def test_longer_rotary_tables_are_captured_again(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured step reads the old tables, so it must be captured again."""
    prompts = [random_ids(2040)]
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": ()}
    expected = stream(model, prompts, **options)
    model.model._tables = None
    stand_in = GraphStandIn(monkeypatch)
    assert stream(model, prompts, **options) == expected
    assert stand_in.captures == 2


@pytest.mark.parametrize("end", ["eos", "close", "length"])
def test_a_queued_step_is_dropped_at_the_end(
    end: str, model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is queued before the tokens of the previous step are read, and dropped if unneeded.

    Afterwards the cache holds all tokens except the last one, and continuing it gives the same
    text.
    """
    prompt, more = random_ids(W + 2), random_ids(4)
    texts, caches = [], []
    for replaying in (False, True):
        if replaying:
            GraphStandIn(monkeypatch)
        cache = model.new_cache(1, 1000)
        options: dict[str, Any] = {"max_new_tokens": 12, "cache": cache}
        if end == "eos" and texts:
            options["eos_token_ids"] = (texts[0][5],)
        elif end == "eos":
            probe = stream(model, [prompt], max_new_tokens=12)[0]
            eos = next(i for i in range(3, 12) if probe[i] not in probe[:i])
            options["eos_token_ids"] = (probe[eos],)
            texts.append(probe)
        steps = model.stream([prompt], **options)
        text = []
        for tokens in steps:
            text.append(tokens[0])
            if end == "close" and len(text) == 7:
                steps.close()
                break
        assert cache.host_lengths == cache.lengths.tolist() == [len(prompt) + len(text) - 1]
        text += stream(model, [[text[-1], *more]], max_new_tokens=9, cache=cache)[0]
        caches.append(text)
        if end == "eos":
            texts = [[*texts[0][:5], options["eos_token_ids"][0]]]
    assert caches[0] == caches[1]


def test_ended_texts_do_not_change_the_others(model: MistralForCausalLM) -> None:
    """A text has the same tokens and cache, whether or not the other text has ended."""
    prompts = [random_ids(4), random_ids(9)]
    whole = stream(model, prompts, max_new_tokens=30)
    eos = next(token for i, token in enumerate(whole[0]) if i > 3 and token not in whole[1])
    caches = [model.new_cache(2, 100) for _ in range(2)]
    runs = [
        stream(model, prompts, max_new_tokens=30, cache=cache, eos_token_ids=ids)
        for cache, ids in zip(caches, ((), (eos,)), strict=True)
    ]
    assert len(runs[1][0]) < len(runs[0][0]) == len(runs[0][1]) == len(runs[1][1])
    assert runs[0][1] == runs[1][1] == whole[1]
    for a, b in zip(*(cache.keys + cache.values for cache in caches), strict=True):
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_decoded_logits_are_bitwise_equal_in_any_batch(
    model: MistralForCausalLM, dtype: torch.dtype
) -> None:
    """The sequences are before, at and past their window, and their rings wrap in the steps."""
    if not extension.load("cpu"):
        pytest.skip(f"PyTorch's products are not bitwise equal; {extension.status('cpu')}")
    model = model.to(dtype).eval()
    lengths = [1, W - 1, W, W + 1, 2 * W + 3, 5, 7]
    prompts = [random_ids(n) for n in lengths]
    alone = []
    for prompt in prompts:  # prefill alone: rows of a matrix product may depend on their number
        alone.append(model.new_cache(1, 4 * W))
        model.prefill([prompt], alone[-1])
    together = model.new_cache(len(prompts), 4 * W)
    for ring, rows in zip(
        (*together.keys, *together.values, together.lengths),
        zip(*((*cache.keys, *cache.values, cache.lengths) for cache in alone), strict=True),
        strict=True,
    ):
        ring.copy_(torch.cat(rows))
    together.host_lengths = lengths.copy()
    for _ in range(W + 2):
        tokens = torch.tensor(random_ids(len(prompts)))
        logits = model.decode(tokens, together)
        for row, cache in enumerate(alone):
            assert torch.equal(model.decode(tokens[row : row + 1], cache)[0], logits[row]), row


def test_finish_read_returns_the_tokens_of_begin_read(model: MistralForCausalLM) -> None:
    """A later step does not change the tokens, and `NextTokens` holds no other tensors."""
    cache = model.new_cache(2, 100)
    newest = NextTokens(Sampler(0), 2, model.device)
    engine = CudaGraphEngine(model, cache, newest)
    newest.choose(model.prefill([random_ids(3), random_ids(5)], cache))
    newest.begin_read()
    first = newest.token_ids.tolist()
    engine.step(newest.token_ids)
    assert newest.finish_read() == first
    held = [x for x in tree_leaves(vars(newest)) if isinstance(x, Tensor)]
    assert held == [newest._chosen, newest._host, newest.token_ids, newest._scores]


@pytest.mark.parametrize("by_modules", [False, True])
def test_generation_does_not_depend_on_autocast(
    by_modules: bool, model: MistralForCausalLM
) -> None:
    if by_modules:
        model.model.norm.register_forward_hook(lambda *_: None)
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": None,
    }
    prompts = [random_ids(9), random_ids(4)]
    expected: Any = model.generate(prompts, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual: Any = model.generate(prompts, **options)
        assert torch.is_autocast_enabled("cpu")
    assert actual.sequences == expected.sequences
    for a, b in zip(actual.logits, expected.logits, strict=True):
        assert torch.equal(a, b)
