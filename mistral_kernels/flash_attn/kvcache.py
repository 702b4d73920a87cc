"""`flash_attn_with_kvcache` of flash-attn 2: append to a cache and attend over it, for inference.

The cache is flat, (batch, seqlen, heads, head_dim), or paged. Differences from flash-attn: float32
is supported too, pages may have any size, and each key is read once for all query heads of its kv
head, with and without a window.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral_kernels.ops.attention.checks import (
    check_num_splits,
    check_options,
    check_qkv,
    check_scoring,
    check_slopes,
)
from mistral_kernels.ops.attention.ops import attend_cached
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.checks import (
    can_read,
    check_device,
    check_optional_tensors,
    check_range,
    check_same_dtype,
    check_shape,
    check_tensors,
    check_unit_stride,
    is_flag,
)
from mistral_kernels.ops.dispatch import with_unit_stride
from mistral_kernels.ops.operator import in_transform
from mistral_kernels.ops.rolling_cache import capacity_of, update_op


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v to the caches in place, then compute attention of q over the caches.

    The function is not differentiable. The last query has the position of the last key.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k_cache: (batch_of_cache, seqlen_cache, num_kv_heads, head_dim), or, with `block_table`,
            (num_pages, page_size, num_kv_heads, head_dim). The dtype is q's; the last dimension
            must be contiguous.
        v_cache: values, of the shape and dtype of k_cache.
        k: (batch, seqlen_new, num_kv_heads, head_dim), new keys, written to the positions that
            start at `cache_seqlens`; None to append nothing.
        v: new values, of k's shape and dtype; None if k is None.
        rotary_cos: (num_positions, rotary_dim / 2), cosines of the rotary embedding. The first
            rotary_dim channels of q and k are rotated by the angles of the positions that start at
            `cache_seqlens`. Exception: without a causal mask and a window, every query of a
            sequence is rotated by the angle of position `cache_seqlens`. Requires rotary_sin, k
            and v.
        rotary_sin: sines, of rotary_cos's shape.
        cache_seqlens: number of tokens of each sequence in the cache before k and v: (batch,)
            int32, or one integer. None for a full cache.
        cache_batch_idx: (batch,) int32, the row of each sequence in the caches; None for its index
            in the batch.
        cache_leftpad: (batch,) int32, the first position of each sequence that is not padding; None
            for 0.
        block_table: (batch, max_pages) int32, the pages of each sequence.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        rotary_interleaved: whether channels (2i, 2i + 1) are rotated as a pair, as in raw Mistral
            checkpoints, instead of (i, i + rotary_dim / 2), as in Hugging Face checkpoints.
        alibi_slopes: as in `flash_attn_func`.
        num_splits: number of programs that share a sequence's keys; 0 derives the number from the
            number of keys.
        return_softmax_lse: whether to return the log-sum-exp too.

    Returns:
        out, of q's shape and dtype, or (out, softmax_lse), where softmax_lse is
        (batch, num_heads, seqlen_q) in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: an argument has a wrong shape, device or value, or an index tensor or table has
            a wrong dtype; the message names the argument. The caches are unchanged. Values of
            `cache_seqlens`, `cache_batch_idx`, `cache_leftpad` and `block_table` are checked on the
            CPU only.
        TypeError: an argument has a wrong type or dtype. The caches are unchanged.
        NotImplementedError: a tensor requires a gradient, or torch.func transforms an index tensor.
        RuntimeError: a compiled call on the CPU has an index out of range. This is checked when the
            compiled code runs.

    Example:
        >>> import torch
        >>> from mistral_kernels.flash_attn import flash_attn_func, flash_attn_with_kvcache
        >>> q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
        >>> k_cache, v_cache = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)
        >>> for i in range(5):  # append and attend, token by token
        ...     new = slice(i, i + 1)
        ...     out = flash_attn_with_kvcache(
        ...         q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=i, causal=True
        ...     )
        >>> torch.equal(k_cache[:, :5], k)
        True
        >>> whole = flash_attn_func(q, k, v, causal=True)
        >>> torch.allclose(out, whole[:, -1:], atol=1e-6)
        True
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    indices = cache_batch_idx, cache_leftpad, block_table
    tensors = q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes
    check_optional_tensors(
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        alibi_slopes=alibi_slopes,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    if in_transform() and any(map(_is_wrapped, (cache_seqlens, *indices))):
        raise NotImplementedError(
            "flash_attn_with_kvcache does not support torch.func transforms of its index tensors; "
            "call it outside of transforms"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(
            "flash_attn_with_kvcache has no backward pass; call it under torch.no_grad(), or train "
            "with flash_attn_func"
        )
    check_qkv(q, k_cache, v_cache, ndim=4, names=("q", "k_cache", "v_cache"))
    if block_table is not None and (block_table.ndim != 2 or 0 in block_table.shape[1:]):
        raise ValueError(f"block_table must be (batch, pages), got {tuple(block_table.shape)}")
    if k_cache.shape[1] == 0:
        raise ValueError(f"k_cache must have capacity for a key, got {tuple(k_cache.shape)}")
    batch, seqlen_q = q.shape[:2]
    capacity = capacity_of(k_cache, block_table)
    new = _check_new(q, k_cache, k, v)
    lengths = _cache_lengths(cache_seqlens, q, capacity, new)
    _check_index_tensors(k_cache, lengths, cache_batch_idx, cache_leftpad, block_table, batch, new)
    check_options(causal, softmax_scale, softcap)
    check_num_splits(num_splits)
    if not is_flag(return_softmax_lse):
        raise TypeError(f"return_softmax_lse must be True or False, got {return_softmax_lse!r}")
    if k is not None:  # check before the update writes: the attention operator checks too late
        check_device("q", q, k_cache=k_cache, v_cache=v_cache, alibi_slopes=alibi_slopes)
        check_unit_stride("k_cache", k_cache)
        check_unit_stride("v_cache", v_cache)
        check_slopes(alibi_slopes, q.shape[-2], batch)
        check_scoring(softmax_scale, softcap)
    cache_batch_idx, cache_leftpad, block_table = (
        x if x is None else x.contiguous() for x in (cache_batch_idx, cache_leftpad, block_table)
    )
    window = resolve_window(causal, window_size, None)
    q = with_unit_stride(q)
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None:
            raise ValueError("rotary_cos and rotary_sin must be given together, with k and v")
        one_position = tuple(window) == (-1, -1)  # all queries have position cache_seqlens
        needed = max(new, 1 if one_position else seqlen_q)
        _check_tables(rotary_cos, rotary_sin, q, lengths, needed)
        dtype = torch.promote_types(rotary_cos.dtype, torch.float32)
        tables = rotary_cos.to(dtype), rotary_sin.to(dtype)
        q = _rotate(q, tables, lengths, 0 if one_position else 1, rotary_interleaved)
        k = _rotate(k, tables, lengths, 1, rotary_interleaved)
    if k is not None and v is not None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * new
        packed = (with_unit_stride(x).flatten(0, 1) for x in (k, v))
        update_op(k_cache, v_cache, *packed, lengths, cu_seqlens, new, cache_batch_idx, block_table)
    view = lengths, new, cache_batch_idx, cache_leftpad, block_table
    spec = AttentionSpec(
        Sequences(None, None, seqlen_q, new),
        window,
        softmax_scale,
        softcap,
        alibi_slopes,
        CacheView(k_cache, v_cache, *view),
    )
    out, lse = attend_cached(
        q, None, None, spec, return_lse=return_softmax_lse, num_splits=num_splits
    )
    return (out, lse) if return_softmax_lse else out


def _check_new(q: Tensor, k_cache: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """Check k and v, and return the number of new tokens per sequence."""
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    for name, x in (("k", k), ("v", v)):
        if x is None:
            continue
        heads = k_cache.shape[2:]
        if x.ndim != 4 or x.shape[0] != q.shape[0] or x.shape[2:] != heads:
            raise ValueError(
                f"{name} must be ({q.shape[0]}, seqlen_new, {heads[0]}, {heads[1]}), "
                f"got {tuple(x.shape)}"
            )
    if k is None or v is None:
        return 0
    check_shape("v", v, k.shape)
    check_same_dtype("k", k, "q", q)
    check_same_dtype("v", v, "q", q)
    check_device("q", q, k=k, v=v)
    return k.shape[1]


def _cache_lengths(
    cache_seqlens: int | Tensor | None, q: Tensor, capacity: int, new: int
) -> Tensor:
    """Return `cache_seqlens` as a (batch,) tensor. `_check_index_tensors` checks a given tensor."""
    if cache_seqlens is None:
        if new:
            raise ValueError("cache_seqlens is required when k and v are given")
        cache_seqlens = capacity
    batch = q.shape[0]
    if not isinstance(cache_seqlens, Tensor):
        try:
            cache_seqlens = operator.index(cache_seqlens)
        except TypeError:
            kind = type(cache_seqlens).__name__
            raise TypeError(f"cache_seqlens must be an integer or a tensor, got {kind}") from None
        if not 0 <= cache_seqlens <= capacity - new:
            raise ValueError(
                f"cache_seqlens must be in [0, {capacity - new}] for {new} new tokens and capacity "
                f"{capacity}, got {cache_seqlens}"
            )
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    return cache_seqlens.contiguous()


def _check_index_tensors(
    k_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    leftpad: Tensor | None,
    block_table: Tensor | None,
    batch: int,
    new: int,
) -> None:
    """Raise ValueError unless the index tensors fit the cache and the batch."""
    capacity, num_rows = capacity_of(k_cache, block_table), k_cache.shape[0]
    if rows is None and block_table is None and num_rows != batch:
        raise ValueError(
            f"k_cache must have q's batch size {batch}, got {num_rows}; select rows by "
            "cache_batch_idx"
        )
    if rows is not None and block_table is not None:
        raise ValueError("cache_batch_idx must be None with block_table, got a tensor")
    _check_index("cache_seqlens", lengths, (batch,), capacity - new, k_cache)
    _check_index("cache_batch_idx", rows, (batch,), num_rows - 1, k_cache)
    _check_index("cache_leftpad", leftpad, (batch,), capacity, k_cache)
    pages = batch, capacity // k_cache.shape[1]
    _check_index("block_table", block_table, pages, num_rows - 1, k_cache)


def _check_index(
    name: str, x: Tensor | None, shape: tuple[int, ...], highest: int, cache: Tensor
) -> None:
    """Raise unless `x` is None, or int32 of this shape on the cache's device, in [0, highest]."""
    if x is None:
        return
    if x.dtype != torch.int32 or x.shape != shape or x.device != cache.device:
        raise ValueError(
            f"{name} must be {shape} of torch.int32 on {cache.device}, "
            f"got {tuple(x.shape)} of {x.dtype} on {x.device}"
        )
    check_range(name, x, highest)
    if torch.compiler.is_compiling() and x.is_cpu and x.numel():  # check when the graph runs
        torch._assert_async(((x >= 0) & (x <= highest)).all(), f"{name} must be in [0, {highest}]")


