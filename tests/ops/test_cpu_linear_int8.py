"""Products with an int8 weight: csrc's kernel, and the function that chooses between backends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.helpers import FLOATS, assert_as_accurate
from torch import Tensor

from mistral_kernels.ops import linear_int8 as op
from mistral_kernels.ops import matmul
from mistral_kernels.ops.linear import KERNEL_ROWS
from mistral_kernels.ops.linear_int8 import linear_int8, quantize_int8


def make_weight(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Return a random int8 weight and scales of several magnitudes."""
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    return weight, torch.rand(out_features) * 10.0 ** torch.randint(-3, 1, (out_features,))


def dequantized(weight: Tensor, scales: Tensor) -> Tensor:
    return weight.double() * scales.double()[:, None]


def assert_product_is_accurate(y: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> None:
    """Check that y is as accurate as PyTorch's product with the dequantized weight in x's dtype."""
    wide = dequantized(weight, scales)
    assert_as_accurate(y, F.linear(x, wide.to(x.dtype)), F.linear(x.double(), wide), "y")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (4, 64), (7, 3), (67, 133), (6, 1100)]
)
def test_kernel_has_the_same_bits_for_any_number_of_rows(
    out_features, in_features, dtype, operators
):
    weight, scales = make_weight(out_features, in_features)
    x = torch.randn(33, in_features).to(dtype)
    alone = torch.cat([operators.linear_int8(row, weight, scales) for row in x.split(1)])
    assert_product_is_accurate(alone, x, weight, scales)
    for rows in (*range(18), 32, 33):
        assert torch.equal(operators.linear_int8(x[:rows], weight, scales), alone[:rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernel_is_exact(dtype, operators):
    """Multiplication by the identity returns every int8 value exactly, from every position."""
    weight = torch.arange(-128, 128, dtype=torch.int8).repeat(7, 1)
    weight = torch.stack([row.roll(31 * i) for i, row in enumerate(weight)])
    x = torch.eye(256).to(dtype)
    y = operators.linear_int8(x, weight, torch.ones(7))
    assert torch.equal(y.to(torch.int8), weight.T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernel_with_unaligned_rows_and_gaps(dtype, operators):
    weight, scales = make_weight(30, 77)
    x = torch.randn(5, 77).to(dtype)
    expected = operators.linear_int8(x, weight, scales)
    memory = torch.full((5 * 80 + 1,), float("nan"), dtype=dtype)
    strided_x = memory[1:].view(-1, 80)[:, :77].copy_(x)
    strided_weight = torch.full((30 * 80 + 1,), 99, dtype=torch.int8)[1:].view(-1, 80)[:, :77]
    strided_weight.copy_(weight)
    assert torch.equal(operators.linear_int8(strided_x, strided_weight, scales), expected)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernel_with_any_number_of_threads(dtype, rows, operators):
    weight, scales = make_weight(1031, 1024)
    x = torch.randn(rows, 1024).to(dtype)
    expected = operators.linear_int8(x, weight, scales)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(operators.linear_int8(x, weight, scales), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernel_with_large_and_nonfinite_values(dtype, operators):
    """Infinity and NaN affect their row and output alone; a sum may exceed the output's range."""
    inf, nan = float("inf"), float("nan")
    weight, scales = make_weight(9, 70)
    scales = scales.clamp_min_(0.01)
    x = torch.randn(6, 70)
    x[1, 3], x[2, 69], x[3, 64], scales[7] = inf, nan, -inf, nan
    x[4], weight[8], scales[8] = 200.0, 127, 1e-3  # the unscaled sum exceeds float16
    x = x.to(dtype)
    actual = operators.linear_int8(x, weight, scales)
    exact = F.linear(x.double(), dequantized(weight, scales))
    assert not torch.isfinite(exact[1:4]).any()
    assert torch.isfinite(exact[4, 8])
    tolerance = {"rtol": 0.05, "atol": 0.2, "equal_nan": True}
    torch.testing.assert_close(actual, exact.to(dtype), **tolerance)


X = torch.randn(3, 5)
WEIGHT, SCALES = make_weight(7, 5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_quantization(dtype):
    """Values are rounded to the nearest, and the largest magnitude of each row becomes 127."""
    weight = (torch.randn(65, 43) * 10.0 ** torch.randint(-3, 3, (65, 1))).to(dtype)
    weight[3] = 0
    quantized, scales = quantize_int8(weight)
    assert quantized.dtype == torch.int8
    assert scales.dtype == torch.float32
    largest = quantized.int().abs().amax(dim=1)
    assert (largest[torch.arange(65) != 3] == 127).all()
    assert largest[3] == 0
    error = (dequantized(quantized, scales) - weight.double()).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize(
    "weight", [torch.randn(3), torch.ones(3, 4, dtype=torch.int8)], ids=["vector", "int8"]
)
def test_quantization_requires_a_floating_point_matrix(weight):
    with pytest.raises(ValueError, match=r"^weight must be \(out_f.* of a floating-point"):
        quantize_int8(weight)


@pytest.mark.parametrize("torch_is_fast", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_rows_and_many(dtype, torch_is_fast, kernel_rows, monkeypatch):
    """One kernel computes few rows. Another one, or PyTorch block by block, computes more."""
    monkeypatch.setattr(op, "_BLOCK", 1000)
    dtypes = {dtype} if torch_is_fast else set()
    monkeypatch.setattr(matmul, "multiplied_by_torch", lambda name: dtypes)
    weight, scales = make_weight(67, 48)
    limit = op._KERNEL_ROWS if torch_is_fast else KERNEL_ROWS
    x = torch.randn(limit + 1, 48).to(dtype)
    few, many = (linear_int8(x[:rows], weight, scales) for rows in (limit, limit + 1))
    assert kernel_rows == [limit]
    for y in (few, many):
        assert_product_is_accurate(y, x[: len(y)], weight, scales)
    for i in range(0, limit, 7):
        assert torch.equal(linear_int8(x[i : i + 1], weight, scales), few[i : i + 1])


def test_non_contiguous_inputs_are_computed_by_pytorch(kernel_rows):
    weight, scales = make_weight(20, 16)
    x = torch.randn(3, 16)
    for transposed in ((x, weight.T.contiguous().T), (x.T.contiguous().T, weight)):
        assert_product_is_accurate(linear_int8(*transposed, scales), x, weight, scales)
    assert not kernel_rows


def test_compiled():
    weight, scales = make_weight(20, 16)
    x = torch.randn(3, 16)
    compiled = torch.compile(linear_int8, fullgraph=True, backend="eager")
    assert_product_is_accurate(compiled(x, weight, scales), x, weight, scales)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.to("meta")}, NotImplementedError, "x must be on the CPU .*, got meta; use"),
        ({"x": X.clone().requires_grad_()}, NotImplementedError, "x must not require a gradi"),
        ({"x": X[:, :4]}, ValueError, r"out_features, in_features\), got \(3, 4\) and \(7, 5\)"),
        ({"x": X[0]}, ValueError, r"out_features, in_features\), got \(5,\) and \(7, 5\)"),
        ({"scales": SCALES[:6]}, ValueError, r"scales must be \(7,\), got \(6,\)"),
        ({"x": X.int()}, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.i"),
        ({"weight": WEIGHT.short()}, TypeError, "weight must be torch.int8, got torch.int16"),
        ({"scales": SCALES.half()}, TypeError, "scales must be torch.float32, got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like x, got meta"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        linear_int8(**{"x": X, "weight": WEIGHT, "scales": SCALES} | change)
