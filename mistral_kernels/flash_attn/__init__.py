"""Functions of flash-attn 2, with the same names, argument order, defaults and results.

    from mistral_kernels.flash_attn import flash_attn_func  # instead of: from flash_attn import ...

The functions defined here call `mistral_kernels.attention`, whose docstring describes shapes and
dtypes. `flash_attn_with_kvcache` is defined in `kvcache.py`. Differences from flash-attn:

- Also supported: float32, CPUs, and all GPUs that Triton supports.
- The backward pass is always deterministic.
- The log-sum-exp includes ALiBi's bias as -slope * |distance|, with and without a causal mask.
- These arguments raise an error: dropout, paged keys outside a cache, and arguments in the order of
  flash-attn 3 or 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mistral_kernels.flash_attn.kvcache import flash_attn_with_kvcache
from mistral_kernels.ops.attention import attention
from mistral_kernels.ops.checks import is_flag, is_number

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = Sequence[int] | Tensor
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Compute attention of a rectangular batch; differentiable in q, k and v.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim); float16, bfloat16 or float32, or float64 on the
            torch backend.
        k: (batch, seqlen_k, num_kv_heads, head_dim), of q's dtype. num_heads must be a multiple of
            num_kv_heads.
        v: values, of the shape and dtype of k.
        dropout_p: must be 0.
        softmax_scale: factor of the products q k^T; head_dim^-0.5 if None.
        causal: whether keys after the query's position are masked. The last query has the position
            of the last key.
        window_size: visible keys as inclusive distances (left, right); -1 for no bound.
        softcap: scores s become softcap * tanh(s / softcap); 0 for no softcap.
        alibi_slopes: (num_heads,) or (batch, num_heads); slope * |distance| is subtracted from the
            scores.
        deterministic: ignored; the backward pass is always deterministic.
        return_attn_probs: whether to return the log-sum-exp too, and an empty tensor in place of
            flash-attn's dropout probabilities.

    Returns:
        out, of q's shape and dtype, or (out, softmax_lse, empty), where softmax_lse is
        (batch, num_heads, seqlen_q) in float32, or in float64 for float64 inputs.

    Raises:
        NotImplementedError: dropout_p is not 0.
        TypeError: an argument has a wrong dtype or type, for example because the arguments are in
            the order of flash-attn 3 or 4.
        ValueError: an argument has a wrong shape, device or value; the message names the argument.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import flash_attn_func
        >>> q = torch.randn(1, 6, 4, 8)  # one sequence of 6 tokens, 4 query heads
        >>> k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)  # 2 kv heads
        >>> out = flash_attn_func(q, k, v, causal=True, window_size=(2, 0))
        >>> last = flash_attn_func(q[:, -1:], k[:, -3:], v[:, -3:])  # the last query sees 3 keys
        >>> torch.allclose(out[:, -1:], last, atol=1e-6)
        True
        >>> out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
        >>> softmax_lse.shape
        torch.Size([1, 4, 6])
    """
    _check_order(dropout_p, softmax_scale, causal)
    result = attention(
        *(q, k, v),
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_attn_probs,
    )
    return (*result, q.new_empty(0)) if isinstance(result, tuple) else result


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Compute attention of a rectangular batch with k and v packed in one tensor.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        kv: (batch, seqlen_k, 2, num_kv_heads, head_dim), keys before values in dimension 2.
        dropout_p: must be 0.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.

    Returns:
        The results of `flash_attn_func`.

    Raises:
        NotImplementedError: dropout_p is not 0.
        TypeError: an argument has a wrong dtype or type, for example because the arguments are in
            the order of flash-attn 3 or 4.
        ValueError: an argument has a wrong shape, device or value; the message names the argument.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import flash_attn_func, flash_attn_kvpacked_func
        >>> q, kv = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 2, 8)
        >>> out = flash_attn_kvpacked_func(q, kv, causal=True)
        >>> torch.equal(out, flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], causal=True))
        True
    """
    k, v = _unpack("kv", kv, 2, ndim=5)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(deterministic, return_attn_probs),
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Compute attention of a rectangular batch with q, k and v packed in one tensor.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), queries, keys and values in dimension 2.
        dropout_p: must be 0.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.

    Returns:
        The results of `flash_attn_func`.

    Raises:
        NotImplementedError: dropout_p is not 0.
        TypeError: an argument has a wrong dtype or type, for example because the arguments are in
            the order of flash-attn 3 or 4.
        ValueError: an argument has a wrong shape, device or value; the message names the argument.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import flash_attn_func, flash_attn_qkvpacked_func
        >>> qkv = torch.randn(1, 6, 3, 4, 8)
        >>> out = flash_attn_qkvpacked_func(qkv, causal=True)
        >>> torch.equal(out, flash_attn_func(*qkv.unbind(2), causal=True))
        True
    """
    q, k, v = _unpack("qkv", qkv, 3, ndim=5)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(deterministic, return_attn_probs),
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Compute attention of a packed batch; differentiable in q, k and v.

    Args:
        q: (total_q, num_heads, head_dim), the queries of all sequences one after the other.
        k: (total_k, num_kv_heads, head_dim), of q's dtype.
        v: values, of the shape and dtype of k.
        cu_seqlens_q: (batch + 1,) int32 on q's device: 0, then the end of each sequence in q.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: upper bound of the lengths in cu_seqlens_q, in tokens.
        max_seqlen_k: the same for cu_seqlens_k.
        dropout_p: must be 0.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.
        block_table: must be None.

    Returns:
        out, of q's shape and dtype, or (out, softmax_lse, empty), where softmax_lse is
        (num_heads, total_q) in float32, or in float64 for float64 inputs.

    Raises:
        NotImplementedError: dropout_p is not 0, or block_table is given.
        TypeError: an argument has a wrong dtype or type, for example because the arguments are in
            the order of flash-attn 3 or 4.
        ValueError: an argument has a wrong shape, device or value; the message names the argument.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import flash_attn_func, flash_attn_varlen_func
        >>> q = torch.randn(5, 4, 8)  # sequences of 2 and 3 tokens
        >>> k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 3, 3, causal=True)
        >>> second = flash_attn_func(q[None, 2:], k[None, 2:], v[None, 2:], causal=True)
        >>> torch.allclose(out[2:], second[0], atol=1e-6)
        True
    """
    _check_order(dropout_p, softmax_scale, causal)
    if block_table is not None:
        raise NotImplementedError(
            "block_table must be None, got a tensor; paged keys and values need "
            "flash_attn_with_kvcache"
        )
    result = attention(
        *(q, k, v),
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=return_attn_probs,
    )
    return (*result, q.new_empty(0)) if isinstance(result, tuple) else result


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Compute attention of a packed batch with k and v in one tensor.

    Args:
        q: (total_q, num_heads, head_dim).
        kv: (total_k, 2, num_kv_heads, head_dim), keys before values in dimension 1.
        cu_seqlens_q: (batch + 1,) int32 on q's device: 0, then the end of each sequence in q.
        cu_seqlens_k: the same for kv.
        max_seqlen_q: upper bound of the lengths in cu_seqlens_q, in tokens.
        max_seqlen_k: the same for cu_seqlens_k.
        dropout_p: must be 0.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.

    Returns:
        The results of `flash_attn_varlen_func`.

    Raises:
        NotImplementedError: dropout_p is not 0.
        TypeError: an argument has a wrong dtype or type, for example because the arguments are in
            the order of flash-attn 3 or 4.
        ValueError: an argument has a wrong shape, device or value; the message names the argument.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import (
        ...     flash_attn_varlen_func,
        ...     flash_attn_varlen_kvpacked_func,
        ... )
        >>> q, kv = torch.randn(5, 4, 8), torch.randn(7, 2, 2, 8)
        >>> lengths = (
        ...     torch.tensor([0, 2, 5], dtype=torch.int32),  # 2 and 3 queries
        ...     torch.tensor([0, 3, 7], dtype=torch.int32),  # over 3 and 4 keys
        ... )
        >>> out = flash_attn_varlen_kvpacked_func(q, kv, *lengths, 3, 4, causal=True)
        >>> k, v = kv.unbind(1)
        >>> torch.equal(out, flash_attn_varlen_func(q, k, v, *lengths, 3, 4, causal=True))
        True
    """
    k, v = _unpack("kv", kv, 2, ndim=4)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p),
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Compute attention of a packed batch with q, k and v in one tensor.

    Args:
        qkv: (total, 3, num_heads, head_dim), queries, keys and values in dimension 1.
        cu_seqlens: (batch + 1,) int32 on qkv's device: 0, then the end of each sequence in qkv.
        max_seqlen: upper bound of the lengths in cu_seqlens, in tokens.
        dropout_p: must be 0.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.

    Returns:
        The results of `flash_attn_varlen_func`.

    Raises:
        NotImplementedError: dropout_p is not 0.
        TypeError: an argument has a wrong dtype or type, for example because the arguments are in
            the order of flash-attn 3 or 4.
        ValueError: an argument has a wrong shape, device or value; the message names the argument.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import (
        ...     flash_attn_qkvpacked_func,
        ...     flash_attn_varlen_qkvpacked_func,
        ... )
        >>> qkv = torch.randn(5, 3, 4, 8)
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)  # sequences of 2 and 3 tokens
        >>> out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 3, causal=True)
        >>> first = flash_attn_qkvpacked_func(qkv[None, :2], causal=True)
        >>> torch.allclose(out[:2], first[0], atol=1e-6)
        True
    """
    q, k, v = _unpack("qkv", qkv, 3, ndim=4)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p),
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_attn_probs,
    )


_ORDER = (
    "the order of arguments is flash-attn 2's: dropout_p, softmax_scale, causal and window_size "
    "follow v (and the lengths); flash-attn 3 and 4 have no dropout_p; pass these four by keyword"
)


def _check_order(dropout_p: Any, softmax_scale: Any, causal: Any) -> None:
    """Raise for dropout, and for types that show the argument order of flash-attn 3 or 4."""
    if not (dropout_p is None or is_number(dropout_p)):
        raise TypeError(f"dropout_p must be 0, got {_short_repr(dropout_p)}; {_ORDER}")
    if not (softmax_scale is None or is_number(softmax_scale)):
        raise TypeError(
            f"softmax_scale must be a number, got {_short_repr(softmax_scale)}; {_ORDER}"
        )
    if not is_flag(causal):
        raise TypeError(f"causal must be True or False, got {_short_repr(causal)}; {_ORDER}")
    if dropout_p:
        raise NotImplementedError(
            f"dropout_p must be 0, got {dropout_p}; dropout is not supported; {_ORDER}"
        )


def _short_repr(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _unpack(name: str, packed: Tensor, parts: int, ndim: int) -> tuple[Tensor, ...]:
    if packed.ndim != ndim or packed.shape[-3] != parts:
        raise ValueError(
            f"{name} must have {ndim} dimensions, with size {parts} in dimension -3, "
            f"got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)
