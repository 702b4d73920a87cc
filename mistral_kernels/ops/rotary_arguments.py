"""Checks of the rotary embedding's arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.checks import can_read, check_float, check_same_dtype, has_memory
from mistral_kernels.ops.dispatch import with_unit_stride


def check_rotary(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, *_: Any
) -> None:
    """Raise unless the arguments fit `apply_rotary`; one of q and k may be None."""
    given = {name: x for name, x in (("q", q), ("k", k)) if x is not None}
    if not given:
        raise ValueError("q or k must be a tensor, got None for both")
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
                f"positions must be in [0, {num_positions}), got {lowest} to {highest}; "
                f"cos and sin have {num_positions} rows"
            )


def check_tables(cos: Tensor, sin: Tensor, head_dim: int) -> int:
    """Check the tables for heads of `head_dim` and return their number of positions."""
    num_positions = cos.shape[0] if cos.ndim else 0
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        if table.shape != (num_positions, head_dim / 2):
            raise ValueError(
                f"{name} must be (num_positions, {head_dim / 2:g}), got {tuple(table.shape)}"
            )
    check_same_dtype("sin", sin, "cos", cos)
    return num_positions


def check_in_place_memory(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless in-place kernels can address q and k, and q and k do not overlap.

    Tensors without memory (see `has_memory`) are not checked.
    """
    if not (has_memory(q) and has_memory(k)):
        return
    q_stride, q_row, q_end = _memory_extent("q", q)
    k_stride, k_row, k_end = _memory_extent("k", k)
    offset = (k.data_ptr() - q.data_ptr()) // q.element_size()
    # In a fused projection the rows of q and k alternate, token by token.
    alternate = q_stride == k_stride > 0 and q_row <= offset % q_stride <= q_stride - k_row
    if q_end and k_end and not (offset >= q_end or offset <= -k_end or alternate):
        raise ValueError("q and k must not share memory; use apply_rotary")


def _memory_extent(name: str, x: Tensor) -> tuple[int, int, int]:
    """Return, in elements, the stride between tokens, the span of a token and of all tokens."""
    if x.numel() == 0:
        return 0, 0, 0
    rows = flatten_tokens(x)
    tokens, heads, end = rows.shape
    row = (heads - 1) * rows.stride(1) + end
    supported = rows.data_ptr() == x.data_ptr()  # otherwise `rows` is a copy
    for stride, size in sorted(zip(rows.stride()[:2], (tokens, heads), strict=True)):
        supported &= size == 1 or stride >= end
        end += (size - 1) * stride
    if not supported:
        raise ValueError(
            f"{name} must have evenly spaced tokens, contiguous channels and no "
            f"repeated elements, got {tuple(x.shape)} with strides {x.stride()}; use apply_rotary"
        )
    return rows.stride(0), row, end


def flatten_tokens(x: Tensor) -> Tensor:
    """Return `x` as (tokens, heads, head_dim) with a contiguous last dimension.

    Return a copy only if no view has this shape.
    """
    x = x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
    return with_unit_stride(x)
