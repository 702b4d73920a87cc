"""SwiGLU: silu(gate) * up, the gated activation of Mistral's feed-forward (arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.dispatch import require_torch_backend


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise and differentiable.

    Args:
        gate, up: equal shapes and floating-point dtypes, any strides (the two halves of a fused
            projection go in as views).

    Raises:
        ValueError: shapes or dtypes differ.
        TypeError: gate is not floating point.
    """
    require_torch_backend("swiglu")
    if not gate.is_floating_point():
        raise TypeError(f"gate must be floating point, got {gate.dtype}")
    if gate.shape != up.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if gate.dtype != up.dtype:
        raise ValueError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    activated = F.silu(gate)
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)
