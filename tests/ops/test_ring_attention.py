"""The backward operator of a part of the keys, with the output and log-sum-exp over all of them.

So ring attention and other kinds of context parallelism call it: each device holds a part of the
keys, merges the outputs of all parts, and asks each part for its share of the gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mistral_kernels.ops import reference

ops = torch.ops.mistral_kernels
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


class Part(NamedTuple):
    """Keys [start, stop) of each sequence, and the window that they are seen through."""

    start: int
    stop: int
    left: int
    right: int


def whole_and_parts(kind: str, seqlen: int, split: int) -> tuple[Part, list[Part]]:
    """Shift the window: queries stand on the last keys, nearer than an earlier part's were."""
    later = seqlen - split
    if kind == "full":
        return Part(0, seqlen, -1, -1), [Part(0, split, -1, -1), Part(split, seqlen, -1, -1)]
    if kind == "causal":
        return Part(0, seqlen, -1, 0), [Part(0, split, -1, -1), Part(split, seqlen, -1, 0)]
    left = later + 3
    return Part(0, seqlen, left, 0), [Part(0, split, 3, -1), Part(split, seqlen, left, 0)]


def merge(outs: list[Tensor], sums: list[Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(torch.stack(sums), 0)
    shares = [(x - lse).nan_to_num(-torch.inf, -torch.inf, -torch.inf).exp() for x in sums]
    out = sum(
        x * share.transpose(-1, -2).unsqueeze(-1) for x, share in zip(outs, shares, strict=True)
    )
    return out, lse


@pytest.mark.parametrize("packed", [False, True], ids=["rectangular", "packed"])
@pytest.mark.parametrize(
    "kind", ["causal", *(pytest.param(x, marks=pytest.mark.long) for x in ("full", "window"))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parts_add_up(kind, packed, dtype, backend, device):
    """To the gradients that float64 gives over all keys at once."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no float64 there")
    batch, queries, seqlen, split = 2, 45, 131, 67
    whole, parts = whole_and_parts(kind, seqlen, split)
    q, dout = (torch.randn(batch, queries, HEADS, HEAD_DIM, device=device) for _ in "qd")
    k, v = (torch.randn(batch, seqlen, KV_HEADS, HEAD_DIM, device=device) for _ in "kv")

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    window = {"window_size": (whole.left, whole.right)}
    exact, _ = reference.attention(*leaves, **window)
    expected = torch.autograd.grad(exact, leaves, dout.double())

    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))

    def laid_out(x: Tensor) -> Tensor:
        return x.flatten(0, 1) if packed else x

    def options(part: Part) -> tuple:
        tokens = part.stop - part.start
        lengths = (None, None, queries, tokens)
        if packed:
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device)
            lengths = (cu_seqlens * queries, cu_seqlens * tokens, queries, tokens)
        return *lengths, None, part.left, part.right, 0.0, None

    def keys(x: Tensor, part: Part) -> Tensor:
        return laid_out(x[:, part.start : part.stop])

    results = [
        ops.attention_forward(laid_out(q), keys(k, part), keys(v, part), *options(part), True)
        for part in parts
    ]
    out, lse = merge([x for x, _ in results], [x for _, x in results])
    torch.testing.assert_close(out.double().view_as(exact), exact.detach(), rtol=1e-5, atol=1e-5)

    dq, dk, dv = torch.zeros_like(laid_out(q)), [], []
    for part in parts:
        grads = ops.attention_backward(
            *(laid_out(dout), laid_out(q), keys(k, part), keys(v, part), out.contiguous(), lse),
            *(*options(part), True, True, True),
        )
        dq += grads[0]
        dk.append(grads[1].view(batch, -1, KV_HEADS, HEAD_DIM))
        dv.append(grads[2].view(batch, -1, KV_HEADS, HEAD_DIM))
    actual = dq.view_as(q), torch.cat(dk, 1), torch.cat(dv, 1)
    for name, x, y in zip("qkv", actual, expected, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < (1e-12 if dtype == torch.float64 else 3e-6), f"d{name}: {error:.2g}"
