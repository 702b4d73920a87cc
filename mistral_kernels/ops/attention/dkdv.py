"""The gradients of keys and values: one program a tile of keys, walking along its queries.

The queries that see the tile are visited head after head of its group, so that dk and dv are
summed in registers, in a fixed order, without atomics. Scores are transposed, [keys, queries]: p
and ds are then the left operands of the products that follow, and stay in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_kernels.ops.attention.tiles import (
    load_block,
    load_rows,
    program_place,
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
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, slopes_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    q_stride_b, q_stride_s, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    lse_stride_b, lse_stride_h,
    dk_stride_b, dk_stride_s, dk_stride_h, slopes_stride_b,
    seqlen_q, seqlen_k, tiles, num_kv_heads, window_left, window_right,
    softmax_scale, tanh_scale, exp_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VARLEN: tl.constexpr, RIGHT_EDGE: tl.constexpr,
    NARROW: tl.constexpr, NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, PRECISION: tl.constexpr, SAME_STRIDES: tl.constexpr,
    OFFSETS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    tile, kv_head, batch = program_place(tiles, num_kv_heads)
    start_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if tile * BLOCK_N >= seqlen_k:
        return

    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr = sequence_pointer(k_ptr, batch, start_k, k_stride_b, k_stride_s, VARLEN)
    v_ptr = sequence_pointer(v_ptr, batch, start_k, v_stride_b, v_stride_s, VARLEN)
    k = load_rows(k_ptr, key, kv_head, seqlen_k, k_stride_s, k_stride_h, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, key, kv_head, seqlen_k, v_stride_s, v_stride_h, HEAD_DIM, BLOCK_D)

    if SAME_STRIDES:
        dout_stride_s = q_stride_s
    head = (kv_head * GROUP).to(tl.int64)  # the first of the group
    q_ptr = sequence_pointer(q_ptr, batch, start_q, q_stride_b, q_stride_s, VARLEN)
    dout_ptr = sequence_pointer(dout_ptr, batch, start_q, dout_stride_b, dout_stride_s, VARLEN)
    lse2_ptr = sequence_pointer(lse2_ptr, batch, start_q, lse_stride_b, 1, VARLEN)
    delta_ptr = sequence_pointer(delta_ptr, batch, start_q, lse_stride_b, 1, VARLEN)
    q_ptr += head * q_stride_h
    dout_ptr += head * dout_stride_h
    lse2_ptr += head * lse_stride_h
    delta_ptr += head * lse_stride_h
    if ALIBI:
        slopes_ptr += batch * slopes_stride_b + head
    if DESCRIPTORS:
        # The heads side by side as columns, however far apart they lie.
        q_columns = (GROUP - 1) * q_stride_h + HEAD_DIM
        dout_columns = (GROUP - 1) * dout_stride_h + HEAD_DIM
        q_desc = tl.make_tensor_descriptor(
            q_ptr, [seqlen_q, q_columns], [q_stride_s, 1], [BLOCK_M, BLOCK_D]
        )
        dout_desc = tl.make_tensor_descriptor(
            dout_ptr, [seqlen_q, dout_columns], [dout_stride_s, 1], [BLOCK_M, BLOCK_D]
        )

    # Places among the queries. Seen from a key, right and left change sides.
    first_place = tile * BLOCK_N + seqlen_q - seqlen_k
    last_place = min(tile * BLOCK_N + BLOCK_N, seqlen_k) - 1 + seqlen_q - seqlen_k
    place = (key + seqlen_q - seqlen_k)[:, None]
    bounds = block_ranges(
        first_place, last_place, seqlen_q, window_right, window_left, BLOCK_M, NARROW
    )

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The blocks that cross left edges, those that cross none, those that cross right ones.
    for PART in tl.static_range(3):
        if PART == 2 or (not NARROW and (PART == 1 or RIGHT_EDGE)):
            # The heads one after the other in one loop: its pipeline fills only once.
            first = bounds[PART]
            member = 0
            q_head = q_ptr
            dout_head = dout_ptr
            lse2_head = lse2_ptr
            delta_head = delta_ptr
            blocks = tl.cdiv(max(bounds[PART + 1] - first, 0), BLOCK_M)
            for _ in tl.range(0, GROUP * blocks, num_stages=NUM_STAGES):
                if DESCRIPTORS:
                    q = q_desc.load([first, member * q_stride_h])
                    dout = dout_desc.load([first, member * dout_stride_h])
                else:
                    q = load_block(
                        q_head, None, first, seqlen_q, q_stride_s, BLOCK_M, HEAD_DIM, BLOCK_D,
                        PART != 1, False, OFFSETS,
                    )  # fmt: skip
                    dout = load_block(
                        dout_head, None, first, seqlen_q, dout_stride_s, BLOCK_M, HEAD_DIM, BLOCK_D,
                        PART != 1, False, OFFSETS,
                    )  # fmt: skip
                query = first + tl.arange(0, BLOCK_M)
                if PART != 1:  # past the end, where nothing else is masked, p becomes 0
                    lse2 = tl.load(lse2_head + query, mask=query < seqlen_q, other=float("inf"))
                    delta = tl.load(delta_head + query, mask=query < seqlen_q, other=0.0)
                else:
                    lse2 = tl.load(lse2_head + query)
                    delta = tl.load(delta_head + query)
                s = tl.dot(k, q.T, input_precision=PRECISION)
                if SOFTCAP:
                    s = tanh(s * tanh_scale)
                    cap_slope = 1.0 - s * s
                if ALIBI:
                    slope = tl.load(slopes_ptr + member) * (1.4426950408889634 / exp_scale)
                    s -= slope * tl.abs(place - query[None, :]).to(tl.float32)
                if PART != 1:
                    s = hide(
                        s, place, query[None, :], seqlen_q, window_right, window_left,
                        PART == 0 or NARROW, PART == 2,
                    )  # fmt: skip
                p = tl.exp2(s * exp_scale - lse2[None, :])
                if NEEDS_DK:
                    dp = tl.dot(v, dout.T, input_precision=PRECISION)
                if NEEDS_DV:
                    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
                if NEEDS_DK:
                    ds = p * (dp - delta[None, :])
                    if SOFTCAP:
                        ds *= cap_slope
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                first += BLOCK_M
                done = first >= bounds[PART + 1]
                first = tl.where(done, bounds[PART], first)
                member += done.to(tl.int32)
                q_head += tl.where(done, q_stride_h, 0)
                dout_head += tl.where(done, dout_stride_h, 0)
                lse2_head += tl.where(done, lse_stride_h, 0)
                delta_head += tl.where(done, lse_stride_h, 0)

    if NEEDS_DK:
        dk_ptr = sequence_pointer(dk_ptr, batch, start_k, dk_stride_b, dk_stride_s, VARLEN)
        dk *= softmax_scale
        store_rows(dk_ptr, dk, key, kv_head, seqlen_k, dk_stride_s, dk_stride_h, HEAD_DIM, BLOCK_D)
    if NEEDS_DV:
        dv_ptr = sequence_pointer(dv_ptr, batch, start_k, dk_stride_b, dk_stride_s, VARLEN)
        store_rows(dv_ptr, dv, key, kv_head, seqlen_k, dk_stride_s, dk_stride_h, HEAD_DIM, BLOCK_D)
