"""Times of several calls, in turn, and the peaks of the machine they are held against."""

from __future__ import annotations

import ctypes
import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.load_memory import resident
from benchmarks.registry import Prepared

MIN_ROUNDS, MAX_ROUNDS = 5, 100


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
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
    for _ in range(4):
        _flush_buffer(device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def in_turn(
    calls: dict[str, Prepared], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Times of every call, round by round, so that all meet the same machine.

    Each round has an order of its own, so that no call always follows the same one. As many rounds
    as fit into `seconds`, within bounds.
    """
    start = time.perf_counter()
    for prepared in calls.values():  # a second call: the first may have compiled
        timed(prepared(1), device)
    rounds = 1
    if device.type != "meta":
        rounds = int(seconds / (time.perf_counter() - start))
        rounds = max(MIN_ROUNDS, min(rounds, MAX_ROUNDS))
    order = list(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(timed(calls[name](turn), device))
    return times


# What a machine can do, measured among the calls. Names in brackets are nobody's.
GEMM, READ = "[GEMM]", "[copy]"


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Prepared, float]]:
    """By name: a call, and its FLOPs (`GEMM`) or the bytes it moves (`READ`)."""
    if device.type == "meta":
        return {}
    n = 1024 if device.type == "cpu" else 8192
    a, b = _square(n, dtype, device)
    source, target = _stretch(device)
    return {
        GEMM: (lambda turn: lambda: a @ b, 2 * n**3),
        READ: (lambda turn: lambda: target.copy_(source), 2 * source.nbytes),
    }


@functools.lru_cache(maxsize=2)
def _square(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return a, b


@functools.cache
def _stretch(device: torch.device) -> tuple[Tensor, Tensor]:
    size = (64 if device.type == "cpu" else 1024) << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the ratios of each round: what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(theirs, ours))


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a call beyond those before it; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "meta" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
