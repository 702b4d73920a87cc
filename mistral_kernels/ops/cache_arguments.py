"""Checks of what is handed to an operator over a cache."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mistral_kernels.ops.checks import (
    INT32_MAX,
    can_read,
    check_dtype,
    check_float,
    check_int32,
    check_range,
    check_same_dtype,
    check_shape,
    check_unit_stride,
)
from mistral_kernels.ops.rotary_arguments import check_tables


def check_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    block_table: Tensor | None,
) -> int:
    """Return the number of sequences of a cache, rings or pages.

    Raises:
        ValueError: naming the argument whose shape does not fit; the values are for `check_places`.
        TypeError: naming the argument whose dtype does not fit.
    """
    check_float("k_cache", k_cache)
    if k_cache.ndim != 4 or 0 in k_cache.shape[1:3]:
        raise ValueError(
            "k_cache must be (batch, capacity, num_kv_heads, head_dim) with capacity and "
            f"num_kv_heads > 0, got {tuple(k_cache.shape)}"
        )
    check_shape("v_cache", v_cache, k_cache.shape)
    check_same_dtype("v_cache", v_cache, "k_cache", k_cache)
    check_unit_stride("k_cache", k_cache)
    check_unit_stride("v_cache", v_cache)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (batch,), got {tuple(lengths.shape)}")
    batch = len(lengths)
    check_int32("lengths", lengths, lengths.shape)
    check_int32("rows", rows, lengths.shape)
    if block_table is not None:
        if rows is not None:
            raise ValueError("rows and block_table both say where a sequence is: give one")
        if block_table.ndim != 2 or block_table.shape[1] == 0:
            raise ValueError(f"block_table must be (batch, pages), got {tuple(block_table.shape)}")
        check_int32("block_table", block_table, (batch, block_table.shape[1]))
    elif rows is None and batch > k_cache.shape[0]:
        raise ValueError(
            f"k_cache must have a row for each of the {batch} sequences, got {k_cache.shape[0]}"
        )
    return batch


def check_places(
    k_cache: Tensor, lengths: Tensor, rows: Tensor | None, block_table: Tensor | None
) -> None:
    """Raise ValueError for values of index tensors that no cache has, where they can be read."""
    check_range("lengths", lengths, INT32_MAX)
    check_range("rows", rows, k_cache.shape[0] - 1)
    check_range("block_table", block_table, k_cache.shape[0] - 1)


def check_one_per_row(k_cache: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless each row of the cache is one sequence's."""
    if k_cache.ndim == 4 and lengths.shape != k_cache.shape[:1]:
        raise ValueError(
            f"lengths must be ({k_cache.shape[0]},), one for each row of k_cache, "
            f"got {tuple(lengths.shape)}"
        )


def check_packing(cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """Raise ValueError unless these are `total` tokens in sequences of at most `max_seqlen`."""
    if not can_read(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    counts = [end - start for start, end in itertools.pairwise(offsets)]
    shortest, longest = min(counts, default=0), max(counts, default=0)
    if offsets[0] != 0 or offsets[-1] != total or shortest < 0 or longest > max_seqlen:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {total} new tokens in steps of at most "
            f"max_seqlen {max_seqlen}, got {offsets}"
        )


def check_new_tokens(name: str, x: Tensor, k_cache: Tensor, total: int) -> None:
    """Raise unless `x` holds keys or values of `total` packed tokens for this cache."""
    _, _, num_kv_heads, head_dim = k_cache.shape
    check_shape(name, x, (total, num_kv_heads, head_dim))
    check_same_dtype(name, x, "k_cache", k_cache)


def check_rotation(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor) -> None:
    """Raise unless q and k, packed, can be rotated by these tables."""
    total, _, head_dim = k.shape
    if q.ndim != 3 or q.shape[0] != total or q.shape[1] == 0 or q.shape[-1] != head_dim:
        raise ValueError(f"q must be ({total}, num_heads, {head_dim}) like k, got {tuple(q.shape)}")
    check_same_dtype("q", q, "k", k)
    check_tables(cos, sin, head_dim)
    check_dtype("cos", cos, torch.float32)
    check_unit_stride("cos", cos)
    check_unit_stride("sin", sin)


def check_reach(cos: Tensor, lengths: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError if the new tokens' positions go beyond the tables."""
    if can_read(lengths) and can_read(cu_seqlens):
        offsets = cu_seqlens.tolist()
        spans = zip(lengths.tolist(), itertools.pairwise(offsets), strict=True)
        end = max(
            (length + stop - start for length, (start, stop) in spans if stop > start), default=0
        )
        if end > len(cos):
            raise ValueError(
                f"cos and sin end at position {len(cos)}, but the new tokens reach {end}"
            )
