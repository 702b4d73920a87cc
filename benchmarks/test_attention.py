"""Attention, forward and backward, beside everything else that computes it here.

    python -m pytest benchmarks/test_attention.py

On a GPU with the shapes of Mistral-7B, elsewhere with small ones. A provider is timed only once its
values and gradients are as accurate as plain PyTorch's; who is not, and why, is printed.

On a CPU with other work, set OMP_NUM_THREADS to the cores that are free: with a thread too many,
every parallel region waits for the scheduler, and who has most of them (we do) looks 30 times
slower than it is.
"""

from __future__ import annotations

import functools
import gc
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import Report
from providers import OURS, PROVIDERS, Provider, flash_window
from torch import Tensor

from mistral_kernels.ops import reference

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers import assert_matches_reference  # noqa: E402  # the tolerance rule of the tests

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
HEAD_DIM = 128
HEADS = (32, 8) if ON_GPU else (8, 2)
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
LENGTHS_AND_WINDOWS = (
    [(seqlen, window) for seqlen in (2048, 8192, 32768) for window in (4096, None)]
    if ON_GPU
    else [(1024, 256), (2048, 256), (1024, None)]
)
COPIES = 3 if ON_GPU else 1  # of the inputs, in rotation
SECONDS = 4.0  # for the rounds of one shape, but for the bounds below
MIN_ROUNDS, MAX_ROUNDS = 5, 100

# Dense bf16 TFLOP/s by the vendors' data sheets, for names that say which board it is.
VENDOR_PEAKS = {
    r"A100[- \w]*$": 312,
    r"H100 80GB HBM3$": 989,  # SXM
    r"H200$": 989,
    r"B200$": 2250,
    r"L4$": 121,
    r"RTX 4090$": 165,
    r"MI300X$": 1307,
}
GEMM = 1024  # rows, columns and depth of what stands for a CPU's peak

plain = reference.eager_arithmetic()(reference.attention)


class Shape(NamedTuple):
    seqlen: int
    window: int | None
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"S{self.seqlen}-{f'W{self.window}' if self.window else 'causal'}-{dtype}"

    def inputs(self, needs_grad: bool) -> dict[str, Tensor]:
        heads = zip("qkv", (HEADS[0], HEADS[1], HEADS[1]))
        return {
            name: torch.randn(1, self.seqlen, count, HEAD_DIM, device=DEVICE)
            .to(self.dtype)
            .requires_grad_(needs_grad)
            for name, count in heads
        }

    def flops(self, backward: bool) -> float:
        """Of the products that visible pairs need: 2 in the forward pass, 5 in the backward."""
        seen = self.seqlen if self.window is None else min(self.window, self.seqlen)
        pairs = seen * (seen + 1) // 2 + (self.seqlen - seen) * seen
        return 4 * HEAD_DIM * HEADS[0] * pairs * (2.5 if backward else 1)


