"""ops.matmul: csrc's kernel for many rows, and where it is chosen."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from support.helpers import FLOATS, assert_as_accurate
from torch import Tensor

from mistral_kernels.ops import compiler, extension, matmul
from mistral_kernels.ops.linear import linear


def in_memory(rows: int, cols: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Return a random matrix with contiguous rows or columns, and gaps between them."""
    shape = (rows, cols + 3) if layout == "rows" else (cols, rows + 3)
    if dtype == torch.int8:
        whole = torch.randint(-128, 128, shape, dtype=dtype)
    else:
        whole = torch.randn(shape).to(dtype)
    return whole[:, :cols] if layout == "rows" else whole[:, :rows].T


def assert_product(operators, rows: int, inner: int, cols: int, dtype: torch.dtype) -> None:
    """Compare random products of these sizes with float64."""
    a = in_memory(rows, inner, dtype, random.choice(("rows", "cols")))
    scales = torch.rand(cols) if random.random() < 0.4 else None
    b_dtype = dtype if scales is None else torch.int8
    b = in_memory(inner, cols, b_dtype, random.choice(("rows", "cols")))
    accumulate, wide = random.random() < 0.5, random.random() < 0.5
    c = in_memory(rows, cols, torch.float32 if wide else dtype, "rows")
    exact = a.double() @ b.double() * (1 if scales is None else scales.double())
    plain = (a.float() @ b.float() * (1 if scales is None else scales)).to(c.dtype)
    if accumulate:
        exact += c.double()
        plain += c
    around = c.as_strided((rows, cols + 3), c.stride()).clone()
    operators.matmul_(c, a, b, scales, accumulate)
    assert_as_accurate(c, plain, exact, "c")
    assert torch.equal(c.as_strided((rows, cols + 3), c.stride())[:, cols:], around[:, cols:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_shape_and_layout(dtype, operators):
    """The sizes include parts of a tile, and several blocks of each dimension."""
    for _ in range(12):
        assert_product(
            operators,
            random.randint(1, 300),
            random.choice((1, 2, 7, 64, 127, 256, 257, 600, 1031)),
            random.choice((1, 3, 16, 31, 97, 256, 300, 521)),
            dtype,
        )


@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (1, 1, 1)], ids=str)
def test_empty_products(sizes, operators):
    rows, inner, cols = sizes
    a, b = torch.randn(rows, inner), torch.randn(inner, cols)
    c = torch.full((rows, cols), 3.0)
    operators.matmul_(c, a, b, None, True)
    assert torch.allclose(c, a @ b + 3)
    operators.matmul_(c, a, b, None, False)
    assert torch.allclose(c, a @ b)


def test_bits_depend_on_neither_threads_nor_other_rows(operators):
    a, b = torch.randn(517, 700), torch.randn(700, 333)
    expected = a.new_empty(517, 333)
    operators.matmul_(expected, a, b, None, False)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        c = torch.empty_like(expected)
        operators.matmul_(c, a, b, None, False)
        assert torch.equal(c, expected)
    part = a.new_empty(60, 333)
    operators.matmul_(part, a[100:160], b, None, False)
    assert torch.equal(part, expected[100:160])


def test_nonfinite_values_stay_in_their_row_and_column(operators):
    a, b = torch.randn(70, 300), torch.randn(300, 65)
    a[3, 299], a[69, 0], b[17, 64] = float("inf"), float("nan"), float("-inf")
    c = a.new_empty(70, 65)
    operators.matmul_(c, a, b, None, False)
    exact = a.double() @ b.double()
    assert torch.equal(torch.isfinite(c), torch.isfinite(exact))
    torch.testing.assert_close(c.double(), exact, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.ones(3)}, ValueError, r"^a and b must be .*, got \(3,\) and \(4, 5\)$"),
        ({"b": torch.ones(3, 5)}, ValueError, r"^a and b must be .*, got \(3, 4\) and \(3, 5\)$"),
        ({"c": torch.ones(5, 3)}, ValueError, r"^c must be \(3, 5\), got \(5, 3\)$"),
        ({"c": torch.ones(5, 3).T}, ValueError, "^c's last dimension must be contiguous"),
        ({"c": torch.ones(5).expand(3, 5)}, ValueError, "^c must not be an expanded tensor"),
        ({"c": torch.ones(3, 5).half()}, TypeError, "^c must be torch.float32 or torch.float32 "),
        (
            {"b": torch.ones(4, 5).half()},
            TypeError,
            "^b must have a's dtype torch.float32, got torch.float16$",
        ),
        ({"scales": torch.ones(5)}, TypeError, "^b must be torch.int8, got torch.float32$"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "c": torch.ones(3, 5),
        "a": torch.ones(3, 4),
        "b": torch.ones(4, 5),
        "scales": None,
        "accumulate": False,
    }
    with pytest.raises(error, match=message):
        matmul._matmul_op(*(arguments | change).values())


def test_every_instruction_set_has_a_choice():
    names = {x for machine in ("x86_64", "aarch64") for x in compiler.instruction_sets_of(machine)}
    assert set(matmul._MULTIPLIED_BY_TORCH) == names


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("is_fast", [True, False])
def test_the_choice_is_followed(dtype, is_fast, monkeypatch):
    """Many rows, and gradients, are multiplied by csrc's kernel unless PyTorch is fast."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    monkeypatch.setattr(matmul, "multiplied_by_torch", lambda name: {dtype} if is_fast else set())
    shapes = []

    def call(c, a, b, *rest, operator=matmul._matmul_op):
        shapes.append((*a.shape, b.shape[1]))
        return operator(c, a, b, *rest)

    monkeypatch.setattr(matmul, "_matmul_op", call)
    x = torch.randn(40, 16).to(dtype).requires_grad_()
    weight = torch.randn(20, 16).to(dtype).requires_grad_()
    y = linear(x, weight)
    grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert shapes == ([] if is_fast else [(40, 16, 20), (40, 20, 16), (20, 40, 16)])
    exact = torch.autograd.grad(F.linear(x.double(), weight.double()).sum(), (x, weight))
    for actual, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, weight = torch.randn(40, 16), torch.randn(20, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = linear(x, weight)
        assert linear(x.double(), weight.double()).dtype == torch.float64
    assert y.dtype == dtype
    (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, x.sum(0).expand(20, 16), rtol=0.03, atol=0.3)
