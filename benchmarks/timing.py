"""Time and memory of a call, noise of many calls, and peak speeds of the machine."""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.load_memory import resident
from benchmarks.registry import Prepared
from benchmarks.results import has_bf16_products


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "meta":  # run everything except the launch
        call()
        return 1e-3
    if device.type == "cpu":
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # its deallocation is not timed
        return elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Flush the L2 cache, as another layer would. Meanwhile the launches of the call are queued, so
    # that their cost on the CPU is not measured.
    for _ in range(_flushes(device)):
        _flush_buffer(device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _flushes(device: torch.device) -> int:
    """Return how many writes of the buffer keep the GPU busy for two milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer(device).zero_()
    begin.record()
    for _ in range(8):
        _flush_buffer(device).zero_()
    end.record()
    end.synchronize()
    return max(4, math.ceil(8 * 2.0 / begin.elapsed_time(end)))


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def noise(sessions: Sequence[Sequence[float]]) -> float:
    """Return the largest distance of a session's quartile from the median of all, relative to it.

    Times vary within a session, and the machine drifts from one session to the next. The median of
    five further sessions lies within this distance in nine of ten cases, for normal drift.
    """
    median = statistics.median(x for times in sessions for x in times)
    quartiles = [x for times in sessions for x in _quartiles(times)]
    return max(max(quartiles) - median, median - min(quartiles)) / median


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


# Peak speeds of the machine, measured in the rounds of the providers. Brackets: not a provider.
GEMM, COPY, READ = "[GEMM]", "[copy]", "[read]"


def peak(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Prepared, float]:
    """Return the call to time, and its FLOPs (`GEMM`) or the bytes that it moves."""
    if name == GEMM:
        n = 1024 if device.type == "cpu" else 8192
        if device.type == "cpu" and not (dtype == torch.bfloat16 and has_bf16_products()):
            dtype = torch.float32  # PyTorch's other products are far from the peak
        a, b = _square(n, dtype, device)
        return lambda i: lambda: a @ b, 2 * n**3
    source, target = _buffers(device)
    if name == COPY:
        return lambda i: lambda: target.copy_(source), 2 * source.nbytes
    return lambda i: lambda: source.amax(), source.nbytes


@functools.lru_cache(maxsize=2)
def _square(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return a, b


@functools.cache
def _buffers(device: torch.device) -> tuple[Tensor, Tensor]:
    size = (64 if device.type == "cpu" else 1024) << 20
    source = torch.ones(size // 4, device=device)
    return source, torch.zeros_like(source)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of a call in bytes, without the memory in use before it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "meta" or not Path("/proc/self/clear_refs").exists():
        call()
        return None
    ctypes.CDLL(None).malloc_trim(
        0
    )  # return freed memory to the system, so that it is counted when used again
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
