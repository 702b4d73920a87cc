"""Checks of the arguments of operators on a cache."""

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
    """Check the shapes and dtypes of a cache and return its number of sequences.

    `check_cache_indices` checks the values of the index tensors.

    Args:
        k_cache: (rows, capacity, num_kv_heads, head_dim), or (pages, page_size, num_kv_heads,
            head_dim) with a block table.
        v_cache: like k_cache.
        lengths: (batch,) int32, tokens per sequence.
        rows: (batch,) int32, each sequence's row of the cache; None: its index in the batch.
        block_table: (batch, pages) int32, each sequence's pages; None: the cache is not paged.

    Raises:
        ValueError: a shape does not fit, or both `rows` and `block_table` are given.
        TypeError: a dtype does not fit.
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
            raise ValueError("rows must be None when block_table is given, got both; pass one")
        if block_table.ndim != 2 or block_table.shape[1] == 0:
            raise ValueError(f"block_table must be (batch, pages), got {tuple(block_table.shape)}")
        check_int32("block_table", block_table, (batch, block_table.shape[1]))
    elif rows is None and batch > k_cache.shape[0]:
        raise ValueError(
            f"k_cache must have at least {batch} rows, one for each sequence of lengths, "
            f"got {k_cache.shape[0]}"
        )
    return batch


def check_cache_indices(
    k_cache: Tensor, lengths: Tensor, rows: Tensor | None, block_table: Tensor | None
) -> None:
    """Raise ValueError for indices outside the cache. Values on a GPU are not read."""
    check_range("lengths", lengths, INT32_MAX)
    check_range("rows", rows, k_cache.shape[0] - 1)
    check_range("block_table", block_table, k_cache.shape[0] - 1)


def check_one_sequence_per_row(k_cache: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless the cache has exactly one row per sequence."""
    if k_cache.ndim == 4 and lengths.shape != k_cache.shape[:1]:
        raise ValueError(
            f"lengths must be ({k_cache.shape[0]},), one for each row of k_cache, "
            f"got {tuple(lengths.shape)}"
        )


def check_cu_seqlens_values(cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """Raise ValueError unless cu_seqlens splits `total` tokens into sequences up to `max_seqlen`.

    Values on a GPU are not read.
    """
    if not can_read(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    counts = [end - start for start, end in itertools.pairwise(offsets)]
    shortest, longest = min(counts, default=0), max(counts, default=0)
    if offsets[0] != 0 or offsets[-1] != total or shortest < 0 or longest > max_seqlen:
        raise ValueError(
            f"cu_seqlens must begin with 0, end with {total} (the number of new tokens) and have "
            f"steps of 0 to max_seqlen {max_seqlen}, got {offsets}"
        )


def check_new_tokens(name: str, x: Tensor, k_cache: Tensor, total: int) -> None:
    """Raise unless `x` holds keys or values of `total` packed tokens that fit the cache."""
    _, _, num_kv_heads, head_dim = k_cache.shape
    check_shape(name, x, (total, num_kv_heads, head_dim))
    check_same_dtype(name, x, "k_cache", k_cache)


def check_packed_rotary(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor) -> None:
    """Raise unless the tables fit the packed q and k."""
    total, _, head_dim = k.shape
    if q.ndim != 3 or q.shape[0] != total or q.shape[1] == 0 or q.shape[-1] != head_dim:
        raise ValueError(f"q must be ({total}, num_heads, {head_dim}) like k, got {tuple(q.shape)}")
    check_same_dtype("q", q, "k", k)
    check_tables(cos, sin, head_dim)
    check_dtype("cos", cos, torch.float32)
    check_unit_stride("cos", cos)
    check_unit_stride("sin", sin)


def check_num_positions(cos: Tensor, lengths: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError if a new token's position is outside the tables. GPU values are not read."""
    if can_read(lengths) and can_read(cu_seqlens):
        offsets = cu_seqlens.tolist()
        spans = zip(lengths.tolist(), itertools.pairwise(offsets), strict=True)
        end = max(
            (length + stop - start for length, (start, stop) in spans if stop > start), default=0
        )
        if end > len(cos):
            raise ValueError(
                f"cos and sin must have at least {end} rows for the positions of the new tokens, "
                f"got {len(cos)}"
            )
