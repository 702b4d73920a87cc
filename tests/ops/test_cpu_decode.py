"""Tests of csrc's CPU kernels for a decode step: products of few rows, attention of one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import without_csrc
from support.helpers import FLOATS, assert_as_accurate
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.attention.ops import attend_cached
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.torch_backend import blocked_forward
from mistral_kernels.ops.attention.torch_cache import cached_forward
from mistral_kernels.ops.attention.window import Window


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (4, 64), (7, 3), (67, 133), (6, 1100)]
)
def test_linear(out_features, in_features, dtype, operators):
    """Check accuracy, and that the bits of a row do not depend on the number of rows."""
    weight = torch.randn(out_features, in_features).to(dtype)
    x = torch.randn(33, in_features).to(dtype)
    alone = torch.cat([operators.linear(row, weight) for row in x.split(1)])
    exact = F.linear(x.double(), weight.double())
    assert_as_accurate(alone, F.linear(x, weight), exact, "y")
    for rows in (*range(18), 33):
        assert torch.equal(operators.linear(x[:rows], weight), alone[:rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_of_strided_inputs(dtype, operators):
    """Check unaligned rows with gaps between them."""
    x, weight = torch.randn(5, 77).to(dtype), torch.randn(30, 77).to(dtype)
    expected = operators.linear(x, weight)
    views = []
    for tensor in (x, weight):
        memory = torch.full((len(tensor) * 80 + 1,), float("nan"), dtype=dtype)
        views.append(memory[1:].view(-1, 80)[:, :77].copy_(tensor))
    assert torch.equal(operators.linear(*views), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_bits_do_not_depend_on_threads(dtype, operators):
    x, weight = torch.randn(3, 1024).to(dtype), torch.randn(1031, 1024).to(dtype)
    expected = operators.linear(x, weight)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(operators.linear(x, weight), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_of_extreme_values(dtype, operators):
    """Check that non-finite values stay in their row, and that no partial sum overflows."""
    inf, nan = float("inf"), float("nan")
    x, weight = torch.randn(6, 70), torch.randn(9, 70)
    x[1, 3], x[2, 69], x[3, 64], weight[7, 5] = inf, nan, -inf, nan
    x[4], weight[8] = 200.0, 300.0  # their products exceed float16's range
    x[4, ::2] *= -1
    x, weight = x.to(dtype), weight.to(dtype)
    exact = F.linear(x.double(), weight.double())
    exact[3, 8] = exact[3, 8].sign() * inf
    actual = operators.linear(x, weight)
    torch.testing.assert_close(
        actual, exact.to(dtype), rtol=0.05, atol=0.2, equal_nan=True, check_dtype=True
    )


def make_cache(kind: str, batch: int, capacity: int, heads: int, head_dim: int, dtype) -> CacheView:
    """Return a cache of random keys and values.

    Kinds are a ring that has wrapped several times, flat rows ("flat", "rows", "leftpad") and
    pages. Tensors are views with arbitrary strides.
    """
    longest = 3 * capacity if kind == "ring" else capacity
    lengths = torch.randint(longest, (batch,)).int()
    lengths[0], lengths[-1] = 0, longest - 1
    options: dict[str, Any] = {"seqlen_new": 1}
    shape: tuple[int, ...] = (batch, capacity)
    if kind == "ring":
        options = {}  # one packed token per sequence
    elif kind == "rows":
        shape = (batch + 3, capacity)
        options["rows"] = torch.randperm(batch + 3)[:batch].int()
    elif kind == "leftpad":
        options["leftpad"] = (torch.rand(batch) * (lengths + 1)).int()
    elif kind == "paged":
        pages = -(-capacity // 16)
        shape = (batch * pages + 2, 16)
        options["block_table"] = torch.randperm(shape[0])[: batch * pages].view(batch, -1).int()
    else:
        assert kind == "flat"
    caches = []  # views in which only the last dimension is contiguous
    for _ in range(2):
        memory = torch.randn(shape[1], shape[0], heads, head_dim + 8).to(dtype)
        caches.append(memory[..., :head_dim].transpose(0, 1))
    return CacheView(*caches, lengths, **options)


def make_queries(cache: CacheView, heads: int) -> Tensor:
    shape = (len(cache.lengths), heads, cache.k_cache.shape[-1])
    q = torch.randn(shape).to(cache.k_cache.dtype)
    return q.unsqueeze(1) if cache.seqlen_new else q


def spec_of(cache: CacheView, window_left: int) -> AttentionSpec:
    cu_seqlens = None if cache.seqlen_new else torch.arange(len(cache.lengths) + 1).int()
    return AttentionSpec(Sequences(cu_seqlens, None, 1, 1), Window(window_left, 0), cache=cache)


def attend(q: Tensor, cache: CacheView, window_left: int) -> Tensor:
    out, lse = attend_cached(q, None, None, spec_of(cache, window_left))
    assert lse.numel() == 0
    return out


def attend_in_pytorch(q: Tensor, cache: CacheView, window_left: int) -> Tensor:
    return cached_forward(q, None, None, spec_of(cache, window_left), False, blocked_forward)[0]


def assert_attention_is_accurate(q: Tensor, cache: CacheView, window_left: int) -> Tensor:
    wide = cache._replace(k_cache=cache.k_cache.double(), v_cache=cache.v_cache.double())
    plain = attend_in_pytorch(q, cache, window_left)
    exact = attend_in_pytorch(q.double(), wide, window_left)
    actual = attend(q, cache, window_left)
    assert_as_accurate(actual, plain, exact, "out")
    return actual


# Capacity, query heads, kv heads, head_dim. They cover several splits of keys, several jobs per
# split and per kv head, tiles of 4 and 1 heads, and head_dims that are not a multiple of a vector.
SHAPES = [
    (1, 1, 1, 8),
    (5, 6, 2, 24),
    (100, 14, 2, 80),
    (600, 8, 4, 64),
    (1300, 4, 1, 128),
    (70, 36, 12, 16),
    (70, 74, 2, 16),
]
KINDS = ["ring", "flat", "rows", "leftpad", "paged"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention(dtype, kind, operators):
    for capacity, heads, kv_heads, head_dim in SHAPES:
        cache = make_cache(kind, 3, capacity, kv_heads, head_dim, dtype)
        q = make_queries(cache, heads)
        for window_left in (-1, capacity // 2):
            assert_attention_is_accurate(q, cache, window_left)


def test_pytorch_computes_without_the_library():
    """Check the result of PyTorch's operators, which add in another order than csrc."""
    has_library = extension.load("cpu")
    cache = make_cache("ring", 3, 600, 2, 64, torch.float32)
    q = make_queries(cache, 8)
    before = attend(q, cache, 300)
    with without_csrc():
        out = assert_attention_is_accurate(q, cache, 300)
    assert torch.equal(out, attend_in_pytorch(q, cache, 300))
    assert torch.equal(out, before) != has_library


