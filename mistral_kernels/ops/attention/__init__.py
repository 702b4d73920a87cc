"""Sliding-window grouped-query attention, over whole sequences and over the rolling cache.

    out = softmax(scale * q k^T + bias) v        over the keys that the window lets a query see

Query head h reads kv head h // (num_heads / num_kv_heads). Sequences are aligned at their ends: the
last query stands on the last key. Windows are interpreted in `window.py` and nowhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.attention.cache_view import CacheView
from mistral_kernels.ops.attention.cached import attend_cached
from mistral_kernels.ops.attention.decode import num_counters
from mistral_kernels.ops.attention.op import attend
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.cache_arguments import check_ring
from mistral_kernels.ops.dispatch import with_unit_stride

MAX_HEAD_DIM = 256


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
    """Attention of a batch, rectangular or packed. Differentiable once in q, k and v.

    Time follows the window, and memory the output: scores never exist but for a tile.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with
            `cu_seqlens_q`. float16, bfloat16, float32, or, on the torch backend, float64; head_dim
            at most 256. Any strides; a last dimension that is not contiguous is copied.
        k, v: (batch, seqlen_k, num_kv_heads, head_dim), or packed (total_k, ...), of q's dtype;
            num_kv_heads divides num_heads.
        causal: no query sees past its own place.
        sliding_window: how many keys a query sees, its own included; None for no window.
        window_size: the same as inclusive distances (left, right), -1 for no bound.
        softmax_scale: positive; head_dim^-0.5 if None.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        alibi_slopes: (num_heads,) or (batch, num_heads); slope * |distance| is subtracted
            (arXiv:2108.12409).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device, where each packed sequence
            begins and the last ends; from 0, never decreasing. cu_seqlens_k is cu_seqlens_q if
            None. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; the number of tokens if None,
            which is right but may launch programs that find nothing to do.
        return_lse: also return the log-sum-exp of the scores, float32 (batch, num_heads, seqlen_q)
            or packed (num_heads, total_q), through which no gradient flows.

    Returns:
        out of q's shape and dtype, or (out, lse). A query that sees no key gives 0 and -inf.

    Raises:
        ValueError: naming the argument that does not fit.
        TypeError: q, k or v is not floating point, or a window or length is not of integers.
    """
    if cu_seqlens_q is None:
        check_qkv(q, k, v, ndim=4)
        given = {
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is for packed batches and needs cu_seqlens_q too")
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"k must have q's batch of {q.shape[0]}, got {k.shape[0]}")
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        check_qkv(q, k, v, ndim=3)
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        batch = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        if _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q) != batch:
            raise ValueError(
                f"cu_seqlens_k must be of {batch} sequences like cu_seqlens_q, "
                f"got {cu_seqlens_k.shape[0] - 1}"
            )
        max_seqlen_q = _as_length("max_seqlen_q", max_seqlen_q, q.shape[0])
        max_seqlen_k = _as_length("max_seqlen_k", max_seqlen_k, k.shape[0])
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, batch)
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0, got {softcap}")
    if softmax_scale is not None and softmax_scale <= 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    out, lse = attend(
        *(with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)),
        window=resolve_window(causal, window_size, sliding_window),
        softmax_scale=softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
    )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


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
    """Causal attention of new tokens over the rolling cache and over themselves.

    Differentiable; without a gradient, keys are read from the ring where they lie, each once, and
    nothing is read from the device.

    With k and v, the ring is read as it was before the new tokens: call this first, then
    `rolling_cache_update_`. A single new token overwrites only the key that has just left its
    window, so for one token a sequence the order may be turned round: update, then attend with k
    and v of None, and every key is read from the ring.

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
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    check_ring(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, q.shape[0])
    if k is not None and v is not None:
        check_qkv(q, k, v, ndim=3)
    else:
        check_qkv(q, k_cache, v_cache, ndim=3, names=("q", "k_cache", "v_cache"), kv_ndim=4)
        if max_seqlen != 1 or q.shape[0] != lengths.shape[0]:
            raise ValueError(
                "k and v may be None only for one new token a sequence, got "
                f"{q.shape[0]} tokens for {lengths.shape[0]} sequences, max_seqlen {max_seqlen}"
            )
    needed = num_counters(k_cache.shape[0], k_cache.shape[2])
    if counters is not None and (
        counters.numel() < needed or counters.dtype != torch.int32 or counters.device != q.device
    ):
        raise ValueError(
            f"counters must hold {needed} zeros of torch.int32 on {q.device}, "
            f"got {counters.numel()} of {counters.dtype} on {counters.device}"
        )
    if k is not None and v is not None:
        k, v = with_unit_stride(k), with_unit_stride(v)
    out, _ = attend_cached(
        *(with_unit_stride(q), k, v),
        CacheView(k_cache, v_cache, lengths.contiguous(), cu_seqlens.contiguous()),
        window=resolve_window(True, None, sliding_window),
        max_seqlen_q=max_seqlen,
        counters=counters,
        softmax_scale=softmax_scale,
    )
    return out


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ndim: int,
    names: tuple[str, ...] = ("q", "k", "v"),
    kv_ndim: int | None = None,
) -> None:
    """Raises unless q, k and v, by whatever names, are one attention's: see `attention`."""
    dtype, device = q.dtype, q.device
    kv_ndim = kv_ndim or ndim
    for name, x, dims in zip(names, (q, k, v), (ndim, kv_ndim, kv_ndim)):
        if x.ndim != dims:
            layout = "batch, seqlen" if dims == 4 else "tokens"
            raise ValueError(f"{name} must be ({layout}, heads, head_dim), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{name} must be {dtype} on {device} like q, got {x.dtype} on {x.device}"
            )
    if v.shape != k.shape:
        raise ValueError(
            f"{names[2]} must have {names[1]}'s shape {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    if not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{names[0]}'s head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{names[1]} must have q's head_dim {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{names[1]}'s {k.shape[-2]} heads must divide q's {q.shape[-2]} "
            "(grouped-query attention)"
        )


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> int:
    """The number of sequences. Checks what needs no look at the values; `packed.check` does those.

    (On a GPU to look is to wait, and in code being compiled there is nothing to see yet.)
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"{name} must be a tensor of torch.int32, got {got}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must be (batch + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {cu_seqlens.device}")
    return cu_seqlens.shape[0] - 1


def check_slopes(alibi_slopes: Tensor, q: Tensor, batch: int) -> None:
    """Raises `ValueError` unless the slopes fit q's heads and the batch."""
    num_heads = q.shape[-2]
    if not isinstance(alibi_slopes, Tensor):
        raise ValueError(f"alibi_slopes must be a tensor, got {type(alibi_slopes).__name__}")
    if alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(
            f"alibi_slopes must be ({num_heads},) or ({batch}, {num_heads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )
    if not alibi_slopes.is_floating_point() or alibi_slopes.device != q.device:
        raise ValueError(
            f"alibi_slopes must be floating point on {q.device}, "
            f"got {alibi_slopes.dtype} on {alibi_slopes.device}"
        )


def _as_length(name: str, value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, int):  # or one that torch.compile keeps open, which `index` would fix
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


__all__ = ["attention", "rolling_cache_attention"]
