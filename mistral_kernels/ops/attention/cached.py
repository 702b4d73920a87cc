"""Attention over a cache as PyTorch sees it: one operator, for rings and flat or paged caches.

Of `lengths + new` tokens a sequence, the last are its queries' places. With k and v the new tokens'
keys are fresh: the cache holds the `lengths` before them, as it was. Without, it holds all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.attention import decode
from mistral_kernels.ops.attention.cache_torch import attend_in_pieces, is_decode_step
from mistral_kernels.ops.attention.cache_view import CacheView
from mistral_kernels.ops.attention.scoring import Scoring
from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.dispatch import uses_triton, with_unit_stride


def _cached_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor | None]:
    """In the schema's order; its middle part is a `CacheView`."""
    *cache, max_seqlen_q, left, right, scale, softcap, slopes, return_lse, splits, counters = args
    view, scoring = (
        CacheView(*cache),
        Scoring(Window(left, right), scale, softcap, slopes, return_lse),
    )
    if uses_triton(q):
        return decode.launch(q, k, v, view, scoring, max_seqlen_q, splits, counters)
    operators = extension.cpu_operators(q)
    if operators is not None and is_decode_step(q, k, view, scoring, max_seqlen_q):
        return _decode_csrc(operators, q, view, scoring), None
    return attend_in_pieces(q, k, v, view, scoring, max_seqlen_q)


def _decode_csrc(operators: Any, q: Tensor, cache: CacheView, scoring: Scoring) -> Tensor:
    """One new token a sequence, whose key is in the cache."""
    queries = with_unit_stride(q if q.ndim == 3 else q.squeeze(1))
    out = torch.empty(queries.shape, dtype=q.dtype)
    new_tokens = cache.seqlen_new if cache.cu_seqlens is None else 1
    places = [
        None if x is None else x.contiguous()
        for x in (cache.rows, cache.leftpad, cache.block_table)
    ]
    operators.decode_attention.default(
        *(queries, cache.k_cache, cache.v_cache, cache.lengths.contiguous(), new_tokens),
        *(*places, scoring.window.left, scoring.scale, out),
    )
    return out if q.ndim == 3 else out.unsqueeze(1)


def _cached_attention_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    *_, return_lse, _, _ = args
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not (return_lse or uses_triton(q)):
        return out, None
    *batch, seqlen, num_heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out, torch.empty((*batch, num_heads, seqlen), dtype=dtype, device=q.device)


torch.library.define(
    "mistral_kernels::cached_attention",
    "(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor? cu_seqlens, SymInt seqlen_new, Tensor? rows, Tensor? leftpad, Tensor? block_table, "
    "SymInt max_seqlen_q, SymInt window_left, SymInt window_right, float scale, float softcap, "
    "Tensor? alibi_slopes, bool return_lse, SymInt num_splits, Tensor? counters)"
    " -> (Tensor out, Tensor? lse)",
)
torch.library.impl("mistral_kernels::cached_attention", ("cpu", "cuda"), _cached_attention)
torch.library.register_fake("mistral_kernels::cached_attention", _cached_attention_fake)

_cached_attention_op = torch.ops.mistral_kernels.cached_attention.default


def attend_cached(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: CacheView,
    *,
    window: Window,
    max_seqlen_q: int,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a cache of arguments that have been checked. The log-sum-exp may come unasked.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed with the cache's `cu_seqlens`.
        k, v: packed like q, the new tokens'; None: in the cache.
        num_splits: programs that share a sequence's keys; 0: as many as pay.
        counters: see `rolling_cache_attention`.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, cache.k_cache, cache.v_cache)
    ):
        scoring = Scoring(window, scale, softcap, alibi_slopes, return_lse)
        return attend_in_pieces(q, k, v, cache, scoring, max_seqlen_q)
    scoring_args = *window, scale, softcap, alibi_slopes, return_lse
    return _cached_attention_op(q, k, v, *cache, max_seqlen_q, *scoring_args, num_splits, counters)
