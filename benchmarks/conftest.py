"""Cases times providers, measured in turn: the times of each are an entry of pytest-benchmark.

Options: --op, --providers, --shapes, --seconds, --device. A provider that is not timed is a skipped
test, which says why.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, timing
from benchmarks.registry import OURS, PROVIDERS, Case, Operator, in_a_line
from benchmarks.timing import GEMM

Outcome = dict[str, list[float] | str]  # times, or why there are none, by provider


PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "xformers",
    "liger-kernel",
    "llama-cpp-python",
)
SECONDS = 2.0  # for the rounds of one case, within bounds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mistral_kernels")
    group.addoption("--op", help="operators, with commas between: attention,rms_norm")
    group.addoption("--providers", help="providers, with commas between: ours,eager")
    group.addoption("--shapes", choices=("cpu", "gpu"), help="small ones, or those of Mistral-7B")
    group.addoption("--seconds", type=float, default=SECONDS, help="for the rounds of a case")
    group.addoption("--device", help="cuda, cpu, or meta: a rehearsal that times nothing")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.cuda.current_device() if chosen == "cuda" else None
    config.benchmark_device = torch.device(chosen, index)  # type: ignore[attr-defined]
    if chosen == "meta":
        torch.compiler.set_stance("force_eager")  # there is nothing to make code for
    config.option.benchmark_quiet = True  # `report`'s table says all of it
    if config.option.shapes is None:
        config.option.shapes = "cpu" if chosen == "cpu" else "gpu"
    for option, known in (("providers", tuple(PROVIDERS)), ("op", _operators())):
        given = getattr(config.option, option)
        names = given.split(",") if given else known
        if unknown := set(names) - set(known):
            raise pytest.UsageError(
                f"--{option} knows no {sorted(unknown)[0]!r}, but {', '.join(known)}"
            )
        setattr(config.option, option, names)


def _operators() -> tuple[str, ...]:
    """An operator's file is named after it."""
    return tuple(
        sorted(p.stem.removeprefix("test_") for p in Path(__file__).parent.glob("test_*.py"))
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`test_speed(case, provider, ...)` for the module's OPERATOR."""
    if "provider" not in metafunc.fixturenames:
        return
    operator: Operator = metafunc.module.OPERATOR
    options = metafunc.config.option
    pairs = [
        pytest.param(case, provider, id=f"{case}-{provider}")
        for case in (operator.cases[options.shapes] if operator.name in options.op else ())
        for provider in operator.providers
        if provider in options.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


class Replay:
    """A clock for pytest-benchmark, by which each call takes what was measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, times: Iterator[float]) -> None:
        self.now += next(times)


CLOCK = Replay()
_measured: dict[tuple[str, Case], Outcome] = {}
_memory: dict[str, int | None] = {}


def measure(
    operator: Operator,
    case: Case,
    providers: list[str],
    device: torch.device,
    seconds: float = SECONDS,
) -> Outcome:
    """All providers that are right, and the machine's peaks, in turn."""
    outcome: Outcome = {}
    calls: dict[str, Any] = {}
    for provider in providers:
        if reason := operator.unfit(provider, case, device):
            outcome[provider] = reason
            continue
        try:
            prepared = operator.prepare(provider, case, device)
            timing.timed(prepared(0), device)
            calls[provider] = prepared
        except Exception as error:
            outcome[provider] = in_a_line(error)
            gc.collect()  # out of memory, perhaps, and its traceback held tensors
            torch.cuda.empty_cache()
    if operator.measures_memory:
        for provider, prepared in calls.items():
            _memory[provider] = timing.peak_memory(prepared(0), device)
    if calls:
        calls |= {name: call for name, (call, _) in timing.peaks(device, case.dtype).items()}
        outcome.update(timing.in_turn(calls, device, seconds * operator.patience))
    operator.release()
    return outcome


@pytest.fixture
def speed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Operator, Case, str], None]:
    """`speed(operator, case, provider)`: an entry of the benchmark, or a skip that says why not."""
    config = request.config
    device = config.benchmark_device

    def run(operator: Operator, case: Case, provider: str) -> None:
        key = operator.name, case
        if key not in _measured:
            _measured.clear()
            names = [name for name in operator.providers if name in config.option.providers]
            _measured[key] = measure(operator, case, names, device, config.option.seconds)
        outcome = _measured[key]
        times = outcome[provider]
        if isinstance(times, str):
            if provider == OURS.name:
                pytest.fail(times, pytrace=False)
            pytest.skip(f"{provider}: {times}")
        entry = {
            "op": operator.name,
            "sizes": dict(case.sizes),
            "dtype": str(case.dtype).removeprefix("torch."),
            "direction": case.direction,
            "provider": provider,
            "bound": operator.bound_of(case),
            "flops": operator.flops(case),
            "bytes": operator.bytes(case),
            "environment": environment(device),
        }
        for name, (_, work) in timing.peaks(device, case.dtype).items():
            entry["peak_flops" if name == GEMM else "peak_bytes"] = work / statistics.median(
                outcome[name]
            )
        if operator.measures_memory:
            entry["peak_memory"] = _memory[provider]
        ours = outcome.get(OURS.name)
        if isinstance(ours, list):
            entry["over_ours"] = [a / b for a, b in zip(times, ours)]
        benchmark.extra_info.update(entry)
        benchmark.group = f"{operator.name} {case}"
        replayed = iter(times)
        benchmark.pedantic(CLOCK.advance, (replayed,), rounds=len(times))

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "speed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False, warmup=False))


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """What times depend on. The commit and the machine's names are pytest-benchmark's to note."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
        try:
            found[query] = subprocess.check_output(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], text=True
            ).strip()
        except (OSError, subprocess.SubprocessError) as error:
            found["clocks"] = in_a_line(error)
    return found


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [
        report.row_of(x.extra_info, {"median": x.stats.median, "iqr": x.stats.iqr})
        for x in (session.benchmarks if session else ())
        if "op" in x.extra_info
    ]
    if rows:
        described = environment(config.benchmark_device)  # type: ignore[attr-defined]
        terminalreporter.section(", ".join(f"{k} {v}" for k, v in described.items()))
        terminalreporter.write_line(report.table(rows))
