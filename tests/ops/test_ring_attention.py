"""Tests of the backward operator on a part of the keys, given the output and lse over all keys.

Ring attention and other kinds of context parallelism call the operator in this way. Each device
holds a part of the keys. The outputs of all parts are merged, and each part computes its share of
the gradients.
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
    """Keys [start, stop) of each sequence, and the window of the queries over this part."""

    start: int
    stop: int
    left: int
    right: int


def whole_and_parts(kind: str, seqlen: int, split: int) -> tuple[Part, list[Part]]:
    """Return all keys as one part, and two parts with shifted windows.

    Queries are aligned with the last key of each part, so distances to an earlier part are smaller
    by the number of later keys.
    """
    later = seqlen - split
    if kind == "full":
        return Part(0, seqlen, -1, -1), [Part(0, split, -1, -1), Part(split, seqlen, -1, -1)]
    if kind == "causal":
        return Part(0, seqlen, -1, 0), [Part(0, split, -1, -1), Part(split, seqlen, -1, 0)]
    left = later + 3
    return Part(0, seqlen, left, 0), [Part(0, split, 3, -1), Part(split, seqlen, left, 0)]


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp over all parts."""
    lse = torch.logsumexp(torch.stack(lses), 0)
    shares = [(x - lse).nan_to_num(-torch.inf, -torch.inf, -torch.inf).exp() for x in lses]
    out = sum(
        x * share.transpose(-1, -2).unsqueeze(-1) for x, share in zip(outs, shares, strict=True)
    )
    return out, lse


@pytest.mark.parametrize("packed", [False, True], ids=["rectangular", "packed"])
@pytest.mark.parametrize(
    "kind", ["causal", *(pytest.param(x, marks=pytest.mark.long) for x in ("full", "window"))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_parts_add_up(kind, packed, dtype, backend, device):
    """Compare the gradients of the parts with float64 gradients over all keys at once."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels do not support float64")
    batch, queries, seqlen, split = 2, 45, 131, 67
    whole, parts = whole_and_parts(kind, seqlen, split)
    q, dout = (torch.randn(batch, queries, HEADS, HEAD_DIM, device=device) for _ in "qd")
    k, v = (torch.randn(batch, seqlen, KV_HEADS, HEAD_DIM, device=device) for _ in "kv")

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    window = {"window_size": (whole.left, whole.right)}
    exact, _ = reference.attention(*leaves, **window)
    expected = torch.autograd.grad(exact, leaves, dout.double())

    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))

    def in_layout(x: Tensor) -> Tensor:
        return x.flatten(0, 1) if packed else x

    def options(part: Part) -> tuple:
        tokens = part.stop - part.start
        lengths = (None, None, queries, tokens)
        if packed:
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device)
            lengths = (cu_seqlens * queries, cu_seqlens * tokens, queries, tokens)
        return *lengths, None, part.left, part.right, 0.0, None

    def keys(x: Tensor, part: Part) -> Tensor:
        return in_layout(x[:, part.start : part.stop])

    results = [
        ops.attention_forward(in_layout(q), keys(k, part), keys(v, part), *options(part), True)
        for part in parts
    ]
    out, lse = merge([x for x, _ in results], [x for _, x in results])
    torch.testing.assert_close(out.double().view_as(exact), exact.detach(), rtol=1e-5, atol=1e-5)

    dq, dk, dv = torch.zeros_like(in_layout(q)), [], []
    for part in parts:
        grads = ops.attention_backward(
            *(in_layout(dout), in_layout(q), keys(k, part), keys(v, part), out.contiguous(), lse),
            *(*options(part), True, True, True),
        )
        dq += grads[0]
        dk.append(grads[1].view(batch, -1, KV_HEADS, HEAD_DIM))
        dv.append(grads[2].view(batch, -1, KV_HEADS, HEAD_DIM))
    actual = dq.view_as(q), torch.cat(dk, 1), torch.cat(dv, 1)
    for name, x, y in zip("qkv", actual, expected, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < (1e-12 if dtype == torch.float64 else 3e-6), f"d{name}: {error:.2g}"
