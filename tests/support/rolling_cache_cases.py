"""Arguments and exact results of rolling_cache_update, for all its backends."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

HEADS, KV_HEADS = 4, 2
MAX_INT32 = 2**31 - 1

# Arguments of `make_arguments` that differ from its defaults.
CASES: dict[str, dict[str, Any]] = {
    "decode": {"counts": [1, 1, 1]},
    "wrap": {"counts": [5, 2, 4], "lengths": [4, 6, 13]},
    "longer-than-the-ring": {"counts": [20, 1, 8], "lengths": [3, 0, 7]},
    "empty-sequences": {"counts": [0, 3, 0, 0, 2, 0], "lengths": [1, 2, 3, 4, 5, 6]},
    "one-slot": {"counts": [3, 1], "capacity": 1},
    "far": {"counts": [6, 1], "lengths": [MAX_INT32 - 3, MAX_INT32], "num_positions": 2**31 + 8},
    "head-dim-8": {"head_dim": 8},
    "head-dim-24": {"head_dim": 24},
    "head-dim-128": {"head_dim": 128},
    "fused-qkv": {"head_dim": 128, "fused": True},
    "misaligned": {"offset": 1},
    "half-aligned": {"offset": 8},
    "padded": {"padding": 1},
    "slots-inside-heads": {"transposed": True},
    "rows": {"counts": [3, 1, 2], "rows": [4, 0, 3]},
    "paged": {"counts": [7, 1, 12], "page_size": 4},
}
# Each case with each rotation that its operator has.
UPDATES = [
    (case, rotary)
    for case in CASES
    for rotary in (None, "half-split", "interleaved")
    if rotary is None or case not in ("rows", "paged")
]


def make_arguments(
    dtype: torch.dtype,
    rotary: str | None,
    counts: list[int] | tuple[int, ...] = (3, 0, 1, 9),
    lengths: list[int] | None = None,
    capacity: int = 8,
    head_dim: int = 64,
    heads: tuple[int, int] = (HEADS, KV_HEADS),
    num_positions: int = 200,
    fused: bool = False,
    offset: int = 0,
    padding: int = 0,
    transposed: bool = False,
    rows: list[int] | None = None,
    page_size: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return random arguments, in the order of the schema.

    Args:
        dtype: dtype of q, k, v and the caches.
        rotary: None, "half-split" or "interleaved".
        counts: number of new tokens per sequence.
        lengths: number of earlier tokens per sequence; random by default.
        capacity: slots per sequence.
        head_dim: size of a head.
        heads: numbers of query heads and of kv heads.
        num_positions: rows of the tables.
        fused: make q, k and v slices of one tensor.
        offset: bytes between the start of an aligned allocation and the data of each tensor.
        padding: elements between the heads of q, k and v, and between the rows of the tables.
        transposed: store the caches as (batch, heads, capacity, head_dim).
        rows: cache row per sequence; the sequence's index by default.
        page_size: slots per page; None for a cache without pages.
        device: device of the tensors.
    """
    (num_heads, num_kv_heads), total, batch = heads, sum(counts), len(counts)

    def numbers(*shape: int) -> Tensor:
        # Many binades: they test rounding to nearest, of subnormal numbers too, and overflow.
        scale = torch.randint(-24, 13, shape, device=device).double().exp2()
        x = torch.randn(shape, dtype=torch.float64, device=device).mul(scale).to(dtype)
        if not offset:
            return x
        room = torch.empty(x.numel() + 8, dtype=dtype, device=device)
        start = max(offset // x.element_size(), 1)
        return room[start : start + x.numel()].view(shape).copy_(x)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if fused:
        qkv = numbers(total, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    else:
        q, k, v = (
            numbers(total, n, head_dim + padding)[..., :head_dim]
            for n in (num_heads, num_kv_heads, num_kv_heads)
        )
    block_table, slots, cache_rows = None, capacity, batch if rows is None else max(rows) + 2
    if page_size is not None:
        pages = -(-capacity // page_size)
        cache_rows, slots = batch * pages + 3, page_size
        # Make the rows of block_table non-contiguous.
        wider = torch.full((batch, pages + 1), -1, dtype=torch.int32, device=device)
        block_table = wider[:, :pages]
        block_table.copy_(torch.randperm(cache_rows)[: batch * pages].view(batch, pages))
    if transposed:
        k_cache, v_cache = (
            numbers(cache_rows, num_kv_heads, slots, head_dim).transpose(1, 2) for _ in range(2)
        )
    else:
        k_cache, v_cache = (numbers(cache_rows, slots, num_kv_heads, head_dim) for _ in range(2))
    if lengths is None:
        lengths = torch.randint(num_positions - max(counts), (batch,)).tolist()
    q_out = cos = sin = None
    if rotary:
        q_out = numbers(total, num_heads, head_dim)
        half = head_dim // 2
        shape = 2, min(num_positions, 10_000), half + padding
        tables = torch.randn(shape, device=device).clamp(-1, 1)[..., :half]
        if num_positions > 10_000:  # too many for memory: all positions share one row
            tables = tables[:, :1].expand(2, num_positions, half)
        cos, sin = tables
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "lengths": int32(lengths),
        "cu_seqlens": int32([0, *counts]).cumsum(0).int(),
        "max_seqlen": max(counts),
        "rows": None if rows is None else int32(rows),
        "block_table": block_table,
        "q": q if rotary else None,
        "q_out": q_out,
        "cos": cos,
        "sin": sin,
        "interleaved": rotary == "interleaved",
    }


def update(operators: Any, arguments: dict[str, Any]) -> None:
    """Call the operator that takes these arguments; write a rotated q to `q_out`."""
    *packed, rows, block_table, q, q_out, cos, sin, interleaved = arguments.values()
    if q is None:
        operators.rolling_cache_update(*packed, rows, block_table)
    else:
        q_out.copy_(operators.rotary_rolling_cache_update(*packed, q, cos, sin, interleaved))


def expected(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Compute the final k_cache, v_cache and, if q is given, q_out, one token at a time."""
    a = arguments
    after = {
        name: a[name].clone() for name in ("k_cache", "v_cache", "q_out") if a[name] is not None
    }
    slots = a["k_cache"].shape[1] * (1 if a["block_table"] is None else a["block_table"].shape[1])
    offsets = a["cu_seqlens"].tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(offsets)):
        for token in range(start, end):
            position = a["lengths"][sequence].item() + token - start
            key = a["k"][token]
            if a["q"] is not None:
                angles = a["cos"][position], a["sin"][position]
                after["q_out"][token] = rotated(a["q"][token], *angles, a["interleaved"])
                key = rotated(key, *angles, a["interleaved"])
            if token < end - slots:
                continue
            row, slot = sequence, position % slots
            if a["rows"] is not None:
                row = a["rows"][sequence]
            if a["block_table"] is not None:
                page, slot = divmod(slot, a["k_cache"].shape[1])
                row = a["block_table"][sequence, page]
            after["k_cache"][row, slot] = key
            after["v_cache"][row, slot] = a["v"][token]
    return after


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate in float32, rounding each product and each sum; then round to the dtype of x."""
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)).to(x.dtype)


def assert_same_bits(arguments: dict[str, Any], after: dict[str, Tensor]) -> None:
    """Check that the tensors of `arguments` equal `after`, bit for bit."""
    for name, wanted in after.items():
        integers = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
        wrong = arguments[name].contiguous().view(integers) != wanted.contiguous().view(integers)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} elements differ"
