"""Tests of csrc's attention over whole sequences, in each instruction set of this processor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.helpers import FLOATS, assert_as_accurate
from torch import Tensor

from mistral_kernels.ops import reference
from mistral_kernels.ops.attention import ops
from mistral_kernels.ops.attention.ops import attention_forward_op
from mistral_kernels.ops.attention.spec import AttentionSpec, Sequences
from mistral_kernels.ops.attention.window import Window

# seqlen_q, seqlen_k, heads, kv heads, head_dim, left and right window, softcap.
CASES = [
    (1, 1, 1, 1, 1, 0, 0, 0.0),
    (67, 67, 8, 2, 128, 16, 0, 0.0),
    (200, 133, 4, 4, 64, None, 0, 0.0),
    (33, 150, 12, 1, 80, 20, 5, 0.0),
    (130, 130, 8, 2, 17, None, None, 30.0),
    (5, 300, 71, 1, 64, 100, 0, 0.0),
    (10, 4, 2, 1, 256, None, 0, 0.0),
    (7, 700, 6, 3, 33, 90, 0, 0.0),
    (97, 401, 14, 2, 72, 200, 3, 0.0),
    (4, 0, 2, 1, 32, None, 0, 0.0),
    (0, 9, 2, 1, 32, None, 0, 0.0),
]


def attend(
    operators: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Any,
    right: Any,
    softcap: float,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    flat = options_of(q, k, left, right, softcap=softcap, alibi_slopes=slopes)
    return operators.attention_forward(q, k, v, *flat, True)


def options_of(q: Tensor, k: Tensor, left: Any, right: Any, **options: Any) -> tuple[Any, ...]:
    sequences = Sequences(None, None, q.shape[1], k.shape[1])
    window = Window(*(-1 if x is None else x for x in (left, right)))
    return AttentionSpec(sequences, window, **options).flatten()


@pytest.fixture
def no_fallback(monkeypatch):
    """Make the backward pass in PyTorch fail, so that tests of csrc's cannot pass with it."""
    monkeypatch.setattr(ops._backward_op, "_torch", None)


