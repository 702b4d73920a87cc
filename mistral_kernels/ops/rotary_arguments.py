"""Checks of what is handed to the rotary embedding: an error names what is off."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.dispatch import with_unit_stride


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Raises unless these are arguments of `apply_rotary`; positions it does not look into."""
    if q.ndim < 2:
        raise ValueError(f"q must be (..., num_heads, head_dim), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, got {q.dtype}")
    tokens, head_dim, num_positions = q.shape[:-2], q.shape[-1], cos.shape[0] if cos.ndim else 0
    if k.shape[-1] != head_dim or k.shape[:-2] != tokens:
        raise ValueError(
            f"k must be (..., num_kv_heads, head_dim) with the leading dimensions and head_dim of "
            f"q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if k.dtype != q.dtype:
        raise ValueError(f"k must have q's dtype {q.dtype}, got {k.dtype}")
    if positions.shape != tokens:
        raise ValueError(
            f"positions must be {tuple(tokens)}, one for each token of q, "
            f"got {tuple(positions.shape)}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions must be torch.int32 or torch.int64, got {positions.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (num_positions, head_dim / 2):
            raise ValueError(
                f"{name} must be (num_positions, {head_dim / 2:g}), got {tuple(table.shape)}"
            )
    device = q.device
    for name, x in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        if x.device != device:
            raise ValueError(f"{name} must be on {device} like q, got {x.device}")


def check_positions(positions: Tensor, num_positions: int) -> None:
    """Raises unless they lie in the tables, where there is a look at no cost.

    On a GPU it would have to be waited for, and tracing cannot branch on it.
    """
    if positions.is_cpu and positions.numel() and not torch.compiler.is_compiling():
        lowest, highest = (x.item() for x in positions.aminmax())
        if lowest < 0 or highest >= num_positions:
            raise ValueError(
                f"positions must lie in the tables' [0, {num_positions}), got {lowest} to {highest}"
            )


def check_memory(q: Tensor, k: Tensor) -> None:
    """The kernel's strides must reach all that is turned in place, and nothing twice."""
    q_stride, q_row, q_end = _memory_of("q", q)
    k_stride, k_row, k_end = _memory_of("k", k)
    ahead = (k.data_ptr() - q.data_ptr()) // q.element_size()
    # In a fused projection the two take turns, token by token.
    in_turns = q_stride == k_stride > 0 and q_row <= ahead % q_stride <= q_stride - k_row
    if q_end and k_end and not (ahead >= q_end or ahead <= -k_end or in_turns):
        raise ValueError("apply_rotary_: q and k must not share memory; use apply_rotary")


def _memory_of(name: str, x: Tensor) -> tuple[int, int, int]:
    """How many elements from one token to the next, in a token's row, and in all."""
    if x.numel() == 0:
        return 0, 0, 0
    rows = by_token(x)
    tokens, heads, end = rows.shape
    row = (heads - 1) * rows.stride(1) + end
    apart = rows.data_ptr() == x.data_ptr()  # else it was copied
    for stride, size in sorted(zip(rows.stride()[:2], (tokens, heads))):
        apart &= size == 1 or stride >= end
        end += (size - 1) * stride
    if not apart:
        raise ValueError(
            f"apply_rotary_: {name} must have tokens evenly spaced, channels side by side and no "
            f"element twice, got {tuple(x.shape)} with strides {x.stride()}; use apply_rotary"
        )
    return rows.stride(0), row, end


def by_token(x: Tensor) -> Tensor:
    """(tokens, heads, head_dim) with a contiguous last dimension; a copy only where views end."""
    x = x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
    return with_unit_stride(x)
