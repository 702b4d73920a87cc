"""rolling_cache_update_ and rolling_cache_attention against a cache that keeps all tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import FLOATS, assert_as_accurate, assert_matches_reference

from mistral_kernels.ops import reference
from mistral_kernels.ops.attention import rolling_cache_attention
from mistral_kernels.ops.rolling_cache import rolling_cache_update_

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
eager_attention = reference.eager_arithmetic()(reference.rolling_cache_attention)


@pytest.fixture(params=[*FLOATS, torch.float64], ids=str)
def dtype(request, set_backend):
    if request.param == torch.float64:  # supported by the torch backend only
        set_backend("torch")
    return request.param


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def offsets(counts, device="cpu"):
    return int32([sum(counts[:i]) for i in range(len(counts) + 1)], device)


def make_ring(batch, capacity, dtype, device):
    return [
        torch.randn(batch, capacity, KV_HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(2)
    ]


def make_tokens(total, dtype, device):
    return [
        torch.randn(total, heads, HEAD_DIM, device=device).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


class GrowingCache:
    """Cache of all keys and values of each sequence, in order."""

    def __init__(self, batch):
        self.keys = [torch.empty(0, KV_HEADS, HEAD_DIM) for _ in range(batch)]
        self.values = list(self.keys)

    def append(self, q, k, v, counts, window):
        """Append the tokens and return their attention to all tokens up to themselves."""
        outs = []
        for i, new in enumerate(zip(*(x.split(counts) for x in (q, k, v)), strict=True)):
            self.keys[i] = torch.cat((self.keys[i], new[1]))
            self.values[i] = torch.cat((self.values[i], new[2]))
            text = (x[None].double() for x in (new[0], self.keys[i], self.values[i]))
            window_size = (-1 if window is None else window - 1, 0)
            outs.append(reference.attention(*text, causal=True, window_size=window_size)[0][0])
        return torch.cat(outs).float()


@settings(max_examples=60)
@given(st.data())
def test_any_sequence_of_chunks(data):
    """Attention matches the whole text after prompts, long chunks, single and no new tokens.

    Slots that were never written hold NaN, so that reading one fails the test.
    """
    batch = data.draw(st.integers(1, 3), "batch")
    capacity = data.draw(st.integers(1, 6), "capacity")
    window = data.draw(st.integers(1, capacity), "window")
    count = st.integers(0, 2 * capacity + 3)
    steps = data.draw(
        st.lists(st.lists(count, min_size=batch, max_size=batch), max_size=6), "steps"
    )
    steps += [[1] * batch] * data.draw(st.integers(0, 2), "decode")
    rings = [torch.full((batch, capacity, KV_HEADS, HEAD_DIM), math.nan) for _ in range(2)]
    grown, lengths = GrowingCache(batch), int32([0] * batch)
    for counts in steps:
        q, k, v = make_tokens(sum(counts), torch.float32, "cpu")
        ring = {"lengths": lengths, "cu_seqlens": offsets(counts), "max_seqlen": max(counts)}
        ring = {"k_cache": rings[0], "v_cache": rings[1], **ring}
        expected = grown.append(q, k, v, counts, window)
        out = rolling_cache_attention(q, k, v, **ring, sliding_window=window)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        before = lengths.clone()
        assert rolling_cache_update_(k=k, v=v, **ring) is None
        assert torch.equal(lengths, before)
        # Rings that hold unequal numbers of tokens are masked, and a masked NaN still gives NaN.
        if max(counts) == min(counts) == 1 and len(set(lengths.clamp(max=capacity).tolist())) == 1:
            out = rolling_cache_attention(q, None, None, **ring, sliding_window=window)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        lengths = lengths + int32(counts)
        for texts, cache in zip((grown.keys, grown.values), rings, strict=True):
            for text, slots in zip(texts, cache, strict=True):
                held = range(max(0, len(text) - capacity), len(text))
                assert all(torch.equal(slots[p % capacity], text[p]) for p in held)
                assert slots[len(held) :].isnan().all()


UPDATES = [
    ([0], [5]),
    ([3], [4]),
    ([7], [1]),
    ([6], [20]),
    ([0, 9, 100], [3, 0, 8]),
    ([7, 2, 13], [1, 1, 1]),
    ([7, 2, 13], [0, 1, 0]),
    ([7, 2], [0, 0]),
    ([2**31 - 30, 0], [9, 17]),
]


@pytest.mark.parametrize(("lengths", "counts"), UPDATES, ids=str)
@pytest.mark.parametrize("capacity", [1, 7, 16])
def test_update(lengths, counts, capacity, dtype, device):
    rings = make_ring(len(lengths), capacity, dtype, device)
    _, k, v = make_tokens(sum(counts), dtype, device)
    where = int32(lengths, device), offsets(counts, device)
    expected = reference.rolling_cache_update(*rings, k, v, *where)
    rolling_cache_update_(*rings, k, v, *where, max(counts))
    assert all(torch.equal(a, b) for a, b in zip(rings, expected, strict=True))


@pytest.mark.parametrize("counts", [[9, 0, 4], [6, 0, 1], [1, 1, 1]], ids=str)
def test_update_gradients_and_strides(counts, device):
    where = int32([3, 0, 6], device), offsets(counts, device)
    fused = torch.randn(sum(counts), 8, HEAD_DIM, device=device).requires_grad_()
    rings = [x.requires_grad_() for x in make_ring(3, 5, torch.float32, device)]

    def update(k_cache, v_cache, k, v):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        rolling_cache_update_(k_cache, v_cache, k, v, *where, max(counts))
        return k_cache, v_cache

    inputs = {"k_cache": rings[0], "v_cache": rings[1], "k": fused[:, 4:6], "v": fused[:, 6:]}
    assert_matches_reference(
        update, lambda **x: reference.rolling_cache_update(**x, **by_name(where)), inputs
    )


def by_name(where):
    return {"lengths": where[0], "cu_seqlens": where[1]}


ATTENTIONS = [
    ([0], [5]),
    ([5], [70]),
    ([100], [3]),
    ([0, 3, 200], [70, 1, 9]),
    ([0, 30, 31], [0, 2, 40]),
    ([20, 30], [1, 1]),
]


@pytest.mark.parametrize(("lengths", "counts"), ATTENTIONS, ids=str)
@pytest.mark.parametrize(("capacity", "window"), [(30, 30), (30, 11), (30, 40), (30, None), (1, 1)])
def test_attention_and_gradients(lengths, counts, capacity, window, device):
    q, k, v = make_tokens(sum(counts), torch.float32, device)
    rings = make_ring(len(lengths), capacity, torch.float32, device)
    inputs = dict(zip(("q", "k", "v", "k_cache", "v_cache"), (q, k, v, *rings), strict=True))
    # A token that sees only itself has weight 1, and q and the keys get no gradient.
    frozen = ("q", "k", "k_cache") if window == 1 or counts == [0] else ()
    inputs = {name: x.requires_grad_(name not in frozen) for name, x in inputs.items()}
    where = by_name((int32(lengths, device), offsets(counts, device)))
    assert_matches_reference(
        with_zero_gradients(
            lambda **x: rolling_cache_attention(
                **x, **where, max_seqlen=max(counts), sliding_window=window
            )
        ),
        with_zero_gradients(lambda **x: eager_attention(**x, **where, sliding_window=window)),
        inputs,
    )


def with_zero_gradients(function):
    """Add 0 times each input, so that a ring that no token reads has gradient 0 and not None."""
    return lambda **x: function(**x) + sum(0 * y.sum() for y in x.values())


@pytest.mark.parametrize("lengths", [[0, 0], [3, 29], [29, 30], [29, 29], [500, 31], [7, 500]])
@pytest.mark.parametrize("window", [30, 11, 1, 40, None])
def test_decode_after_update(lengths, window, dtype, device):
    """Write one token per sequence, then attend to the ring without new tokens."""
    q, k, v = make_tokens(2, dtype, device)
    rings = make_ring(2, 30, dtype, device)
    where = by_name((int32(lengths, device), int32([0, 1, 2], device)))
    # In a full ring the new token has overwritten the oldest key: at most 30 keys are visible.
    visible = min(window or 30, 30)
    exact = reference.rolling_cache_attention(
        *(x.double() for x in (q, k, v, *rings)), **where, sliding_window=visible
    )
    plain = eager_attention(q, k, v, *rings, **where, sliding_window=visible)
    rolling_cache_update_(*rings, k, v, **where, max_seqlen=1)
    out = rolling_cache_attention(
        q, None, None, *rings, **where, max_seqlen=1, sliding_window=window
    )
    assert_as_accurate(out, plain, exact, "out")


@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.7}], ids=str)
def test_scale_and_strides(options, device):
    """Slices of a fused projection, as a chunk and as single tokens."""
    rings = make_ring(2, 6, torch.float32, device)
    for counts in ([3, 9], [1, 1]):
        fused = torch.randn(sum(counts), 8, HEAD_DIM, device=device)
        q, k, v = fused.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        where = by_name((int32([4, 11], device), offsets(counts, device)))
        expected = reference.rolling_cache_attention(
            q, k, v, *rings, **where, sliding_window=6, **options
        )
        where["max_seqlen"] = max(counts)
        out = rolling_cache_attention(q, k, v, *rings, **where, sliding_window=6, **options)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        rolling_cache_update_(*rings, k, v, **where)
        if counts == [1, 1]:
            out = rolling_cache_attention(
                q, None, None, *rings, **where, sliding_window=6, **options
            )
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
