"""Forward pass of attention on Triton: online softmax over key blocks, per tile of queries.

    out = softmax(scale * q k^T) v,   lse = log(sum(exp(scale * q k^T)))

Each program computes one tile of queries. It skips key blocks that no row of the tile sees. Scores
are masked only in blocks that cross an edge of the window or the end of the keys
(`window.block_ranges`).
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
    empty_softmax,
    load_sequence_rows,
    load_slopes,
    program_indices,
    rows_of_tile,
    sequence_bounds,
    softmax_over_keys,
    store_softmax,
)
from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.tiles import launch_first_that_fits
from mistral_kernels.ops.attention.window import block_ranges
from mistral_kernels.ops.launch_configs import LaunchConfig, cdiv
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _forward_kernel(
    q, k, v, out, lse_ptr, slopes, cu_seqlens, scales,
    seqlen_q, seqlen_k, lse_stride, tiles, num_kv_heads, window_left, window_right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT_EDGE: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, SAME_STRIDES: tl.constexpr, OFFSETS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
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
    if slopes is not None:
        slopes = load_slopes(slopes, batch, head, scales.exp)[:, None]
    keys, values = dense_keys(
        k, v, batch, start_k, kv_head, seqlen_k, VARLEN, SAME_STRIDES, SOURCE, BLOCK_N, HEAD_DIM,
        BLOCK_D,
    )  # fmt: skip
    ranges = block_ranges(
        first_position, last_position, seqlen_k, window_left, window_right, BLOCK_N, NARROW
    )
    state = softmax_over_keys(
        empty_softmax(BLOCK_M, BLOCK_D), q_rows, position, slopes, keys, values, ranges, seqlen_k,
        (window_left, window_right), scales,
        SOURCE, LEFT_EDGE, NARROW, False, PRECISION, OFFSETS, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        NUM_STAGES,
    )  # fmt: skip
    store_softmax(
        state, out, lse_ptr, lse_stride, batch, start_q, query, head, seqlen_q,
        num_kv_heads * GROUP, VARLEN, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of a rectangular or packed batch."""
    problem = Problem(q, k, spec)
    _, _, max_seqlen_q, max_seqlen_k, covers_q, _ = spec.sequences
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    if not covers_q:
        out.zero_()
        lse.fill_(-torch.inf)
    if out.numel() == 0:
        return out, lse

    def launch(config: LaunchConfig) -> None:
        tiles = cdiv(max_seqlen_q * problem.group, config["BLOCK_M"])
        _forward_kernel[problem.grid(tiles)](
            *(problem.view(x) for x in (q, k, v, out)),
            lse,
            *problem.arguments,
            *(max_seqlen_q, max_seqlen_k, lse.stride(-2), tiles, problem.num_kv_heads),
            *(problem.left, problem.right),
            **problem.constants,
            LEFT_EDGE=spec.window.left >= 0,
            NARROW=problem.narrow_for_queries(config),
            SAME_STRIDES=same_strides(config, k, v),
            OFFSETS=offsets_within("block", config["BLOCK_N"], k, v),
            **config,
        )

    descriptors = fits_descriptors(k, v)
    launch_first_that_fits("attention_forward", q, problem.block_d, descriptors, launch)
    return out, lse
