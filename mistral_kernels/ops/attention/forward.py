"""Attention, forward, on Triton: one program a tile of queries, online softmax over its key blocks.

    out = softmax(scale * q k^T) v,   lse = log(sum(exp(scale * q k^T)))

The softmax is that of FlashAttention-2 (arXiv:2307.08691), in base 2: the running maximum m and sum
l of each row are carried from block to block, and the division by l comes once, at the end.

Key blocks that no row of the tile sees are never visited. In `[lo, full_lo)` and `[full_hi, hi)`
some rows see only a part of a block (the window's left edge; the diagonal and the end of the keys)
and scores are masked; every row sees all of `[full_lo, full_hi)`, and nothing is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.ops.attention.launch import (
    Problem,
    fits_descriptors,
    offsets_within,
    same_strides,
    softmax_factors,
)
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

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, slopes_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    q_stride_b, q_stride_s, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h,
    lse_stride_b, lse_stride_h, slopes_stride_b,
    seqlen_q, seqlen_k, tiles, num_kv_heads, window_left, window_right, tanh_scale, exp_scale,
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
    q = load_rows(q_ptr, query, head, seqlen_q, q_stride_s, q_stride_h, HEAD_DIM, BLOCK_D)
    if ALIBI:
        slopes = tl.load(slopes_ptr + batch * slopes_stride_b + head)
        slopes = (slopes * (1.4426950408889634 / exp_scale))[:, None]
    lse_ptr = sequence_pointer(lse_ptr, batch, start_q, lse_stride_b, 1, VARLEN)
    lse_offset = head.to(tl.int64) * lse_stride_h + query

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

    row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)  # finite: -inf - -inf is not a number
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DESCRIPTORS:
        ahead = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if seqlen_k > 0:  # a descriptor of no rows must not be read
            ahead = tl.dot(q, k_desc.load([bounds[0], 0]).T, input_precision=PRECISION)
    # The blocks that cross left edges, those that cross none, those that cross right ones.
    for PART in tl.static_range(3):
        if PART == 2 or (not NARROW and (PART == 1 or LEFT_EDGE)):
            for first in tl.range(bounds[PART], bounds[PART + 1], BLOCK_N, num_stages=NUM_STAGES):
                if DESCRIPTORS:
                    s = ahead
                else:
                    k = load_block(
                        k_ptr, k_desc, first, seqlen_k, k_stride_s, BLOCK_N, HEAD_DIM, BLOCK_D,
                        PART == 2, DESCRIPTORS, OFFSETS,
                    )  # fmt: skip
                    s = tl.dot(q, k.T, input_precision=PRECISION)
                key = first + tl.arange(0, BLOCK_N)[None, :]
                if SOFTCAP:
                    s = tanh(s * tanh_scale)
                if ALIBI:
                    s -= slopes * tl.abs(key - place).to(tl.float32)
                if PART != 1:  # ptxas for sm_90 spills unless right-edge blocks check both
                    s = hide(
                        s, place, key, seqlen_k, window_left, window_right,
                        PART == 0 or NARROW or DESCRIPTORS, PART == 2,
                    )  # fmt: skip
                new_max = tl.maximum(row_max, tl.max(s, 1) * exp_scale)
                p = tl.exp2(s * exp_scale - new_max[:, None])
                rescale = tl.exp2(row_max - new_max)
                row_sum = row_sum * rescale + tl.sum(p, 1)
                row_max = new_max
                p = p.to(q.dtype)  # before v is waited for: half the registers
                if DESCRIPTORS:
                    # The product of the next block comes after the exponentials of this one, which
                    # the product p v of the last block, still on its way, hides.
                    k = k_desc.load([first + BLOCK_N, 0])
                    ahead = tl.dot(q, k.T, input_precision=PRECISION)
                acc = acc * rescale[:, None]
                v = load_block(
                    v_ptr, v_desc, first, seqlen_k, v_stride_s, BLOCK_N, HEAD_DIM, BLOCK_D,
                    PART == 2, DESCRIPTORS, OFFSETS,
                )  # fmt: skip
                acc = tl.dot(p, v, acc, input_precision=PRECISION)

    # A row that saw no key has the sum 0: its output is 0 and its log-sum-exp -inf.
    out = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_ptr = sequence_pointer(out_ptr, batch, start_q, out_stride_b, out_stride_s, VARLEN)
    store_rows(out_ptr, out, query, head, seqlen_q, out_stride_s, out_stride_h, HEAD_DIM, BLOCK_D)
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)
    tl.store(lse_ptr + lse_offset, lse, mask=query < seqlen_q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of a batch, rectangular or packed."""
    problem = Problem(q, k, spec)
    cu_seqlens_q, _, max_seqlen_q, max_seqlen_k, covers_q, _ = spec.sequences
    head_dim = problem.head_dim
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    if not covers_q:
        out.zero_()
        lse.fill_(-torch.inf)
    if out.numel() == 0:
        return out, lse

    def run(config: Config) -> None:
        tiles = cdiv(max_seqlen_q * problem.group, config["BLOCK_M"])
        _forward_kernel[(tiles * problem.num_kv_heads * problem.batch,)](
            *(q, k, v, out, lse, problem.slopes, problem.cu_seqlens_q, problem.cu_seqlens_k),
            *problem.strides(q, k, v, out),
            *problem.lse_strides(lse),
            problem.slopes_stride,
            *(max_seqlen_q, max_seqlen_k, tiles, problem.num_kv_heads),
            *(problem.left, problem.right),
            *softmax_factors(spec.scale(head_dim), spec.softcap),
            GROUP=problem.group,
            HEAD_DIM=head_dim,
            VARLEN=cu_seqlens_q is not None,
            LEFT_EDGE=spec.window.left >= 0,
            NARROW=problem.narrow_for_queries(config),
            SOFTCAP=spec.softcap > 0,
            ALIBI=problem.slopes is not None,
            PRECISION=problem.precision,
            SAME_STRIDES=same_strides(config, k, v),
            OFFSETS=offsets_within("block", config["BLOCK_N"], k, v),
            **config,
        )

    problem.launch("attention_forward", fits_descriptors(k, v), run)
    return out, lse
