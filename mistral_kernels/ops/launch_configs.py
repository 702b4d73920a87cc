"""Choose the launch parameters of the Triton kernels by fixed rules, without autotuning.

Each function returns the meta-parameters of one kernel, for ``kernel[grid](..., **config)``. The
functions are cached: a call costs one dictionary lookup. The launch parameters of attention are in
`attention/tiles.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mistral_kernels.ops.dispatch import DeviceProperties

LaunchConfig = Mapping[str, Any]


def launch_config(**parameters: Any) -> LaunchConfig:
    """Return the parameters as a read-only mapping, which cached callers share.

    `enable_fp_fusion` is set explicitly, because its default changes in Triton 3.10.
    """
    return MappingProxyType({"enable_fp_fusion": True, **parameters})


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least `n`."""
    return 1 << (n - 1).bit_length()


@functools.cache
def rms_norm_forward(hidden: int) -> LaunchConfig:
    """Return the parameters of RMSNorm's forward.

    A program holds whole rows in registers, 16 elements per thread up to 8192 columns. Short rows
    share a program.
    """
    block_cols = next_power_of_2(hidden)
    block_rows = max(1, 2048 // block_cols)
    num_warps = min(16, max(1, block_rows * block_cols // 512))
    return launch_config(BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, num_warps=num_warps)


@functools.cache
def rms_norm_backward(hidden: int, element_bytes: int, device: DeviceProperties) -> LaunchConfig:
    """Return the parameters of RMSNorm's backward.

    The tile is that of the forward. Further rows are prefetched into shared memory if they fit.
    Wide rows are divided into chunks, because the float32 state of more columns does not fit in
    registers. Each program processes one chunk.

    Args:
        hidden: columns per row.
        element_bytes: sum of the element sizes, in bytes, of the inputs that are read by rows.
        device: properties of the device that runs the kernel.
    """
    widest = 16384 if device.platform == "hip" else 8192
    chunks = cdiv(hidden, widest)
    forward = rms_norm_forward(min(hidden, widest))
    stage_bytes = forward["BLOCK_ROWS"] * forward["BLOCK_COLS"] * element_bytes
    # A program also reads dy, h and weight of the other chunks. Per chunk, these have at most 1.5
    # times the bytes of the program's own chunk, which has at least two inputs.
    stage_bytes += (chunks - 1) * stage_bytes * 3 // 2
    num_stages = max(1, min(3, device.shared_memory // stage_bytes))
    # Use more warps (fewer elements per thread) where registers run out: for long float32 rows, and
    # for all rows on AMD.
    spills = device.platform == "hip" or (element_bytes >= 8 and forward["BLOCK_ROWS"] == 1)
    num_warps = min(16, forward["num_warps"] * (2 if spills else 1))
    return launch_config(
        **{**forward, "num_warps": num_warps}, CHUNKS=chunks, NUM_STAGES=num_stages
    )


def rms_norm_partial_sums(rows: int, device: DeviceProperties) -> int:
    """Return the number of programs of RMSNorm's backward; each writes partial sums of dweight.

    With 32 rows per program, the float32 partial sums are under 5 % of the memory traffic in
    bfloat16. For few rows, half of the multiprocessors saturate the memory bandwidth, because each
    multiprocessor has several rows in flight.
    """
    return min(4 * device.multiprocessors, max(device.multiprocessors // 2, cdiv(rows, 32)))


@functools.cache
def rms_norm_sum_partials() -> LaunchConfig:
    """Return the parameters of the kernel that adds up the partial sums of dweight."""
    return launch_config(BLOCK_ROWS=32, BLOCK_COLS=32, num_warps=4)


@functools.cache
def swiglu(cols: int) -> LaunchConfig:
    """Return the parameters of SwiGLU's kernels, forward and backward.

    A program processes 2048 elements, 16 of each tensor per thread. Short rows share a program.
    Wider blocks would leave lanes idle: Mistral 7B has 14336 = 7 * 2048 columns.
    """
    block_cols = min(2048, next_power_of_2(cols))
    return launch_config(BLOCK_ROWS=2048 // block_cols, BLOCK_COLS=block_cols, num_warps=4)


@functools.cache
def rotary(half: int) -> LaunchConfig:
    """Return the parameters of the rotary embedding for heads of 2 * `half` channels.

    Each iteration of the loop over heads rotates 2048 pairs of channels, 16 per thread. Fused
    multiply-adds are disabled, so that results are bit-identical on every backend.
    """
    block_i = next_power_of_2(half)
    block_h = 8
    block_t = max(1, 2048 // (block_h * block_i))
    return launch_config(
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_I=block_i, num_warps=4, enable_fp_fusion=False
    )


@functools.cache
def rolling_cache_update(head_dim: int, max_seqlen: int) -> LaunchConfig:
    """Return the parameters of the rolling cache's update.

    For several tokens per sequence, use the parameters of `rotary`. One token per sequence is
    latency bound: use more programs, with 4 heads each. Fused multiply-adds are disabled, so that
    results are bit-identical on every backend.
    """
    block_i = max(1, next_power_of_2(head_dim) // 2)
    block_h, warps = (4, 1) if max_seqlen == 1 else (8, 4)
    block_t = 1 if max_seqlen == 1 else max(1, 2048 // (block_h * block_i))
    return launch_config(
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_I=block_i, num_warps=warps, enable_fp_fusion=False
    )


@functools.cache
def cross_entropy(vocab: int) -> LaunchConfig:
    """Return the parameters of the cross entropy kernel.

    A program processes one row of logits, in blocks of 16 logits per thread.
    """
    block = min(4096, max(64, next_power_of_2(vocab)))
    return launch_config(BLOCK=block, num_warps=max(1, block // 512))
