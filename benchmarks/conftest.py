"""Paired timing: ours by pytest-benchmark, a peer in between, in one run on one machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch

Pair = Callable[[str, Callable[[], object], Callable[[], object], int], None]
Report = Callable[[str, str], None]
_sections: dict[str, list[str]] = {}


@pytest.fixture(scope="session")
def report() -> Report:
    """`report(title, line)`: a line, once, below a title at the end of the run."""

    def add(title: str, line: str) -> None:
        lines = _sections.setdefault(title, [])
        if line not in lines:
            lines.append(line)

    return add


@pytest.fixture
def against(benchmark, request: pytest.FixtureRequest, report: Report) -> Pair:
    """`against(peer, ours, theirs, rounds)`: times the two in turn, so that both meet the same
    machine, and keeps medians and the median of the pairwise ratios."""

    def run(
        peer: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
    ) -> None:
        times: list[float] = []

        def theirs_first() -> None:
            start = time.perf_counter()
            theirs()
            times.append(time.perf_counter() - start)

        ours()
        benchmark.pedantic(ours, setup=theirs_first, rounds=rounds, warmup_rounds=1)
        timed = times[-rounds:]
        own = benchmark.stats.stats.data
        ratio = statistics.median(b / a for a, b in zip(own, timed))
        benchmark.extra_info.update(
            {"peer": peer, "peer_seconds": timed, "peer_over_ours": ratio, **environment()}
        )
        median, peer_median = statistics.median(own), statistics.median(timed)
        report(
            "medians of interleaved rounds",
            f"{request.node.name:55} ours {median * 1e3:10.2f} ms   "
            f"{peer} {peer_median * 1e3:10.2f} ms   {peer} / ours {ratio:5.2f}",
        )

    return run


def environment() -> dict[str, object]:
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "machine": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    described = ", ".join(f"{key} {value}" for key, value in environment().items())
    for title, lines in _sections.items():
        terminalreporter.section(f"{title}; {described}")
        for line in lines:
            terminalreporter.write_line(line)
