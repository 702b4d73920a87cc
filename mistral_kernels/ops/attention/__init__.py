"""Sliding-window grouped-query attention over whole sequences and over the rolling cache.

    out = softmax(scale * q k^T + bias) v        over the keys inside each query's window

Query head h reads kv head h // (num_heads / num_kv_heads). Sequences are aligned at their ends: the
last query has the position of the last key. `window.py` defines the arguments of a window.
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
from mistral_kernels.ops.cache_arguments import check_one_sequence_per_row
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
    """Compute softmax attention of a rectangular or packed batch; differentiable once in q, k, v.

    The scores of a query and the keys inside its window are

        s = softmax_scale * q k^T,   then softcap * tanh(s / softcap),   then minus ALiBi's bias

    Only tiles of the score matrix are stored (arXiv:2307.08691). Time is proportional to the number
    of visible (query, key) pairs. Memory is proportional to the size of the output.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with
            `cu_seqlens_q`. float16, bfloat16 or float32; also float64 on the torch backend.
            head_dim is at most 256. Strides are arbitrary; a tensor whose last dimension is not
            contiguous is copied.
        k: (batch, seqlen_k, num_kv_heads, head_dim), or packed (total_k, num_kv_heads, head_dim),
            of q's dtype. num_heads must be a multiple of num_kv_heads.
        v: values, of the shape and dtype of k.
        causal: whether keys after the query's position are masked. The last query has the position
            of the last key.
        sliding_window: number of visible keys per query, including its own position; None for no
            window.
        window_size: the window as inclusive distances (left, right), instead of `sliding_window`;
            -1 for no bound.
        softmax_scale: positive factor of the products q k^T; head_dim^-0.5 if None.
        softcap: bound of the absolute scores; 0 for no softcap.
        alibi_slopes: (num_heads,) or (batch, num_heads). ALiBi's bias, slope * |distance| in
            tokens, is subtracted from the scores (arXiv:2108.12409).
        cu_seqlens_q: (batch + 1,) int32 on q's device: 0, then the end of each packed sequence
            in q, never decreasing. Sequences may be empty.
        cu_seqlens_k: the same for k and v; cu_seqlens_q if None.
        max_seqlen_q: upper bound of the lengths in cu_seqlens_q, in tokens. total_q if None, which
            is always valid but may launch programs without work.
        max_seqlen_k: the same for cu_seqlens_k; total_k if None.
        return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
        out, of q's shape and dtype, or (out, lse). lse is (batch, num_heads, seqlen_q), or packed
        (num_heads, total_q), in float32 (float64 for float64 inputs); it is not differentiable.
        A query without visible keys has an output of 0 and an lse of -inf.

    Raises:
        ValueError: an argument has a wrong shape, device or value; the message names the argument.
        TypeError: q, k or v is not floating point, dtypes differ, cu_seqlens is not int32, or a
            window or length is not an integer.

    Example:
        >>> import torch
        >>> from mistral_kernels import attention
        >>> q = torch.randn(1, 6, 4, 8)  # one sequence of 6 tokens, 4 query heads
        >>> k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)  # 2 kv heads
        >>> out = attention(q, k, v, sliding_window=3)
        >>> out.shape
        torch.Size([1, 6, 4, 8])
        >>> last = attention(q[:, -1:], k[:, -3:], v[:, -3:])  # the last query sees 3 keys
        >>> torch.allclose(out[:, -1:], last, atol=1e-6)
        True
        >>> cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)  # packed: 2 and 4 tokens
        >>> packed = attention(q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, sliding_window=3)
        >>> torch.allclose(packed[:2], out[0, :2], atol=1e-6)
        True
    """
    check_options(causal, softmax_scale, softcap)
    check_tensors(q=q, k=k, v=v)
    check_optional_tensors(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes
    )
    if cu_seqlens_q is None and not max_seqlen_q is max_seqlen_k is None:
        name = "max_seqlen_k" if max_seqlen_q is None else "max_seqlen_q"
        value = max_seqlen_k if max_seqlen_q is None else max_seqlen_q
        raise ValueError(
            f"{name} must be None without cu_seqlens_q, got {value}; packed batches need "
            "cu_seqlens_q"
        )
    ndim = 4 if cu_seqlens_q is None else 3
    check_ndim("q", q, ndim)
    check_ndim("k", k, ndim)
    tokens_q, tokens_k = q.shape[-3], k.shape[-3]
    if cu_seqlens_k is cu_seqlens_q:  # torch.compile rejects a tensor that is passed twice
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
    """Compute causal attention of new tokens over the rolling cache and over the new tokens.

    The function is differentiable. When no input requires a gradient, the Triton backend reads the
    keys directly from the ring, without a copy, and copies no value to the host.

    With k and v, the ring must not hold the new tokens yet: call `rolling_cache_update_` after this
    function. If k and v are None, the ring must hold the new tokens already: call
    `rolling_cache_update_` first. k and v may be None only if every sequence has one new token.
    `RollingCache.attend` calls both functions in the right order.

    Args:
        q: (total_tokens, num_heads, head_dim), packed.
        k: (total_tokens, num_kv_heads, head_dim), packed; None if the ring holds the new tokens.
        v: values, of the shape and dtype of k; None if k is None.
        k_cache: (batch, capacity, num_kv_heads, head_dim), the ring of keys. The position p of a
            sequence is in slot p % capacity. All values must be finite, so start from zeros: the
            torch backend masks unwritten slots after reading them, and NaN would propagate.
        v_cache: the ring of values, of k_cache's shape.
        lengths: (batch,) int32, number of tokens of each sequence before the new ones.
        cu_seqlens: (batch + 1,) int32: 0, then the end of each sequence in q.
        max_seqlen: upper bound of the number of new tokens per sequence.
        sliding_window: number of visible keys per token, including its own position; None for no
            window. The ring holds at most `capacity` of them.
        softmax_scale: positive factor of the products q k^T; head_dim^-0.5 if None.
        counters: at least 4 * batch * num_kv_heads zeros, int32, on q's device. Programs that share
            the keys of a sequence count in this tensor how many of them have finished. The last
            program resets its counter to 0. Calls that may run at the same time need different
            counters. If None, counters are allocated and cleared for this call, which costs one
            more launch.

    Returns:
        (total_tokens, num_heads, head_dim), of q's dtype.

    Raises:
        ValueError: an argument has a wrong shape, device or value; the message names the argument.
        TypeError: q, k or v is not floating point, dtypes differ, an index tensor is not int32, or
            the window is not an integer.

    Example:
        >>> import torch
        >>> from mistral_kernels import attention, rolling_cache_attention, rolling_cache_update_
        >>> q, k, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
        >>> k_cache, v_cache = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8)  # ring of 3 slots
        >>> outs = []
        >>> for start, end in ((0, 4), (4, 6)):  # a sequence of 6 tokens in chunks of 4 and 2
        ...     lengths = torch.tensor([start], dtype=torch.int32)
        ...     chunk = torch.tensor([0, end - start], dtype=torch.int32), end - start
        ...     new = k[start:end], v[start:end]
        ...     outs.append(
        ...         rolling_cache_attention(
        ...             q[start:end], *new, k_cache, v_cache, lengths, *chunk, sliding_window=3
        ...         )
        ...     )
        ...     rolling_cache_update_(k_cache, v_cache, *new, lengths, *chunk)
        >>> whole = attention(q[None], k[None], v[None], sliding_window=3)
        >>> torch.allclose(torch.cat(outs), whole[0], atol=1e-6)
        True
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, cu_seqlens=cu_seqlens)
    check_optional_tensors(k=k, v=v)
    check_one_sequence_per_row(k_cache, lengths)
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    if k is None and (max_seqlen != 1 or q.shape[0] != lengths.shape[0]):
        raise ValueError(
            "k and v must be given unless each sequence has one new token, got "
            f"{q.shape[0]} tokens for {lengths.shape[0]} sequences and max_seqlen {max_seqlen}"
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
    """Return the upper bound of a sequence length as an integer, at most `tokens`."""
    if torch.compiler.is_compiling():  # `operator.index` would specialize a symbolic length
        return value  # type: ignore[no-any-return]
    try:
        return min(operator.index(value), tokens)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


__all__ = ["attention", "check_qkv", "rolling_cache_attention"]
