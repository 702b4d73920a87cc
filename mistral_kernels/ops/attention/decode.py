"""Attention of new tokens over a cache, on Triton: keys are read where they lie, each once.

A tile's rows are the new queries times the query heads of one kv head, so that few queries share
every load of a key. Keys are named by their age: key 0 is the oldest that the cache still holds, or
shows. It lies in slot `oldest % capacity` of the ring, the next ones behind it, round the end to
slot 0; after those of the cache come the fresh ones, which are not in it yet. The order of slots is
never undone, and a cache that does not wrap, paged or not, is a ring like any other.

Where a call has few rows, its keys are split over programs, at places that depend on the sequence
alone: so its bits do not depend on its batch-mates, and the grid depends on what the cache can
hold, not on what it does. Each program leaves its part of the softmax; the last to arrive puts the
parts together, in order. The parts over keys A and B, with sums l and outputs o, combine as

    l = l_A + l_B,    o = (l_A o_A + l_B o_B) / l        l relative to one common maximum
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.ops.attention.launch import Problem, offsets_within, softmax_factors
from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.tiles import (
    load_block,
    load_rows,
    program_place,
    rows_of_tile,
    sequence_bounds,
    sequence_pointer,
    store_rows,
)
from mistral_kernels.ops.attention.window import block_ranges, hide
from mistral_kernels.ops.device_functions import tanh
from mistral_kernels.ops.launch_configs import Config, cdiv
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.rolling_cache import slot_row

if TYPE_CHECKING:
    import triton.language as tl

# Programs that share the keys of a sequence: one for so many keys, but at most so many programs.
_SPLIT_KEYS, _MOST_SPLITS = 256, 64
# Up to so many rows a tile is "decode": the matrix products have room, memory decides. No tile has
# fewer. Keys are split where a call has at most so many tiles of them.
_DECODE_ROWS, _SPLIT_TILES = 16, 4


@jit
def _load_cached(
    ptr, table_ptr, first, first_slot, length, capacity, page_size, table_stride, stride_b,
    stride_s, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Keys `first` to `first + BLOCK_N` as [BLOCK_N, BLOCK_D]; 0 beyond HEAD_DIM.

    With `MASK` also beyond `length`; without, all keys must be there.
    """
    key = first + tl.arange(0, BLOCK_N)
    exists = key < length
    slot = first_slot + key
    slot = tl.where(slot >= capacity, slot - capacity, slot)
    page, slot = slot_row(table_ptr, table_stride, slot, exists, page_size, PAGED)
    row = page * stride_b + slot.to(tl.int64) * stride_s
    dim = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + (row[:, None] + dim)
    if MASK and HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=exists[:, None] & (dim < HEAD_DIM), other=0.0)
    if MASK:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=dim < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, out_ptr, lse_ptr, parts_ptr, part_lse_ptr,
    counters_ptr, slopes_ptr, lengths_ptr, cu_seqlens_ptr, rows_ptr, leftpad_ptr, table_ptr,
    q_stride_b, q_stride_s, q_stride_h,
    out_stride_b, out_stride_s, out_stride_h,
    k_stride_s, k_stride_h, v_stride_s, v_stride_h,
    k_cache_stride_b, k_cache_stride_s, k_cache_stride_h,
    v_cache_stride_b, v_cache_stride_s, v_cache_stride_h,
    lse_stride_b, lse_stride_h, slopes_stride_b, table_stride_b, table_stride, part_stride,
    seqlen_q, seqlen_new, tiles, splits, split_keys, num_kv_heads, capacity, page_size,
    window_left, window_right, tanh_scale, exp_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, VARLEN: tl.constexpr,
    FRESH: tl.constexpr, ROWS: tl.constexpr, LEFTPAD: tl.constexpr, PAGED: tl.constexpr,
    LEFT_EDGE: tl.constexpr, NARROW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    program, kv_head, batch = program_place(tiles * splits, num_kv_heads)
    tile, split = program % tiles, program // tiles
    start, seqlen_q = sequence_bounds(cu_seqlens_ptr, batch, seqlen_q, VARLEN)
    if tile * BLOCK_M >= seqlen_q * GROUP:
        return

    # What the cache holds, and which slot is the oldest key's.
    if VARLEN:
        seqlen_new = seqlen_q
    cached = tl.load(lengths_ptr + batch)
    total = cached + seqlen_new
    if not FRESH:
        cached = total
    oldest = max(cached - capacity, 0)
    if LEFTPAD:
        oldest = min(max(oldest, tl.load(leftpad_ptr + batch)), total)
    first_slot = oldest % capacity
    seqlen_k, held = total - oldest, cached - oldest

    # What the tile sees of the cache, and this program of that.
    query, head, first_query, last_query = rows_of_tile(tile, kv_head, GROUP, BLOCK_M)
    place = (query + seqlen_k - seqlen_q)[:, None]
    first_place = first_query + seqlen_k - seqlen_q
    last_place = min(last_query, seqlen_q - 1) + seqlen_k - seqlen_q
    bounds = block_ranges(first_place, last_place, held, window_left, window_right, BLOCK_N, NARROW)
    begin, end = bounds[0], bounds[3]
    parts = 1
    if SPLIT:
        parts = max(tl.cdiv(end - begin, split_keys), 1)
        begin += split * split_keys
        end = min(begin + split_keys, end)
        if split >= parts:
            return

    q_ptr = sequence_pointer(q_ptr, batch, start, q_stride_b, q_stride_s, VARLEN)
    q = load_rows(q_ptr, query, head, seqlen_q, q_stride_s, q_stride_h, HEAD_DIM, BLOCK_D)
    if ALIBI:
        slopes = tl.load(slopes_ptr + batch * slopes_stride_b + head)
        slopes = (slopes * (1.4426950408889634 / exp_scale))[:, None]
    kv_head = kv_head.to(tl.int64)
    k_cache_ptr += kv_head * k_cache_stride_h
    v_cache_ptr += kv_head * v_cache_stride_h
    if PAGED:
        table_ptr += batch * table_stride_b
    else:
        row = batch
        if ROWS:
            row = tl.load(rows_ptr + batch)
        k_cache_ptr += row.to(tl.int64) * k_cache_stride_b
        v_cache_ptr += row.to(tl.int64) * v_cache_stride_b
    if FRESH:
        k_ptr += start.to(tl.int64) * k_stride_s + kv_head * k_stride_h
        v_ptr += start.to(tl.int64) * v_stride_s + kv_head * v_stride_h

    row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)  # finite: -inf - -inf is not a number
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for SOURCE in tl.static_range(2 if FRESH else 1):  # the cache, then what is not yet in it
        length = held
        if SOURCE == 1:  # the last part's; keys and places are counted from the first fresh one
            length, place = seqlen_k - held, place - held
            bounds = block_ranges(
                first_place - held, last_place - held, length, window_left, window_right, BLOCK_N,
                NARROW,
            )  # fmt: skip
            begin, end = bounds[0], bounds[3]
            if SPLIT:
                end = tl.where(split == parts - 1, end, begin)
        # The blocks that cross left edges, those that cross none, those that cross right ones.
        for PART in tl.static_range(3):
            if PART == 2 or (not NARROW and (PART == 1 or LEFT_EDGE)):
                first, last = max(bounds[PART], begin), min(bounds[PART + 1], end)
                for block in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
                    if SOURCE == 0:
                        k = _load_cached(
                            k_cache_ptr, table_ptr, block, first_slot, length, capacity, page_size,
                            table_stride, k_cache_stride_b, k_cache_stride_s,
                            BLOCK_N, HEAD_DIM, BLOCK_D, PART != 1, PAGED,
                        )  # fmt: skip
                    else:
                        k = load_block(
                            k_ptr, None, block, length, k_stride_s, BLOCK_N, HEAD_DIM, BLOCK_D,
                            PART != 1, False, OFFSETS,
                        )  # fmt: skip
                    s = tl.dot(q, k.T, input_precision=PRECISION)
                    key = block + tl.arange(0, BLOCK_N)[None, :]
                    if SOFTCAP:
                        s = tanh(s * tanh_scale)
                    if ALIBI:
                        s -= slopes * tl.abs(key - place).to(tl.float32)
                    if PART != 1:  # the cache may end, before the fresh keys, amid left edges
                        s = hide(
                            s, place, key, length, window_left, window_right,
                            PART == 0 or NARROW, True,
                        )  # fmt: skip
                    new_max = tl.maximum(row_max, tl.max(s, 1) * exp_scale)
                    p = tl.exp2(s * exp_scale - new_max[:, None])
                    rescale = tl.exp2(row_max - new_max)
                    row_sum = row_sum * rescale + tl.sum(p, 1)
                    row_max = new_max
                    if SOURCE == 0:
                        v = _load_cached(
                            v_cache_ptr, table_ptr, block, first_slot, length, capacity, page_size,
                            table_stride, v_cache_stride_b, v_cache_stride_s,
                            BLOCK_N, HEAD_DIM, BLOCK_D, PART != 1, PAGED,
                        )  # fmt: skip
                    else:
                        v = load_block(
                            v_ptr, None, block, length, v_stride_s, BLOCK_N, HEAD_DIM, BLOCK_D,
                            PART != 1, False, OFFSETS,
                        )  # fmt: skip
                    acc = acc * rescale[:, None]
                    acc = tl.dot(p.to(q.dtype), v, acc, input_precision=PRECISION)

    if SPLIT and parts > 1:
        # Parts lie as (splits, tokens, heads, HEAD_DIM), normalised, their sums in base 2.
        heads = num_kv_heads * GROUP
        first_token = start if VARLEN else batch * seqlen_q
        first_row = tl.cast(first_token, tl.int64) * heads
        row_lse = part_lse_ptr + (first_row + query * heads + head)
        mine = split.to(tl.int64) * part_stride
        in_parts = query < seqlen_q
        sum_or_1 = tl.where(row_sum == 0.0, 1.0, row_sum)
        store_rows(
            parts_ptr + (first_row + mine) * HEAD_DIM, acc * (1.0 / sum_or_1)[:, None],
            query, head, seqlen_q, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        part_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
        tl.store(row_lse + mine, part_lse, mask=in_parts)
        tl.debug_barrier()  # all of this program's part is written before it is counted
        counter = counters_ptr + ((batch * num_kv_heads + kv_head) * tiles + tile)
        if tl.atomic_add(counter, 1, sem="acq_rel") != parts - 1:
            return
        tl.store(counter, 0)  # for the next call
        row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # The maximum first: then no part waits for the one before it, and loads overlap.
        for first in tl.range(0, parts, 64):
            others = first + tl.arange(0, 64)[None, :]
            lses = tl.load(
                row_lse[:, None] + others.to(tl.int64) * part_stride,
                mask=in_parts[:, None] & (others < parts), other=float("-inf"),
            )  # fmt: skip
            row_max = tl.maximum(row_max, tl.max(lses, 1))
        for other in tl.range(0, parts, loop_unroll_factor=4):
            theirs = tl.cast(other, tl.int64) * part_stride
            part_lse = tl.load(row_lse + theirs, mask=in_parts, other=float("-inf"))
            o = load_rows(
                parts_ptr + (first_row + theirs) * HEAD_DIM,
                query, head, seqlen_q, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            weight = tl.exp2(part_lse - row_max)
            row_sum += weight
            acc += o * weight[:, None]

    # A row that saw no key has the sum 0: its output is 0 and its log-sum-exp -inf.
    out = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_ptr = sequence_pointer(out_ptr, batch, start, out_stride_b, out_stride_s, VARLEN)
    store_rows(out_ptr, out, query, head, seqlen_q, out_stride_s, out_stride_h, HEAD_DIM, BLOCK_D)
    lse_ptr = sequence_pointer(lse_ptr, batch, start, lse_stride_b, 1, VARLEN)
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)
    tl.store(lse_ptr + (head.to(tl.int64) * lse_stride_h + query), lse, mask=query < seqlen_q)


def _split(keys: int, rows: int, block: int, num_splits: int) -> tuple[int, int]:
    """Over how many programs at most to split `keys`, and how many keys each takes."""
    if num_splits == 0:
        num_splits = (
            min(cdiv(keys, _SPLIT_KEYS), _MOST_SPLITS) if rows <= _SPLIT_TILES * _DECODE_ROWS else 1
        )
    split_keys = cdiv(cdiv(keys, num_splits), block) * block
    return cdiv(keys, split_keys), split_keys


def num_counters(batch: int, num_kv_heads: int) -> int:
    """How many counters the split of its keys may need for each call over such a cache."""
    return _SPLIT_TILES * batch * num_kv_heads


def attention_decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    spec: AttentionSpec,
    num_splits: int,
    counters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of new tokens over `spec.cache` and over k and v."""
    cache = spec.cache
    assert cache is not None
    cu_seqlens, max_seqlen_q = spec.sequences.cu_seqlens_q, spec.sequences.max_seqlen_q
    problem = Problem(q, cache.k_cache, spec)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    query_rows = max_seqlen_q * problem.group
    fresh = [x for x in (k, v) if x is not None]
    keys = cache.capacity + (max_seqlen_q if fresh else 0)

    def run(config: Config) -> None:
        tiles = cdiv(query_rows, config["BLOCK_M"])
        places = min(max_seqlen_q, cdiv(config["BLOCK_M"], problem.group) + 1)
        seen = min(keys, problem.left + problem.right + places)
        splits, split_keys = _split(seen, query_rows, config["BLOCK_N"], num_splits)
        parts = part_lse = arrived = None
        if splits > 1:
            parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
            part_lse = torch.empty((splits, *q.shape[:-1]), dtype=torch.float32, device=q.device)
            arrived = counters
            if arrived is None:
                programs = problem.batch * problem.num_kv_heads * tiles
                arrived = torch.zeros(programs, dtype=torch.int32, device=q.device)
        _decode_kernel[(tiles * splits * problem.num_kv_heads * problem.batch,)](
            *(q, k, v, cache.k_cache, cache.v_cache, out, lse, parts, part_lse, arrived),
            *(problem.slopes, cache.lengths, problem.cu_seqlens_q),
            *(cache.rows, cache.leftpad, cache.block_table),
            *problem.strides(q, out),
            *(stride for x in fresh for stride in x.stride()[:2]),
            *([0] * (4 - 2 * len(fresh))),
            *(*cache.k_cache.stride()[:3], *cache.v_cache.stride()[:3]),
            *problem.lse_strides(lse),
            problem.slopes_stride,
            *((0, 0) if cache.block_table is None else cache.block_table.stride()),
            q.shape[:-1].numel(),
            *(max_seqlen_q, cache.seqlen_new, tiles, splits, split_keys, problem.num_kv_heads),
            *(cache.capacity, cache.k_cache.shape[1], problem.left, problem.right),
            *softmax_factors(spec.scale(problem.head_dim), spec.softcap),
            GROUP=problem.group,
            HEAD_DIM=problem.head_dim,
            SPLIT=splits > 1,
            VARLEN=cu_seqlens is not None,
            FRESH=bool(fresh),
            ROWS=cache.rows is not None,
            LEFTPAD=cache.leftpad is not None,
            PAGED=cache.block_table is not None,
            LEFT_EDGE=spec.window.left >= 0 and max_seqlen_q > 1,
            NARROW=problem.narrow_for_queries(config),
            SOFTCAP=spec.softcap > 0,
            ALIBI=problem.slopes is not None,
            PRECISION=problem.precision,
            OFFSETS=offsets_within("block", config["BLOCK_N"], *fresh),
            **{x: y for x, y in config.items() if x != "DESCRIPTORS"},
        )

    kernel = "attention_decode" if query_rows <= _DECODE_ROWS else "attention_chunk"
    problem.launch(kernel, False, run)
    return out, lse
