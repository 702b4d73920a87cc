"""Definitions of the operators in float64, for fuzz_operators.py.

Each function takes the arguments of one operator. It raises `Invalid` unless they meet every
requirement of the operator, and returns the exact results; None for a result that is not checked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mistral_kernels.ops import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Invalid(Exception):
    """Arguments that an operator must reject."""


class Undefined(Exception):
    """Arguments for which several results are right."""


def require(*conditions: bool) -> None:
    if not all(conditions):
        raise Invalid


def close(
    actual: Tensor, exact: Tensor, dtype: torch.dtype | None = None, share: float = 1.0
) -> bool:
    """Return whether two tensors are equal up to `share` times the rounding errors of `dtype`.

    `actual` must be finite wherever its dtype can hold `exact`; other elements are ignored.
    """
    eps = {torch.float16: 2e-2, torch.bfloat16: 8e-2}.get(dtype or actual.dtype, 1e-4) * share
    exact = exact.double()
    exact = exact.where(exact.abs() < torch.finfo(actual.dtype).max, torch.nan)
    both = exact.isfinite() & actual.isfinite()
    if not bool((exact.isfinite() <= actual.isfinite()).all()):
        return False
    difference = (actual.double() - exact)[both].abs()
    scale = max(1.0, exact[both].abs().max().item()) if difference.numel() else 1.0
    return not difference.numel() or difference.max().item() <= eps * scale


def require_like(x: Tensor, *others: Tensor | None) -> None:
    """Require a floating-point dtype and the CPU of x, and the same of the others."""
    require(x.dtype in FLOATS, x.is_cpu)
    for other in others:
        require(other is None or (other.dtype == x.dtype and other.is_cpu))


def rms_norm(x, weight, residual, eps, save_rstd):
    require_like(x, weight, residual)
    require(x.ndim > 0, weight.shape == x.shape[-1:], residual is None or residual.shape == x.shape)
    h = x if residual is None else x + residual
    y = reference.rms_norm(h.double(), weight.double(), eps)
    rstd = torch.rsqrt(h.double().square().mean(-1) + eps)
    return y, None if residual is None else h, rstd if save_rstd else None


def rms_norm_backward(dy, dh, h, weight, rstd, *mask):
    require_like(h, dy, dh, weight)
    require(h.ndim > 0, weight.shape == h.shape[-1:], dy.shape == h.shape)
    require(dh is None or dh.shape == h.shape, rstd.shape == h.shape[:-1])
    require(rstd.dtype == torch.promote_types(h.dtype, torch.float32))
    normed = h.double() * rstd.double()[..., None]
    g = dy.double() * weight.double()
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd.double()[..., None]
    dx = dx if dh is None else dx + dh
    dweight = (dy.double() * normed).reshape(-1, h.shape[-1]).sum(0)
    return dx if mask[0] else None, dweight if mask[1] else None


def rotary(q, k, cos, sin, positions, interleaved, inverse):
    given = [x for x in (q, k) if x is not None]
    require(bool(given), cos.ndim == 2, sin.shape == cos.shape)
    require_like(given[0], *given)
    require(cos.dtype == sin.dtype, cos.dtype in FLOATS)
    require(positions.dtype in (torch.int32, torch.int64))
    for x in given:
        require(x.ndim >= 2, x.shape[:-2] == positions.shape, x.shape[-1] == 2 * cos.shape[1])
    require(bool(((positions >= 0) & (positions < len(cos))).all()))
    sin = -sin if inverse else sin
    tables = cos.double(), sin.double(), positions
    return tuple(
        None
        if x is None
        else reference.apply_rotary(x.double(), x.double(), *tables, interleaved)[0]
        for x in (q, k)
    )


def swiglu(gate, up):
    require_like(gate, up)
    require(up is None or up.shape == gate.shape)
    require(up is not None or (gate.ndim > 0 and gate.shape[-1] % 2 == 0))
    return (reference.swiglu(gate.double(), None if up is None else up.double()),)


def swiglu_backward(dy, gate, up, *mask):
    require_like(gate, up, dy)
    leaves = [x.detach().double().clone().requires_grad_() for x in (gate, up) if x is not None]
    (y,) = swiglu(gate, up)
    require(dy.shape == y.shape)
    y = reference.swiglu(*leaves)
    grads = [*torch.autograd.grad(y, leaves, dy.double()), None][:2]
    return tuple(grad if need else None for grad, need in zip(grads, mask, strict=True))


def linear_cross_entropy(hidden, weight, targets, ignore_index, mean, *options):
    *numbers, needs_dhidden, needs_dweight = options
    require_like(hidden, weight)
    require(hidden.ndim == weight.ndim == 2, hidden.shape[1] == weight.shape[1], len(weight) > 0)
    require(targets.dtype == torch.int64, targets.shape == hidden.shape[:1])
    require(bool((((targets >= 0) & (targets < len(weight))) | (targets == ignore_index)).all()))
    require(0 <= numbers[0] <= 1, *(0 <= x < math.inf for x in numbers[1:]))
    leaves = [x.detach().double().clone().requires_grad_() for x in (hidden, weight)]
    reduction = "mean" if mean else "sum"
    loss = reference.linear_cross_entropy(*leaves, targets, ignore_index, reduction, *numbers)
    grads = torch.autograd.grad(loss, leaves)
    return loss.detach(), grads[0] if needs_dhidden else None, grads[1] if needs_dweight else None


def attention_pieces(q, k, v, *options):
    """Check the arguments; yield each sequence's rows of q, rows of k and reference options."""
    cu_q, cu_k, max_q, max_k, scale, left, right, softcap, slopes, *_ = options
    require_like(q, k, v)
    require(q.ndim == k.ndim == v.ndim == (4 if cu_q is None else 3), k.shape == v.shape)
    require(q.shape[-1] == k.shape[-1], 0 < q.shape[-1] <= 256)
    require(q.shape[-2] > 0, k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0)
    require(scale is None or 0 < scale < math.inf, 0 <= softcap < math.inf)
    if cu_q is None:
        require(cu_k is None, k.shape[0] == q.shape[0])
        offsets = None
        batch = q.shape[0]
    else:
        cu_k = cu_q if cu_k is None else cu_k
        offsets = []
        for cu, x, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
            require(cu.dtype == torch.int32, cu.ndim == 1, cu.is_cpu, len(cu) > 0)
            steps = cu.diff()
            require(int(cu[0]) == 0, bool((steps >= 0).all()), int(cu[-1]) <= len(x))
            require(not len(steps) or int(steps.max()) <= longest)
            offsets.append(cu.tolist())
        batch = len(offsets[0]) - 1
        require(len(offsets[1]) - 1 == batch)
    if slopes is not None:
        shapes = ((q.shape[-2],), (batch, q.shape[-2]))
        require(slopes.dtype in FLOATS, slopes.is_cpu, tuple(slopes.shape) in shapes)
    definition = {
        "window_size": (left if left >= 0 else -1, right if right >= 0 else -1),
        "softmax_scale": scale,
        "softcap": softcap,
    }
    if offsets is None:
        yield ..., ..., {**definition, "alibi_slopes": slopes}
        return
    for i in range(batch):
        slope = slopes[i] if slopes is not None and slopes.ndim == 2 else slopes
        rows, keys = (slice(*cu[i : i + 2]) for cu in offsets)
        yield rows, keys, {**definition, "alibi_slopes": slope}


