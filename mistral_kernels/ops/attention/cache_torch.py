"""Attention of new tokens over a cache in PyTorch's operators: on the torch backend, and where a
gradient is wanted, on any."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.attention.op import attend
from mistral_kernels.ops.attention.window import Window, keys_of_rows, visible
from mistral_kernels.ops.rolling_cache import capacity_of


def attend_in_pieces(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor | None,
    rows: Tensor | None,
    leftpad: Tensor | None,
    block_table: Tensor | None,
    max_seqlen_q: int,
    seqlen_new: int,
    softmax_scale: float | None,
    window: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`cached.py`'s operator, sequence by sequence, with each one's keys put in order. Reads
    `lengths` on the host."""
    plain = leftpad is None and block_table is None and not softcap and alibi_slopes is None
    single = max_seqlen_q == 1 and len(q) == lengths.numel() and k is None and not return_lse
    if plain and single and cu_seqlens is not None and rows is None:
        return _ring_decode(q, k_cache, v_cache, lengths, window, softmax_scale), None
    if not lengths.numel():
        *batch, seqlen, heads, _ = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(*batch, heads, seqlen, dtype=dtype, device=q.device)
        return torch.empty_like(q), lse if return_lse else None
    capacity = capacity_of(k_cache, block_table)
    offsets = None if cu_seqlens is None else cu_seqlens.tolist()
    outs, sums = [], []
    for sequence, length in enumerate(lengths.tolist()):
        new = slice(sequence, sequence + 1)
        if offsets is None:
            queries = q[sequence]
        else:
            new = slice(*offsets[sequence : sequence + 2])
            queries = q[new]
        total = length + (seqlen_new if offsets is None else len(queries))
        cached = total if k is None else length
        oldest = max(cached - capacity, 0)
        if leftpad is not None:
            oldest = min(max(oldest, int(leftpad[sequence])), total)
        if len(queries):  # only what the first query, which reaches furthest back, still sees
            first = keys_of_rows(range(1), len(queries), total - oldest, window).start
            oldest += min(first, cached - oldest)
        row = sequence if rows is None else int(rows[sequence])
        table = None if block_table is None else block_table[sequence]
        keys, values = (
            _in_order(cache, row, table, oldest, cached, capacity, x if x is None else x[new])
            for cache, x in ((k_cache, k), (v_cache, v))
        )
        slopes = alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[sequence]
        out, lse = attend(
            *(x.unsqueeze(0) for x in (queries, keys, values)),
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=slopes,
            return_lse=return_lse,
        )
        outs.append(out.squeeze(0))
        sums.append(lse)
    join = torch.stack if offsets is None else torch.cat
    out = join(outs) if len(outs) > 1 or offsets is None else outs[0]
    if not return_lse:
        return out, None
    together = torch.cat([x for x in sums if x is not None], 0 if offsets is None else -1)
    return out, together if offsets is None else together.squeeze(0)


def _in_order(
    cache: Tensor,
    row: int,
    table: Tensor | None,
    start: int,
    end: int,
    capacity: int,
    fresh: Tensor | None,
) -> Tensor:
    """A sequence's keys (or values) at positions `start` to `end`, then the fresh ones."""
    if table is None:
        ring = cache[row]
    else:
        page_size = cache.shape[1]
        pages = table[start // page_size : -(-end // page_size)].long()
        first = start // page_size * page_size
        ring, start, end = cache[pages].flatten(0, 1), start - first, end - first
    first, last = start % capacity, (end - 1) % capacity + 1
    if start == end:
        held = [] if fresh is not None else [ring[:0]]
    else:
        held = [ring[first:last]] if first < last else [ring[first:], ring[:last]]
    pieces = held if fresh is None else [*held, fresh]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _ring_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    window: Window,
    softmax_scale: float | None,
) -> Tensor:
    """One token a sequence. Softmax does not mind the order of keys: the ring is read as is."""
    batch, capacity, groups, head_dim = k_cache.shape
    counts = (lengths + 1).clamp(max=capacity)
    narrow = 0 <= window.left < capacity - 1  # the ring keeps more than the window shows
    bias = None
    if k_cache.device.type == "cpu":
        smallest, longest = counts.min().item(), counts.max().item()
        k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
        ragged = smallest != longest
    else:
        ragged = True  # the counts stay on the device
    if ragged or narrow:
        slots = torch.arange(k_cache.shape[1], device=q.device)
        mask = slots < counts[:, None]
        if narrow:
            mask &= visible(-((lengths[:, None] - slots) % capacity), window)
        bias = mask[:, None, None]
    # The query heads of a kv head become the rows of one product, so its keys are read once.
    out = F.scaled_dot_product_attention(
        q.reshape(batch, groups, -1, head_dim),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=bias,
        scale=softmax_scale,
    )
    return out.reshape(batch, -1, head_dim)
