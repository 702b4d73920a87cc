"""Rotary position embedding of queries and keys (arXiv:2104.09864).

    angle_i(p) = p * theta^(-2i / d)            i = 0 .. d/2 - 1, p the token's absolute position
    (a, b) -> (a cos - b sin, b cos + a sin)

A pair (a, b) is channels (i, i + d/2) in Hugging Face checkpoints (half-split), (2i, 2i + 1) in raw
Mistral checkpoints (interleaved). Angles are formed in float64, tables and arithmetic are float32:
in bfloat16 position 4095 itself would become 4096, a whole radian off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops import reference
from mistral_kernels.ops.dispatch import require_torch_backend


def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, each (num_positions, head_dim / 2) in float32.

    Raises `ValueError` for an odd `head_dim`.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, for channels turn in pairs, got {head_dim}")
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, theta ** (-channels / head_dim))
    return angles.cos().float(), angles.sin().float()


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k to their tokens' positions. Differentiable; the inputs are left as they are.

    Args:
        q: (..., num_heads, head_dim), float16, bfloat16, float32 or float64.
        k: (..., num_kv_heads, head_dim), of q's dtype.
        cos, sin: (num_positions, head_dim / 2), from `rotary_tables`.
        positions: (...), int32 or int64 in [0, num_positions): each token's index in its own
            sequence.
        interleaved: pair channels (2i, 2i + 1) in place of (i, i + head_dim / 2).

    Returns:
        The rotated q and k, new tensors of the same shapes and dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or, on the CPU,
            a position outside the tables.
        TypeError: q is not floating point.
    """
    require_torch_backend("apply_rotary")
    if q.ndim < 2:
        raise ValueError(f"q must be (..., num_heads, head_dim), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, got {q.dtype}")
    head_dim = q.shape[-1]
    if k.shape[-1] != head_dim or k.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"k must be (..., num_kv_heads, head_dim) with the leading dimensions and head_dim of "
            f"q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if k.dtype != q.dtype:
        raise ValueError(f"k must have q's dtype {q.dtype}, got {k.dtype}")
    if positions.shape != q.shape[:-2]:
        raise ValueError(
            f"positions must be {tuple(q.shape[:-2])}, one for each token of q, "
            f"got {tuple(positions.shape)}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions must be torch.int32 or torch.int64, got {positions.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape[-1] * 2 != head_dim or len(table) != len(cos):
            raise ValueError(
                f"{name} must be (num_positions, {head_dim / 2:g}), got {tuple(table.shape)}"
            )
    for name, x in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")
    # On a GPU the look would wait for it; tracing cannot branch on it.
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        lowest, highest = (x.item() for x in positions.aminmax())
        if lowest < 0 or highest >= len(cos):
            raise ValueError(
                f"positions must lie in the tables' [0, {len(cos)}), got {lowest} to {highest}"
            )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return reference.apply_rotary(q, k, cos, sin, positions, interleaved)
    dtype = torch.promote_types(q.dtype, cos.dtype)
    cos, sin = (table[positions].unsqueeze(-2).to(dtype) for table in (cos, sin))
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The definition in fewer passes over memory, some of them in place: not differentiable."""
    wide = x.to(cos.dtype)  # mixed products would be far slower
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (out_a, out_b) = (
        (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, dim=-1) for y in (wide, out)
    )
    out_a.copy_((a * cos).addcmul_(b, sin, value=-1))
    out_b.copy_((b * cos).addcmul_(a, sin))
    return out
