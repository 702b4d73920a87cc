"""Definitions of the package's operators in plain PyTorch.

The tests compare values and gradients of every backend with these functions in float64. The
functions run on any device and are differentiable (twice, if the formula is). They compute in the
dtype of their inputs, but at least in float32. They are not fast: attention builds the whole score
matrix, and the rolling cache is updated one token at a time.

Notation: `b` sequences, `s` tokens, `h` query heads, `g` key/value heads, `d` head_dim. `t` is the
number of tokens of a packed batch, which `cu_seqlens` (b + 1 offsets from 0) splits into sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_widen = True


@contextlib.contextmanager
def eager_arithmetic() -> Iterator[None]:
    """Make the definitions compute in the dtype of their inputs, as eager PyTorch models do.

    The tests compare errors with this arithmetic: a kernel's error may be at most twice as large.
    """
    global _widen
    before, _widen = _widen, False
    try:
        yield
    finally:
        _widen = before


def _wide(x: Tensor) -> Tensor:
    """Convert `x` to the accumulation dtype: float64 for float64, float32 for narrower dtypes."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if _widen else x


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute weight * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467).

    The normalized value is rounded to x.dtype before the product with the weight, as in Mistral's
    own code. With `residual`, return (norm(x + residual), x + residual).
    """
    h = x if residual is None else x + residual
    # Use float32 within `eager_arithmetic` too, as the RMSNorm of eager models does.
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = normalized.to(x.dtype) * weight
    return y if residual is None else (y, h)


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate each pair of channels by the angle of the token's position (arXiv:2104.09864).

    q (..., h, d), k (..., g, d), positions (...), cos and sin (num_positions, d / 2). Pairs are the
    channels i and i + d/2 (half-split, Hugging Face checkpoints), or 2i and 2i + 1 (`interleaved`,
    raw Mistral checkpoints).
    """

    def rotate(x: Tensor) -> Tensor:
        wide = _wide(x)
        c, s = (table.to(wide.dtype)[positions].unsqueeze(-2) for table in (cos, sin))
        if interleaved:
            a, b = wide[..., 0::2], wide[..., 1::2]
            rotated = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
        else:
            a, b = wide.chunk(2, dim=-1)
            rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
        return rotated.to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up (arXiv:2002.05202). Without up, gate holds gate and up, in order."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window_size: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the mask (seqlen_q, seqlen_k) that is True where the query sees the key.

    The mask is bottom-right aligned: the last query has the position of the last key. `window_size`
    holds inclusive distances to the left and right of the query's position, -1 for no bound.
    `causal` is a right distance of 0.
    """
    left, right = window_size
    if causal:
        right = 0
    distance = (
        torch.arange(seqlen_k, device=device)
        - torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[:, None]
    )
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T + bias) v over the visible keys, and the log-sum-exp.

    q (b, sq, h, d), k and v (b, sk, g, d): query head i reads kv head i // (h / g). `softcap` c
    replaces a score s by c * tanh(s / c). `alibi_slopes`, (h,) or (b, h), subtract
    slope * |distance| from the scores (arXiv:2108.12409). Return out (b, sq, h, d) and lse
    (b, h, sq). A query that sees no key has output 0, a log-sum-exp of -inf and zero gradients.
    """
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    keys = _wide(k).repeat_interleave(group, dim=2)
    values = _wide(v).repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", _wide(q), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        rows = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=q.device)[:, None]
        distance = (rows - torch.arange(seqlen_k, device=q.device)).abs()
        scores = scores - alibi_slopes.to(scores).reshape(-1, q.shape[2], 1, 1) * distance
    mask = visible(seqlen_q, seqlen_k, causal, window_size, q.device)
    # Use the lowest finite value, not -inf, so that a row without keys has no NaN gradients.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)
    lse = scores.logsumexp(dim=-1) if seqlen_k else scores.new_zeros(scores.shape[:-1])
    return out, lse.masked_fill(~mask.any(dim=-1), -torch.inf)


def rolling_cache_update(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return copies of the caches with the new tokens of every sequence appended.

    k_cache and v_cache (b, capacity, g, d), k and v (t, g, d) packed, lengths (b,) tokens before
    the new ones. The token at absolute position p is written to slot p % capacity.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for sequence in range(len(lengths)):
        start, end = int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1])
        for token in range(start, end):
            slot = (int(lengths[sequence]) + token - start) % k_cache.shape[1]
            k_cache[sequence, slot] = k[token]
            v_cache[sequence, slot] = v[token]
    return k_cache, v_cache


def rolling_cache_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    *,
    sliding_window: int | None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute causal attention of new tokens to the cache and to each other.

    q (t, h, d), k and v (t, g, d) packed. The caches and lengths are those before
    `rolling_cache_update`. The token at position i sees the positions in (i - sliding_window, i].
    Return (t, h, d).
    """
    capacity = k_cache.shape[1]
    window_size = (-1 if sliding_window is None else sliding_window - 1, 0)
    outs = []
    for sequence in range(len(lengths)):
        new = slice(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1]))
        length = int(lengths[sequence])
        slots = [position % capacity for position in range(max(0, length - capacity), length)]
        keys = torch.cat((k_cache[sequence, slots], k[new]))
        values = torch.cat((v_cache[sequence, slots], v[new]))
        out, _ = attention(
            q[new].unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            causal=True,
            window_size=window_size,
            softmax_scale=softmax_scale,
        )
        outs.append(out.squeeze(0))
    return torch.cat(outs)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Compute the cross entropy, in nats, of the logits hidden @ weight^T.

    hidden (t, hidden_size), weight (vocab_size, hidden_size), targets (t,) int64. Tokens with the
    target `ignore_index` are excluded from the sum and from the mean. `softcap` c replaces a logit
    z by c * tanh(z / c). `label_smoothing` e gives every class the probability e / vocab_size, and
    adds 1 - e to the probability of the target (arXiv:1512.00567). `z_loss` adds
    z_loss * logsumexp^2 to each token's loss (arXiv:2204.02311).
    """
    logits = _wide(hidden) @ _wide(weight).mT
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    counted = targets != ignore_index
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square() * counted
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()
