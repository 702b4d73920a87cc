"""Attention over a cache as PyTorch sees it: one operator, for rings and flat or paged caches.

Of `total = lengths + new` tokens a sequence, the last are its queries' places. With k and v the new
tokens' keys are fresh: the cache holds the `lengths` before them, as it was. Without, it holds all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.attention import decode
from mistral_kernels.ops.attention.cache_torch import attend_in_pieces
from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.dispatch import uses_triton


def _cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None,
    rows: Tensor | None,
    leftpad: Tensor | None,
    block_table: Tensor | None,
    counters: Tensor | None,
    max_seqlen_q: int,
    seqlen_new: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    cache = k_cache, v_cache, lengths, cu_seqlens, rows, leftpad, block_table
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = max_seqlen_q, seqlen_new, scale, Window(window_left, window_right), softcap
    if uses_triton(q):
        return decode.launch(q, k, v, *cache, counters, *numbers, alibi_slopes, num_splits)
    return attend_in_pieces(q, k, v, *cache, *numbers, alibi_slopes, return_lse)


def _cached_attention_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not (args[-1] or uses_triton(q)):
        return out, None
    *batch, seqlen, num_heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out, torch.empty((*batch, num_heads, seqlen), dtype=dtype, device=q.device)


torch.library.define(
    "mistral_kernels::cached_attention",
    "(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor? cu_seqlens, Tensor? rows, Tensor? leftpad, Tensor? block_table, "
    "Tensor? counters, SymInt max_seqlen_q, SymInt seqlen_new, float? softmax_scale, "
    "SymInt window_left, SymInt window_right, float softcap, Tensor? alibi_slopes, "
    "SymInt num_splits, bool return_lse) -> (Tensor out, Tensor? lse)",
)
torch.library.impl("mistral_kernels::cached_attention", ("cpu", "cuda"), _cached_attention)
torch.library.register_fake("mistral_kernels::cached_attention", _cached_attention_fake)

_cached_attention_op = torch.ops.mistral_kernels.cached_attention.default


def attend_cached(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: Window,
    max_seqlen_q: int,
    cu_seqlens: Tensor | None = None,
    seqlen_new: int = 0,
    rows: Tensor | None = None,
    leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    counters: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a cache of arguments that have been checked. The log-sum-exp may come unasked.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed with `cu_seqlens`.
        k, v: packed like q, the new tokens'; None: in the cache.
        k_cache, v_cache: (rows, capacity, num_kv_heads, head_dim), or, with `block_table` (batch,
            max_pages) int32, (pages, page_size, ...).
        lengths: (batch,) int32; tokens before the new ones.
        seqlen_new: new tokens of a sequence, if q is not packed.
        rows: (batch,) int32, which row of the cache is each sequence's.
        leftpad: (batch,) int32, the first position that counts.
        counters: see `rolling_cache_attention`.
        num_splits: programs that share a sequence's keys; 0: as many as pay.
    """
    cache = k_cache, v_cache, lengths, cu_seqlens, rows, leftpad, block_table
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, k_cache, v_cache)
    ):
        scoring = softmax_scale, window, softcap, alibi_slopes
        return attend_in_pieces(q, k, v, *cache, max_seqlen_q, seqlen_new, *scoring, return_lse)
    numbers = max_seqlen_q, seqlen_new, softmax_scale, *window, softcap
    return _cached_attention_op(
        q, k, v, *cache, counters, *numbers, alibi_slopes, num_splits, return_lse
    )
