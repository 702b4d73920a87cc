"""The time and the memory of a call, the noise of many, and the peaks of the machine."""

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


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "meta":  # a rehearsal: everything but the launch
        call()
        return 1e-3
    if device.type == "cpu":
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # freeing it is not the call's work
        return elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Cold L2, as after another layer. And while this is written, the call's launches queue up, so
    # that their cost to the CPU is not in the measure.
    for _ in range(_flushes(device)):
        _flush_buffer(device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _flushes(device: torch.device) -> int:
    """Return how often the buffer must be written to keep the GPU busy for two milliseconds."""
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


def noise(sittings: Sequence[Sequence[float]]) -> float:
    """Return how far the sittings' quartiles reach from the median of all times, relative to it.

    Times scatter within a sitting, and from one to the next the machine drifts. The median of
    another five sittings lies within it nine times of ten, if drift is as good as normal.
    """
    median = statistics.median(x for times in sittings for x in times)
    reached = [x for times in sittings for x in _quartiles(times)]
    return max(max(reached) - median, median - min(reached)) / median


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


# What a machine can do, measured among the calls. Names in brackets are nobody's.
GEMM, COPY, READ = "[GEMM]", "[copy]", "[read]"


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Prepared, float]]:
    """Return by name a call, and its FLOPs (`GEMM`) or the bytes that it moves."""
    if device.type == "meta":
        return {}
    n = 1024 if device.type == "cpu" else 8192
    a, b = _square(n, dtype, device)
    source, target = _stretch(device)
    return {
        GEMM: (lambda turn: lambda: a @ b, 2 * n**3),
        COPY: (lambda turn: lambda: target.copy_(source), 2 * source.nbytes),
        READ: (lambda turn: lambda: source.amax(), source.nbytes),
    }


@functools.lru_cache(maxsize=2)
def _square(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return a, b


@functools.cache
def _stretch(device: torch.device) -> tuple[Tensor, Tensor]:
    size = (64 if device.type == "cpu" else 1024) << 20
    source = torch.ones(size // 4, device=device)
    return source, torch.zeros_like(source)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes at the peak of a call beyond those before it; None if unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "meta" or not Path("/proc/self/clear_refs").exists():
        call()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
