"""Tests of flash_attn_with_kvcache against attention over keys gathered by plain indexing."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention_cases import eager
from support.helpers import assert_as_accurate

from mistral_kernels import flash_attn_with_kvcache
from mistral_kernels.ops import reference
from mistral_kernels.ops.dispatch import uses_triton

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
TENSORS = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")
DEFINED = ("softmax_scale", "causal", "window_size", "softcap")

# Each case needs different kernels. Compiling them takes too long; interpreted they take minutes.
KERNELS = [pytest.mark.kernels, pytest.mark.interpreted, pytest.mark.slow]
on_both_backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=KERNELS)], indirect=True
)


def int32(values, device):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def make_arguments(
    device,
    dtype=F32,
    seqlen_q=1,
    heads=(4, 2),
    head_dim=64,
    cached=(190, 0, 71),
    new=None,
    capacity=240,
    rows=None,
    leftpad=None,
    page_size=None,
    rotary_dim=None,
    tables=None,
    alibi=None,
    **options,
):
    """Return random arguments of `flash_attn_with_kvcache`.

    `cached` is `cache_seqlens`: a tuple with one length per sequence, or a number or None for 3
    sequences. `page_size` selects a cache of pages in random order, of which some are unused.
    `tables` is the dtype of the rotary tables; None for q's. `alibi` is "shared" or "per-batch".
    """
    (num_heads, num_kv_heads), batch = heads, len(cached) if isinstance(cached, tuple) else 3

    def numbers(*shape):
        return torch.randn(shape, device=device).to(dtype)

    shape = batch if rows is None else max(rows) + 2, capacity
    block_table = None
    if page_size is not None:
        pages = -(-capacity // page_size)
        shape = batch * pages + 3, page_size
        block_table = random.sample(range(shape[0]), batch * pages)
        block_table = [block_table[i * pages :][:pages] for i in range(batch)]
    cos = sin = slopes = None
    if rotary_dim is not None:
        # Random numbers instead of cosines and sines: exchanging the tables changes the result.
        cos, sin = torch.randn(2, capacity + seqlen_q, rotary_dim // 2, device=device).to(
            tables or dtype
        )
    if alibi is not None:
        slopes = torch.rand((batch, num_heads) if alibi == "per-batch" else num_heads)
        slopes = slopes.to(device)
    return {
        "q": numbers(batch, seqlen_q, num_heads, head_dim),
        "k_cache": numbers(*shape, num_kv_heads, head_dim),
        "v_cache": numbers(*shape, num_kv_heads, head_dim),
        "k": None if new is None else numbers(batch, new, num_kv_heads, head_dim),
        "v": None if new is None else numbers(batch, new, num_kv_heads, head_dim),
        "rotary_cos": cos,
        "rotary_sin": sin,
        "cache_seqlens": int32(cached, device) if isinstance(cached, tuple) else cached,
        "cache_batch_idx": int32(rows, device),
        "cache_leftpad": int32(leftpad, device),
        "block_table": int32(block_table, device),
        "alibi_slopes": slopes,
        **options,
    }


class Definition:
    """Expected caches and attention of a call, computed by plain indexing."""

    def __init__(self, arguments):
        a = self.arguments = arguments
        cached, table, new = a["cache_seqlens"], a["block_table"], a["k"]
        batch, self.seqlen_q = a["q"].shape[:2]
        self.capacity = a["k_cache"].shape[1] * (1 if table is None else table.shape[1])
        if isinstance(cached, torch.Tensor):
            self.cached = cached.tolist()
        else:
            self.cached = [self.capacity if cached is None else cached] * batch
        self.new = 0 if new is None else new.shape[1]
        self.options = {name: a[name] for name in DEFINED if name in a}
        window = self.options.get("window_size", (-1, -1))
        self.local = self.options.get("causal", False) or tuple(window) != (-1, -1)
        self.q = self.rotated(a["q"], 1 if self.local else 0)
        self.caches = [a["k_cache"].clone(), a["v_cache"].clone()]
        for cache, x in zip(self.caches, (self.rotated(a["k"], 1), a["v"]), strict=True):
            for i, length in enumerate(self.cached if self.new else ()):
                cache[self.slots(i, range(length, length + self.new))] = x[i]

    def rotated(self, x, step):
        """Return x rotated to positions `cached`, `cached + step`, ..."""
        a = self.arguments
        if x is None or a["rotary_cos"] is None:
            return x
        cos, sin = a["rotary_cos"].float(), a["rotary_sin"].float()
        index = torch.arange(x.shape[1], device=x.device)
        positions = torch.tensor(self.cached, device=x.device)[:, None] + step * index
        channels = x[..., : 2 * cos.shape[1]]
        interleaved = a.get("rotary_interleaved", True)
        channels, _ = reference.apply_rotary(channels, channels, cos, sin, positions, interleaved)
        return torch.cat((channels, x[..., 2 * cos.shape[1] :]), -1)

    def slots(self, sequence, positions):
        """Return the index of a sequence's positions in a cache: row or pages, and slots."""
        rows, table = self.arguments["cache_batch_idx"], self.arguments["block_table"]
        if table is None:
            return sequence if rows is None else int(rows[sequence]), list(positions)
        page_size = self.arguments["k_cache"].shape[1]
        pages = [int(table[sequence, position // page_size]) for position in positions]
        return pages, [position % page_size for position in positions]

    def span(self, sequence):
        """Return the positions of a sequence that are not padding."""
        leftpad = self.arguments["cache_leftpad"]
        end = self.cached[sequence] + self.new
        return range(0 if leftpad is None else min(int(leftpad[sequence]), end), end)

    def seen(self, sequence):
        """Return the positions that at least one query sees."""
        span = self.span(sequence)
        window = self.options.get("window_size", (-1, -1))
        causal = self.options.get("causal", False)
        mask = reference.visible(self.seqlen_q, len(span), causal, tuple(window))
        return [span[key] for key in mask.any(0).nonzero().flatten().tolist()]

    def attend(self, attention, dtype):
        """Compute `attention` in `dtype`, sequence by sequence."""
        results, slopes = [], self.arguments["alibi_slopes"]
        for i in range(len(self.cached)):
            keys, values = (cache[self.slots(i, self.span(i))][None] for cache in self.caches)
            own = slopes if slopes is None or slopes.ndim == 1 else slopes[i : i + 1]
            qkv = (x.to(dtype) for x in (self.q[i : i + 1], keys, values))
            results.append(attention(*qkv, **self.options, alibi_slopes=own))
        return [torch.cat(x) for x in zip(*results, strict=True)]


def check_call(arguments):
    """Check that caches are bitwise right, and results as accurate as plain PyTorch."""
    definition = Definition(arguments)
    dtype = arguments["q"].dtype
    kept = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    for name, x in zip(("k_cache", "v_cache"), definition.caches, strict=True):
        assert torch.equal(arguments[name], x), name
        del kept[name]
    assert all(torch.equal(arguments[name], x) for name, x in kept.items())
    exact, exact_lse = definition.attend(reference.attention, F64)
    plain, _ = definition.attend(eager, dtype)
    _, plain_lse = definition.attend(reference.attention, torch.promote_types(dtype, F32))
    no_keys = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), no_keys)
    assert (out.transpose(1, 2)[no_keys] == 0).all()
    assert_as_accurate(out, plain, exact, "out")
    if not uses_triton(out):  # other code computes the output without the log-sum-exp
        assert_as_accurate(flash_attn_with_kvcache(**arguments), plain, exact, "out alone")
    lses = (x.masked_fill(no_keys, 0.0) for x in (lse, plain_lse, exact_lse))
    assert_as_accurate(*lses, "softmax_lse")
    return out, lse


CASES = {
    "plain": {},
    "mha": {"heads": (3, 3)},
    "mqa": {"heads": (4, 1)},
    "head-dim-24": {"head_dim": 24, "new": 2},
    "head-dim-128": {"head_dim": 128, "new": 2},
    "head-dim-20": {"head_dim": 20, "new": 2},  # csrc supports multiples of 8 only
    # Keys in the cache.
    "all-of-the-cache": {"cached": None},
    "one-number": {"cached": 77},
    "numbers-from-0": {"cached": 0, "new": 5},
    "full-and-empty": {"cached": (240, 0, 1)},
    "rows": {"rows": [4, 0, 2]},
    "one-row-twice": {"rows": [1, 3, 1]},
    "leftpad": {"leftpad": [20, 0, 40], "causal": True},
    "leftpad-beyond-all": {"leftpad": [240, 7, 100]},
    "rows-and-leftpad": {"rows": [4, 0, 2], "leftpad": [150, 3, 60], "new": 5},
    "pages-of-16": {"page_size": 16},
    "pages-of-37": {"page_size": 37, "new": 40, "causal": True},
    "pages-and-leftpad": {"page_size": 37, "leftpad": [150, 3, 60], "new": 5},
    "all-of-the-pages": {"page_size": 16, "cached": None, "window_size": (100, 0)},
    # New tokens.
    "append-1": {"new": 1},
    "append-3": {"new": 3, "causal": True},
    "append-40": {"new": 40, "causal": True},
    "append-nothing": {"new": 0, "cached": None},
    "append-to-rows": {"new": 4, "rows": [4, 0, 2]},
    "append-to-pages": {"new": 20, "page_size": 16},
    "fill": {"new": 50, "cached": (190, 190, 0)},
    # Rotary embedding.
    "interleaved": {"new": 3, "rotary_dim": 64, "causal": True},
    "half-split": {"new": 3, "rotary_dim": 64, "causal": True, "rotary_interleaved": False},
    "all-at-one-position": {"new": 1, "rotary_dim": 64},
    "rotated-in-a-window": {"new": 3, "rotary_dim": 64, "window_size": (30, 40)},
    "partial": {"new": 3, "rotary_dim": 32, "causal": True},
    "partial-half-split": {"new": 40, "rotary_dim": 16, "rotary_interleaved": False},
    "float32-tables": {"new": 3, "rotary_dim": 64, "causal": True, "tables": F32},
    "rotated-from-0": {"cached": 0, "new": 40, "rotary_dim": 64, "causal": True},
    "rotated-in-pages": {"new": 3, "rotary_dim": 64, "page_size": 37, "causal": True},
    # Masks and scores.
    "causal": {"causal": True},
    "left": {"window_size": (50, -1)},
    "right": {"window_size": (-1, 1)},
    "both-sides": {"window_size": (130, 9)},
    "narrow": {"window_size": (2, 1)},
    "causal-window": {"causal": True, "window_size": [100, 30]},
    "window-and-new": {"window_size": (70, 0), "new": 7, "leftpad": [150, 0, 3]},
    "itself": {"window_size": torch.tensor([0, 0])},
    "scale": {"softmax_scale": 0.4},
    "softcap": {"softcap": 0.8, "causal": True},
    "alibi": {"alibi": "shared", "causal": True},
    "alibi-per-batch": {"alibi": "per-batch", "leftpad": [20, 0, 40]},
    "alibi-and-softcap": {"alibi": "shared", "softcap": 2.0, "window_size": (90, 0), "new": 1},
    # Splits of the keys.
    "1-split": {"num_splits": 1},
    "2-splits": {"num_splits": 2, "causal": True},
    "5-splits": {"num_splits": 5, "page_size": 37},
    "splits-of-a-window": {"num_splits": 5, "window_size": (150, 0), "leftpad": [60, 0, 0]},
    "far-more-splits-than-keys": {"num_splits": 1000, "cached": 30},
}


@on_both_backends
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("case", CASES)
def test_values(case, seqlen_q, backend, device):
    dtype = (F32, F16)[(list(CASES).index(case) + seqlen_q // 3) % 2]
    check_call(make_arguments(device, dtype, seqlen_q, **CASES[case]))


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("case", CASES)
def test_other_dtypes_on_the_torch_backend(case, seqlen_q, dtype, device, torch_backend):
    check_call(make_arguments(device, dtype, seqlen_q, **CASES[case]))


# Cases that also run compiled. They are few, since compiling takes most of the time.
COMPILED = {
    "decode": {
        "dtype": BF16,
        "new": 1,
        "rotary_dim": 64,
        "causal": True,
        "window_size": (100, 0),
    },
    "tokens": {
        "dtype": F32,
        "seqlen_q": 3,
        "head_dim": 24,
        "rows": [4, 0, 2],
        "leftpad": [20, 0, 40],
        "alibi": "per-batch",
        "softcap": 2.0,
        "num_splits": 2,
    },
    "chunk": {
        "dtype": F16,
        "seqlen_q": 40,
        "new": 30,
        "page_size": 37,
        "rotary_dim": 32,
        "rotary_interleaved": False,
        "causal": True,
    },
    "long-heads": {"dtype": BF16, "heads": (4, 1), "head_dim": 128, "page_size": 16},
    "splits": {
        "dtype": BF16,
        "seqlen_q": 3,
        "capacity": 700,
        "cached": (699, 5, 300),
        "window_size": (500, 1),
        "leftpad": [0, 2, 40],
        "num_splits": 5,
    },
    "chunk-in-a-window": {
        "dtype": BF16,
        "seqlen_q": 150,
        "heads": (3, 3),
        "capacity": 400,
        "cached": (250, 0, 149),
        "new": 150,
        "window_size": (140, 20),
        "alibi": "shared",
    },
}


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"), [(name, case["dtype"]) for name, case in COMPILED.items()], ids=str
)
def test_values_compiled(case, dtype, triton_backend, device):
    check_call(make_arguments(device, **COMPILED[case]))


@st.composite
def combinations(draw):
    """Draw a valid combination of options."""
    capacity, batch = draw(st.integers(1, 150)), draw(st.integers(1, 3))
    new = draw(st.none() | st.integers(0, min(capacity, 12)))
    per_sequence = {"min_size": batch, "max_size": batch}
    case = {
        "seqlen_q": draw(st.sampled_from([1, 2, 5, 20])),
        "heads": draw(st.sampled_from([(2, 2), (4, 2), (3, 1)])),
        "head_dim": 16,
        "capacity": capacity,
        "cached": tuple(draw(st.lists(st.integers(0, capacity - (new or 0)), **per_sequence))),
        "new": new,
        "causal": draw(st.booleans()),
        "window_size": draw(st.tuples(*[st.just(-1) | st.integers(0, capacity)] * 2)),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "alibi": draw(st.sampled_from([None, "shared", "per-batch"])),
        "num_splits": draw(st.integers(0, 4)),
    }
    where = draw(st.sampled_from(["flat", "rows", "paged"]))
    if where == "rows":
        case["rows"] = draw(st.permutations(range(5)))[:batch]
    if where == "paged":
        case["page_size"] = draw(st.integers(1, 40))
    if draw(st.booleans()):
        case["leftpad"] = draw(st.lists(st.integers(0, capacity), **per_sequence))
    if new is not None:
        case["rotary_dim"] = draw(st.sampled_from([None, 8, 16]))
        case["rotary_interleaved"] = draw(st.booleans())
    return case


@on_both_backends
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=combinations())
def test_options_together(case, backend, device):
    check_call(make_arguments(device, **case))


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_output_and_log_sum_exp(seqlen_q, backend, device):
    """Check the output with and without the log-sum-exp, which is -inf without keys."""
    for heads, window_size in (((4, 2), (-1, -1)), ((4, 2), (100, 0))):
        arguments = make_arguments(device, F16, seqlen_q, heads, window_size=window_size)
        out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
        assert out.shape == arguments["q"].shape
        assert out.dtype == F16
        assert lse.shape == (3, 4, seqlen_q)
        assert lse.dtype == F32
        assert lse[1].isneginf().all()
        assert (out[1] == 0).all()
        assert lse[0].isfinite().all()
        assert (out[0] != 0).any(-1).all()
        alone = flash_attn_with_kvcache(**arguments)
        assert isinstance(alone, torch.Tensor)
        assert alone.dtype == F16
        torch.testing.assert_close(alone, out, rtol=0, atol=0 if backend == "triton" else 2e-3)


def test_positional_arguments(device):
    """Check flash-attn's order of arguments."""
    a = make_arguments(device, new=2, rotary_dim=64, rows=[4, 0, 2], leftpad=[3, 0, 1], alibi=None)
    given = [a[name] for name in (*TENSORS, "cache_seqlens", "cache_batch_idx", "cache_leftpad")]
    out, lse = flash_attn_with_kvcache(
        *(*given, None, 0.3, True, (60, 0), 1.5, False, torch.ones(4, device=device), 1, True)
    )
    named = {"softmax_scale": 0.3, "causal": True, "window_size": (60, 0), "softcap": 1.5}
    named |= {"rotary_interleaved": False, "alibi_slopes": torch.ones(4, device=device)}
    expected, expected_lse = check_call({**a, **named})
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize(
    "cache",
    ["first", "beside-keys", "heads-first"],
)
def test_strides(cache, backend, device):
    """Check slices of a fused projection, and caches that are views of one tensor."""
    shape = {"first": (2, 3, 240, 2, 64), "beside-keys": (3, 240, 2, 2, 64)}
    both = torch.randn(shape.get(cache, (2, 3, 2, 240, 64)), device=device).half()
    k_cache, v_cache = both.unbind(2 if cache == "beside-keys" else 0)
    if cache == "heads-first":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    arguments = make_arguments(device, F16, causal=True, new=1)
    q, k, v = torch.randn(3, 1, 8, 64, device=device).half().split((4, 2, 2), dim=2)
    check_call({**arguments, "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache})
    strided = [torch.stack((x, -x), -1)[..., 0] for x in (q, k, v)]
    assert all(x.stride(-1) == 2 for x in strided)
    strided = dict(zip("qkv", strided, strict=True))
    check_call({**arguments, **strided, "k_cache": k_cache, "v_cache": v_cache})


@on_both_backends
@pytest.mark.parametrize("name", ["cache_seqlens", "cache_batch_idx", "cache_leftpad"])
def test_strided_indices(name, backend, device):
    """Check an index tensor that is a column of a larger tensor."""
    arguments = make_arguments(device, rows=[4, 0, 2], leftpad=[3, 9, 1], new=2)
    wide = torch.stack((arguments[name], arguments[name].flip(0) // 2), 1)
    check_call({**arguments, name: wide[:, 0]})


@on_both_backends
def test_strided_tables(backend, device):
    """Check a strided block table, and rotary tables interleaved in one tensor."""
    arguments = make_arguments(device, page_size=37, new=2, rotary_dim=64, causal=True)
    table = arguments["block_table"]
    wide = torch.stack((table, torch.full_like(table, 2**30)), -1)
    tables = torch.stack((arguments["rotary_cos"], arguments["rotary_sin"]), -1)
    cos, sin = tables.unbind(-1)
    check_call({**arguments, "block_table": wide[..., 0], "rotary_cos": cos, "rotary_sin": sin})


def with_nan(arguments, kept):
    """Return the arguments with NaN in all slots except those of the `kept` positions."""
    definition, result = Definition(arguments), dict(arguments)
    for name in ("k_cache", "v_cache"):
        cache = torch.full_like(arguments[name], math.nan)
        for sequence, positions in enumerate(kept):
            index = definition.slots(sequence, positions)
            cache[index] = arguments[name][index]
        result[name] = cache
    return result


UNSEEN = {
    "causal": {"causal": True, "new": 2},
    "pages-in-a-window": {"window_size": (100, 0), "page_size": 37, "new": 2},
    "leftpad": {"causal": True, "leftpad": [150, 0, 60], "rows": [4, 0, 2], "new": 2},
    "both-sides": {"window_size": (70, 3), "cached": (190, 30, 240)},
    "no-mask": {"cached": (190, 0, 65), "num_splits": 5},
    "narrow": {"window_size": (3, 0), "cached": (190, 0, 65), "num_splits": 5},
}


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("case", UNSEEN)
def test_unseen_slots_may_be_nan(case, seqlen_q, dtype, triton_backend, device):
    check_nan(make_arguments(device, dtype, seqlen_q, **UNSEEN[case]))


@pytest.mark.kernels
def test_unseen_slots_may_be_nan_compiled(triton_backend, device):
    case = {"seqlen_q": 3, "causal": True, "window_size": (100, 0), "num_splits": 2}
    check_nan(make_arguments(device, F16, **case))


def check_nan(arguments):
    """Check that NaN in unseen slots changes no bit, and NaN in a seen slot gives NaN."""
    definition = Definition(arguments)
    old = [range(length) for length in definition.cached]
    seen = [[x for x in definition.seen(i) if x in old[i]] for i in range(len(old))]
    unseen_nan, seen_nan = with_nan(arguments, seen), with_nan(arguments, [seen[0][1:], *seen[1:]])
    out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    for x, expected in zip(
        flash_attn_with_kvcache(**unseen_nan, return_softmax_lse=True), (out, lse), strict=True
    ):
        assert torch.equal(x, expected)
    assert out.isfinite().all()
    assert flash_attn_with_kvcache(**seen_nan)[0].isnan().any()


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize("window_size", [(-1, -1), (150, 0)])
def test_bits_do_not_depend_on_the_batch(window_size, triton_backend, device):
    arguments = make_arguments(device, F16, window_size=window_size, rows=[2, 0, 3])
    together = flash_attn_with_kvcache(**arguments)
    for i in range(3):
        alone = dict(arguments)
        for name in ("q", "cache_seqlens", "cache_batch_idx"):
            alone[name] = arguments[name][i : i + 1]
        assert torch.equal(flash_attn_with_kvcache(**alone), together[i : i + 1])


@on_both_backends
def test_token_by_token(backend, device):
    """Append and rotate chunks and single tokens, and compare with attention at once."""
    q, k, v = (torch.randn(1, 30, heads, 16, device=device) for heads in (4, 2, 2))
    angles = torch.arange(30, device=device)[:, None] * torch.rand(8, device=device)
    cos, sin = angles.cos(), angles.sin()
    caches = [torch.full((1, 32, 2, 16), math.nan, device=device) for _ in range(2)]
    outs, start = [], 0
    for count in (9, 1, 1, 14, 1, 4):
        new = slice(start, start + count)
        if backend == "torch":  # the torch backend reads masked slots
            caches = [x.nan_to_num() for x in caches]
        outs.append(
            flash_attn_with_kvcache(
                *(q[:, new], *caches, k[:, new], v[:, new], cos, sin),
                cache_seqlens=start,
                causal=True,
                window_size=(11, -1),
            )
        )
        start += count
    rotated = reference.apply_rotary(q, k, cos, sin, torch.arange(30, device=device)[None], True)
    options = {"causal": True, "window_size": (11, 0)}
    exact, _ = reference.attention(*(x.double() for x in (*rotated, v)), **options)
    plain, _ = eager(*rotated, v, **options)
    assert_as_accurate(torch.cat(outs, 1), plain, exact, "out")


@pytest.mark.parametrize("shape", ["no-queries", "no-sequences"])
def test_empty_inputs(shape, backend, device):
    """Check that new tokens are appended even without queries."""
    arguments = make_arguments(device, new=2)
    if shape == "no-sequences":
        for name in ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens"):
            arguments[name] = arguments[name][:0]
    arguments["q"] = arguments["q"][:, :0] if shape == "no-queries" else arguments["q"]
    caches = Definition(arguments).caches
    out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    assert out.shape == arguments["q"].shape
    assert lse.shape == (len(out), 4, out.shape[1])
    assert torch.equal(arguments["k_cache"], caches[0])
    assert torch.equal(arguments["v_cache"], caches[1])


Q, CACHE, NEW = torch.ones(2, 3, 4, 8), torch.zeros(2, 10, 2, 8), torch.ones(2, 3, 2, 8)
TABLE, LENGTHS = torch.ones(20, 4), int32([2, 7], "cpu")
GOOD = {
    "q": Q,
    "k_cache": CACHE,
    "v_cache": CACHE,
    "k": NEW,
    "v": NEW,
    "rotary_cos": TABLE,
    "rotary_sin": TABLE,
    "cache_seqlens": LENGTHS,
}
NO_NEW = dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin"))
PAGES = int32([[0, 1], [1, 0]], "cpu")
ROTARY = (
    "rotary_cos and rotary_sin must be (num_positions, rotary_dim / 2) with rotary_dim at most 8, "
    "got "
)
BAD = [
    ({"block_table": PAGES[0]}, "block_table must be (batch, pages), got (2,)"),
    ({"block_table": PAGES[:, :0]}, "block_table must be (batch, pages), got (2, 0)"),
    (
        {"k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]},
        "k_cache must have capacity for a key, got (2, 0, 2, 8)",
    ),
    ({"alibi_slopes": [0.5] * 4}, "alibi_slopes must be a tensor, got list"),
    (
        {"softmax_scale": math.nan},
        "softmax_scale must be in (0, 3.4e+38], got nan",
    ),
    ({"q": Q[0]}, "q must be (batch, seqlen, heads, head_dim), got (3, 4, 8)"),
    ({"k_cache": CACHE[0]}, "k_cache must be (batch, seqlen, heads, head_dim), got (10, 2, 8)"),
    (
        {"v_cache": CACHE.half()},
        "v_cache must have q's dtype torch.float32, got torch.float16",
    ),
    ({"v_cache": CACHE[:1]}, "v_cache must be (2, 10, 2, 8), got (1, 10, 2, 8)"),
    (
        {"k_cache": CACHE[..., :4], "v_cache": CACHE[..., :4]},
        "k_cache must have q's head_dim 8, got 4",
    ),
    (
        {"q": Q[:, :, :3]},
        "q's number of heads must be a positive multiple of k_cache's, got 3 and 2",
    ),
    (
        {"k_cache": CACHE.mT.contiguous().mT},
        "k_cache's last dimension must be contiguous, got strides (160, 16, 1, 2)",
    ),
    (
        {"v_cache": CACHE.mT.contiguous().mT},
        "v_cache's last dimension must be contiguous, got strides (160, 16, 1, 2)",
    ),
    ({"v": None}, "k and v must both be given, or both be None"),
    ({"k": None}, "k and v must both be given, or both be None"),
    ({"k": NEW[0]}, "k must be (2, seqlen_new, 2, 8), got (3, 2, 8)"),
    ({"k": NEW[:1]}, "k must be (2, seqlen_new, 2, 8), got (1, 3, 2, 8)"),
    ({"v": NEW[:, :, :1]}, "v must be (2, seqlen_new, 2, 8), got (2, 3, 1, 8)"),
    ({"k": NEW.half()}, "k must have q's dtype torch.float32, got torch.float16"),
    ({"v": NEW.to("meta")}, "v must be on cpu like q, got meta"),
    ({"v": NEW[:, :2]}, "v must be (2, 3, 2, 8), got (2, 2, 2, 8)"),
    (
        {"cache_seqlens": None},
        "cache_seqlens is required when k and v are given",
    ),
    (
        {"cache_seqlens": 8},
        "cache_seqlens must be in [0, 7] for 3 new tokens and capacity 10, got 8",
    ),
    (
        {"cache_seqlens": -1},
        "cache_seqlens must be in [0, 7] for 3 new tokens and capacity 10, got -1",
    ),
    (
        {**NO_NEW, "cache_seqlens": 21, "block_table": PAGES},
        "cache_seqlens must be in [0, 20] for 0 new tokens and capacity 20, got 21",
    ),
    (
        {"cache_seqlens": LENGTHS.long()},
        "cache_seqlens must be (2,) of torch.int32 on cpu, got (2,) of torch.int64 on cpu",
    ),
    (
        {"cache_seqlens": int32([1], "cpu")},
        "cache_seqlens must be (2,) of torch.int32 on cpu, got (1,) of torch.int32 on cpu",
    ),
    (
        {"cache_seqlens": LENGTHS.to("meta")},
        "cache_seqlens must be (2,) of torch.int32 on cpu, got (2,) of torch.int32 on meta",
    ),
    ({"cache_seqlens": int32([0, 8], "cpu")}, "cache_seqlens must be in [0, 7], got 0 to 8"),
    ({"cache_seqlens": int32([-3, 2], "cpu")}, "cache_seqlens must be in [0, 7], got -3 to 2"),
    (
        {"k_cache": CACHE[:1], "v_cache": CACHE[:1]},
        "k_cache must have q's batch size 2, got 1; select rows by cache_batch_idx",
    ),
    (
        {"cache_batch_idx": LENGTHS, "block_table": PAGES},
        "cache_batch_idx must be None with block_table, got a tensor",
    ),
    ({"cache_batch_idx": int32([0, 2], "cpu")}, "cache_batch_idx must be in [0, 1], got 0 to 2"),
    ({"cache_batch_idx": int32([-1, 1], "cpu")}, "cache_batch_idx must be in [0, 1], got -1 to 1"),
    (
        {"cache_batch_idx": LENGTHS.long()},
        "cache_batch_idx must be (2,) of torch.int32 on cpu, got (2,) of torch.int64 on cpu",
    ),
    ({"cache_leftpad": int32([0, 11], "cpu")}, "cache_leftpad must be in [0, 10], got 0 to 11"),
    ({"cache_leftpad": int32([-1, 0], "cpu")}, "cache_leftpad must be in [0, 10], got -1 to 0"),
    (
        {"cache_leftpad": LENGTHS[:1]},
        "cache_leftpad must be (2,) of torch.int32 on cpu, got (1,) of torch.int32 on cpu",
    ),
    (
        {"block_table": PAGES[:1]},
        "block_table must be (2, 2) of torch.int32 on cpu, got (1, 2) of torch.int32 on cpu",
    ),
    (
        {"block_table": PAGES.long()},
        "block_table must be (2, 2) of torch.int32 on cpu, got (2, 2) of torch.int64 on cpu",
    ),
    ({"block_table": PAGES * 2}, "block_table must be in [0, 1], got 0 to 2"),
    ({"block_table": PAGES - 1}, "block_table must be in [0, 1], got -1 to 0"),
    ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must be (4,) or (2, 4), got (3,)"),
    (
        {"alibi_slopes": torch.ones(4).int()},
        "alibi_slopes must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    ({"num_splits": -1}, "num_splits must be in [0, 2147483647], got -1"),
    ({"softcap": -0.5}, "softcap must be 0, or in [1.2e-38, 3.4e+38], got -0.5"),
    ({"softmax_scale": 0.0}, "softmax_scale must be in (0, 3.4e+38], got 0.0"),
    ({"window_size": (3, 2, 1)}, "window_size must be (left, right), got (3, 2, 1)"),
    (
        {"window_size": (-2, 0)},
        "window_size must hold distances >= 0, or -1 for no bound, got (-2, 0)",
    ),
    ({"rotary_cos": None}, "rotary_cos and rotary_sin must be given together, with k and v"),
    ({"rotary_sin": None}, "rotary_cos and rotary_sin must be given together, with k and v"),
    ({"k": None, "v": None}, "rotary_cos and rotary_sin must be given together, with k and v"),
    ({"rotary_cos": TABLE[None]}, f"{ROTARY}(1, 20, 4) and (20, 4)"),
    ({"rotary_sin": TABLE[:9]}, f"{ROTARY}(20, 4) and (9, 4)"),
    (
        {"rotary_cos": torch.ones(20, 5), "rotary_sin": torch.ones(20, 5)},
        f"{ROTARY}(20, 5) and (20, 5)",
    ),
    ({"rotary_cos": TABLE[:, :0], "rotary_sin": TABLE[:, :0]}, f"{ROTARY}(20, 0) and (20, 0)"),
    (
        {"rotary_cos": TABLE.int()},
        "rotary_cos must be floating point on cpu, got torch.int32 on cpu",
    ),
    (
        {"rotary_sin": TABLE.to("meta")},
        "rotary_sin must be floating point on cpu, got torch.float32 on meta",
    ),
    (
        {"rotary_cos": TABLE[:9], "rotary_sin": TABLE[:9]},
        "rotary_cos must have at least 10 positions, got 9",
    ),
    (
        {"q": torch.ones(2, 9, 4, 8), "rotary_cos": TABLE[:15], "rotary_sin": TABLE[:15]}
        | {"causal": True},
        "rotary_cos must have at least 16 positions, got 15",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_input_raises_and_keeps_the_caches(change, message):
    arguments = {name: x.clone() if x is CACHE else x for name, x in {**GOOD, **change}.items()}
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises((ValueError, TypeError)) as error:
        flash_attn_with_kvcache(**arguments)
    assert str(error.value) == message
    assert all(torch.equal(arguments[name], cache) for name, cache in before.items())


def test_good_input():
    """Check that the unchanged arguments are valid, up to the last position of the tables."""
    caches = {"k_cache": CACHE.clone(), "v_cache": CACHE.clone()}
    for causal, end in ((False, 10), (True, 12)):
        tables = {"rotary_cos": TABLE[:end], "rotary_sin": TABLE[:end]}
        q = torch.ones(2, 5, 4, 8)
        out = flash_attn_with_kvcache(**{**GOOD, **caches, **tables, "q": q}, causal=causal)
        assert out.shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.int()}, "q must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({"window_size": (1.5, 0)}, "window_size must be two integers, got float"),
        ({"cache_seqlens": 3.7}, "cache_seqlens must be an integer or a tensor, got float"),
    ],
    ids=str,
)
def test_bad_types_raise(change, message):
    with pytest.raises(TypeError) as error:
        flash_attn_with_kvcache(**{**GOOD, "k_cache": CACHE.clone(), **change})
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v"])
def test_gradients_raise(name):
    """Check that an input that requires a gradient raises, except under no_grad."""
    arguments = {x: y.clone() for x, y in GOOD.items()}
    arguments[name].requires_grad_()
    before = arguments["k_cache"].detach().clone()
    with pytest.raises(NotImplementedError) as error:
        flash_attn_with_kvcache(**arguments)
    assert str(error.value) == (
        "flash_attn_with_kvcache has no backward pass; call it under torch.no_grad(), or train "
        "with flash_attn_func"
    )
    assert torch.equal(arguments["k_cache"].detach(), before)
    with torch.no_grad():
        assert not flash_attn_with_kvcache(**arguments).requires_grad
    assert not torch.equal(arguments["k_cache"].detach(), before)


@pytest.mark.kernels
def test_float64_on_triton_raises_and_keeps_the_caches(triton_backend, device):
    for new, name in ((None, "q"), (2, "k_cache")):
        arguments = make_arguments(device, F64, new=new)
        before = arguments["k_cache"].clone()
        message = f"{name} must be .* on the triton backend, got torch.float64"
        with pytest.raises(TypeError, match=message):
            flash_attn_with_kvcache(**arguments)
        assert torch.equal(arguments["k_cache"], before)
