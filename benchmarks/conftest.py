"""Pytest plumbing: collects cases and providers, measures them, and reports each pair as a test.

The first test measures everything that was collected (`sessions.py`). A provider that is not timed
is a skipped test with the reason. `python -m benchmarks` is the command for users.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, results, timing
from benchmarks.registry import OURS, PROVIDERS, SHAPES, Case, Operator
from benchmarks.results import Results, Row
from benchmarks.sessions import MAX_ROUNDS, Measurement, measure

SECONDS = 1.5  # for all rounds of one case
SESSIONS = 5
# Options of `python -m benchmarks` and of pytest, as arguments of `add_argument`.
OPTIONS: dict[str, dict[str, Any]] = {
    "op": {"metavar": "A,B", "help": "operators (default: all)"},
    "providers": {"metavar": "A,B", "help": "providers (default: all that run)"},
    "shapes": {"choices": list(SHAPES), "help": "default: gpu where there is one, else cpu"},
    "dtype": {
        "choices": ["bfloat16", "float16", "float32"],
        "help": "default: bfloat16, except for products on a CPU without instructions for it",
    },
    "device": {"choices": ["cpu", "cuda", "meta"], "help": "meta: run every case, time nothing"},
    "seconds": {
        "type": float,
        "help": f"time per case, all sessions together (default: {SECONDS})",
    },
    "sessions": {
        "type": int,
        "help": "number of times that all cases are measured, spread over the run "
        f"(default: {SESSIONS}, on a GPU 1)",
    },
}
Measurements = dict[tuple[str, Case], Measurement]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("mistral_kernels").addoption
    for name, settings in OPTIONS.items():
        add(f"--{name}", **settings)
    add("--results", type=Path, help="write the rows to this JSON file")
    add("--command", default="python -m pytest benchmarks", help="command noted in the results")


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    chosen = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    index = torch.cuda.current_device() if chosen == "cuda" else None
    config.benchmark_device = torch.device(chosen, index)  # type: ignore[attr-defined]
    if chosen == "meta":
        torch.compiler.set_stance("force_eager")  # meta tensors have no code to compile
    # Compiled code has one version per shape. Above the limit it would silently run eagerly.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options.benchmark_quiet = True  # the table of `report` replaces that of pytest-benchmark
    config.benchmark_rows = []  # type: ignore[attr-defined]
    if options.seconds is None:
        options.seconds = SECONDS
    if options.shapes is None:
        options.shapes = "cpu" if chosen == "cpu" else "gpu"
    if options.sessions is None:
        options.sessions = SESSIONS if chosen == "cpu" else 1
    if not 1 <= options.sessions <= MAX_ROUNDS:
        raise pytest.UsageError(f"--sessions must be 1 to {MAX_ROUNDS}, got {options.sessions}")
    for option, valid in (("providers", tuple(PROVIDERS)), ("op", operator_names())):
        given = getattr(options, option)
        names = given.split(",") if given else valid
        if unknown := sorted(set(names) - set(valid)):
            raise pytest.UsageError(f"--{option} must be of {', '.join(valid)}, got {unknown[0]!r}")
        setattr(options, option, names)


def operator_names() -> tuple[str, ...]:
    """Return the operators' names, which are those of the test files."""
    files = Path(__file__).parent.glob("test_*.py")
    return tuple(sorted(path.stem.removeprefix("test_") for path in files))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `test_speed(case, provider, ...)` for the module's OPERATOR."""
    if "provider" not in metafunc.fixturenames:
        return
    operator: Operator = metafunc.module.OPERATOR
    options = metafunc.config.option
    pairs = [
        pytest.param(case, provider, id=f"{case}-{provider}")
        for case in (operator.cases.get(options.shapes, ()) if operator.name in options.op else ())
        if is_chosen(operator, case, options.dtype, options.shapes)
        for provider in operator.providers
        if provider in options.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


def is_chosen(operator: Operator, case: Case, given: str | None, shapes: str) -> bool:
    """Return whether a case has the given dtype, or by default bfloat16.

    On a CPU without instructions for bfloat16, products are timed in float32, because PyTorch's
    bfloat16 products take 5 to 40 times as long. Some cases are timed in every dtype there.
    """
    if given is not None:
        return case.dtype == getattr(torch, given)
    if shapes == "gpu" or operator.bound_of(case) == "byte" or results.has_bf16_products():
        return case.dtype == torch.bfloat16
    return case.dtype == torch.float32 or operator.compares_dtypes(case)


class ReplayedClock:
    """Clock for pytest-benchmark in which each call takes a time measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, times: Iterator[float]) -> None:
        self.now += next(times)


CLOCK = ReplayedClock()


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Measurements:
    """Measure every collected case with its collected providers."""
    config: Any = request.config
    plan: dict[tuple[str, Case], tuple[Operator, Case, list[str]]] = {}
    for item in request.session.items:
        chosen = item.callspec.params if "speed" in getattr(item, "fixturenames", ()) else {}
        if isinstance(case := chosen.get("case"), Case):
            operator = item.module.OPERATOR  # type: ignore[attr-defined]
            providers = plan.setdefault((operator.name, case), (operator, case, []))[2]
            providers.append(chosen["provider"])
    plugins = config.pluginmanager

    def print_line(line: str) -> None:
        with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
            plugins.get_plugin("terminalreporter").write_line(line)

    options = config.option
    found, config.benchmark_interrupted = measure(
        plan.values(), config.benchmark_device, options.seconds, options.sessions, print_line
    )
    return found


@pytest.fixture
def speed(
    benchmark: Any, request: pytest.FixtureRequest, measurements: Measurements
) -> Callable[[Operator, Case, str], None]:
    """Return `speed(operator, case, provider)`, which reports one measurement or skips."""
    config: Any = request.config

    def run(operator: Operator, case: Case, provider: str) -> None:
        measurement = measurements.get((operator.name, case))
        if measurement and (reason := measurement.refused.get(provider)):
            if provider == OURS.name:
                pytest.fail(reason, pytrace=False)
            pytest.skip(f"{provider}: {reason}")
        if measurement is None or provider not in measurement.times:
            pytest.skip("interrupted before it was timed")
        config.benchmark_rows.append(row_of(measurement, provider))
        benchmark.group = f"{operator.name} {case}"
        times = measurement.all_times(provider)
        benchmark.pedantic(CLOCK.advance, (iter(times),), rounds=len(times))

    return run


def row_of(measurement: Measurement, provider: str) -> Row:
    """Return the result of one provider."""
    operator, case = measurement.operator, measurement.case
    times, bound = measurement.all_times(provider), operator.bound_of(case)
    work = operator.flops(case) if bound == "FLOP" else operator.bytes_of(provider, case)
    ratios = measurement.over_ours(provider)
    of_peak = None
    if measurement.peak in measurement.times:
        pairs = zip(times, measurement.all_times(measurement.peak), strict=True)
        of_peak = statistics.median(
            work / own * peak / measurement.peak_work for own, peak in pairs
        )
    return Row(
        op=operator.name,
        sizes=dict(case.sizes),
        dtype=str(case.dtype).removeprefix("torch."),
        direction=case.direction,
        provider=provider,
        bound=bound,
        work=work,
        seconds=statistics.median(times),
        noise=timing.noise(measurement.times[provider]),
        of_peak=of_peak,
        over_ours=ratios and statistics.median(x for session in ratios for x in session),
        over_ours_noise=ratios and timing.noise(ratios),
        peak_memory=measurement.memory.get(provider),
        profile=measurement.profiles.get(provider),  # type: ignore[arg-type]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "speed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False, warmup=False))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    if getattr(config, "benchmark_interrupted", False):
        session.exitstatus = pytest.ExitCode.INTERRUPTED
    if config.benchmark_rows:
        device = config.benchmark_device
        config.benchmark_results = Results(
            machine=results.machine_name(device),
            environment=results.environment(device),
            date=date.today().isoformat(),
            command=config.option.command,
            rows=config.benchmark_rows,
        )
        if config.option.results:
            config.benchmark_results.save(config.option.results)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found: Results | None = getattr(config, "benchmark_results", None)
    if found:
        terminalreporter.section("results")
        terminalreporter.write_line(report.text(found))
