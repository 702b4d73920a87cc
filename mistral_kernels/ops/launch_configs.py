"""Launch parameters by operator, size, dtype and device: rules, nothing is timed.

Each function returns the meta-parameters of one kernel, ready for ``kernel[grid](..., **config)``,
and is cached: in a loop it costs one dictionary look-up. Those of attention stand beside it, in
`attention/tiles.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mistral_kernels.ops.dispatch import DeviceProperties

Config = Mapping[str, Any]


def config(**parameters: Any) -> Config:
    """Read-only, since shared. Floating-point fusion: Triton 3.10 changes the default."""
    return MappingProxyType({"enable_fp_fusion": True, **parameters})


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def rms_norm_forward(hidden: int) -> Config:
    """Whole rows in registers, 16 elements a thread; short rows share a program."""
    block_cols = next_power_of_2(hidden)
    block_rows = max(1, 2048 // block_cols)
    num_warps = min(16, max(1, block_rows * block_cols // 512))
    return config(BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, num_warps=num_warps)


@functools.cache
def rms_norm_backward(hidden: int, element_bytes: int, device: DeviceProperties) -> Config:
    """As forward, with the next rows on their way to shared memory while there is room for them.

    ``element_bytes``: one element of every input that is read by rows. Wide rows are cut into
    chunks, of which each program owns one: the fp32 state of more columns would not fit its
    registers.
    """
    widest = 16384 if device.platform == "hip" else 8192
    chunks = cdiv(hidden, widest)
    forward = rms_norm_forward(min(hidden, widest))
    stage_bytes = forward["BLOCK_ROWS"] * forward["BLOCK_COLS"] * element_bytes
    # Of other chunks dy, h and weight are read, of at least two inputs: half as much again.
    stage_bytes += (chunks - 1) * stage_bytes * 3 // 2
    num_stages = max(1, min(3, device.shared_memory // stage_bytes))
    # Fewer elements a thread where registers run out: long float32 rows, and any on AMD.
    crowded = device.platform == "hip" or (element_bytes >= 8 and forward["BLOCK_ROWS"] == 1)
    num_warps = min(16, forward["num_warps"] * (2 if crowded else 1))
    return config(**{**forward, "num_warps": num_warps}, CHUNKS=chunks, NUM_STAGES=num_stages)


def rms_norm_partial_sums(rows: int, device: DeviceProperties) -> int:
    """How many programs share the rows of backward, each leaving fp32 partial sums of dweight.

    At 32 rows a program, writing and reading the partial sums is under 5 % of the traffic in bf16.
    With fewer rows, half the multiprocessors still keep the memory busy: each has rows in flight.
    """
    return min(4 * device.multiprocessors, max(device.multiprocessors // 2, cdiv(rows, 32)))


@functools.cache
def rms_norm_sum_partials() -> Config:
    return config(BLOCK_ROWS=32, BLOCK_COLS=32, num_warps=4)


@functools.cache
def swiglu(cols: int) -> Config:
    """2048 elements a program, 16 of each tensor a thread; short rows share a program.

    Wider blocks would leave lanes idle: 14336 columns are 7 times 2048.
    """
    block_cols = min(2048, next_power_of_2(cols))
    return config(BLOCK_ROWS=2048 // block_cols, BLOCK_COLS=block_cols, num_warps=4)


@functools.cache
def rotary(half: int) -> Config:
    """2048 pairs of channels a turn of the loop over heads, 16 a thread.

    Unfused here and in the cache update: the products have the same bits on every backend.
    """
    block_i = next_power_of_2(half)
    block_h = 8
    block_t = max(1, 2048 // (block_h * block_i))
    return config(
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_I=block_i, num_warps=4, enable_fp_fusion=False
    )


@functools.cache
def rolling_cache_update(head_dim: int, max_seqlen: int) -> Config:
    """As rotary for a chunk; for single tokens, more programs of 4 heads each: latency decides."""
    block_i = max(1, next_power_of_2(head_dim) // 2)
    block_h, warps = (4, 1) if max_seqlen == 1 else (8, 4)
    block_t = 1 if max_seqlen == 1 else max(1, 2048 // (block_h * block_i))
    return config(
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_I=block_i, num_warps=warps, enable_fp_fusion=False
    )


@functools.cache
def cross_entropy(vocab: int) -> Config:
    """One program a row of logits, 16 of them a thread at a time."""
    block = min(4096, max(64, next_power_of_2(vocab)))
    return config(BLOCK=block, num_warps=max(1, block // 512))
