"""Checks of what is handed to the rotary embedding: an error names what is off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.checks import can_read, check_float, check_same_dtype, has_memory
from mistral_kernels.ops.dispatch import with_unit_stride


def check_rotary(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, *_: Any
) -> None:
    """Raise unless these are arguments of `apply_rotary`, of which q or k may be absent."""
    given = {name: x for name, x in (("q", q), ("k", k)) if x is not None}
    if not given:
        raise ValueError("q or k must be given")
    (first, like), *others = given.items()
    if like.ndim < 2:
        raise ValueError(f"{first} must be (..., num_heads, head_dim), got {tuple(like.shape)}")
    tokens, head_dim = like.shape[:-2], like.shape[-1]
    for name, x in others:
        if x.ndim < 2 or x.shape[-1] != head_dim or x.shape[:-2] != tokens:
            raise ValueError(
                f"{name} must be (..., num_kv_heads, head_dim) with the leading dimensions and "
                f"head_dim of {first} {tuple(like.shape)}, got {tuple(x.shape)}"
            )
        check_same_dtype(name, x, first, like)
    if positions.shape != tokens:
        raise ValueError(
            f"positions must be {tuple(tokens)}, one for each token of {first}, "
            f"got {tuple(positions.shape)}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions must be torch.int32 or torch.int64, got {positions.dtype}")
    num_positions = check_tables(cos, sin, head_dim)
    if positions.numel() and can_read(positions):
        lowest, highest = (x.item() for x in positions.aminmax())
        if lowest < 0 or highest >= num_positions:
            raise ValueError(
                f"positions must be in the tables' [0, {num_positions}), got {lowest} to {highest}"
            )


def check_tables(cos: Tensor, sin: Tensor, head_dim: int) -> int:
    """Return the number of positions of two tables for heads of `head_dim`, or raise."""
    num_positions = cos.shape[0] if cos.ndim else 0
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        if table.shape != (num_positions, head_dim / 2):
            raise ValueError(
                f"{name} must be (num_positions, {head_dim / 2:g}), got {tuple(table.shape)}"
            )
    check_same_dtype("sin", sin, "cos", cos)
    return num_positions


def check_memory(q: Tensor, k: Tensor) -> None:
    """Raise unless kernels' strides reach all that is rotated in place, and no element twice."""
    if not (has_memory(q) and has_memory(k)):
        return
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
    for stride, size in sorted(zip(rows.stride()[:2], (tokens, heads), strict=True)):
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
