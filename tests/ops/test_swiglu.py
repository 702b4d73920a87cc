"""swiglu: values, gradients, strides, bad input."""

from __future__ import annotations

import pytest
import torch
from helpers import FLOATS, assert_matches_reference

from mistral_kernels.ops import reference
from mistral_kernels.ops.swiglu import swiglu

eager = reference.eager_arithmetic()(reference.swiglu)


@pytest.mark.parametrize("shape", [(0, 8), (1,), (65, 111), (2, 3, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_values_and_gradients(shape, dtype, device):
    inputs = {
        name: (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
        for name in ("gate", "up")
    }
    assert_matches_reference(swiglu, eager, inputs)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_halves_of_a_fused_projection(dtype, device):
    gate, up = torch.randn(5, 7, 64, device=device).to(dtype).transpose(0, 1).chunk(2, dim=-1)
    inputs = {"gate": gate.requires_grad_(), "up": up.requires_grad_()}
    assert_matches_reference(swiglu, eager, inputs, strided_gradients=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_large_gates(dtype, device):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device).to(dtype)
    out = swiglu(gate, torch.full_like(gate, 2.0))
    assert out.tolist()[2:] == (2 * gate).tolist()[2:]
    assert (out[:2].abs() < 1e-6).all()


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (X, X[0], ValueError, r"up must have gate's shape \(3, 4\), got \(4,\)"),
        (X, X.half(), ValueError, "up must have gate's dtype torch.float32, got torch.float16"),
        (X.int(), X.int(), TypeError, "gate must be floating point, got torch.int32"),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)


def test_without_gradients(device):
    """The path of inference multiplies in place, and leaves its inputs alone."""
    gate, up = torch.randn(2, 5, 11, device=device)
    before = gate.clone(), up.clone()
    expected = swiglu(gate, up)
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), expected)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