SHAPES = [Shape(*case, dtype) for dtype in DTYPES for case in LENGTHS_AND_WINDOWS]
PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@pytest.fixture(autouse=True)
def compile_afresh() -> Iterator[None]:
    """Dynamo keeps 8 versions of a function, and beyond them would run eager code in silence."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@functools.cache
def unfit(provider: Provider, dtype: torch.dtype, backward: bool) -> str | None:
    """Why it is not timed: it cannot run, or errs more than twice as much as plain PyTorch."""
    if reason := provider.available(DEVICE, dtype):
        return reason
    torch.manual_seed(0)
    try:
        for window in (64, None):
            check(provider, Shape(257, window, dtype), backward)
    except Exception as error:
        if provider is OURS:
            raise
        return in_a_line(error)
    return None


def check(provider: Provider, shape: Shape, backward: bool) -> None:
    window_size = flash_window(shape.window)
    assert_matches_reference(
        functools.partial(provider.run, window=shape.window),
        lambda q, k, v: plain(q, k, v, causal=True, window_size=window_size)[0],
        shape.inputs(backward),
    )


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@PASSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_as_accurate_as_plain_pytorch(
    provider: Provider, dtype: torch.dtype, backward: bool
) -> None:
    if reason := unfit(provider, dtype, backward):
        pytest.skip(f"{provider.name} {reason}")


@PASSES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_speed(shape: Shape, backward: bool, report: Report) -> None:
    copies = [shape.inputs(backward) for _ in range(COPIES)]
    d_outs = [torch.randn_like(copy["q"]) for copy in copies]
    calls: dict[str, Callable[[int], float]] = {}
    skipped: list[str] = []
    direction = "backward" if backward else "forward"
    for provider in PROVIDERS:
        if reason := unfit(provider, shape.dtype, backward):
            skipped.append(f"{provider.name}, {direction}, {shape.dtype}: {reason}")
            continue

        def call(turn: int, provider: Provider = provider) -> float:
            inputs = copies[turn % COPIES]
            return seconds(provider, inputs, shape.window, d_outs[turn % COPIES], backward)

        try:
            call(0)
            calls[provider.name] = call
        except Exception as error:
            if provider is OURS:
                raise
            skipped.append(f"{provider.name}, {direction}, {shape}: {in_a_line(error)}")
        if provider.name not in calls:  # out of memory, perhaps, and its traceback held tensors
            gc.collect()
            torch.cuda.empty_cache()
    if not ON_GPU:
        square = torch.randn(2, GEMM, GEMM, dtype=shape.dtype)
        calls["GEMM"] = lambda _: timed(lambda: square[0] @ square[1])

    times = in_turn(calls)
    flops = {name: shape.flops(backward) for name in times} | {"GEMM": 2 * GEMM**3}
    medians = {name: statistics.median(values) for name, values in times.items()}
    rates = {name: flops[name] / median / 1e12 for name, median in medians.items()}
    peak = rates.get("GEMM") or vendor_peak()
    title = f"attention, heads {HEADS[0]}/{HEADS[1]} of {HEAD_DIM}, medians of interleaved rounds"
    columns = f"{'ms':>10}{'TFLOP/s':>10}{'of peak':>10}{'/ ours':>10}{'rounds':>10}"
    report(title, f"{'shape':24}{'pass':10}{'provider':16}{columns}")
    for name, values in times.items():
        ratios = [theirs / ours for ours, theirs in zip(times[OURS.name], values)]
        ratio = "-" if name == "GEMM" else f"{statistics.median(ratios):.2f}"
        fraction = f"{rates[name] / peak:.1%}" if peak else "-"
        report(
            title,
            f"{shape!s:24}{direction:10}{name:16}{medians[name] * 1e3:10.3f}{rates[name]:10.3f}"
            f"{fraction:>10}{ratio:>10}{len(values):10}",
        )
    for line in skipped:
        report("attention, not timed", line)


def seconds(
    provider: Provider,
    inputs: dict[str, Tensor],
    window: int | None,
    d_out: Tensor,
    backward: bool,
) -> float:
    """Of the forward pass, or of the backward pass alone, after a forward pass of its own."""
    if not backward:
        with torch.no_grad():
            return timed(lambda: provider.run(**inputs, window=window))
    out = provider.run(**inputs, window=window)
    # Without retain_graph, as in training; compiled code may then reuse what it saved.
    return timed(lambda: torch.autograd.grad(out, list(inputs.values()), d_out))


def timed(call: Callable[[], object]) -> float:
    if not ON_GPU:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # freeing it is not the call's work
        return elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Cold L2, as after another layer. And while this is written, the call's launches queue up, so
    # that their cost to the CPU is not in the measure.
    for _ in range(4):
        flush_buffer().zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def flush_buffer() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)


def in_turn(calls: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
    """Times of every call, round by round, so that all meet the same machine.

    Each round has an order of its own, so that no call always follows the same one.
    """
    start = time.perf_counter()
    for call in calls.values():
        call(1)
    rounds = int(SECONDS / (time.perf_counter() - start))
    order, times = list(calls), {name: [] for name in calls}
    for turn in range(max(MIN_ROUNDS, min(rounds, MAX_ROUNDS))):
        random.shuffle(order)
        for name in order:
            times[name].append(calls[name](turn))
    return times


def vendor_peak() -> float | None:
    name = torch.cuda.get_device_name()
    peaks = (peak for model, peak in VENDOR_PEAKS.items() if re.search(rf"\b{model}", name))
    return next(peaks, None)
