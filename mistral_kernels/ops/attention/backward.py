"""Attention, backward, on Triton: probabilities are recomputed tile by tile, never stored.

With p = exp(scale * q k^T - lse) and dp = do v^T, both of one pair of tiles (arXiv:2307.08691):

    delta = rowsum(do * out)            one number a query and head
    ds = p * (dp - delta)
    dv = p^T do,   dk = scale * ds^T q,   dq = scale * ds k

Three kernels: delta, here; then `dkdv.py`, for each tile of keys over its queries; then `dq.py`,
for each tile of queries over its keys. Each sum is formed by one program in a fixed order, so
gradients are the same bit for bit at every run. What needs no gradient is not computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.ops.attention import tile_table
from mistral_kernels.ops.attention.dkdv import dkdv_kernel
from mistral_kernels.ops.attention.dq import dq_kernel
from mistral_kernels.ops.attention.launch import (
    Problem,
    fits_descriptors,
    offsets_within,
    same_strides,
    softmax_factors,
)
from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.tiles import load_rows, sequence_bounds, sequence_pointer
from mistral_kernels.ops.dispatch import device_guard
from mistral_kernels.ops.launch_configs import Config, cdiv, next_power_of_2
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _delta_kernel(
    out_ptr, dout_ptr, lse_ptr, delta_ptr, lse2_ptr, cu_seqlens_q_ptr,
    out_stride_b, out_stride_s, out_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    lse_stride_b, lse_stride_h,
    seqlen_q, tiles,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
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
    cu_seqlens_q, _, max_seqlen_q, max_seqlen_k, covers_q, covers_k = spec.sequences
    window, softcap = spec.window, spec.softcap
    *_, num_heads, head_dim = q.shape
    softmax_scale = spec.scale(head_dim)
    covered = covers_q, covers_k, covers_k
    dq, dk, dv = (
        (torch.empty_like if whole else torch.zeros_like)(x, memory_format=torch.contiguous_format)
        if need
        else None
        for x, need, whole in zip((q, k, v), output_mask, covered, strict=True)
    )
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    inputs = q, k, v, dout, lse2, delta
    cu_seqlens = problem.cu_seqlens_q, problem.cu_seqlens_k
    lse_strides = problem.lse_strides(lse)
    input_strides = *problem.strides(q, k, v, dout), *lse_strides
    window_and_scale = (
        *(problem.left, problem.right, softmax_scale),
        *softmax_factors(softmax_scale, softcap),
    )
    common = {
        "HEAD_DIM": head_dim,
        "VARLEN": cu_seqlens_q is not None,
        "SOFTCAP": softcap > 0,
        "ALIBI": problem.slopes is not None,
        "PRECISION": problem.precision,
        "GROUP": problem.group,
    }

    def run_dkdv(config: Config) -> None:
        tiles = cdiv(max_seqlen_k, config["BLOCK_N"])
        dkdv_kernel[(tiles * problem.num_kv_heads * problem.batch,)](
            *(*inputs, dk, dv, problem.slopes, *cu_seqlens),
            *input_strides,
            *problem.strides(dv if dk is None else dk),
            problem.slopes_stride,
            *(max_seqlen_q, max_seqlen_k, tiles, problem.num_kv_heads),
            *window_and_scale,
            **common,
            RIGHT_EDGE=window.right >= 0,
            NARROW=problem.narrow_for_keys(config),
            NEEDS_DK=dk is not None,
            NEEDS_DV=dv is not None,
            SAME_STRIDES=same_strides(config, q, dout),
            OFFSETS=offsets_within("tensor", max_seqlen_q + config["BLOCK_M"], q, dout),
            **config,
        )

    def run_dq(config: Config) -> None:
        tiles = cdiv(max_seqlen_q * problem.group, config["BLOCK_M"])
        dq_kernel[(tiles * problem.num_kv_heads * problem.batch,)](
            *(*inputs, dq, problem.slopes, *cu_seqlens),
            *input_strides,
            *problem.strides(dq),
            problem.slopes_stride,
            *(max_seqlen_q, max_seqlen_k, tiles, problem.num_kv_heads),
            *window_and_scale,
            **common,
            LEFT_EDGE=window.left >= 0,
            NARROW=problem.narrow_for_queries(config),
            SAME_STRIDES=same_strides(config, k, v),
            OFFSETS=offsets_within("block", config["BLOCK_N"], k, v),
            **config,
        )

    if lse.numel():
        config = tile_table.delta(problem.block_d)
        tiles = cdiv(max_seqlen_q * num_heads, config["BLOCK_M"])
        with device_guard(q):
            _delta_kernel[(tiles * problem.batch,)](
                *(out, dout, lse, delta, lse2, problem.cu_seqlens_q),
                *problem.strides(out, dout),
                *lse_strides,
                *(max_seqlen_q, tiles),
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
                VARLEN=cu_seqlens_q is not None,
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
