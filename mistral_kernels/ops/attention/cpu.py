"""Attention on the torch backend: bands of queries, each over the keys its window reaches.

A band of rows meets one slice of keys, so cost and memory follow the window; neither the scores nor
the mask of the whole sequence ever exists. Inside a band PyTorch's `scaled_dot_product_attention`
does the work. It knows no softcap and returns no log-sum-exp; bands that need one use the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mistral_kernels.ops.attention.window import (
    Window,
    distances,
    keys_of_rows,
    rows_with_keys,
    triangle_rows,
    visible,
)

# Rows of a band. A taller band wastes more masked keys, a shorter one pays more calls.
_BAND_ROWS = 64
# From how many rows on PyTorch's own causal mask is faster than bands; so it is for a single band.
_TRIANGLE_ROWS = 2048


@dataclass(frozen=True)
class _Scoring:
    """How scores are formed from q and k: the arguments that all bands share."""

    window: Window
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    return_lse: bool

    @property
    def needs_formula(self) -> bool:
        return bool(self.softcap) or self.return_lse


@dataclass(frozen=True)
class _Band:
    """Queries `rows`, the `keys` they see, and the distance from the first query to the first."""

    rows: slice
    keys: slice
    first_distance: int
    triangle: bool  # row i sees exactly keys 0..i: PyTorch's own causal mask serves

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    softmax_scale: float,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.attention` for q (b, sq, h, d), k and v (b, sk, g, d), with a resolved window.

    Differentiable in q, k and v; the log-sum-exp (b, h, sq) comes back only when asked for.
    """
    scoring = _Scoring(window, softmax_scale, softcap, alibi_slopes, return_lse)
    # PyTorch forms all scores at once for heads that are not contiguous.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _BandedAttention.apply(q, k, v, scoring)
    return _forward(q, k, v, scoring)


