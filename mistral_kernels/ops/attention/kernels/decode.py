"""Attention of new tokens over a cache on Triton, without a copy of the cached keys.

The rows of a tile are the new queries times the query heads of one kv head. All rows share each
load of a key. Keys are numbered by age. Key 0 is the oldest key in the cache that is not padding,
in slot `oldest % capacity` of the ring. Later keys are in the next slots, wrapping to slot 0. The
fresh keys follow the keys of the cache: the keys of new tokens that are not in the cache yet. A
cache that does not wrap, paged or not, is handled as a ring.

In calls with few rows, the keys of a sequence are split over programs. The split depends on the
sequence, the capacity and `max_seqlen_q`, but not on the other sequences of the batch. Results are
therefore bitwise independent of the other sequences, for the same `max_seqlen_q`. The grid depends
on the capacity of the cache, not on the number of keys in it. Each program stores its part of the
softmax. The program that finishes last combines the parts in order. Parts over the keys A and B,
with sums of weights l and outputs o, combine as

    l = l_A + l_B,    o = (l_A o_A + l_B o_B) / l        l relative to one common maximum
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops.attention.kernels.problem import Problem, offsets_within
from mistral_kernels.ops.attention.kernels.shared import (
    dense_keys,
    empty_softmax,
    load_rows,
    load_sequence_rows,
    load_slopes,
    program_indices,
    rows_of_tile,
    sequence_bounds,
    softmax_over_keys,
    store_rows,
    store_softmax,
)
from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.tiles import launch_first_that_fits
from mistral_kernels.ops.attention.window import block_ranges
from mistral_kernels.ops.device_functions import View, view
from mistral_kernels.ops.launch_configs import LaunchConfig, cdiv
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl

# By default, the keys of a sequence are split over one program per _SPLIT_KEYS keys, and at most
# _MOST_SPLITS programs.
_SPLIT_KEYS, _MOST_SPLITS = 256, 64
# Calls of at most _DECODE_ROWS rows, the smallest tile, are memory bound and use the
# "attention_decode" tiles. Keys are split in calls of at most _SPLIT_TILES such tiles.
_DECODE_ROWS, _SPLIT_TILES = 16, 4


class Cache(NamedTuple):
    """Kernel arguments of a `CacheView`; None for absent tensors."""

    k: View
    v: View
    lengths_ptr: Tensor
    rows_ptr: Tensor | None
    leftpad_ptr: Tensor | None
    table: tuple[Tensor, int, int] | None  # block_table and its strides


class Parts(NamedTuple):
    """Partial softmax of each program over its keys: (splits, tokens, heads, head_dim) and lse."""

    out_ptr: Tensor
    lse_ptr: Tensor
    counters_ptr: Tensor  # number of programs that have finished, per tile
    stride: int  # rows per split


@jit
def _cut(ranges, begin, end):
    """Return the ranges of key blocks, cut to the keys [begin, end)."""
    return (
        (max(ranges[0][0], begin), min(ranges[0][1], end)),
        (max(ranges[1][0], begin), min(ranges[1][1], end)),
        (max(ranges[2][0], begin), min(ranges[2][1], end)),
    )


@jit
def _store_part(
    state, parts, split, first_row, query, head, heads, seqlen_q, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the normalized softmax over a program's keys, and its log-sum-exp in base 2."""
    row_max, row_sum, acc = state
    offset = first_row + split.to(tl.int64) * parts.stride
    sum_or_1 = tl.where(row_sum == 0.0, 1.0, row_sum)
    store_rows(
        parts.out_ptr + offset * HEAD_DIM, acc * (1.0 / sum_or_1)[:, None], query, head, seqlen_q,
        heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
    tl.store(parts.lse_ptr + offset + query * heads + head, lse, mask=query < seqlen_q)


@jit
def _combine_parts(
    parts, num_parts, first_row, query, head, heads, seqlen_q, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the softmax state over all parts, which are added in order."""
    row_lse = parts.lse_ptr + (first_row + query * heads + head)
    exists = query < seqlen_q
    _, row_sum, acc = empty_softmax(BLOCK_M, BLOCK_D)
    # Compute the maximum first: then no part depends on another part, and their loads overlap.
    # Reduce after the loop: Triton 3.6 fails on a reduction into a loop-carried value that is used
    # twice.
    lse_max = tl.full([BLOCK_M, 64], -1.0e38, tl.float32)
    for first in tl.range(0, num_parts, 64):
        part = first + tl.arange(0, 64)[None, :]
        lse = tl.load(
            row_lse[:, None] + part.to(tl.int64) * parts.stride,
            mask=exists[:, None] & (part < num_parts), other=float("-inf"),
        )  # fmt: skip
        lse_max = tl.maximum(lse_max, lse)
    row_max = tl.max(lse_max, 1)
    for part in tl.range(0, num_parts, loop_unroll_factor=4):
        offset = tl.cast(part, tl.int64) * parts.stride
        lse = tl.load(row_lse + offset, mask=exists, other=float("-inf"))
        out = load_rows(
            parts.out_ptr + (first_row + offset) * HEAD_DIM, query, head, seqlen_q,
            heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        weight = tl.exp2(lse - row_max)
        row_sum += weight
        acc += out * weight[:, None]
    return row_max, row_sum, acc


@jit
def _decode_kernel(
    q, k, v, cache, out, lse_ptr, slopes, cu_seqlens_ptr, parts, scales,
    seqlen_q, seqlen_new, lse_stride, tiles, splits, split_keys, num_kv_heads, capacity, page_size,
    window_left, window_right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT_EDGE: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    VARLEN: tl.constexpr = cu_seqlens_ptr is not None
    FRESH: tl.constexpr = k is not None
    SOURCE: tl.constexpr = "ring" if cache.table is None else "pages"
    program, kv_head, batch = program_indices(tiles * splits, num_kv_heads)
    tile, split = program % tiles, program // tiles
    start, seqlen_q = sequence_bounds(cu_seqlens_ptr, batch, seqlen_q)
    if tile * BLOCK_M >= seqlen_q * GROUP:
        return

    # The keys in the cache, and the slot of the oldest one.
    if VARLEN:
        seqlen_new = seqlen_q
    cached = tl.load(cache.lengths_ptr + batch)
    total = cached + seqlen_new
    if not FRESH:
        cached = total
    oldest = max(cached - capacity, 0)
    if cache.leftpad_ptr is not None:
        oldest = min(max(oldest, tl.load(cache.leftpad_ptr + batch)), total)
    seqlen_k, held = total - oldest, cached - oldest

    # The key blocks of the cache that the tile sees, and this program's share of them.
    query, head, position, first_position, last_position = rows_of_tile(
        tile, kv_head, seqlen_q, seqlen_k, GROUP, BLOCK_M
    )
    ranges = block_ranges(
        first_position, last_position, held, window_left, window_right, BLOCK_N, NARROW
    )
    num_parts = 1
    if parts is not None:
        num_parts = max(tl.cdiv(ranges[2][1] - ranges[0][0], split_keys), 1)
        begin = ranges[0][0] + split * split_keys
        end = min(begin + split_keys, ranges[2][1])
        if split >= num_parts:
            return
        ranges = _cut(ranges, begin, end)

    q_rows = load_sequence_rows(q, batch, start, query, head, seqlen_q, VARLEN, HEAD_DIM, BLOCK_D)
    if slopes is not None:
        slopes = load_slopes(slopes, batch, head, scales.exp)[:, None]
    kv_head = kv_head.to(tl.int64)
    k_ptr = cache.k.ptr + kv_head * cache.k.head_stride
    v_ptr = cache.v.ptr + kv_head * cache.v.head_stride
    table_ptr, table_stride = None, None
    if cache.table is not None:
        table_ptr = cache.table[0] + batch * cache.table[1]
        table_stride = cache.table[2]
    else:
        row = batch
        if cache.rows_ptr is not None:
            row = tl.load(cache.rows_ptr + batch)
        k_ptr += row.to(tl.int64) * cache.k.batch_stride
        v_ptr += row.to(tl.int64) * cache.v.batch_stride
    ring = (oldest % capacity, capacity, page_size, table_ptr, table_stride)
    state = softmax_over_keys(
        empty_softmax(BLOCK_M, BLOCK_D), q_rows, position, slopes,
        (k_ptr, cache.k.batch_stride, cache.k.token_stride, ring),
        (v_ptr, cache.v.batch_stride, cache.v.token_stride, ring),
        ranges, held, (window_left, window_right), scales,
        SOURCE, LEFT_EDGE, NARROW, True, PRECISION, OFFSETS, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        NUM_STAGES,
    )  # fmt: skip
    if FRESH:  # the last part includes the fresh keys; positions are relative to the first of them
        keys, values = dense_keys(
            k, v, batch, start, kv_head, seqlen_q, VARLEN, False, "dense", BLOCK_N, HEAD_DIM,
            BLOCK_D,
        )  # fmt: skip
        ranges = block_ranges(
            first_position - held, last_position - held, seqlen_k - held, window_left,
            window_right, BLOCK_N, NARROW,
        )  # fmt: skip
        if parts is not None:
            end = tl.where(split == num_parts - 1, ranges[2][1], ranges[0][0])
            ranges = _cut(ranges, ranges[0][0], end)
        state = softmax_over_keys(
            state, q_rows, position - held, slopes, keys, values, ranges, seqlen_k - held,
            (window_left, window_right), scales,
            "dense", LEFT_EDGE, NARROW, True, PRECISION, OFFSETS, HEAD_DIM, BLOCK_M, BLOCK_N,
            BLOCK_D, NUM_STAGES,
        )  # fmt: skip
    if parts is not None and num_parts > 1:
        heads = num_kv_heads * GROUP
        first_row = tl.cast(start if VARLEN else batch * seqlen_q, tl.int64) * heads
        _store_part(state, parts, split, first_row, query, head, heads, seqlen_q, HEAD_DIM, BLOCK_D)
        tl.debug_barrier()  # write the whole part of this program before counting the program
        counter = parts.counters_ptr + ((batch * num_kv_heads + kv_head) * tiles + tile)
        if tl.atomic_add(counter, 1, sem="acq_rel") != num_parts - 1:
            return
        tl.store(counter, 0)  # for the next call
        state = _combine_parts(
            parts, num_parts, first_row, query, head, heads, seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D
        )
    store_softmax(
        state, out, lse_ptr, lse_stride, batch, start, query, head, seqlen_q,
        num_kv_heads * GROUP, VARLEN, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


def _split(keys: int, rows: int, block: int, num_splits: int) -> tuple[int, int]:
    """Return the maximum number of programs that share `keys`, and the number of keys of each."""
    if num_splits == 0:
        num_splits = (
            min(cdiv(keys, _SPLIT_KEYS), _MOST_SPLITS) if rows <= _SPLIT_TILES * _DECODE_ROWS else 1
        )
    split_keys = cdiv(cdiv(keys, num_splits), block) * block
    return cdiv(keys, split_keys), split_keys


def num_counters(batch: int, num_kv_heads: int) -> int:
    """Return the maximum number of counters of a call with `num_splits` 0 over such a cache."""
    return _SPLIT_TILES * batch * num_kv_heads


def attention_decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    spec: AttentionSpec,
    num_splits: int,
    counters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of new tokens over `spec.cache`, k and v."""
    cache = spec.cache
    assert cache is not None
    max_seqlen_q = spec.sequences.max_seqlen_q
    problem = Problem(q, cache.k_cache, spec)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    query_rows = max_seqlen_q * problem.group
    fresh = [x for x in (k, v) if x is not None]
    keys = cache.capacity + (max_seqlen_q if fresh else 0)
    table = cache.block_table
    cache_arguments = Cache(
        view(cache.k_cache, False),
        view(cache.v_cache, False),
        cache.lengths,
        cache.rows,
        cache.leftpad,
        None if table is None else (table, table.stride(0), table.stride(1)),
    )

    # Blocks start at the first key that the tile sees: a single query needs no left-edge mask.
    left_edge = spec.window.left >= 0 and max_seqlen_q > 1

    def launch(config: LaunchConfig) -> None:
        tiles = cdiv(query_rows, config["BLOCK_M"])
        positions = min(max_seqlen_q, cdiv(config["BLOCK_M"], problem.group) + 1)
        seen = min(keys, problem.left + problem.right + positions)
        splits, split_keys = _split(seen, query_rows, config["BLOCK_N"], num_splits)
        (programs,) = problem.grid(tiles)
        _decode_kernel[(programs * splits,)](
            *(problem.view(x) for x in (q, k, v)),
            cache_arguments,
            problem.view(out),
            *(lse, problem.slopes, problem.cu_seqlens_q),
            _make_parts(q, splits, programs, counters) if splits > 1 else None,
            problem.scales,
            *(max_seqlen_q, cache.seqlen_new, lse.stride(-2), tiles, splits, split_keys),
            *(problem.num_kv_heads, cache.capacity, cache.k_cache.shape[1]),
            *(problem.left, problem.right),
            **problem.constants,
            LEFT_EDGE=left_edge,
            NARROW=problem.narrow_for_queries(config),
            OFFSETS=offsets_within("block", config["BLOCK_N"], *fresh),
            **{x: y for x, y in config.items() if x != "DESCRIPTORS"},
        )

    kernel = "attention_decode" if query_rows <= _DECODE_ROWS else "attention_chunk"
    launch_first_that_fits(kernel, q, problem.block_d, False, launch)
    return out, lse


def _make_parts(q: Tensor, splits: int, programs: int, counters: Tensor | None) -> Parts:
    """Return memory for the parts of the splits, with new counters if `counters` is None."""
    if counters is None:
        counters = torch.zeros(programs, dtype=torch.int32, device=q.device)
    elif counters.numel() < programs:  # possible if `num_splits` is not 0
        raise ValueError(
            f"counters must hold at least {programs} zeros with this num_splits, "
            f"got {counters.numel()}"
        )
    out = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
    lse = torch.empty((splits, *q.shape[:-1]), dtype=torch.float32, device=q.device)
    return Parts(out, lse, counters, q.shape[:-1].numel())
