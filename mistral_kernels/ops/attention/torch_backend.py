"""Blocked attention on the torch backend: blocks of queries over the keys inside their windows.

Each block of rows reads one slice of keys, so time and memory are proportional to the window. The
scores and the mask of a whole sequence are never allocated. PyTorch's
`scaled_dot_product_attention` computes a block. Calls that it does not support (with a softcap or a
log-sum-exp) compute the scores and their softmax explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.window import (
    distances,
    keys_of_rows,
    rows_with_keys,
    triangle_rows,
    visible,
)
from mistral_kernels.ops.operator import absent

# Rows per block. More rows compute more masked scores; fewer rows need more calls.
_BLOCK_ROWS = 64
# PyTorch's own causal mask is faster than blocks in three cases: at least _TRIANGLE_ROWS rows, one
# block, and so few products (rows^2 * batch * heads * head_dim) that making blocks takes longer.
_TRIANGLE_ROWS = 2048
_TRIANGLE_WORK = 1 << 25


@dataclass(frozen=True)
class _Block:
    """Block of queries `rows` and the slice of keys that they see.

    `first_distance` is the position of the first key minus the position of the first query.
    """

    rows: slice
    keys: slice
    first_distance: int
    triangle: bool = False  # row i sees exactly keys 0..i, as with PyTorch's own causal mask

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start


def blocked_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp, which is `absent` unless `return_lse`."""
    if spec.sequences.cu_seqlens_q is None:
        out, lse = _forward(q, k, v, spec, return_lse)
        return out, absent(q, accumulator_dtype(q.dtype)) if lse is None else lse
    # Tokens outside all sequences keep these values.
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = None
    if return_lse:
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulator_dtype(q.dtype))
    for rows, keys, sequence_spec in _sequences(spec):
        inputs = q[None, rows], k[None, keys], v[None, keys]
        part, part_lse = _forward(*inputs, sequence_spec, return_lse)
        out[rows] = part[0]
        if lse is not None and part_lse is not None:
            lse[:, rows] = part_lse[0]
    return out, absent(q, accumulator_dtype(q.dtype)) if lse is None else lse


