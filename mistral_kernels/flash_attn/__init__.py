"""flash-attn 2's functions: the same names, argument order, defaults and returns.

    from mistral_kernels.flash_attn import flash_attn_func  # was: from flash_attn import ...

Every function in this module calls `mistral_kernels.attention`; see there for shapes and dtypes.
Differences from flash-attn: float32 too; any GPU that Triton compiles for, or none; the backward
pass is always deterministic; ALiBi biases count into the log-sum-exp as slope * |distance|, causal
or not. Dropout raises, and so do paged keys outside a cache and arguments in the order of
flash-attn 3 or 4. `flash_attn_with_kvcache` is in `kvcache.py`.
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
    """Compute attention of a rectangular batch.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k, v: (batch, seqlen_k, num_kv_heads, head_dim).
        dropout_p: must be 0.
        softmax_scale: head_dim^-0.5 if None.
        causal: no query sees past its own position; the last query is aligned with the last key.
        window_size: inclusive distances (left, right) that a query sees, -1 for no bound.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        alibi_slopes: (num_heads,) or (batch, num_heads).
        deterministic: the backward pass always is.
        return_attn_probs: also return the log-sum-exp and, instead of dropout's probabilities, an
            empty tensor.

    Returns:
        out, of q's shape, or (out, softmax_lse (batch, num_heads, seqlen_q) float32, empty).

    Raises:
        NotImplementedError: dropout_p is not 0.
        TypeError: dropout_p, softmax_scale or causal has the type of another argument, as in the
            argument order of flash-attn 3 or 4.
        ValueError: naming the argument that does not fit.
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
    """Call `flash_attn_func` with k and v in one, kv: (batch, seqlen_k, 2, num_kv_heads, d)."""
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
    """Call `flash_attn_func` with one tensor, qkv: (batch, seqlen, 3, num_heads, head_dim)."""
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
    """Compute attention of a packed batch; for other arguments see `flash_attn_func`.

    Args:
        q: (total_q, num_heads, head_dim).
        k, v: (total_k, num_kv_heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, where each sequence starts and the last one
            ends.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: must be None.

    Returns:
        out, of q's shape, or (out, softmax_lse (num_heads, total_q) float32, empty).
    """
    _check_order(dropout_p, softmax_scale, causal)
    if block_table is not None:
        raise NotImplementedError(
            "block_table: paged keys and values are not supported; gather them first"
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
    """Call `flash_attn_varlen_func` with k and v in one, kv: (total_k, 2, num_kv_heads, d)."""
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
    """Call `flash_attn_varlen_func` with one tensor, qkv: (total, 3, num_heads, head_dim)."""
    q, k, v = _unpack("qkv", qkv, 3, ndim=4)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p),
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_attn_probs,
    )


_ORDER = (
    "arguments are in flash-attn 2's order, where dropout_p, softmax_scale, causal and window_size "
    "follow v (and the lengths); flash-attn 3 and 4 have no dropout_p: pass these by keyword"
)


def _check_order(dropout_p: Any, softmax_scale: Any, causal: Any) -> None:
    """Raise for dropout, and for what flash-attn 3 and 4 have at these arguments' positions."""
    if not (dropout_p is None or is_number(dropout_p)):
        raise TypeError(f"dropout_p must be 0, got {_shown(dropout_p)}; {_ORDER}")
    if not (softmax_scale is None or is_number(softmax_scale)):
        raise TypeError(f"softmax_scale must be a number, got {_shown(softmax_scale)}; {_ORDER}")
    if not is_flag(causal):
        raise TypeError(f"causal must be True or False, got {_shown(causal)}; {_ORDER}")
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}: no dropout; {_ORDER}")


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _unpack(name: str, packed: Tensor, parts: int, ndim: int) -> tuple[Tensor, ...]:
    if packed.ndim != ndim or packed.shape[-3] != parts:
        raise ValueError(
            f"{name} must have {ndim} dimensions and {parts} at the third from last, "
            f"got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)
