"""Backward pass of attention on Triton. Probabilities are recomputed per tile and never stored.

With p = exp(scale * q k^T - lse) and dp = do v^T for a pair of tiles (arXiv:2307.08691):

    delta = rowsum(do * out)            one number per query and head
    ds = p * (dp - delta)
    dv = p^T do,   dk = scale * ds^T q,   dq = scale * ds k

There are three kernels: one for delta, one for dk and dv with a program per tile of keys, and one
for dq with a program per tile of queries. One program computes each sum in a fixed order, without
atomics, so gradients are bitwise reproducible. Only the gradients that are needed are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.ops.attention.kernels.problem import (
    Problem,
    fits_descriptors,
    offsets_within,
    same_strides,
)
from mistral_kernels.ops.attention.kernels.shared import (
    dense_keys,
    load_block,
    load_keys,
    load_sequence_rows,
    load_slopes,
    program_indices,
    rows_of_tile,
    scores,
    sequence_bounds,
    sequence_pointer,
    statistics_pointer,
    store_sequence_rows,
)
from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.tiles import delta_config, launch_first_that_fits
from mistral_kernels.ops.attention.window import block_ranges
from mistral_kernels.ops.dispatch import device_guard
from mistral_kernels.ops.launch_configs import LaunchConfig, cdiv, next_power_of_2
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _delta_kernel(
    out, dout, lse_ptr, lse2_ptr, delta_ptr, cu_seqlens_q_ptr, seqlen_q, lse_stride, tiles,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store delta, and the log-sum-exp in base 2.

    The log-sum-exp of a query without keys becomes +inf, so that its weights 2^(s - inf) are 0.
    """
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles
    start_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // NUM_HEADS
    head = row % NUM_HEADS
    o = load_sequence_rows(out, batch, start_q, query, head, seqlen_q, VARLEN, HEAD_DIM, BLOCK_D)
    do = load_sequence_rows(dout, batch, start_q, query, head, seqlen_q, VARLEN, HEAD_DIM, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    exists = query < seqlen_q
    offset = head.to(tl.int64) * lse_stride + query
    lse_ptr = statistics_pointer(lse_ptr, batch, start_q, NUM_HEADS, lse_stride, VARLEN)
    lse2_ptr = statistics_pointer(lse2_ptr, batch, start_q, NUM_HEADS, lse_stride, VARLEN)
    delta_ptr = statistics_pointer(delta_ptr, batch, start_q, NUM_HEADS, lse_stride, VARLEN)
    lse = tl.load(lse_ptr + offset, mask=exists, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(delta_ptr + offset, delta, mask=exists)
    tl.store(lse2_ptr + offset, lse2, mask=exists)


@jit
def _dkdv_kernel(
    q, k, v, dout, dk, dv, lse2_ptr, delta_ptr, slopes, cu_seqlens, scales,
    seqlen_q, seqlen_k, lse_stride, tiles, num_kv_heads, window_left, window_right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RIGHT_EDGE: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, SAME_STRIDES: tl.constexpr, OFFSETS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys in a loop over the queries that see it.

    The loop visits the query heads of the group one after the other, so that dk and dv are
    accumulated in registers. Scores are transposed, [keys, queries]: p and ds are then left
    operands of the next products and stay in registers. The position of a key is its index among
    the queries. The left and right distances of the window are therefore swapped.
    """
    VARLEN: tl.constexpr = cu_seqlens[0] is not None
    tile, kv_head, batch = program_indices(tiles, num_kv_heads)
    start_q, seqlen_q = sequence_bounds(cu_seqlens[0], batch, seqlen_q)
    start_k, seqlen_k = sequence_bounds(cu_seqlens[1], batch, seqlen_k)
    if tile * BLOCK_N >= seqlen_k:
        return

    key, _, position, first_position, last_position = rows_of_tile(
        tile, kv_head, seqlen_k, seqlen_q, 1, BLOCK_N
    )
    k_rows = load_sequence_rows(
        k, batch, start_k, key, kv_head, seqlen_k, VARLEN, HEAD_DIM, BLOCK_D
    )
    v_rows = load_sequence_rows(
        v, batch, start_k, key, kv_head, seqlen_k, VARLEN, HEAD_DIM, BLOCK_D
    )
    ranges = block_ranges(
        first_position, last_position, seqlen_q, window_right, window_left, BLOCK_M, NARROW
    )

    q_stride = q.token_stride
    dout_stride = dout.token_stride
    if SAME_STRIDES:
        dout_stride = q_stride
    num_heads = num_kv_heads * GROUP
    head = (kv_head * GROUP).to(tl.int64)  # the first head of the group
    q_ptr = sequence_pointer(q, batch, start_q, VARLEN) + head * q.head_stride
    dout_ptr = sequence_pointer(dout, batch, start_q, VARLEN) + head * dout.head_stride
    lse2_ptr = statistics_pointer(lse2_ptr, batch, start_q, num_heads, lse_stride, VARLEN)
    delta_ptr = statistics_pointer(delta_ptr, batch, start_q, num_heads, lse_stride, VARLEN)
    lse2_ptr += head * lse_stride
    delta_ptr += head * lse_stride
    if DESCRIPTORS:
        # One descriptor for all heads: the columns are those between the first and the last head.
        q_columns = (GROUP - 1) * q.head_stride + HEAD_DIM
        dout_columns = (GROUP - 1) * dout.head_stride + HEAD_DIM
        q_desc = tl.make_tensor_descriptor(
            q_ptr, [seqlen_q, q_columns], [q_stride, 1], [BLOCK_M, BLOCK_D]
        )
        dout_desc = tl.make_tensor_descriptor(
            dout_ptr, [seqlen_q, dout_columns], [dout_stride, 1], [BLOCK_M, BLOCK_D]
        )

    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Parts: query blocks that cross left edges of windows, no edge, and right edges.
    for PART in tl.static_range(3):
        if PART == 2 or (not NARROW and (PART == 1 or RIGHT_EDGE)):
            # One loop for all heads, so that the pipeline is filled only once.
            begin, end = ranges[PART]
            first = begin
            member = 0
            q_head = q_ptr
            dout_head = dout_ptr
            lse2_head = lse2_ptr
            delta_head = delta_ptr
            blocks = tl.cdiv(max(end - begin, 0), BLOCK_M)
            for _ in tl.range(0, GROUP * blocks, num_stages=NUM_STAGES):
                if DESCRIPTORS:
                    q_block = q_desc.load([first, member * q.head_stride])
                    dout_block = dout_desc.load([first, member * dout.head_stride])
                else:
                    q_block = load_block(
                        q_head, q_stride, first, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, PART != 1,
                        OFFSETS,
                    )  # fmt: skip
                    dout_block = load_block(
                        dout_head, dout_stride, first, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D,
                        PART != 1, OFFSETS,
                    )  # fmt: skip
                query = first + tl.arange(0, BLOCK_M)
                if PART != 1:  # past the end, an lse of +inf makes p 0 without another mask
                    lse2 = tl.load(lse2_head + query, mask=query < seqlen_q, other=float("inf"))
                    delta = tl.load(delta_head + query, mask=query < seqlen_q, other=0.0)
                else:
                    lse2 = tl.load(lse2_head + query)
                    delta = tl.load(delta_head + query)
                slope = slopes
                if slopes is not None:
                    slope = load_slopes(slopes, batch, head + member, scales.exp)
                s, cap_slope = scores(
                    tl.dot(k_rows, q_block.T, input_precision=PRECISION), scales, slope, position,
                    query[None, :], seqlen_q, (window_right, window_left),
                    PART == 0 or (PART == 2 and NARROW), PART == 2,
                )  # fmt: skip
                p = tl.exp2(s * scales.exp - lse2[None, :])
                if dk is not None:
                    dp = tl.dot(v_rows, dout_block.T, input_precision=PRECISION)
                if dv is not None:
                    dv_sum = tl.dot(
                        p.to(dout_block.dtype), dout_block, dv_sum, input_precision=PRECISION
                    )
                if dk is not None:
                    ds = p * (dp - delta[None, :])
                    if scales.tanh is not None:
                        ds *= cap_slope
                    dk_sum = tl.dot(
                        ds.to(q_block.dtype), q_block, dk_sum, input_precision=PRECISION
                    )
                first += BLOCK_M
                done = first >= end
                first = tl.where(done, begin, first)
                member += done.to(tl.int32)
                q_head += tl.where(done, q.head_stride, 0)
                dout_head += tl.where(done, dout.head_stride, 0)
                lse2_head += tl.where(done, lse_stride, 0)
                delta_head += tl.where(done, lse_stride, 0)

    if dk is not None:
        store_sequence_rows(
            dk, dk_sum * scales.softmax, batch, start_k, key, kv_head, seqlen_k, VARLEN, HEAD_DIM,
            BLOCK_D,
        )  # fmt: skip
    if dv is not None:
        store_sequence_rows(
            dv, dv_sum, batch, start_k, key, kv_head, seqlen_k, VARLEN, HEAD_DIM, BLOCK_D
        )


@jit
def _dq_kernel(
    q, k, v, dout, dq, lse2_ptr, delta_ptr, slopes, cu_seqlens, scales,
    seqlen_q, seqlen_k, lse_stride, tiles, num_kv_heads, window_left, window_right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT_EDGE: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, SAME_STRIDES: tl.constexpr, OFFSETS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of queries in a loop over the keys that it sees."""
    VARLEN: tl.constexpr = cu_seqlens[0] is not None
    SOURCE: tl.constexpr = "descriptors" if DESCRIPTORS else "dense"
    tile, kv_head, batch = program_indices(tiles, num_kv_heads)
    tile = tiles - 1 - tile  # start the tiles with the most keys first
    start_q, seqlen_q = sequence_bounds(cu_seqlens[0], batch, seqlen_q)
    start_k, seqlen_k = sequence_bounds(cu_seqlens[1], batch, seqlen_k)
    if tile * BLOCK_M >= seqlen_q * GROUP:
        return

    query, head, position, first_position, last_position = rows_of_tile(
        tile, kv_head, seqlen_q, seqlen_k, GROUP, BLOCK_M
    )
    q_rows = load_sequence_rows(q, batch, start_q, query, head, seqlen_q, VARLEN, HEAD_DIM, BLOCK_D)
    dout_rows = load_sequence_rows(
        dout, batch, start_q, query, head, seqlen_q, VARLEN, HEAD_DIM, BLOCK_D
    )
    num_heads = num_kv_heads * GROUP
    lse2_ptr = statistics_pointer(lse2_ptr, batch, start_q, num_heads, lse_stride, VARLEN)
    delta_ptr = statistics_pointer(delta_ptr, batch, start_q, num_heads, lse_stride, VARLEN)
    lse_offset = head.to(tl.int64) * lse_stride + query
    lse2 = tl.load(lse2_ptr + lse_offset, mask=query < seqlen_q, other=float("inf"))
    delta = tl.load(delta_ptr + lse_offset, mask=query < seqlen_q, other=0.0)
    if slopes is not None:
        slopes = load_slopes(slopes, batch, head, scales.exp)[:, None]
    keys, values = dense_keys(
        k, v, batch, start_k, kv_head, seqlen_k, VARLEN, SAME_STRIDES, SOURCE, BLOCK_N, HEAD_DIM,
        BLOCK_D,
    )  # fmt: skip
    ranges = block_ranges(
        first_position, last_position, seqlen_k, window_left, window_right, BLOCK_N, NARROW
    )

    dq_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Parts: key blocks that cross left edges of windows, no edge, and right edges of windows.
    for PART in tl.static_range(3):
        if PART == 2 or (not NARROW and (PART == 1 or LEFT_EDGE)):
            begin, end = ranges[PART]
            for first in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
                k_block = load_keys(
                    keys, first, seqlen_k, SOURCE, BLOCK_N, HEAD_DIM, BLOCK_D, PART == 2, OFFSETS
                )
                v_block = load_keys(
                    values, first, seqlen_k, SOURCE, BLOCK_N, HEAD_DIM, BLOCK_D, PART == 2, OFFSETS
                )
                key = first + tl.arange(0, BLOCK_N)[None, :]
                s, cap_slope = scores(
                    tl.dot(q_rows, k_block.T, input_precision=PRECISION), scales, slopes, position,
                    key, seqlen_k, (window_left, window_right),
                    PART == 0 or (PART == 2 and NARROW), PART == 2,
                )  # fmt: skip
                p = tl.exp2(s * scales.exp - lse2[:, None])
                dp = tl.dot(dout_rows, v_block.T, input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                if scales.tanh is not None:
                    ds *= cap_slope
                dq_sum = tl.dot(ds.to(k_block.dtype), k_block, dq_sum, input_precision=PRECISION)
    store_sequence_rows(
        dq, dq_sum * scales.softmax, batch, start_q, query, head, seqlen_q, VARLEN, HEAD_DIM,
        BLOCK_D,
    )  # fmt: skip


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v, None where `output_mask` is False."""
    problem = Problem(q, k, spec)
    _, _, max_seqlen_q, max_seqlen_k, covers_q, covers_k = spec.sequences
    dq, dk, dv = (
        (torch.empty_like if whole else torch.zeros_like)(x, memory_format=torch.contiguous_format)
        if need
        else None
        for x, need, whole in zip(
            (q, k, v), output_mask, (covers_q, covers_k, covers_k), strict=True
        )
    )
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    lse = lse.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    inputs = [problem.view(x) for x in (q, k, v, dout)]
    statistics = lse2, delta
    sizes = max_seqlen_q, max_seqlen_k, lse.stride(-2)

    def launch_dkdv(config: LaunchConfig) -> None:
        tiles = cdiv(max_seqlen_k, config["BLOCK_N"])
        _dkdv_kernel[problem.grid(tiles)](
            *(*inputs, problem.view(dk), problem.view(dv), *statistics, *problem.arguments),
            *(*sizes, tiles, problem.num_kv_heads, problem.left, problem.right),
            **problem.constants,
            RIGHT_EDGE=spec.window.right >= 0,
            NARROW=problem.narrow_for_keys(config),
            SAME_STRIDES=same_strides(config, q, dout),
            OFFSETS=offsets_within("tensor", max_seqlen_q + config["BLOCK_M"], q, dout),
            **config,
        )

    def launch_dq(config: LaunchConfig) -> None:
        tiles = cdiv(max_seqlen_q * problem.group, config["BLOCK_M"])
        _dq_kernel[problem.grid(tiles)](
            *(*inputs, problem.view(dq), *statistics, *problem.arguments),
            *(*sizes, tiles, problem.num_kv_heads, problem.left, problem.right),
            **problem.constants,
            LEFT_EDGE=spec.window.left >= 0,
            NARROW=problem.narrow_for_queries(config),
            SAME_STRIDES=same_strides(config, k, v),
            OFFSETS=offsets_within("block", config["BLOCK_N"], k, v),
            **config,
        )

    if lse.numel():
        config = delta_config(problem.block_d)
        count = cdiv(max_seqlen_q * problem.num_heads, config["BLOCK_M"])
        with device_guard(q):
            _delta_kernel[(count * problem.batch,)](
                *(problem.view(out), problem.view(dout), lse, *statistics, problem.cu_seqlens_q),
                *(max_seqlen_q, lse.stride(-2), count),
                NUM_HEADS=problem.num_heads,
                HEAD_DIM=problem.head_dim,
                **config,
            )
    if (dk is not None or dv is not None) and k.numel():
        # One descriptor covers all heads of a group: with padding, a block of BLOCK_D columns would
        # read columns of the next head.
        columns = (problem.group - 1) * max(q.stride(-2), dout.stride(-2)) + problem.head_dim
        exact = problem.head_dim == next_power_of_2(problem.head_dim) and columns < 2**31
        descriptors = exact and fits_descriptors(q, dout)
        launch_first_that_fits("attention_dkdv", q, problem.block_d, descriptors, launch_dkdv)
    if dq is not None and dq.numel():
        descriptors = fits_descriptors(k, v)
        launch_first_that_fits("attention_dq", q, problem.block_d, descriptors, launch_dq)
    return dq, dk, dv
