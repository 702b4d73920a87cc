"""Attention, backward, on Triton: probabilities are recomputed tile by tile, never stored.

With p = exp(scale * q k^T - lse) and dp = do v^T, both of one pair of tiles (arXiv:2307.08691):

    delta = rowsum(do * out)            one number a query and head
    ds = p * (dp - delta)
    dv = p^T do,   dk = scale * ds^T q,   dq = scale * ds k

Three kernels. The first computes delta. The second owns a tile of keys and loops over the queries
that see it, head after head of its group: dk and dv are summed in registers, in a fixed order,
without atomics. The third owns a tile of queries and loops over the keys it sees. Scores are
transposed in the second, so that p and ds are the left operands of products and stay in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.attention.launch import Problem, fits_descriptors, softmax_factors
from mistral_kernels.ops.attention.packed import Offsets
from mistral_kernels.ops.attention.tiles import (
    load_block,
    load_rows,
    sequence_bounds,
    sequence_pointer,
    store_rows,
    tanh,
)
from mistral_kernels.ops.attention.window import Window, block_ranges, visible_block
from mistral_kernels.ops.dispatch import device_guard
from mistral_kernels.ops.launch_configs import Config, cdiv, next_power_of_2
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    cu_seqlens_q_ptr,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    lse_stride_b,
    lse_stride_h,
    seqlen_q,
    tiles,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VARLEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta, and the log-sum-exp in base 2, +inf for a query without keys: 2^(s - inf) is 0."""
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles
    start_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // NUM_HEADS
    head = row % NUM_HEADS
    out_ptr = sequence_pointer(out_ptr, batch, start_q, out_stride_b, out_stride_s, VARLEN)
    dout_ptr = sequence_pointer(dout_ptr, batch, start_q, dout_stride_b, dout_stride_s, VARLEN)
    out = load_rows(out_ptr, query, head, seqlen_q, out_stride_s, out_stride_h, HEAD_DIM, BLOCK_D)
    dout = load_rows(
        dout_ptr, query, head, seqlen_q, dout_stride_s, dout_stride_h, HEAD_DIM, BLOCK_D
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    offset = head.to(tl.int64) * lse_stride_h + query
    if VARLEN:
        offset += start_q
    else:
        offset += batch.to(tl.int64) * lse_stride_b
    lse = tl.load(lse_ptr + offset, mask=query < seqlen_q, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(delta_ptr + offset, delta, mask=query < seqlen_q)
    tl.store(lse2_ptr + offset, lse2, mask=query < seqlen_q)


@jit
def _add_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    slopes_ptr,
    begin,
    end,
    place,
    seqlen_q,
    window_left,
    window_right,
    tanh_scale,
    exp_scale,
    q_stride_s,
    q_stride_h,
    dout_stride_s,
    dout_stride_h,
    lse_stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds to dk and dv what the queries [begin, end) of each head give; s is [keys, queries]."""
    MASK: tl.constexpr = LEFT or RIGHT
    if DESCRIPTORS:
        # The heads side by side as columns, however far apart they lie.
        q_desc = tl.make_tensor_descriptor(
            q_ptr,
            [seqlen_q, (GROUP - 1) * q_stride_h + HEAD_DIM],
            [q_stride_s, 1],
            [BLOCK_M, BLOCK_D],
        )
        dout_desc = tl.make_tensor_descriptor(
            dout_ptr,
            [seqlen_q, (GROUP - 1) * dout_stride_h + HEAD_DIM],
            [dout_stride_s, 1],
            [BLOCK_M, BLOCK_D],
        )
    # The heads of the group one after the other in one loop: its pipeline fills only once.
    first = begin
    member = 0
    for _ in tl.range(0, GROUP * tl.cdiv(max(end - begin, 0), BLOCK_M), num_stages=NUM_STAGES):
        if DESCRIPTORS:
            q = q_desc.load([first, member * q_stride_h])
            dout = dout_desc.load([first, member * dout_stride_h])
        else:
            q = load_block(
                q_ptr, None, first, seqlen_q, q_stride_s, BLOCK_M,
                HEAD_DIM, BLOCK_D, MASK, False, WIDE,
            )  # fmt: skip
            dout = load_block(
                dout_ptr, None, first, seqlen_q, dout_stride_s,
                BLOCK_M, HEAD_DIM, BLOCK_D, MASK, False, WIDE,
            )  # fmt: skip
        query = first + tl.arange(0, BLOCK_M)
        if MASK:
            lse2 = tl.load(lse2_ptr + query, mask=query < seqlen_q, other=float("inf"))
            delta = tl.load(delta_ptr + query, mask=query < seqlen_q, other=0.0)
        else:
            lse2 = tl.load(lse2_ptr + query)
            delta = tl.load(delta_ptr + query)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * tanh_scale)
            cap_slope = 1.0 - s * s
        if ALIBI:
            slope = tl.load(slopes_ptr + member) * (1.4426950408889634 / exp_scale)
            s -= slope * tl.abs(place - query[None, :]).to(tl.float32)
        if MASK:
            seen = visible_block(
                place, query[None, :], seqlen_q, window_left, window_right, LEFT, RIGHT
            )
            s = tl.where(seen, s, float("-inf"))
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
        done = first >= end
        first = tl.where(done, begin, first)
        q_ptr += tl.where(done, q_stride_h, 0)
        dout_ptr += tl.where(done, dout_stride_h, 0)
        lse2_ptr += tl.where(done, lse_stride_h, 0)
        delta_ptr += tl.where(done, lse_stride_h, 0)
        member += done.to(tl.int32)
    return dk, dv


@jit
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    lse_stride_b,
    lse_stride_h,
    dk_stride_b,
    dk_stride_s,
    dk_stride_h,
    slopes_stride_b,
    seqlen_q,
    seqlen_k,
    tiles,
    num_kv_heads,
    window_left,
    window_right,
    softmax_scale,
    tanh_scale,
    exp_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VARLEN: tl.constexpr,
    RIGHT_EDGE: tl.constexpr,
    NARROW: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles % num_kv_heads
    batch = tl.program_id(0) // tiles // num_kv_heads
    start_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if tile * BLOCK_N >= seqlen_k:
        return

    if SAME_STRIDES:
        dout_stride_s = q_stride_s
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr = sequence_pointer(k_ptr, batch, start_k, k_stride_b, k_stride_s, VARLEN)
    v_ptr = sequence_pointer(v_ptr, batch, start_k, v_stride_b, v_stride_s, VARLEN)
    k = load_rows(k_ptr, key, kv_head, seqlen_k, k_stride_s, k_stride_h, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, key, kv_head, seqlen_k, v_stride_s, v_stride_h, HEAD_DIM, BLOCK_D)
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

    # Places among the queries. Seen from a key, right and left change sides.
    first_place = tile * BLOCK_N + seqlen_q - seqlen_k
    last_place = min(tile * BLOCK_N + BLOCK_N, seqlen_k) - 1 + seqlen_q - seqlen_k
    lo, full_lo, full_hi, hi = block_ranges(
        first_place, last_place, seqlen_q, window_right, window_left, BLOCK_M, NARROW
    )
    place = (key + seqlen_q - seqlen_k)[:, None]

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if RIGHT_EDGE and not NARROW:
        dk, dv = _add_queries(
            dk, dv, k, v, q_ptr, dout_ptr, lse2_ptr, delta_ptr, slopes_ptr, lo, full_lo, place,
            seqlen_q, window_right, window_left, tanh_scale, exp_scale, q_stride_s, q_stride_h,
            dout_stride_s, dout_stride_h, lse_stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, True,
            False, NEEDS_DK, NEEDS_DV, DESCRIPTORS, WIDE, SOFTCAP, ALIBI, PRECISION, NUM_STAGES,
        )  # fmt: skip
    if not NARROW:
        dk, dv = _add_queries(
            dk, dv, k, v, q_ptr, dout_ptr, lse2_ptr, delta_ptr, slopes_ptr, full_lo, full_hi, place,
            seqlen_q, window_right, window_left, tanh_scale, exp_scale, q_stride_s, q_stride_h,
            dout_stride_s, dout_stride_h, lse_stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, False,
            False, NEEDS_DK, NEEDS_DV, DESCRIPTORS, WIDE, SOFTCAP, ALIBI, PRECISION, NUM_STAGES,
        )  # fmt: skip
    dk, dv = _add_queries(
        dk, dv, k, v, q_ptr, dout_ptr, lse2_ptr, delta_ptr, slopes_ptr, full_hi, hi, place,
        seqlen_q, window_right, window_left, tanh_scale, exp_scale, q_stride_s, q_stride_h,
        dout_stride_s, dout_stride_h, lse_stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, NARROW,
        True, NEEDS_DK, NEEDS_DV, DESCRIPTORS, WIDE, SOFTCAP, ALIBI, PRECISION, NUM_STAGES,
    )  # fmt: skip

    if NEEDS_DK:
        dk_ptr = sequence_pointer(dk_ptr, batch, start_k, dk_stride_b, dk_stride_s, VARLEN)
        dk *= softmax_scale
        store_rows(dk_ptr, dk, key, kv_head, seqlen_k, dk_stride_s, dk_stride_h, HEAD_DIM, BLOCK_D)
    if NEEDS_DV:
        dv_ptr = sequence_pointer(dv_ptr, batch, start_k, dk_stride_b, dk_stride_s, VARLEN)
        store_rows(dv_ptr, dv, key, kv_head, seqlen_k, dk_stride_s, dk_stride_h, HEAD_DIM, BLOCK_D)


@jit
def _add_keys(
    dq,
    q,
    dout,
    lse2,
    delta,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    begin,
    end,
    place,
    seqlen_k,
    window_left,
    window_right,
    slopes,
    tanh_scale,
    exp_scale,
    k_stride,
    v_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds what the keys in [begin, end) give to dq; s is [queries, keys]."""
    for first in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        k = load_block(
            k_ptr, k_desc, first, seqlen_k, k_stride, BLOCK_N, HEAD_DIM, BLOCK_D, RIGHT, DESCRIPTORS, True
        )
        v = load_block(
            v_ptr, v_desc, first, seqlen_k, v_stride, BLOCK_N, HEAD_DIM, BLOCK_D, RIGHT, DESCRIPTORS, True
        )
        key = first + tl.arange(0, BLOCK_N)[None, :]
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * tanh_scale)
            cap_slope = 1.0 - s * s
        if ALIBI:
            s -= slopes * tl.abs(key - place).to(tl.float32)
        if LEFT or RIGHT:
            seen = visible_block(place, key, seqlen_k, window_left, window_right, LEFT, RIGHT)
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s * exp_scale - lse2[:, None])
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= cap_slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    lse_stride_b,
    lse_stride_h,
    dq_stride_b,
    dq_stride_s,
    dq_stride_h,
    slopes_stride_b,
    seqlen_q,
    seqlen_k,
    tiles,
    num_kv_heads,
    window_left,
    window_right,
    softmax_scale,
    tanh_scale,
    exp_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VARLEN: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
    NARROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    tile = tiles - 1 - tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles % num_kv_heads
    batch = tl.program_id(0) // tiles // num_kv_heads
    start_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if tile * BLOCK_M >= seqlen_q * GROUP:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
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
    slopes = 0.0
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
    first_place = tile * BLOCK_M // GROUP + seqlen_k - seqlen_q
    last_place = min((tile * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1) + seqlen_k - seqlen_q
    lo, full_lo, full_hi, hi = block_ranges(
        first_place, last_place, seqlen_k, window_left, window_right, BLOCK_N, NARROW
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT_EDGE and not NARROW:
        dq = _add_keys(
            dq, q, dout, lse2, delta, k_ptr, v_ptr, k_desc, v_desc, lo, full_lo, place, seqlen_k,
            window_left, window_right, slopes, tanh_scale, exp_scale, k_stride_s, v_stride_s,
            HEAD_DIM, BLOCK_N, BLOCK_D, True, False, DESCRIPTORS, SOFTCAP, ALIBI, PRECISION,
            NUM_STAGES,
        )  # fmt: skip
    if not NARROW:
        dq = _add_keys(
            dq, q, dout, lse2, delta, k_ptr, v_ptr, k_desc, v_desc, full_lo, full_hi, place,
            seqlen_k, window_left, window_right, slopes, tanh_scale, exp_scale, k_stride_s,
            v_stride_s, HEAD_DIM, BLOCK_N, BLOCK_D, False, False, DESCRIPTORS, SOFTCAP, ALIBI,
            PRECISION, NUM_STAGES,
        )  # fmt: skip
    dq = _add_keys(
        dq, q, dout, lse2, delta, k_ptr, v_ptr, k_desc, v_desc, full_hi, hi, place, seqlen_k,
        window_left, window_right, slopes, tanh_scale, exp_scale, k_stride_s, v_stride_s,
        HEAD_DIM, BLOCK_N, BLOCK_D, NARROW, True, DESCRIPTORS, SOFTCAP, ALIBI, PRECISION,
        NUM_STAGES,
    )  # fmt: skip
    dq_ptr = sequence_pointer(dq_ptr, batch, start_q, dq_stride_b, dq_stride_s, VARLEN)
    dq *= softmax_scale
    store_rows(dq_ptr, dq, query, head, seqlen_q, dq_stride_s, dq_stride_h, HEAD_DIM, BLOCK_D)


def launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Offsets | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of q, k and v that `output_mask` asks for."""
    problem = Problem.of(q, k, offsets, window, alibi_slopes)
    *_, num_heads, head_dim = q.shape
    covered = (True,) * 3 if offsets is None else (offsets.covers_q, *[offsets.covers_k] * 2)
    dq, dk, dv = (
        (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
        if need
        else None
        for x, need, whole in zip((q, k, v), output_mask, covered)
    )
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    lse_strides = problem.lse_strides(lse)
    cu_seqlens = problem.cu_seqlens_q, problem.cu_seqlens_k
    common = {
        "HEAD_DIM": head_dim,
        "VARLEN": offsets is not None,
        "SOFTCAP": softcap > 0,
        "ALIBI": alibi_slopes is not None,
        "PRECISION": problem.precision,
        "GROUP": problem.group,
    }
    numbers = softmax_scale, *softmax_factors(softmax_scale, softcap)

    def run_dkdv(config: Config) -> None:
        tiles = cdiv(max_seqlen_k, config["BLOCK_N"])
        _dkdv_kernel[(tiles * problem.num_kv_heads * problem.batch,)](
            *(q, k, v, dout, lse2, delta, dk, dv, problem.slopes, *cu_seqlens),
            *problem.strides(q, k, v, dout),
            *lse_strides,
            *problem.strides(dv if dk is None else dk),
            problem.slopes_stride,
            *(max_seqlen_q, max_seqlen_k, tiles, problem.num_kv_heads),
            *(problem.left, problem.right),
            *numbers,
            **common,
            RIGHT_EDGE=window.right >= 0,
            NARROW=problem.narrow_for_keys(config),
            NEEDS_DK=dk is not None,
            NEEDS_DV=dv is not None,
            SAME_STRIDES=q.stride(-3) == dout.stride(-3),
            WIDE=max_seqlen_q * max(q.stride(-3), dout.stride(-3)) >= 2**31,
            **config,
        )

    def run_dq(config: Config) -> None:
        tiles = cdiv(max_seqlen_q * problem.group, config["BLOCK_M"])
        _dq_kernel[(tiles * problem.num_kv_heads * problem.batch,)](
            *(q, k, v, dout, lse2, delta, dq, problem.slopes, *cu_seqlens),
            *problem.strides(q, k, v, dout),
            *lse_strides,
            *problem.strides(dq),
            problem.slopes_stride,
            *(max_seqlen_q, max_seqlen_k, tiles, problem.num_kv_heads),
            *(problem.left, problem.right),
            *numbers,
            **common,
            LEFT_EDGE=window.left >= 0,
            NARROW=problem.narrow_for_queries(config),
            SAME_STRIDES=k.stride(-3) == v.stride(-3),
            **config,
        )

    if lse.numel():
        config = launch_configs.attention_delta(problem.block_d)
        tiles = cdiv(max_seqlen_q * num_heads, config["BLOCK_M"])
        with device_guard(q):
            _delta_kernel[(tiles * problem.batch,)](
                *(out, dout, lse, delta, lse2, problem.cu_seqlens_q),
                *problem.strides(out, dout),
                *lse_strides,
                *(max_seqlen_q, tiles),
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
                VARLEN=offsets is not None,
                **config,
            )
    if (dk is not None or dv is not None) and k.numel():
        # Of the heads side by side in one descriptor: no columns between them may be missing.
        columns = (problem.group - 1) * max(q.stride(-2), dout.stride(-2)) + head_dim
        exact = head_dim == next_power_of_2(head_dim) and columns < 2**31
        problem.launch("attention_dkdv", exact and fits_descriptors(q, dout), run_dkdv)
    if dq is not None and dq.numel():
        problem.launch("attention_dq", fits_descriptors(k, v), run_dq)
    return dq, dk, dv
