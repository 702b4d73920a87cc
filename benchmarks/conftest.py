"""Paired timing: ours by pytest-benchmark, a peer in between, in one run on one machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch

Pair = Callable[[str, Callable[[], object], Callable[[], object], int], None]
_rows: list[tuple[str, str, float, float, float]] = []


@pytest.fixture
def against(benchmark, request: pytest.FixtureRequest) -> Pair:
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
        _rows.append((request.node.name, peer, median, peer_median, ratio))

    return run


def environment() -> dict[str, object]:
    return {
        "machine": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    described = ", ".join(f"{key} {value}" for key, value in environment().items())
    terminalreporter.section(f"medians of interleaved rounds; {described}")
    for name, peer, ours, theirs, ratio in _rows:
        terminalreporter.write_line(
            f"{name:55} ours {ours * 1e3:10.2f} ms   {peer} {theirs * 1e3:10.2f} ms   "
            f"{peer} / ours {ratio:5.2f}"
        )