def make(seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, head_dim: int, dtype: Any) -> Any:
    shapes = (seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads)
    return [torch.randn(2, *shape, head_dim).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("alibi", [None, "shared", "per-batch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, alibi, dtype, operators):
    *sizes, left, right, softcap = case
    q, k, v = make(*sizes, dtype)
    heads = q.shape[2]
    slopes = {"shared": torch.rand(heads), "per-batch": torch.rand(2, heads)}.get(alibi)
    out, lse = attend(operators, q, k, v, left, right, softcap, slopes)
    window = tuple(-1 if x is None else x for x in (left, right))
    options = {"window_size": window, "softcap": softcap, "alibi_slopes": slopes}
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), **options)
    with reference.eager_arithmetic():
        plain, _ = reference.attention(q, k, v, **options)
    assert_as_accurate(out, plain, exact, "out")
    has_keys = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), has_keys)
    assert (lse[~has_keys] == -torch.inf).all()
    torch.testing.assert_close(lse[has_keys].double(), exact_lse[has_keys], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_do_not_depend_on_threads_or_batch(dtype, operators):
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
def test_strided_inputs(dtype, operators):
    """Check unaligned heads inside larger rows, and tensors with heads before tokens."""
    tensors = make(70, 70, 8, 2, 40, dtype)
    expected = attend(operators, *tensors, 30, 0, 0.0)
    views = []
    for x in tensors:
        heads = x.shape[2]
        memory = torch.full((2, 70, heads * 43 + 1), float("nan"), dtype=dtype)
        views.append(memory[..., 1:].unflatten(-1, (heads, 43))[..., :40].copy_(x))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for strided in (views, heads_first):
        for x, y in zip(attend(operators, *strided, 30, 0, 0.0), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_scores(dtype, operators):
    """Check large scores, of which the largest is in the last block of keys."""
    q, k, v = make(1, 200, 2, 1, 16, dtype)
    k[:, -1], q[:] = 100.0, 100.0
    out, lse = attend(operators, q, k, v, None, 0, 0.0)
    torch.testing.assert_close(out, v[:, -1:].expand_as(out))
    assert (lse == 16 * 100.0 * 100.0 / 4).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packed(dtype, operators):
    """Check that sequences have the same bits as alone, and other tokens an output of 0."""
    lengths = [(3, 3), (0, 0), (70, 90), (0, 5), (4, 0), (1, 130)]
    ends_q, ends_k = (
        torch.tensor([0, *itertools.accumulate(x)]).int() for x in zip(*lengths, strict=True)
    )
    q, k, v = (x[0] for x in make(int(ends_q[-1]) + 2, int(ends_k[-1]) + 1, 6, 2, 40, dtype))
    slopes = torch.rand(len(lengths), 6)
    sequences = Sequences(ends_q, ends_k, 70, 130)
    spec = AttentionSpec(sequences, Window(50, 0), softcap=20.0, alibi_slopes=slopes)
    out, lse = attention_forward_op(q, k, v, *spec.flatten(), True)
    assert not attention_forward_op(q, k, v, *spec.flatten(), False)[1].numel()
    spans = (itertools.pairwise(ends.tolist()) for ends in (ends_q, ends_k))
    for i, ((begin, end), keys) in enumerate(zip(*spans, strict=True)):
        sequence = (q[None, begin:end], *(x[None, slice(*keys)] for x in (k, v)))
        alone, alone_lse = attend(operators, *sequence, 50, 0, 20.0, slopes[i])
        assert torch.equal(out[begin:end], alone[0])
        assert torch.equal(lse[:, begin:end], alone_lse[0])
    assert not out[ends_q[-1] :].any()
    assert (lse[:, ends_q[-1] :] == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [1, 3, 5]}, "cu_seqlens_q must begin with 0 and never decrease"),
        ({"cu_seqlens_q": [0, 4, 3]}, "cu_seqlens_q must begin with 0 and never decrease"),
        ({"cu_seqlens_k": [0, 1 << 26, 5]}, "cu_seqlens_k must begin with 0 and never decrease"),
        ({"cu_seqlens_k": [0, 3, 6]}, "cu_seqlens_k must end within the 5 tokens of k, got 6"),
        ({"max_seqlen_q": 2}, "max_seqlen_q must be at least 3, the longest .*, got 2"),
    ],
)
def test_bad_cu_seqlens_raise(change, message, operators):
    q, k, v = (torch.randn(5, n, 8) for n in (4, 2, 2))
    offsets = {name: torch.tensor([0, 2, 5]).int() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    sequences = Sequences(**offsets, max_seqlen_q=3, max_seqlen_k=3)
    for name, value in change.items():
        new = torch.tensor(value).int() if isinstance(value, list) else value
        sequences = sequences._replace(**{name: new})
    arguments = AttentionSpec(sequences, Window(-1, 0)).flatten()
    with pytest.raises(ValueError, match=message):
        attention_forward_op(q, k, v, *arguments, False)


# As CASES, with ALiBi's number of dimensions.
GRADIENT_CASES = [
    *((*case, 0) for case in CASES),
    (390, 421, 4, 2, 40, 100, 30, 0.0, 0),
    (200, 500, 2, 2, 33, 250, None, 5.0, 0),
    (67, 250, 6, 3, 48, None, 0, 0.0, 1),
    (230, 200, 4, 1, 16, 64, 10, 20.0, 2),
]


def assert_gradients_as_accurate(grads: Any, tensors: Any, dout: Tensor, **options: Any) -> None:
    def differentiated(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out, _ = reference.attention(*leaves, **options)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    exact = differentiated(torch.float64)
    with reference.eager_arithmetic():
        plain = differentiated(dout.dtype)
    for name, *values in zip("qkv", grads, plain, exact, strict=True):
        assert_as_accurate(*values, f"gradient of {name}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients(case, dtype, operators, no_fallback):
    *sizes, left, right, softcap, slopes_dim = case
    q, k, v = make(*sizes, dtype)
    slopes = torch.rand((2, sizes[2])[-slopes_dim:]) if slopes_dim else None
    flat = options_of(q, k, left, right, softcap=softcap, alibi_slopes=slopes)
    dout = torch.randn(q.shape).to(dtype)
    out, lse = operators.attention_forward(q, k, v, *flat, True)
    grads = operators.attention_backward(dout, q, k, v, out, lse, *flat, True, True, True)
    window = tuple(-1 if x is None else x for x in (left, right))
    options = {"causal": False, "window_size": window, "softcap": softcap, "alibi_slopes": slopes}
    assert_gradients_as_accurate(grads, (q, k, v), dout, **options)
    has_keys = torch.isfinite(lse).transpose(1, 2)
    assert not grads[0][~has_keys].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_gradients(dtype, operators, no_fallback):
    """Check that they depend neither on threads and the batch nor on which are requested."""
    q, k, v = make(450, 450, 4, 2, 24, dtype)
    dout = torch.randn(q.shape).to(dtype)
    flat = options_of(q, k, 260, 0)
    out, lse = operators.attention_forward(q, k, v, *flat, True)
    tensors = dout, q, k, v, out, lse

    def differentiate(*tensors: Tensor, needed: tuple[bool, ...] = (True,) * 3) -> Any:
        return operators.attention_backward(*tensors, *flat, *needed)

    expected = differentiate(*tensors)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for x, y in zip(differentiate(*tensors), expected, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(differentiate(*(x[1:] for x in tensors)), expected, strict=True):
        assert torch.equal(x, y[1:])
    for needed in itertools.product((True, False), repeat=3):
        for x, y, need in zip(
            differentiate(*tensors, needed=needed), expected, needed, strict=True
        ):
            assert torch.equal(x, y if need else y.new_empty(0))
    # Without a log-sum-exp, the operator computes it.
    for x, y in zip(differentiate(*tensors[:-1], lse.new_empty(0)), expected, strict=True):
        assert torch.equal(x, y)
    strided = [torch.stack((x, x), dim=-1)[..., 0] for x in tensors[:-1]]
    for x, y in zip(differentiate(*strided, lse), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_packed_sequences(dtype, operators, no_fallback):
    """Check that sequences have the same bits as alone, and other tokens gradients of 0."""
    lengths = [(3, 3), (0, 0), (70, 290), (0, 5), (4, 0), (1, 130)]
    ends_q, ends_k = (
        torch.tensor([0, *itertools.accumulate(x)]).int() for x in zip(*lengths, strict=True)
    )
    q, k, v = (x[0] for x in make(int(ends_q[-1]) + 2, int(ends_k[-1]) + 1, 6, 2, 40, dtype))
    dout, slopes = torch.randn(q.shape).to(dtype), torch.rand(len(lengths), 6)
    spec = AttentionSpec(
        Sequences(ends_q, ends_k, 70, 290), Window(50, 0), softcap=20.0, alibi_slopes=slopes
    )
    out, lse = attention_forward_op(q, k, v, *spec.flatten(), True)
    tensors = dout, q, k, v, out, lse
    grads = operators.attention_backward(*tensors, *spec.flatten(), True, True, True)
    spans = (itertools.pairwise(ends.tolist()) for ends in (ends_q, ends_k))
    for i, ((begin, end), keys) in enumerate(zip(*spans, strict=True)):
        rows, keys = slice(begin, end), slice(*keys)
        slices = rows, rows, keys, keys, rows
        sequence = [x[None, part] for x, part in zip(tensors[:-1], slices, strict=True)]
        flat = options_of(sequence[1], sequence[2], 50, 0, softcap=20.0, alibi_slopes=slopes[i])
        alone = operators.attention_backward(*sequence, lse[None, :, rows], *flat, True, True, True)
        for x, y, part in zip(grads, alone, (rows, keys, keys), strict=True):
            assert torch.equal(x[part], y[0])
    for x, end in zip(grads, (ends_q[-1], ends_k[-1], ends_k[-1]), strict=True):
        assert not x[end:].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("factor", [2, 16, 128])
def test_gradients_for_large_scores(factor, dtype, operators):
    """Check rows where few keys have nearly all weight: rounding must not change their sum.

    Queries and keys are integers, so that every sum of products is exact: otherwise, the rounding
    of a score could choose between two keys.
    """
    _, _, v = make(100, 300, 4, 2, 64, dtype)
    q, k = (torch.randint(-3, 4, shape).to(dtype) for shape in ((2, 100, 4, 64), v.shape))
    q *= factor
    flat = options_of(q, k, None, 0)
    dout = torch.randn(q.shape).to(dtype)
    out, lse = operators.attention_forward(q, k, v, *flat, True)
    grads = operators.attention_backward(dout, q, k, v, out, lse, *flat, True, True, True)
    assert_gradients_as_accurate(grads, (q, k, v), dout, causal=True)