@pytest.mark.parametrize("kind", KINDS)
def test_attention_bits_do_not_depend_on_batch_or_threads(kind, operators):
    cache = make_cache(kind, 5, 1300, 3, 64, torch.bfloat16)
    q = make_queries(cache, 12)
    together = attend(q, cache, -1)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(attend(q, cache, -1), together)
    for i in range(5):
        one = slice(i, i + 1)
        alone = cache._replace(
            lengths=cache.lengths[one],
            **{
                name: None if indices is None else indices[one]
                for name in ("rows", "leftpad", "block_table")
                for indices in (getattr(cache, name),)
            },
        )
        if kind in ("ring", "flat", "leftpad"):
            alone = alone._replace(k_cache=cache.k_cache[one], v_cache=cache.v_cache[one])
        assert torch.equal(attend(q[one], alone, -1), together[one])


def test_query_without_keys_gives_zeros(operators):
    cache = make_cache("leftpad", 3, 40, 2, 64, torch.float32)
    assert cache.leftpad is not None
    cache.leftpad[1] = cache.lengths[1] + 1
    q = make_queries(cache, 4)
    out = assert_attention_is_accurate(q, cache, -1)
    assert not out[1].any()
    assert out[0].all()
    empty = CacheView(*(x[:0] for x in cache[:3]), seqlen_new=1)
    assert attend(q[:0], empty, -1).shape == (0, 1, 4, 64)


def test_non_finite_keys_and_values(operators):
    """Check that huge, infinite and NaN keys and values give the same result as PyTorch."""
    cache = make_cache("flat", 6, 700, 1, 8, torch.float32)
    cache.lengths[:] = 699
    q = make_queries(cache, 4)
    cache.k_cache[0] *= 1e15
    q[0] *= 1e15
    cache.k_cache[1, 650] = float("inf")
    cache.k_cache[2, 3] = float("nan")
    cache.v_cache[3, 699] = float("inf")
    cache.v_cache[4, 17] = float("nan")
    actual, expected = attend(q, cache, -1), attend_in_pytorch(q, cache, -1)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("flat", "lengths", -1, r"lengths must be in \[0, 2147483647\], got -1 to"),
        ("flat", "lengths", 2**31 - 1, r"lengths must be in \[0, 2147483646\], got 0 to 214"),
        ("rows", "rows", 6, r"rows must be in \[0, 5\], got 0 to 6"),
        ("leftpad", "leftpad", -3, r"leftpad must be in \[0, 2147483647\], got -3 to"),
        ("paged", "block_table", -1, r"block_table must be in \[0, 10\], got -1 to"),
        ("paged", "block_table", 11, r"block_table must be in \[0, 10\], got 0 to 11"),
    ],
)
def test_indices_out_of_range_raise(kind, name, value, message, operators):
    cache = make_cache(kind, 3, 40, 2, 64, torch.float32)
    indices = torch.zeros_like(getattr(cache, name))
    cache = cache._replace(**{"lengths": torch.full((3,), 39).int(), name: indices})
    indices.view(-1)[1] = value
    with pytest.raises(ValueError, match=message):
        attend(make_queries(cache, 4), cache, -1)
