"""Sliding-window grouped-query attention, over whole sequences and over the rolling cache.

    out = softmax(scale * q k^T + bias) v        over the keys that the window lets a query see

Query head h reads kv head h // (num_heads / num_kv_heads). Sequences are aligned at their ends: the
last query stands on the last key. `window.py` defines the numbers of a window.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.attention.checks import (
    check_ndim,
    check_options,
    check_qkv,
)
from mistral_kernels.ops.attention.ops import (
    attend_cached,
    attend_differentiably,
    attention_forward_op,
)
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.cache_arguments import check_one_per_row
from mistral_kernels.ops.checks import check_optional_tensors, check_tensors
from mistral_kernels.ops.dispatch import with_unit_stride
from mistral_kernels.ops.operator import needs_gradient


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    window_size: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of a batch, rectangular or packed. Differentiable once in q, k and v.

    Time is proportional to the visible pairs; memory to the output: only tiles of scores exist.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with
            `cu_seqlens_q`. float16, bfloat16, float32, or, on the torch backend, float64; head_dim
            at most 256. Any strides; a last dimension that is not contiguous is copied.
        k, v: (batch, seqlen_k, num_kv_heads, head_dim), or packed (total_k, ...), of q's dtype;
            num_kv_heads divides num_heads.
        causal: no query sees past its own position.
        sliding_window: how many keys a query sees, its own included; None for no window.
        window_size: the same as inclusive distances (left, right), -1 for no bound.
        softmax_scale: positive; head_dim^-0.5 if None.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        alibi_slopes: (num_heads,) or (batch, num_heads); slope * |distance| is subtracted
            (arXiv:2108.12409).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device, where each packed sequence
            starts and the last one ends; from 0, never decreasing. cu_seqlens_k is cu_seqlens_q if
            None. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; the number of tokens if None,
            which is right but may launch programs without work.
        return_lse: also return the log-sum-exp of the scores, float32 (batch, num_heads, seqlen_q)
            or packed (num_heads, total_q), through which no gradient flows.

    Returns:
        out of q's shape and dtype, or (out, lse). A query that sees no key gives 0 and -inf.

    Raises:
        ValueError: naming the argument that does not fit.
        TypeError: q, k or v is not floating point, or a window or length is not of integers.
    """
    check_options(causal, softmax_scale, softcap)
    check_tensors(q=q, k=k, v=v)
    check_optional_tensors(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes
    )
    if cu_seqlens_q is None and not max_seqlen_q is max_seqlen_k is None:
        name = "max_seqlen_k" if max_seqlen_q is None else "max_seqlen_q"
        raise ValueError(f"{name} is for packed batches and needs cu_seqlens_q too")
    ndim = 4 if cu_seqlens_q is None else 3
    check_ndim("q", q, ndim)
    check_ndim("k", k, ndim)
    tokens_q, tokens_k = q.shape[-3], k.shape[-3]
    if cu_seqlens_k is cu_seqlens_q:  # torch.compile takes no tensor twice
        cu_seqlens_k = None
    spec = AttentionSpec(
        Sequences(
            cu_seqlens_q,
            cu_seqlens_k,
            tokens_q if max_seqlen_q is None else _length("max_seqlen_q", max_seqlen_q, tokens_q),
            tokens_k if max_seqlen_k is None else _length("max_seqlen_k", max_seqlen_k, tokens_k),
        ),
        resolve_window(causal, window_size, sliding_window),
        softmax_scale,
        softcap,
        alibi_slopes,
    )
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    if needs_gradient(q, k, v):
        out, lse = attend_differentiably(q, k, v, spec, return_lse)
    else:
        out, lse = attention_forward_op(q, k, v, *spec.flatten(), return_lse)
    return (out, lse) if return_lse else out


def rolling_cache_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    sliding_window: int | None,
    softmax_scale: float | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Compute causal attention of new tokens over the rolling cache and over themselves.

    Differentiable. Without a gradient, keys are read from the ring in place, each once, and no
    value is copied to the host.

    With k and v, the ring must not hold the new tokens yet: call `rolling_cache_update_` after
    this. With k and v of None, for one new token per sequence, call it before.
    `RollingCache.attend` does both in the right order.

    Args:
        q: (total_tokens, num_heads, head_dim), packed.
        k, v: (total_tokens, num_kv_heads, head_dim), packed; None: already in the ring.
        k_cache, v_cache: (batch, capacity, num_kv_heads, head_dim), finite throughout: begin with
            zeros, for on the torch backend slots not yet written are masked, and NaN would pass.
        lengths: (batch,) int32, tokens each sequence had seen before the new ones.
        cu_seqlens: (batch + 1,) int32, where each sequence begins in q.
        max_seqlen: the most new tokens of any sequence.
        sliding_window: how many keys a token sees, its own included; at most `capacity` are kept.
        softmax_scale: head_dim^-0.5 if None.
        counters: (at least 4 * batch * num_kv_heads,) int32 on the device, zeros, and zeros again
            afterwards: where programs that share a sequence's keys count one another. Give calls
            that may overlap in time their own. None: cleared for the call, with a launch more.

    Returns:
        (total_tokens, num_heads, head_dim), of q's dtype.

    Raises:
        ValueError: naming the argument that does not fit.
        TypeError: q, k or v is not floating point, or a window is not of integers.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, cu_seqlens=cu_seqlens)
    check_optional_tensors(k=k, v=v)
    check_one_per_row(k_cache, lengths)
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    if k is None and (max_seqlen != 1 or q.shape[0] != lengths.shape[0]):
        raise ValueError(
            "k and v may be None only for one new token per sequence, got "
            f"{q.shape[0]} tokens for {lengths.shape[0]} sequences, max_seqlen {max_seqlen}"
        )
    if softmax_scale is not None:
        check_options(True, softmax_scale, 0.0)
    out, _ = attend_cached(
        with_unit_stride(q),
        k if k is None else with_unit_stride(k),
        v if v is None else with_unit_stride(v),
        AttentionSpec(
            Sequences(cu_seqlens.contiguous(), None, max_seqlen, max_seqlen),
            resolve_window(True, None, sliding_window),
            softmax_scale,
            cache=CacheView(k_cache, v_cache, lengths.contiguous()),
        ),
        counters=counters,
    )
    return out


def _length(name: str, value: Any, tokens: int) -> int:
    if torch.compiler.is_compiling():  # one that torch.compile keeps open, `index` would fix
        return value  # type: ignore[no-any-return]
    try:
        return min(operator.index(value), tokens)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


__all__ = ["attention", "check_qkv", "rolling_cache_attention"]
