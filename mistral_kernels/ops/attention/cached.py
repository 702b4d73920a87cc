"""Attention over a cache as PyTorch sees it: one operator, for rings and flat or paged caches.

Of `lengths + new` tokens a sequence, the last are its queries' places. With k and v the new tokens'
keys are fresh: the cache holds the `lengths` before them, as it was. Without, it holds all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.attention.cache_torch import (
    attend_in_pieces,
    is_decode_step,
    new_tokens,
)
from mistral_kernels.ops.attention.checks import (
    check_heads,
    check_ndim,
    check_num_splits,
    check_scoring,
    check_slopes,
)
from mistral_kernels.ops.attention.kernels.decode import attention_decode, num_counters
from mistral_kernels.ops.attention.op import empty_outputs, lse_dtype
from mistral_kernels.ops.attention.spec import CACHE_SCHEMA, AttentionSpec
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
from mistral_kernels.ops.operator import absent, define, needs_gradient


def _cached_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    *flat, return_lse, num_splits, counters = args
    spec = AttentionSpec.unflatten(*flat)
    triton = uses_triton(q)
    operators = None if triton else extension.cpu_operators(q)
    if operators is not None and is_decode_step(q, k, spec, return_lse):
        cu_seqlens, _, max_seqlen, *_ = spec.sequences
        if cu_seqlens is not None:  # which csrc does not need
            check_packing(cu_seqlens, max_seqlen, q.shape[0])
        try:
            return _decode_csrc(operators, q, spec), absent(q, lse_dtype(q))
        except RuntimeError:  # csrc checks values itself: no need to do it twice
            _check_values(q, spec)
            raise
    _check_values(q, spec)
    if triton:
        out, lse = attention_decode(q, k, v, spec, num_splits, counters)
        return out, lse if return_lse else absent(lse)
    return attend_in_pieces(q, k, v, spec, return_lse)


def _decode_csrc(operators: Any, q: Tensor, spec: AttentionSpec) -> Tensor:
    """One new token a sequence, whose key is in the cache."""
    cache = spec.cache
    assert cache is not None
    queries = with_unit_stride(q if q.ndim == 3 else q.squeeze(1))
    out = torch.empty(queries.shape, dtype=q.dtype)
    places = [
        None if x is None else x.contiguous()
        for x in (cache.rows, cache.leftpad, cache.block_table)
    ]
    operators.decode_attention.default(
        *(queries, cache.k_cache, cache.v_cache, cache.lengths.contiguous(), new_tokens(spec)),
        *(*places, spec.window.left, spec.scale(q.shape[-1]), out),
    )
    return out if q.ndim == 3 else out.unsqueeze(1)


def _check_values(q: Tensor, spec: AttentionSpec) -> None:
    """Raise ValueError for index tensors that do not fit, where their values can be read."""
    view, cu_seqlens = spec.cache, spec.sequences.cu_seqlens_q
    assert view is not None
    check_places(view.k_cache, view.lengths, view.rows, view.block_table)
    check_range("leftpad", view.leftpad, INT32_MAX)
    if cu_seqlens is not None:
        check_packing(cu_seqlens, spec.sequences.max_seqlen_q, q.shape[0])
    else:
        check_range("lengths", view.lengths, INT32_MAX - view.seqlen_new)


def _check(q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any) -> None:
    *flat, _, num_splits, counters = args
    spec = AttentionSpec.unflatten(*flat)
    assert spec.cache is not None
    k_cache, v_cache, lengths, seqlen_new, rows, leftpad, block_table = spec.cache
    cu_seqlens, _, max_seqlen_q, *_ = spec.sequences
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
    check_slopes(spec.alibi_slopes, q.shape[-2], batch)
    check_scoring(spec.softmax_scale, spec.softcap)
    check_num_splits(num_splits)
    if counters is not None:
        needed = num_counters(k_cache.shape[0], k_cache.shape[2])
        if counters.numel() < needed or counters.dtype != torch.int32:
            raise ValueError(
                f"counters must hold {needed} zeros of torch.int32, "
                f"got {counters.numel()} of {counters.dtype}"
            )


def _cached_attention_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_, return_lse, _, _ = args
    return empty_outputs(q, return_lse)


_cached_attention_op = define(
    "cached_attention",
    f"(Tensor q, Tensor? k, Tensor? v, {CACHE_SCHEMA}, bool return_lse, SymInt num_splits, "
    "Tensor? counters) -> (Tensor out, Tensor lse)",
    _cached_attention,
    _cached_attention_fake,
    _check,
)


def attend_cached(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    spec: AttentionSpec,
    *,
    return_lse: bool = False,
    num_splits: int = 0,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention over a cache of arguments that have been checked, and its log-sum-exp.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed with `spec.sequences`.
        k, v: packed like q, the new tokens'; None: in the cache.
        num_splits: programs that share a sequence's keys; 0: as many as pay.
        counters: see `rolling_cache_attention`.
    """
    cache = spec.cache
    assert cache is not None
    args = q, k, v, *spec.flatten(), return_lse, num_splits, counters
    if needs_gradient(q, k, v, cache.k_cache, cache.v_cache):
        tensors = {"k": k, "v": v, **cache._asdict(), "alibi_slopes": spec.alibi_slopes}
        tensors["cu_seqlens"] = spec.sequences.cu_seqlens_q
        check_device("q", q, **{n: x for n, x in tensors.items() if isinstance(x, Tensor)})
        _check(*args)
        _check_values(q, spec)
        return attend_in_pieces(q, k, v, spec, return_lse)
    return _cached_attention_op(*args)
