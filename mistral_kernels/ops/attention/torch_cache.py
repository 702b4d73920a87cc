"""Attention of new tokens over a cache in PyTorch: sequence by sequence, or one decode step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView
from mistral_kernels.ops.attention.torch_backend import accumulator_dtype, empty_outputs
from mistral_kernels.ops.attention.window import keys_of_rows, visible
from mistral_kernels.ops.operator import absent

Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec, bool], tuple[Tensor, Tensor]]


def cached_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    spec: AttentionSpec,
    return_lse: bool,
    attend: Attend,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp, which is `absent` unless `return_lse`.

    The arguments are those of `ops.attend_cached`. `attend` computes attention of one sequence,
    (1, seqlen, heads, head_dim), over the keys of the sequence. Except in decode steps, `lengths`
    is copied to the host.
    """
    cache, cu_seqlens = spec.cache, spec.sequences.cu_seqlens_q
    assert cache is not None
    if not cache.lengths.numel():
        return empty_outputs(q, return_lse)
    whole_rows = cache.rows is None and cache.block_table is None
    if whole_rows and _is_decode_step(q, k, spec, return_lse):
        return _decode(q, spec), absent(q, accumulator_dtype(q.dtype))
    packed = cu_seqlens is not None
    offsets = cu_seqlens.tolist() if cu_seqlens is not None else []
    outs, lses = [], []
    for sequence, length in enumerate(cache.lengths.tolist()):
        new = slice(*offsets[sequence : sequence + 2]) if packed else slice(None)
        queries = q[new] if packed else q[sequence]
        total = length + (len(queries) if packed else cache.seqlen_new)
        cached = total if k is None else length
        oldest = max(cached - cache.capacity, 0)
        if cache.leftpad is not None:
            oldest = min(max(oldest, int(cache.leftpad[sequence])), total)
        if len(queries):  # skip the keys before the first query's window
            first = keys_of_rows(range(1), len(queries), total - oldest, spec.window).start
            oldest += min(first, cached - oldest)
        keys, values = (
            _in_order(cache, x, sequence, oldest, cached, None if fresh is None else fresh[new])
            for x, fresh in ((cache.k_cache, k), (cache.v_cache, v))
        )
        sequence_spec = spec.of_sequence(sequence, len(queries), len(keys))
        queries, keys, values = (x.unsqueeze(0) for x in (queries, keys, values))
        out, lse = attend(queries, keys, values, sequence_spec, return_lse)
        outs.append(out.squeeze(0))
        lses.append(lse)
    out = (outs[0] if len(outs) == 1 else torch.cat(outs)) if packed else torch.stack(outs)
    if not return_lse:
        return out, absent(q, accumulator_dtype(q.dtype))
    lse = torch.cat(lses, -1 if packed else 0)
    return out, lse.squeeze(0) if packed else lse


def _in_order(
    cache: CacheView, x: Tensor, sequence: int, start: int, end: int, fresh: Tensor | None
) -> Tensor:
    """Return the keys (or values) [start, end) of a sequence in the cache x, then `fresh`."""
    if cache.block_table is not None:
        page_size = x.shape[1]
        first = start // page_size
        indices = torch.arange(first, -(-end // page_size), device=x.device)
        pages = cache.block_table[sequence, indices % cache.block_table.shape[1]].long()
        held = [x[pages].flatten(0, 1)[start - first * page_size : end - first * page_size]]
    else:
        ring = x[sequence if cache.rows is None else int(cache.rows[sequence])]
        first, last = start % cache.capacity, (end - 1) % cache.capacity + 1
        if start == end:
            held = [ring[:0]]
        else:
            held = [ring[first:last]] if first < last else [ring[first:], ring[:last]]
    pieces = held if fresh is None else [*held, fresh]
    pieces = [piece for piece in pieces if len(piece)] or pieces[:1]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _is_decode_step(q: Tensor, k: Tensor | None, spec: AttentionSpec, return_lse: bool) -> bool:
    """Return whether the call is a decode step that `_decode` can compute.

    Each sequence has one new token, which is in the cache. There is no softcap, no ALiBi and no
    log-sum-exp.
    """
    assert spec.cache is not None
    one_each = spec.sequences.max_seqlen_q == 1 and len(q) == spec.cache.lengths.numel()
    return spec.is_plain and not return_lse and k is None and one_each


def _new_tokens(spec: AttentionSpec) -> int:
    """Return the number of new tokens per sequence that `lengths` does not include yet."""
    assert spec.cache is not None
    return spec.cache.seqlen_new if spec.sequences.cu_seqlens_q is None else 1


def _decode(q: Tensor, spec: AttentionSpec) -> Tensor:
    """Return the attention of one token per sequence over its cache.

    The keys are read in the order of their slots: softmax does not depend on the order of keys.
    """
    cache, window = spec.cache, spec.window
    assert cache is not None
    batch = cache.lengths.shape[0]
    k_cache, v_cache = cache.k_cache[:batch], cache.v_cache[:batch]
    _, capacity, groups, head_dim = k_cache.shape
    totals = cache.lengths.long() + _new_tokens(spec)
    counts = totals.clamp(max=capacity)
    narrow = 0 <= window.left < capacity - 1  # the cache holds keys outside the window
    begin = 0
    if k_cache.device.type == "cpu":
        smallest, longest = counts.min().item(), counts.max().item()
        ragged = smallest != longest or (cache.leftpad is not None and bool(cache.leftpad.any()))
        # Before the ring wraps, slots are positions: the window is a slice.
        if narrow and not ragged and totals.max() <= capacity:
            begin, narrow = max(int(longest) - window.left - 1, 0), False
        k_cache, v_cache = k_cache[:, begin:longest], v_cache[:, begin:longest]
    else:
        ragged = True  # reading the counts would wait for the device
    bias = None
    if ragged or narrow:
        slots = torch.arange(k_cache.shape[1], device=q.device)
        mask = slots < counts[:, None]
        age = (totals[:, None] - 1 - slots) % capacity  # tokens after the slot's token
        if cache.leftpad is not None:
            mask &= totals[:, None] - 1 - age >= cache.leftpad[:, None]
        if narrow:
            mask &= visible(-age, window)
        bias = mask[:, None, None]
    # The query heads of a kv head become the rows of one matrix, so that each key is read once.
    out = F.scaled_dot_product_attention(
        q.reshape(batch, groups, -1, head_dim),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=bias,
        scale=spec.scale(head_dim),
    )
    if bias is not None and not q.is_cpu:  # for a fully masked row PyTorch averages all values
        out = out.masked_fill(~bias.any(-1, keepdim=True), 0.0)
    return out.reshape(q.shape).contiguous()  # some of PyTorch's kernels keep q's strides