class _BandedAttention(torch.autograd.Function):
    """Recomputes each band in the backward pass.

    Recording the forward instead would pad every band's key gradient to the whole sequence, which
    costs O(seqlen^2 / rows) where the window promises O(seqlen).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scoring: _Scoring
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v)
        ctx.scoring = scoring
        out, lse = _forward(q, k, v, scoring)
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        biases = _Biases(inputs[0], inputs[1], ctx.scoring)
        # A key is in many bands, and many rows of one: its gradient is summed in float32, which
        # PyTorch's kernel for the CPU, unlike those for GPUs, does for float32 inputs only.
        grads = [
            torch.zeros_like(x, dtype=biases.dtype) if need else None
            for x, need in zip(inputs, needed)
        ]
        dtype = biases.dtype if dout.device.type == "cpu" else dout.dtype
        for band in _bands(inputs[0].shape[1], inputs[1].shape[1], ctx.scoring):
            slices = (band.rows, band.keys, band.keys)
            with torch.enable_grad():
                parts = [
                    x[:, s].detach().to(dtype).requires_grad_(need)
                    for x, s, need in zip(inputs, slices, needed)
                ]
                q, k, v = parts
                out, _ = _attend(q, k, v, band, biases, ctx.scoring)
            wanted = [part for part in parts if part.requires_grad]
            computed = iter(torch.autograd.grad(out, wanted, dout[:, band.rows].to(dtype)))
            for grad, s in zip(grads, slices):
                if grad is not None:
                    grad[:, s] += next(computed)
        return *(None if grad is None else grad.to(dout.dtype) for grad in grads), None


def _forward(q: Tensor, k: Tensor, v: Tensor, scoring: _Scoring) -> tuple[Tensor, Tensor | None]:
    batch, seqlen_q, num_heads, _ = q.shape
    bands = _bands(seqlen_q, k.shape[1], scoring)
    biases = _Biases(q, k, scoring)
    if len(bands) == 1 and bands[0].shape[0] == seqlen_q:
        return _attend(q, k[:, bands[0].keys], v[:, bands[0].keys], bands[0], biases, scoring)
    # Rows in no band see no key: they keep these values.
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = None
    if scoring.return_lse:
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((batch, num_heads, seqlen_q), -torch.inf, dtype=dtype)
    for band in bands:
        keys = band.keys
        part, part_lse = _attend(q[:, band.rows], k[:, keys], v[:, keys], band, biases, scoring)
        out[:, band.rows] = part
        if lse is not None and part_lse is not None:
            lse[:, :, band.rows] = part_lse
    return out, lse


def _bands(seqlen_q: int, seqlen_k: int, scoring: _Scoring) -> list[_Band]:
    window = scoring.window
    rows = rows_with_keys(seqlen_q, seqlen_k, window)
    offset = seqlen_k - seqlen_q
    bands = []
    start = rows.start
    size = triangle_rows(seqlen_q, seqlen_k, window)
    plain = not scoring.needs_formula and scoring.alibi_slopes is None
    if plain and (0 < size <= _BAND_ROWS or size >= _TRIANGLE_ROWS):
        bands.append(_Band(slice(0, size), slice(0, size), 0, triangle=True))
        start = size
    while start < rows.stop:
        block = range(start, min(start + _BAND_ROWS, rows.stop))
        keys = keys_of_rows(block, seqlen_q, seqlen_k, window)
        bands.append(
            _Band(
                slice(block.start, block.stop),
                slice(keys.start, keys.stop),
                keys.start - block.start - offset,
                triangle=False,
            )
        )
        start = block.stop
    return bands[::-1]  # widest masks first


class _Biases:
    """The additive masks of the bands, for the rows that `_stack` makes.

    Bands whose last keys lie at the same distance share one mask: it is made for the widest, which
    `_bands` gives first, and the narrower ones see its right end.
    """

    def __init__(self, q: Tensor, k: Tensor, scoring: _Scoring) -> None:
        self.scoring = scoring
        self.device = q.device
        self.groups = k.shape[2]
        self.group_size = q.shape[2] // k.shape[2]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.key: tuple[int, int] | None = None
        self.width = 0
        self.bias: Tensor | None = None

    def of(self, band: _Band) -> Tensor | None:
        """(n * rows, keys), or (1 or b, g, n * rows, keys) with ALiBi; None: nothing to add."""
        rows, keys = band.shape
        key = (rows, band.first_distance + keys)
        if key != self.key or keys > self.width:
            self.key, self.width = key, keys
            self.bias = self._make(rows, keys, band.first_distance)
        return None if self.bias is None else self.bias[..., self.width - keys :]

    def _make(self, rows: int, keys: int, first_distance: int) -> Tensor | None:
        distance = distances(rows, keys, first_distance, self.device)
        hidden = ~visible(distance, self.scoring.window)
        slopes = self.scoring.alibi_slopes
        if slopes is not None:
            slopes = slopes.to(self.dtype).reshape(-1, self.groups, self.group_size, 1, 1)
            return (slopes * -distance.abs()).masked_fill(hidden, -torch.inf).flatten(2, 3)
        if not hidden.any():
            return None
        bias = torch.zeros(rows, keys, dtype=self.dtype, device=self.device)
        return bias.masked_fill_(hidden, -torch.inf).repeat(self.group_size, 1)


def _stack(q: Tensor, groups: int) -> Tensor:
    """(b, rows, h, d) to (b, g, n * rows, d): the n query heads of a kv head under one another.

    As rows of one product they read its keys once.
    """
    return q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unstack(out: Tensor, rows: int) -> Tensor:
    """The inverse of `_stack`."""
    return out.unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, band: _Band, biases: _Biases, scoring: _Scoring
) -> tuple[Tensor, Tensor | None]:
    """One band: q (b, rows, h, d) over k and v (b, keys, g, d)."""
    rows = q.shape[1]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if band.triangle:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=scoring.scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    stacked, bias = _stack(q, biases.groups), biases.of(band)
    if not scoring.needs_formula:
        out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=bias, scale=scoring.scale)
        return _unstack(out, rows), None
    stacked, k, v = (x.to(biases.dtype) for x in (stacked, k, v))
    scores = stacked @ k.mT * scoring.scale  # (b, g, n * rows, keys)
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1, keepdim=True)
    out = _unstack((scores - lse).exp() @ v, rows).to(q.dtype)
    return out, lse.reshape(*q.shape[:3:2], rows) if scoring.return_lse else None


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
    softmax_scale: float,
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
        out, _ = banded_attention(
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
    softmax_scale: float,
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