def blocked_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of q, k and v from recomputed probabilities; None if not `needed`.

    k and v may be a part of the keys and values from which `out` and `lse` were computed, as in
    ring attention. The gradients are then the contributions of this part. If `lse` is empty, `out`
    was computed from these keys alone.
    """
    # A key's gradient is a sum over many rows of many blocks: accumulate in float32 or float64.
    grads = [
        torch.zeros(x.shape, dtype=accumulator_dtype(x.dtype), device=x.device) if need else None
        for x, need in zip((q, k, v), needed, strict=True)
    ]
    if spec.sequences.cu_seqlens_q is None:
        _backward(dout, q, k, v, out, lse, spec, grads)
    else:
        for rows, keys, sequence_spec in _sequences(spec):
            parts = [
                None if grad is None else grad[None, s]
                for grad, s in zip(grads, (rows, keys, keys), strict=True)
            ]
            inputs = dout[None, rows], q[None, rows], k[None, keys], v[None, keys]
            lse_part = lse[None, :, rows] if lse.numel() else lse
            _backward(*inputs, out[None, rows], lse_part, sequence_spec, parts)
    return [None if grad is None else grad.to(q.dtype) for grad in grads]


def _sequences(spec: AttentionSpec) -> Iterator[tuple[slice, slice, AttentionSpec]]:
    """Yield the rows, the keys and the spec of each packed sequence."""
    cu_seqlens_q, cu_seqlens_k, *_ = spec.sequences
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    spans = (pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    for i, (rows, keys) in enumerate(zip(*spans, strict=True)):
        sequence_spec = spec.of_sequence(i, rows[1] - rows[0], keys[1] - keys[0])
        yield slice(*rows), slice(*keys), sequence_spec


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    grads: list[Tensor | None],
) -> None:
    """Add the gradients of a rectangular batch to `grads`.

        p = exp(s - lse),   dp = dout v^T,   ds = p * (dp - rowsum(dout * out))

    p is computed as softmax(s) times a share: the sum of the weights of these keys, divided by the
    sum of the weights of all keys. The share is 1 if there are no other keys. exp(s - lse) would be
    inaccurate for large scores: the rounding error of s becomes a relative error, and the weights
    do not sum to 1.
    """
    dq, dk, dv = grads
    biases = _BlockBiases(q, k, spec)
    groups, dtype = biases.groups, biases.dtype
    for block in _blocks(q, k, spec, needs_formula=True):
        rows = block.shape[0]
        queries, douts = (_heads_to_rows(x[:, block.rows].to(dtype), groups) for x in (q, dout))
        keys, values = (x[:, block.keys].transpose(1, 2).to(dtype) for x in (k, v))
        scores, cap_slope = _scores(queries, keys, biases.for_block(block), spec)
        p = scores.softmax(-1)
        if lse.numel():
            block_lse = lse[:, :, block.rows].unflatten(1, (groups, -1)).flatten(2)
            p *= _share_of_weights(scores, p, block_lse)
        if dv is not None:
            dv[:, block.keys] += (p.mT @ douts).transpose(1, 2)
        if dq is None and dk is None:
            continue
        dp = douts @ values.mT
        # If there are no other keys, rowsum(dp * p) equals rowsum(dout * out), without the rounding
        # error of `out`.
        terms = (
            douts * _heads_to_rows(out[:, block.rows].to(dtype), groups) if lse.numel() else dp * p
        )
        ds = p.mul_(dp.sub_(terms.sum(-1, keepdim=True)))
        if cap_slope is not None:
            ds *= cap_slope
        ds *= spec.scale(q.shape[-1])
        if dk is not None:
            dk[:, block.keys] += (ds.mT @ queries).transpose(1, 2)
        if dq is not None:
            dq[:, block.rows] = _rows_to_heads(ds @ keys, rows)


def _share_of_weights(scores: Tensor, p: Tensor, lse: Tensor) -> Tensor:
    """Return exp(logsumexp(scores) - lse) of each row; p is the softmax of the scores."""
    # The largest weight is exp(max - logsumexp), so logsumexp = max - log(largest weight).
    own_lse = scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    lse = lse.to(own_lse.dtype).unsqueeze(-1)
    log_share = own_lse - lse
    # A difference within rounding errors means that there are no other keys: the share is 1.
    log_share = log_share.masked_fill(
        log_share.abs() <= 4 * torch.finfo(own_lse.dtype).eps * own_lse.abs(), 0.0
    )
    return log_share.masked_fill(lse == -torch.inf, -torch.inf).exp()  # rows that see no key: 0


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output of a rectangular batch, and its log-sum-exp or None."""
    batch, seqlen_q, num_heads, _ = q.shape
    blocks = _blocks(q, k, spec, needs_formula=return_lse)
    biases = _BlockBiases(q, k, spec)
    if len(blocks) == 1 and blocks[0].shape[0] == seqlen_q:
        keys = blocks[0].keys
        out, lse = _attend(q, k[:, keys], v[:, keys], blocks[0], biases, return_lse)
        return out.contiguous(), lse
    # Rows outside all blocks see no key and keep these values.
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = None
    if return_lse:
        lse = q.new_full((batch, num_heads, seqlen_q), -torch.inf, dtype=accumulator_dtype(q.dtype))
    for block in blocks:
        inputs = q[:, block.rows], k[:, block.keys], v[:, block.keys]
        part, part_lse = _attend(*inputs, block, biases, return_lse)
        out[:, block.rows] = part
        if lse is not None and part_lse is not None:
            lse[:, :, block.rows] = part_lse
    return out, lse


def _blocks(q: Tensor, k: Tensor, spec: AttentionSpec, needs_formula: bool) -> list[_Block]:
    """Return the blocks of a rectangular batch, in descending order of the number of keys."""
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, window = k.shape[1], spec.window
    rows = rows_with_keys(seqlen_q, seqlen_k, window)
    offset = seqlen_k - seqlen_q
    blocks = []
    start = rows.start
    size = triangle_rows(seqlen_q, seqlen_k, window)
    plain = spec.is_plain and not needs_formula
    plain &= q.is_cpu or q.dtype.itemsize == 2  # on a GPU, only the flash kernel supports GQA
    few_products = size**2 * batch * num_heads * head_dim <= _TRIANGLE_WORK
    if plain and size and (size <= _BLOCK_ROWS or few_products or size >= _TRIANGLE_ROWS):
        blocks.append(_Block(slice(0, size), slice(0, size), 0, triangle=True))
        start = size
    while start < rows.stop:
        stop = min(start + _BLOCK_ROWS, rows.stop)
        keys = keys_of_rows(range(start, stop), seqlen_q, seqlen_k, window)
        first_distance = keys.start - start - offset
        blocks.append(_Block(slice(start, stop), slice(keys.start, keys.stop), first_distance))
        start = stop
    return blocks[::-1]  # widest masks first


