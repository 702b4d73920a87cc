"""The gradient of queries: one program a tile of queries, walking along its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, slopes_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    q_stride_b, q_stride_s, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    lse_stride_b, lse_stride_h,
    dq_stride_b, dq_stride_s, dq_stride_h, slopes_stride_b,
    seqlen_q, seqlen_k, tiles, num_kv_heads, window_left, window_right,
    softmax_scale, tanh_scale, exp_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VARLEN: tl.constexpr, LEFT_EDGE: tl.constexpr,
    NARROW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    SAME_STRIDES: tl.constexpr, OFFSETS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    tile, kv_head, batch = program_place(tiles, num_kv_heads)
    tile = tiles - 1 - tile  # those with most keys begin first
    start_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if tile * BLOCK_M >= seqlen_q * GROUP:
        return

    query, head, first_query, last_query = rows_of_tile(tile, kv_head, GROUP, BLOCK_M)
    place = (query + seqlen_k - seqlen_q)[:, None]
    q_ptr = sequence_pointer(q_ptr, batch, start_q, q_stride_b, q_stride_s, VARLEN)
    dout_ptr = sequence_pointer(dout_ptr, batch, start_q, dout_stride_b, dout_stride_s, VARLEN)
    q = load_rows(q_ptr, query, head, seqlen_q, q_stride_s, q_stride_h, HEAD_DIM, BLOCK_D)
    dout = load_rows(
        dout_ptr, query, head, seqlen_q, dout_stride_s, dout_stride_h, HEAD_DIM, BLOCK_D
    )
    lse2_ptr = sequence_pointer(lse2_ptr, batch, start_q, lse_stride_b, 1, VARLEN)
    delta_ptr = sequence_pointer(delta_ptr, batch, start_q, lse_stride_b, 1, VARLEN)
    lse_offset = head.to(tl.int64) * lse_stride_h + query
    lse2 = tl.load(lse2_ptr + lse_offset, mask=query < seqlen_q, other=float("inf"))
    delta = tl.load(delta_ptr + lse_offset, mask=query < seqlen_q, other=0.0)
    if ALIBI:
        slopes = tl.load(slopes_ptr + batch * slopes_stride_b + head)
        slopes = (slopes * (1.4426950408889634 / exp_scale))[:, None]

    if SAME_STRIDES:
        v_stride_s = k_stride_s
    k_ptr = sequence_pointer(k_ptr, batch, start_k, k_stride_b, k_stride_s, VARLEN)
    v_ptr = sequence_pointer(v_ptr, batch, start_k, v_stride_b, v_stride_s, VARLEN)
    k_ptr += kv_head.to(tl.int64) * k_stride_h
    v_ptr += kv_head.to(tl.int64) * v_stride_h
    k_desc = None
    v_desc = None
    if DESCRIPTORS:
        k_desc = tl.make_tensor_descriptor(
            k_ptr, [seqlen_k, HEAD_DIM], [k_stride_s, 1], [BLOCK_N, BLOCK_D]
        )
        v_desc = tl.make_tensor_descriptor(
            v_ptr, [seqlen_k, HEAD_DIM], [v_stride_s, 1], [BLOCK_N, BLOCK_D]
        )
    first_place = first_query + seqlen_k - seqlen_q
    last_place = min(last_query, seqlen_q - 1) + seqlen_k - seqlen_q
    bounds = block_ranges(
        first_place, last_place, seqlen_k, window_left, window_right, BLOCK_N, NARROW
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The blocks that cross left edges, those that cross none, those that cross right ones.
    for PART in tl.static_range(3):
        if PART == 2 or (not NARROW and (PART == 1 or LEFT_EDGE)):
            for first in tl.range(bounds[PART], bounds[PART + 1], BLOCK_N, num_stages=NUM_STAGES):
                k = load_block(
                    k_ptr, k_desc, first, seqlen_k, k_stride_s, BLOCK_N, HEAD_DIM, BLOCK_D,
                    PART == 2, DESCRIPTORS, OFFSETS,
                )  # fmt: skip
                v = load_block(
                    v_ptr, v_desc, first, seqlen_k, v_stride_s, BLOCK_N, HEAD_DIM, BLOCK_D,
                    PART == 2, DESCRIPTORS, OFFSETS,
                )  # fmt: skip
                key = first + tl.arange(0, BLOCK_N)[None, :]
                s = tl.dot(q, k.T, input_precision=PRECISION)
                if SOFTCAP:
                    s = tanh(s * tanh_scale)
                    cap_slope = 1.0 - s * s
                if ALIBI:
                    s -= slopes * tl.abs(key - place).to(tl.float32)
                if PART != 1:
                    s = hide(
                        s, place, key, seqlen_k, window_left, window_right, PART == 0 or NARROW,
                        PART == 2,
                    )  # fmt: skip
                p = tl.exp2(s * exp_scale - lse2[:, None])
                dp = tl.dot(dout, v.T, input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                if SOFTCAP:
                    ds *= cap_slope
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_ptr = sequence_pointer(dq_ptr, batch, start_q, dq_stride_b, dq_stride_s, VARLEN)
    dq *= softmax_scale
    store_rows(dq_ptr, dq, query, head, seqlen_q, dq_stride_s, dq_stride_h, HEAD_DIM, BLOCK_D)
