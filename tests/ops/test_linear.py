"""ops.linear: few rows, computed by csrc's kernel or split over threads, and many rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.helpers import FLOATS, assert_as_accurate, assert_matches_reference

from mistral_kernels.ops.linear import KERNEL_ROWS, linear


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 32, 33, 513])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 48), (8, 1), (67, 19), (1, 5)])
def test_values_and_gradients(rows, out_features, in_features, dtype, device):
    inputs = {
        "x": torch.randn(rows, in_features, device=device).to(dtype).requires_grad_(),
        "weight": torch.randn(out_features, in_features, device=device).to(dtype).requires_grad_(),
    }
    assert_matches_reference(linear, lambda x, weight: F.linear(x, weight), inputs)


@pytest.mark.usefixtures("two_threads")
def test_transposed_and_strided_inputs():
    x, weight = torch.randn(3, 40)[:, ::2], torch.randn(20, 16).T
    assert torch.allclose(linear(x, weight), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("in_features", [1, 19, 48, 133])
def test_few_rows_without_gradients(in_features, dtype, kernel_rows):
    """One kernel computes 1 to `KERNEL_ROWS` rows: a row has the same bits in any batch."""
    x = torch.randn(KERNEL_ROWS + 1, in_features).to(dtype)
    weight = torch.nn.Parameter(torch.randn(67, in_features).to(dtype))
    with torch.no_grad():
        few = linear(x[:KERNEL_ROWS], weight)
        for i in range(KERNEL_ROWS):
            assert torch.equal(linear(x[i : i + 1], weight), few[i : i + 1])
        assert kernel_rows == [KERNEL_ROWS] + [1] * KERNEL_ROWS
        many = linear(x, weight)
    assert len(kernel_rows) == KERNEL_ROWS + 1
    exact = F.linear(x.double(), weight.double())
    for y in (few, many):
        assert_as_accurate(y, F.linear(x, weight)[: len(y)], exact[: len(y)], "y")


def test_calls_that_pytorch_computes(kernel_rows):
    x, weight = torch.randn(3, 16), torch.randn(20, 16)
    assert linear(x, weight.clone().requires_grad_()).requires_grad
    assert linear(x.clone().requires_grad_(), weight).requires_grad
    assert linear(x, torch.randn(16, 20).T).shape == (3, 20)
    assert linear(x.as_subclass(_Subclass), weight).__class__ is _Subclass
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.bfloat16())
    batched = torch.func.vmap(linear, in_dims=(0, None))(x[:, None], weight)
    assert_as_accurate(batched[:, 0], F.linear(x, weight), x.double() @ weight.double().T, "y")
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
    assert not kernel_rows


class _Subclass(torch.Tensor):
    pass