def attention(q, k, v, *options):
    pieces = list(attention_pieces(q, k, v, *options))
    q, k, v = q.double(), k.double(), v.double()
    if q.ndim == 4:
        out, lse = reference.attention(q, k, v, **pieces[0][2])
    else:
        out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -math.inf)
        for rows, keys, definition in pieces:
            parts = q[None, rows], k[None, keys], v[None, keys]
            part_out, part_lse = reference.attention(*parts, **definition)
            out[rows], lse[:, rows] = part_out[0], part_lse[0]
    return out, lse if options[-1] else None


def attention_backward(dout, q, k, v, out, lse, *options):
    """Return the gradients; None where `out` and `lse` are not those of these keys.

    test_ring_attention.py tests the gradients of parts of the keys.
    """
    options, mask = options[:-3], options[-3:]
    require_like(q, dout, out)
    require(dout.shape == out.shape == q.shape)
    *batch, seqlen, heads, _ = q.shape
    absent = lse.shape == (0,)  # the operator then recomputes it
    require(absent or lse.shape == (*batch, heads, seqlen), lse.is_cpu)
    require(lse.dtype == torch.promote_types(q.dtype, torch.float32))
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    pieces = list(attention_pieces(q, k, v, *options))
    exact_out, exact_lse = attention(q, k, v, *options, True)
    # Errors of out and lse are larger in the gradients: allow a tenth of the tolerance.
    if not (close(out, exact_out, share=0.1) and (absent or close(lse, exact_lse, share=0.1))):
        return (None,) * 3
    result = leaves[0] * 0
    for rows, keys, definition in pieces:
        if rows is ...:
            result = reference.attention(*leaves, **definition)[0]
        else:
            parts = (x[None, s] for x, s in zip(leaves, (rows, keys, keys), strict=True))
            result = result.index_add(
                0, torch.arange(len(q))[rows], reference.attention(*parts, **definition)[0][0]
            )
    grads = torch.autograd.grad(result, leaves, dout.double(), allow_unused=True)
    return tuple(grad if need else None for grad, need in zip(grads, mask, strict=True))


