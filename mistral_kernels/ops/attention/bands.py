"""Attention on the torch backend: bands of queries, each over the keys its window reaches.

A band of rows meets one slice of keys, so cost and memory follow the window; neither the scores nor
the mask of the whole sequence ever exists. Inside a band PyTorch's `scaled_dot_product_attention`
does the work. It knows no softcap and returns no log-sum-exp; bands that need one use the formula.

Where csrc is there, it serves the forward pass on CPUs but for ALiBi: blocks, too, in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.attention.packed import Offsets
from mistral_kernels.ops.attention.scoring import Scoring
from mistral_kernels.ops.attention.window import (
    distances,
    keys_of_rows,
    rows_with_keys,
    triangle_rows,
    visible,
)
from mistral_kernels.ops.dispatch import with_unit_stride

# Rows of a band. A taller band wastes more masked keys, a shorter one pays more calls.
_BAND_ROWS = 64
# From how many rows on PyTorch's own causal mask is faster than bands; so it is for a single band,
# and where all products together (rows^2 * heads * head_dim) take less than making the bands.
_TRIANGLE_ROWS = 2048
_TRIANGLE_WORK = 1 << 25


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


def banded_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Offsets | None, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """The output, and the log-sum-exp if `scoring` wants it."""
    if offsets is None:
        return _forward(q, k, v, scoring)
    # Tokens of no sequence keep these values.
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = None
    if scoring.return_lse:
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=_wide(q.dtype))
    for rows, keys, sequence in _sequences(offsets, scoring):
        part, part_lse = _forward(q[None, rows], k[None, keys], v[None, keys], sequence)
        out[rows] = part[0]
        if lse is not None and part_lse is not None:
            lse[:, rows] = part_lse[0]
    return out, lse


def banded_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Offsets | None,
    scoring: Scoring,
    needed: list[bool],
) -> list[Tensor | None]:
    """Return the gradients of q, k and v that are `needed`, from recomputed probabilities.

    `out` and `lse` may be those of more keys than k and v hold, as in ring attention, which passes
    the result over all parts: the gradients are then those through this part. An `lse` of no
    elements stands for that of these keys.
    """
    # A key is in many bands, and many rows of one: its gradient is summed in float32 at least.
    grads = [
        torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device) if need else None
        for x, need in zip((q, k, v), needed, strict=True)
    ]
    if offsets is None:
        _backward(dout, q, k, v, out, lse, scoring, grads)
    else:
        for rows, keys, sequence in _sequences(offsets, scoring):
            parts = [
                None if grad is None else grad[None, s]
                for grad, s in zip(grads, (rows, keys, keys), strict=True)
            ]
            inputs = dout[None, rows], q[None, rows], k[None, keys], v[None, keys]
            sums = lse[None, :, rows] if lse.numel() else lse
            _backward(*inputs, out[None, rows], sums, sequence, parts)
    return [None if grad is None else grad.to(q.dtype) for grad in grads]


def _sequences(offsets: Offsets, scoring: Scoring) -> Iterator[Any]:
    """Each sequence of a packed batch: its rows, its keys, and how it is scored."""
    ends_q, ends_k = offsets.q.tolist(), offsets.k.tolist()
    for i in range(len(ends_q) - 1):
        slopes = scoring.alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[i : i + 1]
        yield (
            slice(ends_q[i], ends_q[i + 1]),
            slice(ends_k[i], ends_k[i + 1]),
            replace(scoring, alibi_slopes=slopes),
        )


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
    grads: list[Tensor | None],
) -> None:
    """Add to `grads`. p = exp(s - lse), dp = dout v^T, ds = p * (dp - rowsum(dout * out)).

    p is formed as softmax(s) times the share that these keys have of all keys' weights, 1 without
    others: exp(s - lse) loses a rounding of s, so that large scores' weights would not add up.
    """
    dq, dk, dv = grads
    biases = _Biases(q, k, scoring)
    groups, dtype = biases.groups, biases.dtype
    for band in _bands(q, k, replace(scoring, return_lse=True)):
        rows = band.shape[0]
        queries, douts = (_stack(x[:, band.rows].to(dtype), groups) for x in (q, dout))
        keys, values = (x[:, band.keys].transpose(1, 2).to(dtype) for x in (k, v))
        scores, cap_slope = _scores(queries, keys, biases.of(band), scoring)
        p = scores.softmax(-1)
        if lse.numel():
            sums = lse[:, :, band.rows].unflatten(1, (groups, -1)).flatten(2)
            p *= _share(scores, p, sums)
        if dv is not None:
            dv[:, band.keys] += (p.mT @ douts).transpose(1, 2)
        if dq is None and dk is None:
            continue
        dp = douts @ values.mT
        # Without other keys the two are equal, but for the rounding of `out`.
        of_out = douts * _stack(out[:, band.rows].to(dtype), groups) if lse.numel() else dp * p
        ds = p.mul_(dp.sub_(of_out.sum(-1, keepdim=True)))
        if cap_slope is not None:
            ds *= cap_slope
        ds *= scoring.scale
        if dk is not None:
            dk[:, band.keys] += (ds.mT @ queries).transpose(1, 2)
        if dq is not None:
            dq[:, band.rows] = _unstack(ds @ keys, rows)


def _share(scores: Tensor, p: Tensor, lse: Tensor) -> Tensor:
    """Return exp(logsumexp(scores) - lse) for each row; p is the softmax of the scores."""
    # The largest weight is exp(max - logsumexp).
    here = scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    lse = lse.to(here.dtype).unsqueeze(-1)
    share = here - lse
    # Equal up to roundings: there are no other keys.
    share = share.masked_fill(share.abs() <= 4 * torch.finfo(here.dtype).eps * here.abs(), 0.0)
    return share.masked_fill(lse == -torch.inf, -torch.inf).exp()  # no keys anywhere


def _forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    if scoring.alibi_slopes is None and extension.serves(q):
        return _forward_csrc(q, k, v, scoring)
    batch, seqlen_q, num_heads, _ = q.shape
    bands = _bands(q, k, scoring)
    biases = _Biases(q, k, scoring)
    if len(bands) == 1 and bands[0].shape[0] == seqlen_q:
        keys = bands[0].keys
        out, lse = _attend(q, k[:, keys], v[:, keys], bands[0], biases, scoring)
        return out.contiguous(), lse
    # Rows in no band see no key: they keep these values.
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = None
    if scoring.return_lse:
        lse = q.new_full((batch, num_heads, seqlen_q), -torch.inf, dtype=_wide(q.dtype))
    for band in bands:
        keys = band.keys
        part, part_lse = _attend(q[:, band.rows], k[:, keys], v[:, keys], band, biases, scoring)
        out[:, band.rows] = part
        if lse is not None and part_lse is not None:
            lse[:, :, band.rows] = part_lse
    return out, lse


def _forward_csrc(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    batch, seqlen_q, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(batch, num_heads, seqlen_q) if scoring.return_lse else None
    torch.ops.mistral_kernels.attention(
        *(with_unit_stride(x) for x in (q, k, v)),
        *(out, lse, *scoring.window.reach, scoring.scale, scoring.softcap),
    )
    return out, lse


def _bands(q: Tensor, k: Tensor, scoring: Scoring) -> list[_Band]:
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, window = k.shape[1], scoring.window
    rows = rows_with_keys(seqlen_q, seqlen_k, window)
    offset = seqlen_k - seqlen_q
    bands = []
    start = rows.start
    size = triangle_rows(seqlen_q, seqlen_k, window)
    plain = not scoring.needs_formula and scoring.alibi_slopes is None
    plain &= q.is_cpu or q.dtype.itemsize == 2  # on a GPU only flash takes grouped queries
    little = size**2 * batch * num_heads * head_dim <= _TRIANGLE_WORK
    if plain and size and (size <= _BAND_ROWS or little or size >= _TRIANGLE_ROWS):
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

    def __init__(self, q: Tensor, k: Tensor, scoring: Scoring) -> None:
        self.scoring = scoring
        self.device = q.device
        self.groups = k.shape[2]
        self.group_size = q.shape[2] // k.shape[2]
        self.dtype = _wide(q.dtype)
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
    q: Tensor, k: Tensor, v: Tensor, band: _Band, biases: _Biases, scoring: Scoring
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
    # On a GPU a mask must have q's dtype (cuDNN reads any other as if it had), which holds 0 and
    # -inf, but not ALiBi's distances.
    if not scoring.needs_formula and (q.is_cpu or scoring.alibi_slopes is None):
        if bias is not None and not q.is_cpu:
            bias = bias.to(q.dtype)
        out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=bias, scale=scoring.scale)
        return _unstack(out, rows), None
    stacked, k, v = (x.to(biases.dtype) for x in (stacked, k, v))
    scores, _ = _scores(stacked, k, bias, scoring)
    out = _unstack(scores.softmax(-1) @ v, rows).to(q.dtype)
    if not scoring.return_lse:
        return out, None
    return out, scores.logsumexp(-1).reshape(*q.shape[:3:2], rows)


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """(b, g, n * rows, keys), and the derivative of the softcap where there is one."""
    scores = q @ k.mT * scoring.scale
    cap_slope = None
    if scoring.softcap:
        capped = torch.tanh(scores / scoring.softcap)
        scores, cap_slope = scoring.softcap * capped, 1 - capped.square()
    return scores if bias is None else scores + bias, cap_slope


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
