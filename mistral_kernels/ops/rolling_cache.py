"""Writing new keys and values into the rolling cache.

The cache of a layer is a ring of `capacity` slots a sequence: the token at absolute position p
lives in slot p % capacity, so that a window of `capacity` tokens is kept in constant memory and
nothing is ever moved. `lengths` counts the tokens each sequence has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.dispatch import require_torch_backend


def rolling_cache_update_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> None:
    """Append new tokens to each sequence's ring, in place. `lengths` is left as it was.

    Args:
        k_cache, v_cache: (batch, capacity, num_kv_heads, head_dim), contiguous.
        k, v: (total_tokens, num_kv_heads, head_dim), packed, of the caches' dtype, any strides.
            Of more than `capacity` new tokens the last ones are kept.
        lengths: (batch,) int32, tokens that each sequence had seen before.
        cu_seqlens: (batch + 1,) int32, where each sequence begins in k and v.
        max_seqlen: the most new tokens of any sequence.

    Raises:
        ValueError: naming the argument that does not fit; the caches are untouched.
    """
    require_torch_backend("rolling_cache_update_")
    check_ring(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, k.shape[0])
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {cache.stride()}")
    batch, capacity = k_cache.shape[:2]
    total = k.shape[0]
    if k.device.type == "cpu" and max_seqlen > 1:
        seen, offsets = lengths.tolist(), cu_seqlens.tolist()
        _append_(k_cache, k, seen, offsets)
        _append_(v_cache, v, seen, offsets)
        return
    if max_seqlen == 1 and total == batch:
        slots = torch.arange(batch, device=k.device) * capacity + lengths % capacity
    else:
        starts, counts = cu_seqlens[:-1].long(), cu_seqlens.diff()
        sequence = torch.repeat_interleave(
            torch.arange(batch, device=k.device), counts, output_size=total
        )
        index = torch.arange(total, device=k.device) - starts[sequence]
        slots = sequence * capacity + (lengths[sequence] + index) % capacity
        if max_seqlen > capacity:
            kept = (index >= counts[sequence] - capacity).nonzero().squeeze(1)
            k, v, slots = k[kept], v[kept], slots[kept]
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)


def _append_(ring: Tensor, new: Tensor, lengths: list[int], offsets: list[int]) -> None:
    """The update by slices, at most two a sequence: on the CPU far faster than by index."""
    capacity = ring.shape[1]
    for sequence, (start, end) in enumerate(zip(offsets, offsets[1:])):
        kept = new[max(start, end - capacity) : end]
        slot = (lengths[sequence] + end - start - len(kept)) % capacity
        ahead = min(len(kept), capacity - slot)
        ring[sequence, slot : slot + ahead] = kept[:ahead]
        ring[sequence, : len(kept) - ahead] = kept[ahead:]


def check_ring(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    total: int,
) -> None:
    """Raise `ValueError` unless the arguments describe one cache and `total` new tokens for it.

    What `lengths` and `cu_seqlens` hold is looked at on the CPU only, where that does not wait.
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
    if k_cache.device.type != "cpu":
        return
    if min(lengths.tolist()) < 0:
        raise ValueError(f"lengths must be >= 0, got {lengths.tolist()}")
    offsets = cu_seqlens.tolist()
    counts = [end - start for start, end in zip(offsets, offsets[1:])]
    if offsets[0] != 0 or offsets[-1] != total or not 0 <= min(counts) <= max(counts) <= max_seqlen:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {total} new tokens in steps of at most "
            f"max_seqlen {max_seqlen}, got {offsets}"
        )
