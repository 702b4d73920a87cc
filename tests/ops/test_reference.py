"""The reference definitions against independent formulations in float64."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from mistral_kernels.ops import reference
from mistral_kernels.ops.rotary import rotary_tables

float64 = {"dtype": torch.float64}


def qkv(seqlen_q, seqlen_k, heads=4, kv_heads=2, head_dim=3, batch=2):
    return (
        torch.randn(batch, seqlen_q, heads, head_dim, **float64),
        torch.randn(batch, seqlen_k, kv_heads, head_dim, **float64),
        torch.randn(batch, seqlen_k, kv_heads, head_dim, **float64),
    )


def attention_row_by_row(q, k, v, causal, window_size, scale, softcap, slopes):
    """Compute attention for one query at a time, from the list of keys that the query sees."""
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    out, lse = torch.zeros_like(q), torch.empty(batch, heads, seqlen_q, **float64)
    left, right = window_size
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(seqlen_q):
                position = i + seqlen_k - seqlen_q
                keys = range(seqlen_k)
                keys = [j for j in keys if left == -1 or position - j <= left]
                keys = [j for j in keys if right == -1 or j - position <= right]
                keys = [j for j in keys if not causal or j <= position]
                scores = []
                for j in keys:
                    score = scale * (q[b, i, h] @ k[b, j, g]).item()
                    if softcap:
                        score = softcap * math.tanh(score / softcap)
                    scores.append(score - slopes[b][h] * abs(position - j))
                total = math.fsum(math.exp(score) for score in scores)
                lse[b, h, i] = math.log(total) if keys else -math.inf
                for j, score in zip(keys, scores, strict=True):
                    out[b, i, h] += math.exp(score) / total * v[b, j, g]
    return out, lse


@pytest.mark.parametrize("seqlens", [(5, 5), (3, 7), (7, 3), (1, 6), (4, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window_size", [(-1, -1), (2, 0), (0, 0), (1, 2), (-1, 1), (2, -1)])
def test_attention_row_by_row(seqlens, causal, window_size):
    q, k, v = qkv(*seqlens)
    slopes = torch.rand(2, 4, **float64)
    for softcap, alibi in ((0.0, None), (0.7, slopes), (0.0, slopes[0])):
        out, lse = reference.attention(
            q,
            k,
            v,
            causal=causal,
            window_size=window_size,
            softmax_scale=0.9,
            softcap=softcap,
            alibi_slopes=alibi,
        )
        rows = torch.zeros(2, 4) if alibi is None else alibi.expand(2, 4)
        expected = attention_row_by_row(
            q, k, v, causal, window_size, 0.9, softcap, rows.double().tolist()
        )
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("seqlens", [(9, 9), (4, 9)], ids=str)
def test_attention_matches_pytorch(seqlens):
    q, k, v = qkv(*seqlens, heads=6, kv_heads=2)
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*transposed, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v)[0], expected.transpose(1, 2))
    transposed[1:] = (x.repeat_interleave(3, dim=1) for x in transposed[1:])
    expected = F.scaled_dot_product_attention(*transposed, attn_mask=causal_lower_right(*seqlens))
    out, _ = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_attention_rows_that_see_no_key():
    q, k, v = (x.requires_grad_() for x in qkv(7, 3))
    out, lse = reference.attention(q, k, v, causal=True)
    assert (out[:, :4] == 0).all()
    assert (out[:, 4:] != 0).all()
    assert lse[:, :, :4].isneginf().all()
    assert lse[:, :, 4:].isfinite().all()
    dq, dk, dv = torch.autograd.grad((out, lse[:, :, 4:]), (q, k, v), (out, lse[:, :, 4:]))
    assert (dq[:, :4] == 0).all()
    assert (dq[:, 4:] != 0).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_gradients():
    def check(function, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def attention(q, k, v):
        out, lse = reference.attention(q, k, v, causal=True, window_size=(1, 0), softcap=1.5)
        return out, lse[..., 2:]  # the first rows see no key

    check(attention, *qkv(5, 3, batch=1))
    cos, sin = (table.double() for table in rotary_tables(9, 4, 10.0))
    positions = torch.tensor([[0, 3, 8], [1, 1, 2]])
    for interleaved in (False, True):
        q, k = torch.randn(2, 3, 2, 4, **float64), torch.randn(2, 3, 1, 4, **float64)
        check(
            lambda q, k, i=interleaved: reference.apply_rotary(q, k, cos, sin, positions, i), q, k
        )
    check(reference.swiglu, *torch.randn(2, 3, 4, **float64))
    check(
        lambda x, residual, weight: reference.rms_norm(x, weight, 1e-5, residual),
        *torch.randn(2, 3, 4, **float64),
        torch.randn(4, **float64),
    )
    targets = torch.tensor([2, -100, 0])
    check(
        lambda h, w: reference.linear_cross_entropy(h, w, targets),
        torch.randn(3, 4, **float64),
        torch.randn(5, 4, **float64),
    )


def test_rotary_is_multiplication_of_complex_numbers():
    q, k = torch.randn(2, 5, 4, 6, **float64), torch.randn(2, 5, 2, 6, **float64)
    positions = torch.randint(100, (2, 5))
    cos, sin = rotary_tables(100, 6, 1e4)
    rotation = torch.complex(cos.double(), sin.double())[positions].unsqueeze(-2)
    for x, rotated in zip(
        (q, k), reference.apply_rotary(q, k, cos, sin, positions, True), strict=True
    ):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        torch.testing.assert_close(rotated, torch.view_as_real(pairs * rotation).flatten(-2))


def test_rotary_matches_hugging_face():
    q, k = torch.randn(2, 5, 4, 6, **float64), torch.randn(2, 5, 2, 6, **float64)
    positions = torch.randint(100, (2, 5))
    cos, sin = (table.double() for table in rotary_tables(100, 6, 1e4))
    wide_cos, wide_sin = (torch.cat((t, t), -1)[positions].unsqueeze(2) for t in (cos, sin))
    for x, rotated in zip((q, k), reference.apply_rotary(q, k, cos, sin, positions), strict=True):
        rotated_half = torch.cat((-x[..., 3:], x[..., :3]), dim=-1)
        torch.testing.assert_close(rotated, x * wide_cos + rotated_half * wide_sin)


def test_swiglu_and_rms_norm_formulas():
    x, y, weight = torch.randn(3, 7, **float64), torch.randn(3, 7, **float64), torch.randn(7)
    torch.testing.assert_close(reference.swiglu(x, y), x / (1 + torch.exp(-x)) * y)
    normalized, total = reference.rms_norm(x, weight.double(), 1e-3, residual=y)
    torch.testing.assert_close(total, x + y)
    rms = ((x + y).pow(2).sum(-1, keepdim=True) / 7 + 1e-3).sqrt()
    torch.testing.assert_close(normalized, (x + y) / rms * weight)


def test_linear_cross_entropy_formula():
    hidden, weight = torch.randn(6, 4, **float64), torch.randn(5, 4, **float64)
    targets = torch.tensor([3, -1, 0, 4, -1, 2])
    probabilities = torch.softmax(hidden @ weight.T, dim=1)
    losses = [-math.log(probabilities[i, t]) for i, t in enumerate(targets.tolist()) if t >= 0]
    for reduction, expected in (("sum", math.fsum(losses)), ("mean", math.fsum(losses) / 4)):
        loss = reference.linear_cross_entropy(hidden, weight, targets, -1, reduction)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_rolling_cache_matches_attention_over_the_whole_text(window):
    """Chunks with rings of `window` slots give the results of one pass over the whole text."""
    lengths = [13, 9]
    texts = [tuple(x[0] for x in qkv(n, n, batch=1)) for n in lengths]
    k_cache = torch.full((2, window, 2, 3), math.nan, **float64)
    v_cache, seen, outs = k_cache.clone(), [0, 0], ([], [])
    for counts in ([1, 0], [4, 7], [8, 2]):
        new = [[x[s : s + n] for x in text] for text, s, n in zip(texts, seen, counts, strict=True)]
        q, k, v = (torch.cat(parts) for parts in zip(*new, strict=True))
        ring = torch.tensor(seen, dtype=torch.int32), torch.tensor([0, counts[0], sum(counts)])
        out = reference.rolling_cache_attention(
            q, k, v, k_cache, v_cache, *ring, sliding_window=window
        )
        k_cache, v_cache = reference.rolling_cache_update(k_cache, v_cache, k, v, *ring)
        for kept, part in zip(outs, out.split(counts), strict=True):
            kept.append(part)
        seen = [s + n for s, n in zip(seen, counts, strict=True)]
    for index, ((q, k, v), kept) in enumerate(zip(texts, outs, strict=True)):
        expected, _ = reference.attention(
            q[None], k[None], v[None], causal=True, window_size=(window - 1, 0)
        )
        torch.testing.assert_close(torch.cat(kept), expected[0])
        for p in range(len(q) - window, len(q)):
            assert torch.equal(k_cache[index, p % window], k[p])
            assert torch.equal(v_cache[index, p % window], v[p])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in qkv(6, 6))
    out, lse = reference.attention(q, k, v, causal=True)
    wide, wide_lse = reference.attention(q.float(), k.float(), v.float(), causal=True)
    assert torch.equal(out, wide.to(dtype))
    assert torch.equal(lse, wide_lse)
    assert lse.dtype == torch.float32
    gate, up = torch.randn(2, 99).to(dtype)
    assert torch.equal(reference.swiglu(gate, up), (F.silu(gate.float()) * up).to(dtype))


def test_eager_arithmetic_stays_in_the_dtype_of_its_inputs():
    gate, up = torch.randn(2, 9999).bfloat16()
    with suppress(KeyError), reference.eager_arithmetic():
        eager = reference.swiglu(gate, up)
        raise KeyError
    assert torch.equal(eager, F.silu(gate) * up)
    assert not torch.equal(eager, reference.swiglu(gate, up))
