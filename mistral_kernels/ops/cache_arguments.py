"""Checks of what is handed to an operator over the rolling cache: a `ValueError` names what is off.

What `lengths` and `cu_seqlens` hold is looked at on the CPU alone, where that does not wait, and
not in code being compiled, which has nothing to show yet.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_ring(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    total: int,
) -> int:
    """Do the arguments describe one cache and `total` new tokens for it?

    Returns the position behind the last new token, or 0 where values are not looked at.
    """
    if k_cache.ndim != 4 or 0 in k_cache.shape[:2]:
        raise ValueError(
            "k_cache must be (batch, capacity, num_kv_heads, head_dim) with batch and capacity "
            f"> 0, got {tuple(k_cache.shape)}"
        )
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"v_cache must be like k_cache, {tuple(k_cache.shape)} of {k_cache.dtype}, "
            f"got {tuple(v_cache.shape)} of {v_cache.dtype}"
        )
    batch, _, num_kv_heads, head_dim = k_cache.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise ValueError(
                f"{name}'s last dimension must be contiguous, got strides {cache.stride()}"
            )
    for name, x in (("k", k), ("v", v)):
        if x is None:
            continue
        if x.ndim != 3 or x.shape[1:] != (num_kv_heads, head_dim):
            raise ValueError(
                f"{name} must be (total_tokens, {num_kv_heads}, {head_dim}) to fit the cache, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != k_cache.dtype:
            raise ValueError(f"{name} must have the cache's dtype {k_cache.dtype}, got {x.dtype}")
        if x.shape[0] != total:
            raise ValueError(f"{name} must hold {total} tokens, got {x.shape[0]}")
    for name, x, count in (("lengths", lengths, batch), ("cu_seqlens", cu_seqlens, batch + 1)):
        if x.shape != (count,) or x.dtype != torch.int32:
            raise ValueError(
                f"{name} must be ({count},) of torch.int32 for a cache of {batch} sequences, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
    others = {"v_cache": v_cache, "k": k, "v": v, "lengths": lengths, "cu_seqlens": cu_seqlens}
    for name, other in others.items():
        if other is not None and other.device != k_cache.device:
            raise ValueError(f"{name} must be on {k_cache.device} like k_cache, got {other.device}")
    if k_cache.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    seen = lengths.tolist()
    if min(seen) < 0:
        raise ValueError(f"lengths must be >= 0, got {seen}")
    offsets = cu_seqlens.tolist()
    counts = [end - start for start, end in zip(offsets, offsets[1:])]
    if offsets[0] != 0 or offsets[-1] != total or not 0 <= min(counts) <= max(counts) <= max_seqlen:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {total} new tokens in steps of at most "
            f"max_seqlen {max_seqlen}, got {offsets}"
        )
    return max((length + count for length, count in zip(seen, counts) if count), default=0)


def check_turning(
    q: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k: Tensor,
    end: int,
) -> None:
    """Can q, and k, which `check_ring` has seen, be turned by these tables, as far as `end`?"""
    total, _, head_dim = k.shape
    if q.ndim != 3 or q.shape[0] != total or q.shape[-1] != head_dim:
        raise ValueError(f"q must be ({total}, num_heads, {head_dim}) like k, got {tuple(q.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q must be {k.dtype} on {k.device} like k, got {q.dtype} on {q.device}")
    if cos is None or sin is None:
        raise ValueError("q is turned by cos and sin: give both")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape[-1] * 2 != head_dim or len(table) != len(cos):
            raise ValueError(
                f"{name} must be (num_positions, {head_dim / 2:g}), got {tuple(table.shape)}"
            )
        if table.dtype != torch.float32 or table.device != k.device or table.stride(-1) != 1:
            raise ValueError(
                f"{name} must be torch.float32 on {k.device} with a contiguous last dimension, got "
                f"{table.dtype} on {table.device} with strides {table.stride()}"
            )
    if end > len(cos):
        raise ValueError(f"cos and sin end at position {len(cos)}, but the new tokens reach {end}")
