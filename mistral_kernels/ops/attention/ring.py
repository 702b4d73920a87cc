"""Attention over the rolling cache on the torch backend: the older keys come from the ring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.attention.op import attend
from mistral_kernels.ops.attention.window import Window, keys_of_rows, visible


def ring_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    *,
    window: Window,
    softmax_scale: float | None,
) -> Tensor:
    """`reference.rolling_cache_attention`; without k and v, the ring already holds q's own keys."""
    if k is None or v is None:
        return _ring_decode(q, k_cache, v_cache, lengths, window, softmax_scale)
    outs = []
    offsets = cu_seqlens.tolist()
    for sequence, length in enumerate(lengths.tolist()):
        new = slice(offsets[sequence], offsets[sequence + 1])
        keys = _with_history(k_cache[sequence], k[new], length, window)
        values = _with_history(v_cache[sequence], v[new], length, window)
        out, _ = attend(
            q[new].unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            window=window,
            softmax_scale=softmax_scale,
        )
        outs.append(out.squeeze(0))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _with_history(ring: Tensor, new: Tensor, length: int, window: Window) -> Tensor:
    """The keys in position order: what the first new token still sees of the ring, then `new`."""
    capacity, held = ring.shape[0], min(length, ring.shape[0])
    seen = held - keys_of_rows(range(1), len(new), held + len(new), window).start
    if seen == 0 or len(new) == 0:
        return new
    start, end = (length - seen) % capacity, (length - 1) % capacity + 1
    history = (ring[start:end],) if start < end else (ring[start:], ring[:end])
    return torch.cat((*history, new))


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
