"""Random arguments of the operators, valid and mangled, for fuzz_operators.py.

One function per operator makes valid arguments in a dtype; `mangle` changes some of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import fuzz_definitions as exact
import torch
from fuzz_definitions import FLOATS
from torch import Tensor

import mistral_kernels

Arguments = list[Any]
OTHERS = (torch.float8_e4m3fn, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_lengths(count: int, largest: int) -> list[int]:
    return [random.randint(0, largest) for _ in range(count)]


def cumulative_lengths(lengths: list[int]) -> Tensor:
    return int32(0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist())


def random_sizes() -> tuple[int, int, int, int]:
    """Return batch, heads, kv_heads and head_dim."""
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
    cu = None if packed is None else cumulative_lengths(packed)
    longest = 5 if packed is None else max(packed, default=0)
    return [cu, None, longest, longest, scale, *window, softcap, slopes]


def attention(dtype: torch.dtype) -> tuple[Arguments, Arguments]:
    batch, heads, kv_heads, head_dim = random_sizes()
    packed = random.choice((None, random_lengths(batch, 4)))
    leading = (batch, 5) if packed is None else (sum(packed),)
    q, k, v = (floats(*leading, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    return [q, k, v], attention_options(batch, heads, packed)


def attention_forward(dtype: torch.dtype) -> Arguments:
    tensors, options = attention(dtype)
    return [*tensors, *options, random.random() < 0.5]


def attention_backward(dtype: torch.dtype) -> Arguments:
    tensors, options = attention(dtype)
    out, lse = exact.attention(*tensors, *options, True)
    wide = torch.promote_types(dtype, torch.float32)
    dout = floats(*out.shape, dtype=dtype)
    mask = [random.random() < 0.7 for _ in range(3)]
    return [dout, *tensors, out.to(dtype), lse.to(wide), *options, *mask]


def random_caches(dtype: torch.dtype, batch: int, kv_heads: int, head_dim: int) -> tuple[Any, ...]:
    """Return k_cache, v_cache, rows and block_table; at least one of the last two is None."""
    paged = random.random() < 0.4
    rows = random.sample(range(batch + 2), batch)
    k_cache, v_cache = (floats(3 * batch + 2, 4, kv_heads, head_dim, dtype=dtype) for _ in "kv")
    if paged:
        pages = torch.tensor(random.sample(range(3 * batch + 2), 3 * batch)).view(batch, 3)
        return k_cache, v_cache, None, pages.int()
    k_cache, v_cache = k_cache[: batch + 2], v_cache[: batch + 2]
    return k_cache, v_cache, random.choice((None, int32(*rows))), None


def cache_update(dtype: torch.dtype) -> Arguments:
    batch, _, kv_heads, head_dim = random_sizes()
    new = random_lengths(batch, 6)
    k_cache, v_cache, rows, table = random_caches(dtype, batch, kv_heads, head_dim)
    k, v = (floats(sum(new), kv_heads, head_dim, dtype=dtype) for _ in "kv")
    longest = max(new, default=0)
    return [
        k_cache,
        v_cache,
        k,
        v,
        int32(*random_lengths(batch, 9)),
        cumulative_lengths(new),
        longest,
        rows,
        table,
    ]


def rotary_cache_update(dtype: torch.dtype) -> Arguments:
    *arguments, _, _ = cache_update(dtype)
    k_cache, v_cache, k, _, lengths, *_ = arguments
    arguments[:2] = k_cache[: len(lengths)].clone(), v_cache[: len(lengths)].clone()
    q = floats(len(k), 2 * k.shape[1], k.shape[2], dtype=dtype)
    tables = mistral_kernels.rotary_tables(16, k.shape[2], 1e4)
    return [*arguments, q, *tables, random.random() < 0.5]


def cached_attention(dtype: torch.dtype) -> Arguments:
    batch, heads, kv_heads, head_dim = random_sizes()
    k_cache, v_cache, rows, table = random_caches(dtype, batch, kv_heads, head_dim)
    kind = random.choice(("step", "flat", "fresh"))
    seqlen = 1 if kind == "step" else 3
    new = [seqlen] * batch if kind != "fresh" else random_lengths(batch, 3)
    q = floats(sum(new), heads, head_dim, dtype=dtype)
    k = v = None
    if kind == "fresh":
        k, v = (floats(sum(new), kv_heads, head_dim, dtype=dtype) for _ in "kv")
        rows = table = None
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    if kind == "flat":
        q = q.view(batch, seqlen, heads, head_dim)
    cu_seqlens = None if kind == "flat" else cumulative_lengths(new)
    lengths = int32(*random_lengths(batch, 4 if kind == "flat" else 9))
    leftpad = random.choice((None, int32(*random_lengths(batch, 2)))) if kind == "flat" else None
    window = random.choice(((-1, 0), (3, 0)))
    softcap, return_lse = random.choice(((0.0, False), (0.0, False), (0.8, True)))
    slopes = random.choice((None, None, torch.rand(heads)))
    longest = seqlen if kind != "fresh" else max(new, default=0)
    caches = [q, k, v, k_cache, v_cache, lengths, seqlen, rows, leftpad, table]
    options = [random.choice((None, 0.4)), *window, softcap, slopes]
    return [*caches, cu_seqlens, longest, *options, return_lse, 0, None]


def rms_norm(dtype: torch.dtype) -> Arguments:
    shape = random.choice(((3, 24), (2, 1, 7), (5,)))
    x, residual = floats(*shape, dtype=dtype), floats(*shape, dtype=dtype)
    weight = floats(shape[-1], dtype=dtype)
    return [x, weight, random.choice((None, residual)), 1e-5, random.random() < 0.5]


def rms_norm_backward(dtype: torch.dtype) -> Arguments:
    h, weight, dh, eps, _ = rms_norm(dtype)
    rstd = exact.rms_norm(h, weight, None, eps, True)[2].to(
        torch.promote_types(dtype, torch.float32)
    )
    mask = [random.random() < 0.7 for _ in range(2)]
    return [floats(*h.shape, dtype=dtype), dh, h, weight, rstd, *mask]


def rotary(dtype: torch.dtype) -> Arguments:
    batch, heads, kv_heads, head_dim = random_sizes()
    q, k = (floats(batch, 3, h, head_dim, dtype=dtype) for h in (heads, kv_heads))
    positions = torch.randint(0, 11, (batch, 3), dtype=random.choice((torch.int32, torch.int64)))
    tables = mistral_kernels.rotary_tables(11, head_dim, 1e4)
    flags = random.random() < 0.5, random.random() < 0.5
    return [*random.choice(((q, k), (q, None), (None, k))), *tables, positions, *flags]


def swiglu(dtype: torch.dtype) -> Arguments:
    gate, up = floats(3, 10, dtype=dtype), floats(3, 10, dtype=dtype)
    return [gate, random.choice((None, up))]


def swiglu_backward(dtype: torch.dtype) -> Arguments:
    gate, up = swiglu(dtype)
    dy = floats(3, 10 if up is not None else 5, dtype=dtype)
    return [dy, gate, up, *(random.random() < 0.7 for _ in range(2))]


def linear_cross_entropy(dtype: torch.dtype) -> Arguments:
    targets = torch.randint(0, 13, (6,)).masked_fill(torch.rand(6) < 0.3, -100)
    numbers = random.choice(((0.0, 0.0, 0.0), (0.1, 1e-3, 5.0)))
    flags = random.random() < 0.5, random.random() < 0.5
    tensors = floats(6, 8, dtype=dtype), floats(13, 8, dtype=dtype), targets
    return [*tensors, -100, random.random() < 0.5, *numbers, *flags]


def rotary_in_place(dtype: torch.dtype) -> Arguments:
    *arguments, _ = rotary(dtype)
    return [x if x is not None else arguments[1 - i] for i, x in enumerate(arguments)]


def linear(dtype: torch.dtype) -> Arguments:
    return [floats(3, 24, dtype=dtype), floats(19, 24, dtype=dtype)]


def linear_int8(dtype: torch.dtype) -> Arguments:
    weight = torch.randint(-127, 127, (19, 24), dtype=torch.int8)
    return [floats(3, 24, dtype=dtype), weight, torch.rand(19)]


def cross_entropy(dtype: torch.dtype) -> Arguments:
    scale = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    tensors = floats(6, 13, dtype=dtype), torch.randint(0, 13, (6,)), scale
    return [*tensors, -100, 0.1, 1e-3, 5.0, random.random() < 0.5]


def matmul(dtype: torch.dtype) -> Arguments:
    rows, inner, cols = random.choice(((40, 24, 19), (3, 300, 70)))
    wide = dtype if random.random() < 0.5 else torch.promote_types(dtype, torch.float32)
    b, scales = floats(inner, cols, dtype=dtype), None
    if random.random() < 0.3:
        b, scales = torch.randint(-127, 127, (inner, cols), dtype=torch.int8), torch.rand(cols)
    c = floats(rows, cols, dtype=wide)
    return [c, floats(rows, inner, dtype=dtype), b, scales, random.random() < 0.5]


def accumulate(dtype: torch.dtype) -> Arguments:
    return [floats(3, 7), floats(3, 7, dtype=dtype)]


# Arguments of the operators that only csrc has.


def make_decoder(dtype: torch.dtype) -> Arguments:
    def x(*shape: int) -> Tensor:
        return floats(*shape, dtype=dtype)

    layer = [x(16), x(32, 16), None, x(16, 16), None, x(16), x(40, 16), None, x(16, 20), None]
    layers = [y if y is None else y.clone() for y in layer * 2]
    return [x(11, 16), layers, x(16), x(11, 16), None, [3, -1], 8, 1e-5]


def decoder_step(dtype: torch.dtype) -> Arguments:
    decoder = torch.ops.mistral_kernels.make_decoder(*make_decoder(dtype))
    caches = [[floats(2, 4, 1, 8, dtype=dtype) for _ in range(2)] for _ in "kv"]
    tables = mistral_kernels.rotary_tables(16, 8, 1e4)
    logits = torch.empty(2, 11, dtype=dtype)
    return [decoder, torch.randint(0, 11, (2,)), *tables, *caches, int32(2, 9), logits]


CSRC: dict[str, Callable[[torch.dtype], Arguments]] = {
    "make_decoder": make_decoder,
    "decoder_step": decoder_step,
}


# Mangled arguments.

INTEGERS = (0, 1, -1, 2, 7, 1 << 24, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -1.0, 1.5, 1e-30, 1e30, math.nan, math.inf, -math.inf)
INDICES = (0, 1, -1, 3, 64, 1 << 24, 2**31 - 1, -(2**31))


def mangle_tensor(x: Tensor) -> Tensor | None:
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
    if kind == "permuted" and x.ndim > 1:  # the same shape with other strides
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


def mangle(arguments: Arguments) -> Arguments:
    """Return a list with up to three arguments changed."""
    arguments = list(arguments)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        i = random.randrange(len(arguments))
        x = arguments[i]
        if isinstance(x, Tensor):
            arguments[i] = mangle_tensor(x)
        elif isinstance(x, bool):
            arguments[i] = not x
        elif isinstance(x, int):
            arguments[i] = random.choice(INTEGERS)
        elif isinstance(x, float):
            arguments[i] = random.choice(NUMBERS)
        elif isinstance(x, list) and x:
            j = random.randrange(len(x))
            arguments[i] = random.choice(
                (x[:-1], x + x[:1], [*x[:j], *mangle(x[j : j + 1]), *x[j + 1 :]])
            )
        elif x is None:
            others = [y for y in arguments if isinstance(y, Tensor)]
            arguments[i] = random.choice((None, *others))
    return arguments