def appended(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, rows, block_table):
    """Check the arguments; return (token, row, slot) of each token that the cache keeps."""
    require_like(k_cache, v_cache, k, v)
    require(k_cache.ndim == 4, v_cache.shape == k_cache.shape, 0 not in k_cache.shape[1:3])
    require(k.ndim == 3, k.shape == v.shape, k.shape[1:] == k_cache.shape[2:])
    require(k_cache.stride(-1) == v_cache.stride(-1) == 1 or k_cache.shape[-1] <= 1)
    require(*(x.dtype == torch.int32 and x.is_cpu for x in (lengths, cu_seqlens)))
    require(lengths.ndim == 1, cu_seqlens.shape == (len(lengths) + 1,))
    require(rows is None or block_table is None)
    steps = cu_seqlens.diff()
    require(int(cu_seqlens[0]) == 0, int(cu_seqlens[-1]) == len(k), bool((steps >= 0).all()))
    require(not len(steps) or int(steps.max()) <= max_seqlen, bool((lengths >= 0).all()))
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[-1])
    for x, shape in ((rows, (len(lengths),)), (block_table, (len(lengths), None))):
        if x is not None:
            require(x.dtype == torch.int32, x.ndim == len(shape), len(x) == len(lengths), x.is_cpu)
    require(not (rows is None and block_table is None and len(lengths) > len(k_cache)))
    require(capacity > 0, not any(0 in x.stride() for x in (k_cache, v_cache) if x.numel() > 1))
    kept = []
    for i in range(len(lengths)):
        start, end = cu_seqlens[i : i + 2].tolist()
        for token in range(max(start, end - capacity), end):
            slot = (int(lengths[i]) + token - start) % capacity
            row = i if rows is None else int(rows[i])
            if block_table is not None:
                row, slot = int(block_table[i, slot // k_cache.shape[1]]), slot % k_cache.shape[1]
            require(0 <= row < len(k_cache))
            kept.append((token, row, slot))
    if len({entry[1:] for entry in kept}) < len(kept):
        raise Undefined  # when two tokens are written to one slot, either may remain
    return kept


def cache_update(k_cache, v_cache, k, v, *rest):
    k_after, v_after = k_cache.clone(), v_cache.clone()
    for token, row, slot in appended(k_cache, v_cache, k, v, *rest):
        k_after[row, slot], v_after[row, slot] = k[token], v[token]
    return k_after, v_after


def rotary_cache_update(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, *rest):
    q, cos, sin, interleaved = rest
    appended(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, None, None)
    require_like(k, q)
    require(q.ndim == 3, len(q) == len(k), q.shape[1] > 0, q.shape[-1] == k.shape[-1])
    require(cos.dtype == sin.dtype == torch.float32)
    position = torch.cat(
        [
            int(n) + torch.arange(int(count))
            for n, count in zip(lengths, cu_seqlens.diff(), strict=True)
        ]
        or [torch.arange(0)]
    )
    q_out, k_out = rotary(q, k, cos, sin, position, interleaved, False)
    caches = cache_update(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, None, None)
    k_after = caches[0].double()
    for token, row, slot in appended(
        k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, None, None
    ):
        k_after[row, slot] = k_out[token]
    return k_after, caches[1], q_out


def cached_attention(q, k, v, k_cache, v_cache, lengths, seqlen_new, *rest):
    rows, leftpad, table, cu_seqlens, longest, scale, left, right, softcap, *rest = rest
    slopes, return_lse, *_ = rest
    require_like(q, k, v, k_cache, v_cache)
    require((k is None) == (v is None), q.ndim == (4 if cu_seqlens is None else 3))
    require(k_cache.ndim == 4, v_cache.shape == k_cache.shape, k_cache.shape[1] > 0)
    require(k_cache.stride(-1) == v_cache.stride(-1) == 1 or k_cache.shape[-1] <= 1)
    require(lengths.dtype == torch.int32, lengths.ndim == 1, bool((lengths >= 0).all()))
    require(scale is None or 0 < scale < math.inf, 0 <= softcap < math.inf)
    heads, head_dim, batch = q.shape[-2], q.shape[-1], len(lengths)
    require(heads > 0, k_cache.shape[2] > 0 and heads % k_cache.shape[2] == 0)
    require(0 < head_dim <= 256, k_cache.shape[3] == head_dim)
    if cu_seqlens is None:
        require(k is None, len(q) == batch, q.shape[1] <= longest, seqlen_new >= 0)
    else:
        steps = cu_seqlens.diff()
        require(cu_seqlens.dtype == torch.int32, cu_seqlens.shape == (batch + 1,))
        require(int(cu_seqlens[0]) == 0, int(cu_seqlens[-1]) == len(q))
        require(not batch or 0 <= int(steps.min()) <= int(steps.max()) <= longest)
        require(k is None or (k.shape == v.shape == (len(q), *k_cache.shape[2:])))
    require(rows is None or table is None)
    require(rows is not None or table is not None or batch <= len(k_cache))
    for x, dims in ((rows, 1), (leftpad, 1), (table, 2)):
        require(x is None or (x.dtype == torch.int32 and x.ndim == dims and len(x) == batch))
    require(leftpad is None or bool((leftpad >= 0).all()))
    if slopes is not None:
        require(slopes.dtype in FLOATS, tuple(slopes.shape) in ((heads,), (batch, heads)))
    page, capacity = k_cache.shape[1], k_cache.shape[1] * (1 if table is None else table.shape[-1])
    require(capacity > 0)
    outs, lses = [], []
    for i in range(batch):
        queries = q[i] if cu_seqlens is None else q[slice(*cu_seqlens[i : i + 2].tolist())]
        fresh = slice(0, 0) if cu_seqlens is None else slice(*cu_seqlens[i : i + 2].tolist())
        total = int(lengths[i]) + (seqlen_new if cu_seqlens is None else len(queries))
        held = total if k is None else int(lengths[i])
        first = max(held - capacity, 0 if leftpad is None else int(leftpad[i]), 0)
        row = i if rows is None else int(rows[i])
        keys, values = [], []
        for position in range(first, held):
            slot = position % capacity
            location = row, slot
            if table is not None:
                location = int(table[i, slot // page]), slot % page
            require(0 <= location[0] < len(k_cache))
            keys.append(k_cache[location])
            values.append(v_cache[location])
        require(rows is None or 0 <= row < len(k_cache))
        if k is not None:
            keys += list(k[fresh])
            values += list(v[fresh])
        definition = {
            "window_size": (left if left >= 0 else -1, right if right >= 0 else -1),
            "softmax_scale": scale,
            "softcap": softcap,
            "alibi_slopes": slopes[i] if slopes is not None and slopes.ndim == 2 else slopes,
        }
        empty = k_cache[:0, 0].double()
        keys, values = (torch.stack(x)[None].double() if x else empty[None] for x in (keys, values))
        out, lse = reference.attention(queries[None].double(), keys, values, **definition)
        outs.append(out[0])
        lses.append(lse[0])
    if not batch:
        return None, None
    join, dim = (torch.stack, 0) if cu_seqlens is None else (torch.cat, -1)
    out = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)
    return out, join(lses, dim) if return_lse else None


def rotary_in_place(q, k, cos, sin, positions, interleaved):
    require(q is not None, k is not None, *(0 not in x.stride() for x in (q, k) if x.numel() > 1))
    return rotary(q, k, cos, sin, positions, interleaved, False)


def linear(x, weight):
    require_like(x, weight)
    require(x.ndim == weight.ndim == 2, x.shape[1] == weight.shape[1])
    return (x.double() @ weight.double().mT,)


def linear_int8(x, weight, scales):
    require_like(x)
    require(x.ndim == weight.ndim == 2, x.shape[1] == weight.shape[1])
    require(weight.dtype == torch.int8, scales.dtype == torch.float32)
    require(scales.shape == weight.shape[:1], weight.is_cpu, scales.is_cpu)
    return (x.double() @ (weight.double() * scales.double()[:, None]).mT,)


def cross_entropy(logits, targets, scale, ignore_index, smoothing, z_loss, softcap, needs_gradient):
    """Check the arguments; `linear_cross_entropy` checks the values."""
    require_like(logits)
    require(logits.ndim == 2, targets.dtype == torch.int64, targets.is_cpu, logits.shape[1] > 0)
    require(targets.shape == logits.shape[:1], scale.ndim == 0)
    require(logits.shape[1] == 1 or logits.stride(1) == 1)
    require(len(logits) == 1 or logits.stride(0) != 0)
    require(scale.dtype == torch.promote_types(logits.dtype, torch.float32), scale.is_cpu)
    require(0 <= smoothing <= 1, 0 <= z_loss < math.inf, 0 <= softcap < math.inf)
    inside = (targets >= 0) & (targets < logits.shape[1])
    require(bool((inside | (targets == ignore_index)).all()))
    return None, None


def matmul(c, a, b, scales, accumulate):
    require_like(a)
    require(a.ndim == b.ndim == 2, a.shape[1] == b.shape[0], b.is_cpu, c.is_cpu)
    require(c.shape == (len(a), b.shape[1]))
    require(c.dtype in (a.dtype, torch.promote_types(a.dtype, torch.float32)))
    require(c.shape[1] <= 1 or c.stride(1) == 1, 0 not in c.stride() or c.numel() <= 1)
    require(b.dtype == (a.dtype if scales is None else torch.int8))
    factors = 1
    if scales is not None:
        require(scales.dtype == torch.float32, scales.shape == b.shape[1:], scales.is_cpu)
        factors = scales.double()
    return (a.double() @ b.double() * factors + (c.double() if accumulate else 0),)


def accumulate(total, x):
    require_like(x)
    require(total.shape == x.shape, total.dtype in FLOATS, total.is_cpu)
    require(0 not in total.stride() or total.numel() <= 1)
    return (total.double() + x.double(),)
