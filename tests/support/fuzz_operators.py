"""Call operators with mangled arguments: a program that tests run in a child process.

    python tests/support/fuzz_operators.py SEED COUNT

Each call starts from valid arguments of one operator and changes some: dtypes, shapes, strides,
devices, values, or arguments that are missing. Then the operator raises an exception, or its
results are those of plain PyTorch in float64 for the same arguments. csrc's own operators, below
the checks in Python, are called as well: of these it is asked only that they stay within memory.
The number of the call is printed before it, so that a crash of the process names its input: the
same SEED repeats it.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from declared import declared_operators
from peak_memory import peak_memory
from torch import Tensor

import mistral_kernels
from mistral_kernels.ops import extension, reference

Arguments = list[Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.float8_e4m3fn, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64)
SECONDS, MEMORY = 20, 2 << 30  # of a call; of the process beyond what it starts with


class Invalid(Exception):
    """The definition has no result for these arguments."""


class Undefined(Exception):
    """The definition has no single result for these arguments."""


def require(*conditions: bool) -> None:
    if not all(conditions):
        raise Invalid


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Definitions, with every demand that an operator makes.


def like(x: Tensor, *others: Tensor | None) -> None:
    require(x.dtype in FLOATS, x.is_cpu)
    for other in others:
        require(other is None or (other.dtype == x.dtype and other.is_cpu))


def rms_norm(x, weight, residual, eps, save_rstd):
    like(x, weight, residual)
    require(x.ndim > 0, weight.shape == x.shape[-1:], residual is None or residual.shape == x.shape)
    h = x if residual is None else x + residual
    y = reference.rms_norm(h.double(), weight.double(), eps)
    rstd = torch.rsqrt(h.double().square().mean(-1) + eps)
    return y, None if residual is None else h, rstd if save_rstd else None


def rms_norm_backward(dy, dh, h, weight, rstd, *mask):
    like(h, dy, dh, weight)
    require(h.ndim > 0, weight.shape == h.shape[-1:], dy.shape == h.shape)
    require(dh is None or dh.shape == h.shape, rstd.shape == h.shape[:-1])
    require(rstd.dtype == torch.promote_types(h.dtype, torch.float32))
    normed = h.double() * rstd.double()[..., None]
    g = dy.double() * weight.double()
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd.double()[..., None]
    dx = dx if dh is None else dx + dh
    dweight = (dy.double() * normed).reshape(-1, h.shape[-1]).sum(0)
    return dx if mask[0] else None, dweight if mask[1] else None


def rotary(q, k, cos, sin, positions, interleaved, backwards):
    given = [x for x in (q, k) if x is not None]
    require(bool(given), cos.ndim == 2, sin.shape == cos.shape)
    like(given[0], *given)
    require(cos.dtype == sin.dtype, cos.dtype in FLOATS)
    require(positions.dtype in (torch.int32, torch.int64))
    for x in given:
        require(x.ndim >= 2, x.shape[:-2] == positions.shape, x.shape[-1] == 2 * cos.shape[1])
    require(bool(((positions >= 0) & (positions < len(cos))).all()))
    sin = -sin if backwards else sin
    tables = cos.double(), sin.double(), positions
    return tuple(
        None
        if x is None
        else reference.apply_rotary(x.double(), x.double(), *tables, interleaved)[0]
        for x in (q, k)
    )


def swiglu(gate, up):
    like(gate, up)
    require(up is None or up.shape == gate.shape)
    require(up is not None or (gate.ndim > 0 and gate.shape[-1] % 2 == 0))
    return (reference.swiglu(gate.double(), None if up is None else up.double()),)


def swiglu_backward(dy, gate, up, *mask):
    like(gate, up, dy)
    leaves = [x.detach().double().clone().requires_grad_() for x in (gate, up) if x is not None]
    (y,) = swiglu(gate, up)
    require(dy.shape == y.shape)
    y = reference.swiglu(*leaves)
    grads = [*torch.autograd.grad(y, leaves, dy.double()), None][:2]
    return tuple(grad if need else None for grad, need in zip(grads, mask, strict=True))


def linear_cross_entropy(hidden, weight, targets, ignore_index, mean, *options):
    *numbers, needs_dhidden, needs_dweight = options
    like(hidden, weight)
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
    """Check the arguments; yield each sequence's rows, keys and options of the definition."""
    cu_q, cu_k, max_q, max_k, scale, left, right, softcap, slopes, *_ = options
    like(q, k, v)
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
            o, sums = reference.attention(q[None, rows], k[None, keys], v[None, keys], **definition)
            out[rows], lse[:, rows] = o[0], sums[0]
    return out, lse if options[-1] else None


