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
from mistral_kernels.ops.attention.checks import (
    check_heads,
    check_ndim,
    check_num_splits,
    check_scoring,
    check_slopes,
)
from mistral_kernels.ops.attention.op import empty_outputs, lse_dtype
from mistral_kernels.ops.attention.scoring import Scoring
from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.cache_arguments import (
    check_cache,
    check_new_tokens,
    check_packing,
    check_places,
)
from mistral_kernels.ops.checks import (
    INT32_MAX,
    check_device,
    check_int32,
    check_range,
    check_same_dtype,
)
from mistral_kernels.ops.dispatch import uses_triton, with_unit_stride
from mistral_kernels.ops.operator import Operator, absent, needs_gradient


def _cached_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    """In the schema's order; its middle part is a `CacheView`."""
    *cache, max_seqlen_q, left, right, scale, softcap, slopes, return_lse, splits, counters = args
    view, scoring = (
        CacheView(*cache),
        Scoring(Window(left, right), scale, softcap, slopes, return_lse),
    )
    triton = uses_triton(q)
    if not triton and extension.serves(q) and is_decode_step(q, k, view, scoring, max_seqlen_q):
        if view.cu_seqlens is not None:  # which csrc does not need
            check_packing(view.cu_seqlens, max_seqlen_q, q.shape[0])
        try:
            return _decode_csrc(q, view, scoring), absent(q, lse_dtype(q))
        except RuntimeError:  # csrc checks values itself: no need to do it twice
            _check_values(q, view, max_seqlen_q)
            raise
    _check_values(q, view, max_seqlen_q)
    if triton:
        out, lse = decode.launch(q, k, v, view, scoring, max_seqlen_q, splits, counters)
        return out, lse if return_lse else absent(lse)
    return attend_in_pieces(q, k, v, view, scoring, max_seqlen_q)


def _decode_csrc(q: Tensor, cache: CacheView, scoring: Scoring) -> Tensor:
    """One new token a sequence, whose key is in the cache."""
    queries = with_unit_stride(q if q.ndim == 3 else q.squeeze(1))
    out = torch.empty(queries.shape, dtype=q.dtype)
    new_tokens = cache.seqlen_new if cache.cu_seqlens is None else 1
    places = [
        None if x is None else x.contiguous()
        for x in (cache.rows, cache.leftpad, cache.block_table)
    ]
    torch.ops.mistral_kernels.decode_attention.default(
        *(queries, cache.k_cache, cache.v_cache, cache.lengths.contiguous(), new_tokens),
        *(*places, scoring.window.left, scoring.scale, out),
    )
    return out if q.ndim == 3 else out.unsqueeze(1)


def _check_values(q: Tensor, view: CacheView, max_seqlen_q: int) -> None:
    """Raise ValueError for index tensors that do not fit, where their values can be read."""
    check_places(view.k_cache, view.lengths, view.rows, view.block_table)
    check_range("leftpad", view.leftpad, INT32_MAX)
    if view.cu_seqlens is not None:
        check_packing(view.cu_seqlens, max_seqlen_q, q.shape[0])
    else:
        check_range("lengths", view.lengths, INT32_MAX - view.seqlen_new)


def _check(q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any) -> None:
    k_cache, v_cache, lengths, cu_seqlens, seqlen_new, rows, leftpad, block_table, *rest = args
    max_seqlen_q, _, _, scale, softcap, slopes, _, num_splits, counters = rest
    batch = check_cache(k_cache, v_cache, lengths, rows, block_table)
    check_ndim("q", q, 4 if cu_seqlens is None else 3)
    check_same_dtype("k_cache", k_cache, "q", q)
    check_heads("q", q, "k_cache", k_cache)
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    if cu_seqlens is not None:
        check_int32("cu_seqlens", cu_seqlens, (batch + 1,))
    elif k is not None:
        raise ValueError("k and v are for packed queries and need cu_seqlens")
    else:
        if q.shape[0] != batch or q.shape[1] > max_seqlen_q:
            raise ValueError(
                f"q must hold {batch} sequences of at most max_seqlen_q {max_seqlen_q} tokens, "
                f"got {tuple(q.shape)}"
            )
        if not 0 <= seqlen_new <= INT32_MAX:
            raise ValueError(f"seqlen_new must be in [0, {INT32_MAX}], got {seqlen_new}")
    if k is not None and v is not None:
        check_new_tokens("k", k, k_cache, q.shape[0])
        check_new_tokens("v", v, k_cache, q.shape[0])
    check_int32("leftpad", leftpad, (batch,))
    check_slopes(slopes, q.shape[-2], batch)
    check_scoring(scale, softcap)
    check_num_splits(num_splits)
    if counters is not None:
        needed = decode.num_counters(k_cache.shape[0], k_cache.shape[2])
        if counters.numel() < needed or counters.dtype != torch.int32:
            raise ValueError(
                f"counters must hold {needed} zeros of torch.int32, "
                f"got {counters.numel()} of {counters.dtype}"
            )


def _cached_attention_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_, return_lse, _, _ = args
    return empty_outputs(q, return_lse)


_cached_attention_op = Operator(
    "cached_attention",
    "(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor? cu_seqlens, SymInt seqlen_new, Tensor? rows, Tensor? leftpad, Tensor? block_table, "
    "SymInt max_seqlen_q, SymInt window_left, SymInt window_right, float scale, float softcap, "
    "Tensor? alibi_slopes, bool return_lse, SymInt num_splits, Tensor? counters)"
    " -> (Tensor out, Tensor lse)",
    fake=_cached_attention_fake,
    check=_check,
    torch=_cached_attention,
    triton=_cached_attention,
)


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
) -> tuple[Tensor, Tensor]:
    """Compute attention over a cache of arguments that have been checked, and its log-sum-exp.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed with the cache's `cu_seqlens`.
        k, v: packed like q, the new tokens'; None: in the cache.
        num_splits: programs that share a sequence's keys; 0: as many as pay.
        counters: see `rolling_cache_attention`.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scoring_args = *window, scale, softcap, alibi_slopes, return_lse
    args = q, k, v, *cache, max_seqlen_q, *scoring_args, num_splits, counters
    if needs_gradient(q, k, v, cache.k_cache, cache.v_cache):
        tensors = {"k": k, "v": v, **cache._asdict(), "alibi_slopes": alibi_slopes}
        check_device("q", q, **{n: x for n, x in tensors.items() if isinstance(x, Tensor)})
        _check(*args)
        _check_values(q, cache, max_seqlen_q)
        scoring = Scoring(window, scale, softcap, alibi_slopes, return_lse)
        return attend_in_pieces(q, k, v, cache, scoring, max_seqlen_q)
    return _cached_attention_op(*args)
