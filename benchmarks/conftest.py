"""Cases times providers, measured in turn: each one's times are an entry of pytest-benchmark.

Options: --op, --providers, --shapes, --seconds, --sittings, --device. The first test times all that
were collected (`sittings.py`); a provider that is not timed is a skipped test, which says why.
"""

from __future__ import annotations

import functools
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
from benchmarks.registry import OURS, PROVIDERS, SHAPES, Case, Operator, in_a_line
from benchmarks.sittings import MAX_ROUNDS, Trial, hold

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "xformers",
    "liger-kernel",
    "llama-cpp-python",
)
SECONDS = 1.5  # for the rounds of one case, within bounds
SITTINGS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mistral_kernels")
    group.addoption("--op", help="operators, with commas between: attention,rms_norm")
    group.addoption("--providers", help="providers, with commas between: ours,eager")
    group.addoption(
        "--shapes", choices=SHAPES, help="; ".join(f"{k}: {v}" for k, v in SHAPES.items())
    )
    group.addoption("--seconds", type=float, default=SECONDS, help="for the rounds of a case")
    group.addoption(
        "--sittings",
        type=int,
        help=f"over which they are spread, everything staying in memory: {SITTINGS}, on a GPU 1",
    )
    group.addoption("--device", help="cuda, cpu, or meta: a rehearsal that times nothing")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.cuda.current_device() if chosen == "cuda" else None
    config.benchmark_device = torch.device(chosen, index)  # type: ignore[attr-defined]
    if chosen == "meta":
        torch.compiler.set_stance("force_eager")  # there is nothing to make code for
    # A version of compiled code for each shape. Beyond so many, eager code would run in silence.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    config.option.benchmark_quiet = True  # `report`'s table says all of it
    if config.option.shapes is None:
        config.option.shapes = "cpu" if chosen == "cpu" else "gpu"
    if config.option.sittings is None:
        config.option.sittings = SITTINGS if chosen == "cpu" else 1
    if not 1 <= config.option.sittings <= MAX_ROUNDS:
        raise pytest.UsageError(
            f"--sittings must be 1 to {MAX_ROUNDS}, got {config.option.sittings}"
        )
    for option, known in (("providers", tuple(PROVIDERS)), ("op", _operators())):
        given = getattr(config.option, option)
        names = given.split(",") if given else known
        if unknown := set(names) - set(known):
            raise pytest.UsageError(
                f"--{option} knows no {sorted(unknown)[0]!r}, but {', '.join(known)}"
            )
        setattr(config.option, option, names)


def _operators() -> tuple[str, ...]:
    """List the operators: each one's file is named after it."""
    return tuple(
        sorted(p.stem.removeprefix("test_") for p in Path(__file__).parent.glob("test_*.py"))
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `test_speed(case, provider, ...)` for the module's OPERATOR."""
    if "provider" not in metafunc.fixturenames:
        return
    operator: Operator = metafunc.module.OPERATOR
    options = metafunc.config.option
    pairs = [
        pytest.param(case, provider, id=f"{case}-{provider}")
        for case in (operator.cases.get(options.shapes, ()) if operator.name in options.op else ())
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


@pytest.fixture(scope="session")
def trials(request: pytest.FixtureRequest) -> dict[tuple[str, Case], Trial]:
    """Time every case that was collected with the providers that were."""
    config: Any = request.config
    plan: dict[tuple[str, Case], tuple[Operator, Case, list[str]]] = {}
    for item in request.session.items:
        chosen = item.callspec.params if "speed" in getattr(item, "fixturenames", ()) else {}
        if isinstance(case := chosen.get("case"), Case):
            operator = item.module.OPERATOR  # type: ignore[attr-defined]
            providers = plan.setdefault((operator.name, case), (operator, case, []))[2]
            providers.append(chosen["provider"])
    plugins = config.pluginmanager

    def tell(line: str) -> None:
        with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
            plugins.get_plugin("terminalreporter").write_line(line)

    option = config.option
    return hold(plan.values(), config.benchmark_device, option.seconds, option.sittings, tell)


@pytest.fixture
def speed(
    benchmark: Any, request: pytest.FixtureRequest, trials: dict[tuple[str, Case], Trial]
) -> Callable[[Operator, Case, str], None]:
    """Return `speed(operator, case, provider)`.

    It is an entry of the benchmark, or a skip with its reason.
    """
    device = request.config.benchmark_device  # type: ignore[attr-defined]

    def run(operator: Operator, case: Case, provider: str) -> None:
        trial = trials[operator.name, case]
        if reason := trial.refused.get(provider):
            if provider == OURS.name:
                pytest.fail(reason, pytrace=False)
            pytest.skip(f"{provider}: {reason}")
        times = trial.all_times(provider)
        entry = {
            "op": operator.name,
            "sizes": dict(case.sizes),
            "dtype": str(case.dtype).removeprefix("torch."),
            "direction": case.direction,
            "provider": provider,
            "bound": operator.bound_of(case),
            "flops": operator.flops(case),
            "bytes": operator.bytes_of(provider, case),
            "noise": timing.noise(trial.times[provider]),
            "sittings": len(trial.times[provider]),
            "peak_memory": trial.memory.get(provider),
            "over_ours": trial.over_ours(provider),
            "profile": trial.profiles.get(provider),
            "environment": environment(device),
        }
        moved = timing.READ if operator.only_reads else timing.COPY
        limit, unit = (timing.GEMM, "flops") if entry["bound"] == "FLOP" else (moved, "bytes")
        peaks = timing.peaks(device, case.dtype)
        if limit in peaks:
            of_limit = peaks[limit][1]
            entry["peak"] = of_limit / statistics.median(trial.all_times(limit))
            entry["of_peak"] = statistics.median(
                entry[unit] / own * theirs / of_limit
                for own, theirs in zip(times, trial.all_times(limit), strict=True)
            )
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
    """Return what times depend on.

    pytest-benchmark notes the commit and the machine's names.
    """
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
        report.row_of(x.extra_info, x.stats.median)
        for x in (session.benchmarks if session else ())
        if "op" in x.extra_info
    ]
    if rows:
        described = environment(config.benchmark_device)  # type: ignore[attr-defined]
        terminalreporter.section(", ".join(f"{k} {v}" for k, v in described.items()))
        terminalreporter.write_line(report.table(rows))
        terminalreporter.write_line(report.profiles(rows))