def attention_backward(dout, q, k, v, out, lse, *options):
    """Return `out` and `lse` of these very keys: parts are the business of another test."""
    options, mask = options[:-3], options[-3:]
    like(q, dout, out)
    require(dout.shape == out.shape == q.shape)
    *batch, seqlen, heads, _ = q.shape
    absent = lse.shape == (0,)  # then it is computed anew
    require(absent or lse.shape == (*batch, heads, seqlen), lse.is_cpu)
    require(lse.dtype == torch.promote_types(q.dtype, torch.float32))
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    pieces = list(attention_pieces(q, k, v, *options))
    fitting, sums = attention(q, k, v, *options, True)
    # An error of theirs comes back larger in the gradients.
    if not (close(out, fitting, share=0.1) and (absent or close(lse, sums, share=0.1))):
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
    """Check the arguments; return where each kept token goes: (token, row, slot)."""
    like(k_cache, v_cache, k, v)
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
    places = []
    for i in range(len(lengths)):
        start, end = cu_seqlens[i : i + 2].tolist()
        for token in range(max(start, end - capacity), end):
            slot = (int(lengths[i]) + token - start) % capacity
            row = i if rows is None else int(rows[i])
            if block_table is not None:
                row, slot = int(block_table[i, slot // k_cache.shape[1]]), slot % k_cache.shape[1]
            require(0 <= row < len(k_cache))
            places.append((token, row, slot))
    if len({place[1:] for place in places}) < len(places):
        raise Undefined  # of two tokens for one slot, either may stay
    return places


def cache_update(k_cache, v_cache, k, v, *rest):
    k_after, v_after = k_cache.clone(), v_cache.clone()
    for token, row, slot in appended(k_cache, v_cache, k, v, *rest):
        k_after[row, slot], v_after[row, slot] = k[token], v[token]
    return k_after, v_after


def rotary_cache_update(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, *rest):
    q, cos, sin, interleaved = rest
    appended(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, None, None)
    like(k, q)
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
    like(q, k, v, k_cache, v_cache)
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
    outs, sums = [], []
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
            place = row, slot
            if table is not None:
                place = int(table[i, slot // page]), slot % page
            require(0 <= place[0] < len(k_cache))
            keys.append(k_cache[place])
            values.append(v_cache[place])
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
        sums.append(lse[0])
    if not batch:
        return None, None
    together = (torch.stack, 0) if cu_seqlens is None else (torch.cat, -1)
    out = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)
    return out, together[0](sums, together[1]) if return_lse else None


def rotary_in_place(q, k, cos, sin, positions, interleaved):
    require(q is not None, k is not None, *(0 not in x.stride() for x in (q, k) if x.numel() > 1))
    return rotary(q, k, cos, sin, positions, interleaved, False)


def linear(x, weight):
    like(x, weight)
    require(x.ndim == weight.ndim == 2, x.shape[1] == weight.shape[1])
    return (x.double() @ weight.double().mT,)


def linear_int8(x, weight, scales):
    like(x)
    require(x.ndim == weight.ndim == 2, x.shape[1] == weight.shape[1])
    require(weight.dtype == torch.int8, scales.dtype == torch.float32)
    require(scales.shape == weight.shape[:1], weight.is_cpu, scales.is_cpu)
    return (x.double() @ (weight.double() * scales.double()[:, None]).mT,)


def cross_entropy(logits, targets, scale, ignore_index, smoothing, z_loss, softcap, needs_gradient):
    """Check the arguments alone: the values are those of `linear_cross_entropy`."""
    like(logits)
    require(logits.ndim == 2, targets.dtype == torch.int64, targets.is_cpu, logits.shape[1] > 0)
    require(targets.shape == logits.shape[:1], scale.ndim == 0)
    require(logits.shape[1] == 1 or logits.stride(1) == 1)
    require(len(logits) == 1 or logits.stride(0) != 0)
    require(scale.dtype == torch.promote_types(logits.dtype, torch.float32), scale.is_cpu)
    require(0 <= smoothing <= 1, 0 <= z_loss < math.inf, 0 <= softcap < math.inf)
    inside = (targets >= 0) & (targets < logits.shape[1])
    require(bool((inside | (targets == ignore_index)).all()))
    return None, None


def accumulate(total, x):
    like(x)
    require(total.shape == x.shape, total.dtype in FLOATS, total.is_cpu)
    require(0 not in total.stride() or total.numel() <= 1)
    return (total.double() + x.double(),)


# Valid arguments, of which each call changes some.


def some_lengths(count: int, most: int) -> list[int]:
    return [random.randint(0, most) for _ in range(count)]


def cu_of(lengths: list[int]) -> Tensor:
    return int32(0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist())


def sizes() -> tuple[int, int, int, int]:
    kv_heads = random.choice((1, 2))
    return (
        random.choice((1, 2, 3)),
        kv_heads * random.choice((1, 3)),
        kv_heads,
        random.choice((8, 24)),
    )


def attention_options(batch: int, heads: int, packed: list[int] | None) -> Arguments:
    scale = random.choice((None, 0.3))
    window = random.choice(((-1, 0), (-1, -1), (3, 0), (2, 1), (0, 2**63 - 1)))
    softcap = random.choice((0.0, 0.0, 0.8))
    slopes = random.choice((None, None, torch.rand(heads), torch.rand(batch, heads)))
    cu = None if packed is None else cu_of(packed)
    longest = 5 if packed is None else max(packed, default=0)
    return [cu, None, longest, longest, scale, *window, softcap, slopes]


def attention_arguments(dtype: torch.dtype) -> tuple[Arguments, Arguments]:
    batch, heads, kv_heads, head_dim = sizes()
    packed = random.choice((None, some_lengths(batch, 4)))
    leading = (batch, 5) if packed is None else (sum(packed),)
    q, k, v = (floats(*leading, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    return [q, k, v], attention_options(batch, heads, packed)


def attention_forward_arguments(dtype: torch.dtype) -> Arguments:
    tensors, options = attention_arguments(dtype)
    return [*tensors, *options, random.random() < 0.5]


def attention_backward_arguments(dtype: torch.dtype) -> Arguments:
    tensors, options = attention_arguments(dtype)
    out, lse = attention(*tensors, *options, True)
    wide = torch.promote_types(dtype, torch.float32)
    dout = floats(*out.shape, dtype=dtype)
    mask = [random.random() < 0.7 for _ in range(3)]
    return [dout, *tensors, out.to(dtype), lse.to(wide), *options, *mask]


def cache(dtype: torch.dtype, batch: int, kv_heads: int, head_dim: int) -> tuple[Any, ...]:
    paged = random.random() < 0.4
    rows = random.sample(range(batch + 2), batch)
    k_cache, v_cache = (floats(3 * batch + 2, 4, kv_heads, head_dim, dtype=dtype) for _ in "kv")
    if paged:
        pages = torch.tensor(random.sample(range(3 * batch + 2), 3 * batch)).view(batch, 3)
        return k_cache, v_cache, None, pages.int()
    k_cache, v_cache = k_cache[: batch + 2], v_cache[: batch + 2]
    return k_cache, v_cache, random.choice((None, int32(*rows))), None


def cache_update_arguments(dtype: torch.dtype) -> Arguments:
    batch, _, kv_heads, head_dim = sizes()
    new = some_lengths(batch, 6)
    k_cache, v_cache, rows, table = cache(dtype, batch, kv_heads, head_dim)
    k, v = (floats(sum(new), kv_heads, head_dim, dtype=dtype) for _ in "kv")
    longest = max(new, default=0)
    return [
        k_cache,
        v_cache,
        k,
        v,
        int32(*some_lengths(batch, 9)),
        cu_of(new),
        longest,
        rows,
        table,
    ]


def rotary_cache_update_arguments(dtype: torch.dtype) -> Arguments:
    *arguments, _, _ = cache_update_arguments(dtype)
    k_cache, v_cache, k, _, lengths, *_ = arguments
    arguments[:2] = k_cache[: len(lengths)].clone(), v_cache[: len(lengths)].clone()
    q = floats(len(k), 2 * k.shape[1], k.shape[2], dtype=dtype)
    tables = mistral_kernels.rotary_tables(16, k.shape[2], 1e4)
    return [*arguments, q, *tables, random.random() < 0.5]


def cached_attention_arguments(dtype: torch.dtype) -> Arguments:
    batch, heads, kv_heads, head_dim = sizes()
    k_cache, v_cache, rows, table = cache(dtype, batch, kv_heads, head_dim)
    kind = random.choice(("step", "flat", "fresh"))
    seqlen = 1 if kind == "step" else 3
    new = [seqlen] * batch if kind != "fresh" else some_lengths(batch, 3)
    q = floats(sum(new), heads, head_dim, dtype=dtype)
    k = v = None
    if kind == "fresh":
        k, v = (floats(sum(new), kv_heads, head_dim, dtype=dtype) for _ in "kv")
        rows = table = None
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    if kind == "flat":
        q = q.view(batch, seqlen, heads, head_dim)
    cu_seqlens = None if kind == "flat" else cu_of(new)
    lengths = int32(*some_lengths(batch, 4 if kind == "flat" else 9))
    leftpad = random.choice((None, int32(*some_lengths(batch, 2)))) if kind == "flat" else None
    window = random.choice(((-1, 0), (3, 0)))
    softcap, return_lse = random.choice(((0.0, False), (0.0, False), (0.8, True)))
    slopes = random.choice((None, None, torch.rand(heads)))
    longest = seqlen if kind != "fresh" else max(new, default=0)
    caches = [q, k, v, k_cache, v_cache, lengths, seqlen, rows, leftpad, table]
    options = [random.choice((None, 0.4)), *window, softcap, slopes]
    return [*caches, cu_seqlens, longest, *options, return_lse, 0, None]


def rms_norm_arguments(dtype: torch.dtype) -> Arguments:
    shape = random.choice(((3, 24), (2, 1, 7), (5,)))
    x, residual = floats(*shape, dtype=dtype), floats(*shape, dtype=dtype)
    weight = floats(shape[-1], dtype=dtype)
    return [x, weight, random.choice((None, residual)), 1e-5, random.random() < 0.5]


def rms_norm_backward_arguments(dtype: torch.dtype) -> Arguments:
    h, weight, dh, eps, _ = rms_norm_arguments(dtype)
    rstd = rms_norm(h, weight, None, eps, True)[2].to(torch.promote_types(dtype, torch.float32))
    mask = [random.random() < 0.7 for _ in range(2)]
    return [floats(*h.shape, dtype=dtype), dh, h, weight, rstd, *mask]


def rotary_arguments(dtype: torch.dtype) -> Arguments:
    batch, heads, kv_heads, head_dim = sizes()
    q, k = (floats(batch, 3, h, head_dim, dtype=dtype) for h in (heads, kv_heads))
    positions = torch.randint(0, 11, (batch, 3), dtype=random.choice((torch.int32, torch.int64)))
    tables = mistral_kernels.rotary_tables(11, head_dim, 1e4)
    flags = random.random() < 0.5, random.random() < 0.5
    return [*random.choice(((q, k), (q, None), (None, k))), *tables, positions, *flags]


def swiglu_arguments(dtype: torch.dtype) -> Arguments:
    gate, up = floats(3, 10, dtype=dtype), floats(3, 10, dtype=dtype)
    return [gate, random.choice((None, up))]


def swiglu_backward_arguments(dtype: torch.dtype) -> Arguments:
    gate, up = swiglu_arguments(dtype)
    dy = floats(3, 10 if up is not None else 5, dtype=dtype)
    return [dy, gate, up, *(random.random() < 0.7 for _ in range(2))]


def linear_cross_entropy_arguments(dtype: torch.dtype) -> Arguments:
    targets = torch.randint(0, 13, (6,)).masked_fill(torch.rand(6) < 0.3, -100)
    numbers = random.choice(((0.0, 0.0, 0.0), (0.1, 1e-3, 5.0)))
    flags = random.random() < 0.5, random.random() < 0.5
    tensors = floats(6, 8, dtype=dtype), floats(13, 8, dtype=dtype), targets
    return [*tensors, -100, random.random() < 0.5, *numbers, *flags]


def rotary_in_place_arguments(dtype: torch.dtype) -> Arguments:
    *arguments, _ = rotary_arguments(dtype)
    return [x if x is not None else arguments[1 - i] for i, x in enumerate(arguments)]


def linear_arguments(dtype: torch.dtype) -> Arguments:
    return [floats(3, 24, dtype=dtype), floats(19, 24, dtype=dtype)]


def linear_int8_arguments(dtype: torch.dtype) -> Arguments:
    weight = torch.randint(-127, 127, (19, 24), dtype=torch.int8)
    return [floats(3, 24, dtype=dtype), weight, torch.rand(19)]


def cross_entropy_arguments(dtype: torch.dtype) -> Arguments:
    scale = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    tensors = floats(6, 13, dtype=dtype), torch.randint(0, 13, (6,)), scale
    return [*tensors, -100, 0.1, 1e-3, 5.0, random.random() < 0.5]


def accumulate_arguments(dtype: torch.dtype) -> Arguments:
    return [floats(3, 7), floats(3, 7, dtype=dtype)]


def copied(x: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    if x is None or x.is_meta:
        return x
    storage = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())


def in_place(operator: Callable[..., Any], written: int) -> Callable[..., Any]:
    """Return the operator as a function of its arguments: what it wrote, then its result."""

    def call(*arguments: Any) -> tuple[Any, ...]:
        arguments = [copied(x) if i < written else x for i, x in enumerate(arguments)]
        result = operator(*arguments)
        results = result if isinstance(result, (tuple, list)) else (result,)
        return (*arguments[:written], *(x for x in results if x is not None))

    return call


_OPS = torch.ops.mistral_kernels
OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    name: (in_place(getattr(_OPS, name).default, written), definition, arguments)
    for name, written, definition, arguments in (
        ("rms_norm_forward", 0, rms_norm, rms_norm_arguments),
        ("rms_norm_backward", 0, rms_norm_backward, rms_norm_backward_arguments),
        ("rotary", 0, rotary, rotary_arguments),
        ("rotary_", 2, rotary_in_place, rotary_in_place_arguments),
        ("linear", 0, linear, linear_arguments),
        ("linear_int8", 0, linear_int8, linear_int8_arguments),
        ("cross_entropy_", 1, cross_entropy, cross_entropy_arguments),
        ("accumulate_", 1, accumulate, accumulate_arguments),
        ("swiglu_forward", 0, swiglu, swiglu_arguments),
        ("swiglu_backward", 0, swiglu_backward, swiglu_backward_arguments),
        ("linear_cross_entropy", 0, linear_cross_entropy, linear_cross_entropy_arguments),
        ("attention_forward", 0, attention, attention_forward_arguments),
        ("attention_backward", 0, attention_backward, attention_backward_arguments),
        ("cached_attention", 0, cached_attention, cached_attention_arguments),
        ("rolling_cache_update", 2, cache_update, cache_update_arguments),
        ("rotary_rolling_cache_update", 2, rotary_cache_update, rotary_cache_update_arguments),
    )
}


# csrc's own operators: arguments and the tensors that they write.


def csrc_make_decoder(dtype: torch.dtype) -> Arguments:
    def x(*shape: int) -> Tensor:
        return floats(*shape, dtype=dtype)

    layer = [x(16), x(32, 16), None, x(16, 16), None, x(16), x(40, 16), None, x(16, 20), None]
    layers = [y if y is None else y.clone() for y in layer * 2]
    return [x(11, 16), layers, x(16), x(11, 16), None, [3, -1], 8, 1e-5]


def csrc_decoder_step(dtype: torch.dtype) -> Arguments:
    decoder = _OPS.make_decoder(*csrc_make_decoder(dtype))
    caches = [[floats(2, 4, 1, 8, dtype=dtype) for _ in range(2)] for _ in "kv"]
    tables = mistral_kernels.rotary_tables(16, 8, 1e4)
    logits = torch.empty(2, 11, dtype=dtype)
    return [decoder, torch.randint(0, 11, (2,)), *tables, *caches, int32(2, 9), logits]


CSRC: dict[str, Callable[[torch.dtype], Arguments]] = {
    "make_decoder": csrc_make_decoder,
    "decoder_step": csrc_decoder_step,
}


# Changes.

INTEGERS = (0, 1, -1, 2, 7, 1 << 24, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -1.0, 1.5, 1e-30, 1e30, math.nan, math.inf, -math.inf)
INDICES = (0, 1, -1, 3, 64, 1 << 24, 2**31 - 1, -(2**31))


def change_tensor(x: Tensor) -> Tensor | None:
    kind = random.choice(
        (
            "dtype",
            "odd dtype",
            "reshape",
            "transpose",
            "narrow",
            "empty",
            "strides",
            "expand",
            "value",
            "value",
            "value",
            "meta",
            "none",
            "unsqueeze",
            "permuted",
        )
    )
    if kind == "dtype":
        return x.to(random.choice(FLOATS if x.is_floating_point() else (torch.int32, torch.int64)))
    if kind == "odd dtype":
        return x.to(random.choice(OTHERS))
    if kind == "reshape":
        return x.reshape(random.choice(((-1,), (1, -1), (-1, 1), (x.numel(),))))
    if kind == "transpose" and x.ndim > 1:
        return x.transpose(*random.sample(range(x.ndim), 2))
    if kind == "permuted" and x.ndim > 1:  # the same shape by other strides
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    if kind == "narrow" and x.ndim and x.numel():
        dim = random.randrange(x.ndim)
        return x.narrow(dim, 0, max(x.shape[dim] - 1, 0))
    if kind == "empty" and x.ndim:
        return x.narrow(random.randrange(x.ndim), 0, 0)
    if kind == "strides" and x.ndim:
        return torch.stack((x, x), -1)[..., 0]
    if kind == "expand" and x.ndim and x.numel():
        return x.select(0, 0).expand(x.shape[0] + random.choice((0, 1)), *x.shape[1:])
    if kind == "unsqueeze":
        return x.unsqueeze(random.randint(0, x.ndim))
    if kind == "meta":
        return x.to("meta")
    if kind == "none":
        return None
    if x.numel() and x.dtype in (torch.int32, torch.int64):
        x = x.clone()
        x[tuple(map(random.randrange, x.shape))] = random.choice(INDICES)
    return x


def change(arguments: Arguments) -> Arguments:
    arguments = list(arguments)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        i = random.randrange(len(arguments))
        x = arguments[i]
        if isinstance(x, Tensor):
            arguments[i] = change_tensor(x)
        elif isinstance(x, bool):
            arguments[i] = not x
        elif isinstance(x, int):
            arguments[i] = random.choice(INTEGERS)
        elif isinstance(x, float):
            arguments[i] = random.choice(NUMBERS)
        elif isinstance(x, list) and x:
            j = random.randrange(len(x))
            arguments[i] = random.choice(
                (x[:-1], x + x[:1], [*x[:j], *change(x[j : j + 1]), *x[j + 1 :]])
            )
        elif x is None:
            others = [y for y in arguments if isinstance(y, Tensor)]
            arguments[i] = random.choice((None, *others))
    return arguments


def close(
    actual: Tensor, exact: Tensor, dtype: torch.dtype | None = None, share: float = 1.0
) -> bool:
    """Return whether roundings to `dtype` explain a difference, or a share of them does.

    Where `exact` is finite, `actual` must be, too.
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


def describe(arguments: Arguments) -> str:
    return "; ".join(
        f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device} "
        f"{x.tolist() if not x.is_meta and not x.is_floating_point() else ''}"
        if isinstance(x, Tensor)
        else repr(x)
        for x in arguments
    )


def check(name: str, arguments: Arguments) -> str | None:
    """Return what is wrong with the operator's answer to these arguments; None if it is right."""
    call, definition, _ = OPERATORS[name]
    try:
        results = call(*arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        return None if str(error).strip() else f"an empty message of {type(error).__name__}"
    except AttributeError as error:
        return repr(error)
    if any(x.is_meta for x in results if isinstance(x, Tensor)):
        return None  # all were meta tensors
    try:
        expected = definition(*arguments)
    except Invalid:
        return "invalid arguments were accepted"
    except Undefined:
        return None
    for i, (actual, exact) in enumerate(zip(results, expected, strict=True)):
        if exact is None:
            continue
        if actual.shape != exact.shape:
            return f"result {i} is {tuple(actual.shape)}, expected {tuple(exact.shape)}"
        dtype = next(x.dtype for x in arguments if isinstance(x, Tensor))
        if not close(actual, exact, dtype):
            return f"result {i} is {actual.tolist()}, expected {exact.tolist()}"
    return None


def call_csrc(name: str, dtype: torch.dtype) -> None:
    """Call one of csrc's own operators with mangled arguments: any exception will do."""
    arguments = change(CSRC[name](dtype))
    with contextlib.suppress(RuntimeError, ValueError, TypeError, NotImplementedError):
        getattr(_OPS, name)(*arguments)


def main(seed: int, count: int) -> int:
    torch.set_num_threads(2)
    has_library = extension.load("cpu")
    used = peak_memory()
    failures = 0
    if missing := declared_operators() - OPERATORS.keys():
        failures += 1
        print(f"FAILED: no arguments are made for {missing}")
    for index in range(count):
        random.seed(f"{seed} {index}")
        torch.manual_seed(seed * 1_000_003 + index)
        if has_library and index % 6 == 5:
            name = random.choice(list(CSRC))
            print(f"call {index}: csrc {name}", flush=True)
            signal.alarm(SECONDS)
            call_csrc(name, random.choice(FLOATS[:3]))
            signal.alarm(0)
            continue
        name = random.choice(list(OPERATORS))
        dtype = random.choice(FLOATS)
        arguments = OPERATORS[name][2](dtype)
        if index % 10:  # the others as they are
            arguments = change(arguments)
        print(f"call {index}: {name}", flush=True)
        signal.alarm(SECONDS)
        problem = check(name, arguments)
        signal.alarm(0)
        if problem:
            failures += 1
            print(f"FAILED call {index}: {name}({describe(arguments)}): {problem}", flush=True)
    used = (peak_memory()) - used
    if used > MEMORY:
        failures += 1
        print(f"FAILED: {used >> 20} MiB of memory")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]), int(sys.argv[2])) else 0)