def _is_wrapped(x: object) -> bool:
    """Return whether a torch.func transform wraps `x`."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _check_tables(cos: Tensor, sin: Tensor, q: Tensor, lengths: Tensor, needed: int) -> None:
    """Raise unless the tables fit q and have `needed` positions, starting at `lengths`."""
    rotary_dim = cos.shape[-1] * 2 if cos.ndim == 2 else 0
    if not 0 < rotary_dim <= q.shape[-1] or sin.shape != cos.shape:
        raise ValueError(
            "rotary_cos and rotary_sin must be (num_positions, rotary_dim / 2) with rotary_dim at "
            f"most {q.shape[-1]}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not table.is_floating_point() or table.device != q.device:
            raise ValueError(
                f"{name} must be floating point on {q.device}, got {table.dtype} on {table.device}"
            )
    if lengths.numel() and can_read(lengths):
        end = int(lengths.max()) + needed
        if end > len(cos):
            raise ValueError(f"rotary_cos must have at least {end} positions, got {len(cos)}")


def _rotate(
    x: Tensor, tables: tuple[Tensor, Tensor], lengths: Tensor, step: int, interleaved: bool
) -> Tensor:
    """Rotate the channels that the tables cover, for positions lengths, lengths + step, ..."""
    rotary_dim = tables[0].shape[1] * 2
    positions = lengths.long()[:, None] + step * torch.arange(x.shape[1], device=x.device)
    rotary = torch.ops.mistral_kernels.rotary
    rotated, _ = rotary(x[..., :rotary_dim], None, *tables, positions, interleaved, False)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), -1)
