"""csrc's attention over whole sequences, in each instruction set of this processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import FLOATS, assert_as_accurate
from torch import Tensor

from mistral_kernels.ops import reference
from mistral_kernels.ops.attention.window import UNBOUNDED

# Lengths of queries and keys, heads, kv heads, head_dim, window to the left and right, softcap.
CASES = [
    (1, 1, 1, 1, 1, 0, 0, 0.0),
    (67, 67, 8, 2, 128, 16, 0, 0.0),
    (200, 133, 4, 4, 64, None, 0, 0.0),
    (33, 150, 12, 1, 80, 20, 5, 0.0),
    (130, 130, 8, 2, 17, None, None, 30.0),
    (5, 300, 71, 1, 64, 100, 0, 0.0),
    (10, 4, 2, 1, 256, None, 0, 0.0),
    (4, 0, 2, 1, 32, None, 0, 0.0),
    (0, 9, 2, 1, 32, None, 0, 0.0),
]


def attend(
    operators: Any, q: Tensor, k: Tensor, v: Tensor, left: Any, right: Any, softcap: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    reach = (UNBOUNDED if x is None else x for x in (left, right))
    operators.attention(q, k, v, out, lse, *reach, q.shape[-1] ** -0.5, softcap)
    return out, lse


def make(seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, head_dim: int, dtype: Any) -> Any:
    shapes = (seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads)
    return [torch.randn(2, *shape, head_dim).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype, operators):
    *sizes, left, right, softcap = case
    q, k, v = make(*sizes, dtype)
    out, lse = attend(operators, q, k, v, left, right, softcap)
    window = tuple(-1 if x is None else x for x in (left, right))
    how = {"causal": False, "window_size": window, "softcap": softcap}
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), **how)
    with reference.eager_arithmetic():
        plain, _ = reference.attention(q, k, v, **how)
    assert_as_accurate(out, plain, exact, "out")
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert (lse[~seen] == -torch.inf).all()
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_with_any_number_of_threads_and_batch_mates(dtype, operators):
    q, k, v = make(150, 150, 8, 2, 64, dtype)
    expected = attend(operators, q, k, v, 40, 0, 0.0)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for x, y in zip(attend(operators, q, k, v, 40, 0, 0.0), expected, strict=True):
            assert torch.equal(x, y)
    alone = attend(operators, q[1:], k[1:], v[1:], 40, 0, 0.0)
    for x, y in zip(alone, expected, strict=True):
        assert torch.equal(x, y[1:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_views(dtype, operators):
    """Heads within larger rows, aligned to nothing; heads first."""
    tensors = make(70, 70, 8, 2, 40, dtype)
    expected = attend(operators, *tensors, 30, 0, 0.0)
    views = []
    for x in tensors:
        heads = x.shape[2]
        memory = torch.full((2, 70, heads * 43 + 1), float("nan"), dtype=dtype)
        views.append(memory[..., 1:].unflatten(-1, (heads, 43))[..., :40].copy_(x))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for strided in (views, turned):
        for x, y in zip(attend(operators, *strided, 30, 0, 0.0), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_scores(dtype, operators):
    """Scores of any size, the largest of all in the last block."""
    q, k, v = make(1, 200, 2, 1, 16, dtype)
    k[:, -1], q[:] = 100.0, 100.0
    out, lse = attend(operators, q, k, v, None, 0, 0.0)
    torch.testing.assert_close(out, v[:, -1:].expand_as(out))
    assert (lse == 16 * 100.0 * 100.0 / 4).all()
