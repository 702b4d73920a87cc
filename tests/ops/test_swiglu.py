"""swiglu: values and gradients on every backend."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOATS, assert_matches_reference

from mistral_kernels.ops import reference
from mistral_kernels.ops.swiglu import swiglu

eager = reference.eager_arithmetic()(reference.swiglu)
both_forms = pytest.mark.parametrize("fused", [False, True], ids=["two", "fused"])


def make_inputs(shape, dtype, device, fused=False):
    """Return gate and up of this shape, or a fused gate."""
    if fused:
        shape = (*shape[:-1], 2 * shape[-1])
    return {
        name: (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
        for name in (("gate",) if fused else ("gate", "up"))
    }


LONG = [(5, 0), (1,), (2, 3, 1000), (3, 5000)]


@both_forms
@pytest.mark.parametrize(
    "shape", [(0, 8), (65, 111), *(pytest.param(x, marks=pytest.mark.long) for x in LONG)]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(shape, dtype, fused, backend, device):
    assert_matches_reference(swiglu, eager, make_inputs(shape, dtype, device, fused))


def test_scalars(backend, device):
    assert_matches_reference(swiglu, eager, make_inputs((), torch.float32, device))


@pytest.mark.long
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_halves_of_a_fused_projection(dtype, backend, device):
    """With any strides, the fused call has the bits of two halves and one contiguous gradient."""
    wide = torch.randn(5, 7, 66, device=device).to(dtype)
    spread = torch.stack((wide, wide), dim=-1)[..., 0]
    for fused in (wide, wide.transpose(0, 1), wide[..., :64], spread):
        halves = fused.chunk(2, dim=-1)
        inputs = dict(
            zip(("gate", "up"), (x.detach().requires_grad_() for x in halves), strict=True)
        )
        assert_matches_reference(swiglu, eager, inputs, strided_gradients=True)
        whole = {"gate": fused.detach().requires_grad_()}
        assert_matches_reference(swiglu, eager, whole, strided_gradients=True)
        outs = swiglu(**inputs), swiglu(**whole)
        assert torch.equal(*outs)
        dy = torch.randn_like(outs[0])
        *parts, dwhole = torch.autograd.grad(outs, (*inputs.values(), *whole.values()), (dy, dy))
        assert torch.equal(torch.cat(parts, dim=-1), dwhole)
        assert dwhole.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_gates(dtype, backend, device):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device).to(dtype)
    out = swiglu(gate, torch.full_like(gate, 2.0))
    assert out.tolist()[2:] == (2 * gate).tolist()[2:]
    assert (out[:2].abs() < 1e-6).all()
