"""rms_norm: values and gradients on every backend."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOATS, assert_matches_reference
from torch import Tensor

from mistral_kernels.ops import reference
from mistral_kernels.ops.rms_norm import rms_norm

# In backward, several programs share each row of the widest shapes.
SHAPES = [
    (0, 64),
    (1, 4096),
    (65, 1),
    (63, 7),
    (65, 64),
    (2, 33, 111),
    (9, 1000),
    (5, 9001),
    (3, 16384),
]

# Half of all combinations: every pair of values of shape, dtype and residual occurs.
CASES = [
    pytest.param(
        *(shape, dtype, residual),
        id=f"{'x'.join(map(str, shape))}-{dtype}{'-residual' if residual else ''}",
        marks=[] if i % 3 == 2 else [pytest.mark.long],
    )
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(FLOATS)
    for residual in (False, True)
    if (i + j + residual) % 2 == 0
]


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    residual: bool = False,
) -> dict[str, Tensor]:
    shapes = {"x": shape, "weight": shape[-1:], **({"residual": shape} if residual else {})}
    return {
        name: torch.randn(shape, device=device).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("shape", "dtype", "residual"), CASES)
def test_values_and_gradients(shape, dtype, residual, backend, device):
    inputs = make_inputs(shape, dtype, device, residual)
    if residual and shape[-1] == 1:
        # With one channel, y is the sign of x + residual. Give both the same sign: if they
        # canceled, rounding alone would decide the sign of y.
        inputs["residual"].detach().copysign_(inputs["x"].detach())
    assert_matches_reference(rms_norm, reference.rms_norm, inputs)
