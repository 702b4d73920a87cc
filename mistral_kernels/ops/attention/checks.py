"""Checks of attention's arguments, for its functions and operators."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.checks import (
    FLOAT32,
    INT32_MAX,
    check_float,
    check_same_dtype,
    check_shape,
    check_softcap,
    is_flag,
    is_number,
)

MAX_HEAD_DIM = 256


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ndim: int,
    names: tuple[str, ...] = ("q", "k", "v"),
) -> None:
    """Raise unless q, k and v, by whatever names, fit one another: see `attention`."""
    q_name, k_name, v_name = names
    check_ndim(q_name, q, ndim)
    check_ndim(k_name, k, ndim)
    check_heads(q_name, q, k_name, k)
    check_shape(v_name, v, k.shape)
    check_float(q_name, q)
    check_same_dtype(k_name, k, q_name, q)
    check_same_dtype(v_name, v, q_name, q)


def check_heads(q_name: str, q: Tensor, k_name: str, k: Tensor) -> None:
    """Raise ValueError unless the heads of q and k go together."""
    (heads, head_dim), (kv_heads, kv_head_dim) = q.shape[-2:], k.shape[-2:]
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{q_name}'s head_dim must lie in [1, {MAX_HEAD_DIM}], got {head_dim}")
    if kv_head_dim != head_dim:
        raise ValueError(f"{k_name} must have q's head_dim {head_dim}, got {kv_head_dim}")
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{k_name}'s {kv_heads} heads must divide {q_name}'s {heads}, and both be positive "
            "(grouped-query attention)"
        )


def check_ndim(name: str, x: Tensor, ndim: int) -> None:
    """Raise ValueError unless `x` has 4 dimensions, or the 3 of a packed batch."""
    if x.ndim != ndim:
        layout = "batch, seqlen" if ndim == 4 else "tokens"
        raise ValueError(f"{name} must be ({layout}, heads, head_dim), got {tuple(x.shape)}")


def check_cu_seqlens(name: str, cu_seqlens: Tensor) -> int:
    """Return the number of sequences. The values are for `packed.check`."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must be (batch + 1,), got {tuple(cu_seqlens.shape)}")
    return cu_seqlens.shape[0] - 1


def check_slopes(alibi_slopes: Tensor | None, num_heads: int, batch: int) -> None:
    """Raise unless the slopes fit the heads and the batch."""
    if alibi_slopes is None:
        return
    check_float("alibi_slopes", alibi_slopes)
    if alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(
            f"alibi_slopes must be ({num_heads},) or ({batch}, {num_heads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )


def check_options(causal: Any, softmax_scale: Any, softcap: Any) -> None:
    """Raise TypeError unless these are a flag and numbers; `softmax_scale` may be None."""
    if not is_flag(causal):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if not is_number(value) and not (value is None and name == "softmax_scale"):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_scoring(softmax_scale: float | None, softcap: float) -> None:
    """Raise ValueError for numbers that give NaN, or results that depend on the backend."""
    if softmax_scale is not None and not 0 < softmax_scale <= FLOAT32.max:
        raise ValueError(f"softmax_scale must be in (0, {FLOAT32.max:.2g}], got {softmax_scale}")
    check_softcap(softcap)


def check_num_splits(num_splits: Any) -> None:
    """Raise unless it is an integer from 0 on that fits 32 bits."""
    if type(num_splits) is int and 0 <= num_splits <= INT32_MAX:
        return
    if torch.compiler.is_compiling():  # it may be symbolic
        return
    try:
        number = operator.index(num_splits)
    except TypeError:
        raise TypeError(f"num_splits must be an integer, got {num_splits!r}") from None
    if not 0 <= number <= INT32_MAX:
        raise ValueError(f"num_splits must be in [0, {INT32_MAX}], got {number}")