class _BlockBiases:
    """Additive masks of blocks, for the rows that `_heads_to_rows` makes.

    Blocks with the same number of rows and the same distance of the last key share one mask. The
    mask is made for the block with the most keys, which `_blocks` returns first. Later blocks use
    the last columns of the mask.
    """

    def __init__(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> None:
        self.spec = spec
        self.device = q.device
        self.groups = k.shape[2]
        self.group_size = q.shape[2] // k.shape[2]
        self.dtype = accumulator_dtype(q.dtype)
        self.key: tuple[int, int] | None = None
        self.width = 0
        self.bias: Tensor | None = None

    def for_block(self, block: _Block) -> Tensor | None:
        """Return the mask (n * rows, keys), or (1 or b, g, n * rows, keys) with ALiBi, or None."""
        rows, keys = block.shape
        key = (rows, block.first_distance + keys)
        if key != self.key or keys > self.width:
            self.key, self.width = key, keys
            self.bias = self._make(rows, keys, block.first_distance)
        return None if self.bias is None else self.bias[..., self.width - keys :]

    def _make(self, rows: int, keys: int, first_distance: int) -> Tensor | None:
        distance = distances(rows, keys, first_distance, self.device)
        hidden = ~visible(distance, self.spec.window)
        slopes = self.spec.alibi_slopes
        if slopes is not None:
            slopes = slopes.to(self.dtype).reshape(-1, self.groups, self.group_size, 1, 1)
            return (slopes * -distance.abs()).masked_fill(hidden, -torch.inf).flatten(2, 3)
        if not hidden.any():
            return None
        bias = torch.zeros(rows, keys, dtype=self.dtype, device=self.device)
        return bias.masked_fill_(hidden, -torch.inf).repeat(self.group_size, 1)


def _heads_to_rows(q: Tensor, groups: int) -> Tensor:
    """Reshape (b, rows, h, d) to (b, g, n * rows, d) for n query heads per kv head.

    The query heads of a kv head become rows of one matrix product, which reads the keys once.
    """
    return q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # type: ignore[no-any-return]


def _rows_to_heads(out: Tensor, rows: int) -> Tensor:
    """Invert `_heads_to_rows`."""
    return out.unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # type: ignore[no-any-return]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block: _Block, biases: _BlockBiases, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output and the log-sum-exp (or None) of one block.

    q is (b, rows, h, d), k and v are (b, keys, g, d).
    """
    rows, spec = q.shape[1], biases.spec
    scale = spec.scale(q.shape[-1])
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if block.triangle:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    queries, bias = _heads_to_rows(q, biases.groups), biases.for_block(block)
    # On a GPU the mask must have q's dtype: cuDNN reads its memory as that dtype. A half-precision
    # dtype can represent 0 and -inf, but not ALiBi's distances.
    if not (spec.needs_formula or return_lse) and (q.is_cpu or spec.is_plain):
        if bias is not None and not q.is_cpu:
            bias = bias.to(q.dtype)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias, scale=scale)
        return _rows_to_heads(out, rows), None
    queries, k, v = (x.to(biases.dtype) for x in (queries, k, v))
    scores, _ = _scores(queries, k, bias, spec)
    out = _rows_to_heads(scores.softmax(-1) @ v, rows).to(q.dtype)
    if not return_lse:
        return out, None
    return out, scores.logsumexp(-1).reshape(*q.shape[:3:2], rows)


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Return the scores (b, g, n * rows, keys), and the derivative of the softcap or None."""
    scores = q @ k.mT * spec.scale(q.shape[-1])
    cap_slope = None
    if spec.softcap:
        capped = torch.tanh(scores / spec.softcap)
        scores, cap_slope = spec.softcap * capped, 1 - capped.square()
    return scores if bias is None else scores + bias, cap_slope


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, sums and the log-sum-exp: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialized `out` of q's shape and `lse` (..., num_heads, seqlen), or `absent`."""
    *batch, seqlen, num_heads, _ = q.shape
    lse_shape = (*batch, num_heads, seqlen) if return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=accumulator_dtype(q.dtype), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
