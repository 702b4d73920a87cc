"""Benchmarks: checks before timing, sessions, reports, plots, and the pages made from results."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import registry, report, sessions, step_profile, test_attention, timing
from benchmarks.registry import PROVIDERS, Case, Operator, Prepared
from benchmarks.results import Results, Row
from mistral_kernels import attention

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
Options = tuple[str, ...]


def start(*options: str) -> subprocess.Popen[str]:
    """Start `python -m benchmarks`."""
    # Within a worker of pytest-xdist, pytest-benchmark would do nothing.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def bench(results: Path, *options: str) -> tuple[str, Results]:
    """Run `python -m benchmarks`; return its output and its results."""
    process = start("--results", str(results), *options)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed, Results.load(results)


def test_wrong_providers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is off by one gives a reason and no time."""
    case = test_attention.cases([test_attention.sizes(1, 64, 16, 4)], (torch.float32,))[0]

    def off_by_one(case: Any, q: Any, k: Any, v: Any) -> Any:
        window = case["W"]
        return attention(q, k, v, sliding_window=window and window + 1)

    def broken(case: Any, q: Any, k: Any, v: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    runs = {"ours": off_by_one, "SDPA": test_attention.sdpa, "eager": broken}
    monkeypatch.setattr(test_attention.Attention, "runs", runs)
    operator = test_attention.Attention(cpu=[case])
    measurement = sessions.Measurement(operator, case, [*runs, "flash-attn 2"], CPU)
    measurement.run_session(0, sessions=1, seconds=0.0)
    refused = measurement.refused
    assert "error" in refused["ours"]
    assert refused["eager"] == "RuntimeError: no kernel image"
    assert refused["flash-attn 2"] == PROVIDERS["flash-attn 2"].missing(CPU, torch.float32)
    assert measurement.times.keys() == {"SDPA", timing.GEMM}
    assert len(measurement.all_times("SDPA")) == sessions.MIN_ROUNDS
    assert measurement.over_ours("SDPA") is None


class Counting(Operator):
    """Operator of two providers that record their calls; one raises an error in a late call."""

    name = "counting"
    providers = ("eager", "SDPA")

    def __init__(
        self,
        cases: list[Case],
        breaks_after: int,
        bound: str = "FLOP",
        error: type[BaseException] = MemoryError,
    ) -> None:
        super().__init__(cpu=cases)
        self.breaks_after, self.bound, self.error = breaks_after, bound, error
        self.called: list[tuple[Case, str]] = []
        self.indices: list[int] = []
        self.prepared = self.released = 0

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        pass

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        self.prepared += 1
        calls = itertools.count()

        def call(i: int) -> None:
            self.called.append((case, provider))
            self.indices.append(i)
            if provider == "SDPA" and next(calls) == self.breaks_after:
                raise self.error("out of memory")

        return lambda i: functools.partial(call, i)

    def flops(self, case: Case) -> float:
        return 1.0

    def bytes(self, case: Case) -> float:
        return 1.0

    def release(self) -> None:
        self.released += 1


def test_sessions_are_spread_over_the_run() -> None:
    """Prepare every case once, and time it again after all others."""
    cases = registry.cases([{"n": 1}, {"n": 2}], (torch.float32,), ("forward",))
    operator = Counting(cases, breaks_after=3)
    plan = [(operator, case, list(operator.providers)) for case in cases]
    lines: list[str] = []
    found, interrupted = sessions.measure(plan, CPU, seconds=0.0, sessions=3, report=lines.append)
    assert not interrupted
    assert operator.prepared == 4
    assert operator.released == 2
    order = [case for case, _ in operator.called]
    assert [case for case, _ in itertools.groupby(order)] == 3 * cases
    for case in cases:
        measurement = found["counting", case]
        assert [len(times) for times in measurement.times["eager"]] == [1, 2, 2]
        assert measurement.refused == {"SDPA": "MemoryError: out of memory"}
        assert "SDPA" not in measurement.times
    starts = ["[1/2] counting", "[2/2] counting", "session 2 of 3:", "session 3 of 3:"]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert all(re.search(r"; about \d+ (s|min) left$", line) for line in lines)


def test_completed_rounds_of_an_interrupted_run_are_kept() -> None:
    cases = registry.cases([{"n": 1}, {"n": 2}], (torch.float32,), ("forward",))
    operator = Counting(cases, breaks_after=4, error=KeyboardInterrupt)
    plan = [(operator, case, list(operator.providers)) for case in cases]
    found, interrupted = sessions.measure(plan, CPU, seconds=0.0, sessions=1)
    assert interrupted
    assert list(found) == [("counting", cases[0])]  # the second case was not reached
    times = found["counting", cases[0]].times
    # Call 4 of SDPA is that of the third round, after two calls to warm up and to estimate.
    assert {name: len(own[0]) for name, own in times.items()} == dict.fromkeys(times, 2)
    assert {"eager", "SDPA"} <= times.keys()


def test_memory_bound_calls_follow_a_call_of_the_same_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The untimed call before it has other tensors."""
    (case,) = registry.cases([{"n": 1}], (torch.float32,), ("forward",))
    timed: list[int] = []

    def record(call: Any, device: torch.device) -> float:
        call()
        timed.append(operator.indices[-1])
        return 1.0

    monkeypatch.setattr(timing, "timed", record)
    monkeypatch.setattr(timing, "peak", lambda *_: (lambda i: lambda: None, 1.0))
    for bound in ("byte", "FLOP"):
        operator = Counting([case], breaks_after=99, bound=bound)
        measurement = sessions.Measurement(operator, case, ["eager"], CPU)
        measurement._calls.pop(measurement.peak)
        measurement.run_session(0, 1, 0.0)
        indices = [0, 1, *range(5)]  # to compile, to estimate the time, and five rounds
        if bound == "byte":
            assert timed == [2 * i + 1 for i in indices]
            assert operator.indices == [x for i in indices for x in (2 * i, 2 * i + 1)]
        else:
            assert timed == operator.indices == indices
        timed.clear()


def test_noise_covers_quartiles_and_drift() -> None:
    still, wide, later = [1.0] * 4, [0.8, 0.9, 1.0, 1.1, 1.2], [1.5]
    assert timing.noise([still, still]) == 0
    assert timing.noise([wide]) == pytest.approx(0.1)
    assert timing.noise([wide, later]) == pytest.approx(0.45 / 1.05)
    assert timing.noise([wide, [0.5]]) == pytest.approx(0.45 / 0.95)


def test_a_step_is_profiled_operator_by_operator() -> None:
    weight, x = torch.randn(64, 64), torch.randn(1, 64)

    def step() -> None:
        for _ in range(3):
            (x @ weight.t()).view(-1)

    found = step_profile.profile(step, layers=3, device=CPU)
    operators = {operator["name"]: operator for operator in found["operators"]}
    for name, field, other in (("mm", "kernel", "dispatch"), ("t", "dispatch", "kernel")):
        operator = operators[f"aten::{name}"]
        assert operator["calls"] == 3
        assert operator[field] > 0 == operator[other]
    assert found["python_calls"] >= 6
    rows = synthetic().rows
    assert report.profiles(rows) == ""
    rows = [replace(row, profile=found) for row in rows if row.direction == "decode"]
    printed = report.profiles(rows)
    assert printed.count("| aten::mm | 3 | 1.00 |") == len({row.case for row in rows})
    assert printed.count("| eager | ") == len({row.case for row in rows})


@pytest.mark.slow
def test_a_run_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = [
        "--op",
        "rms_norm",
        "--providers",
        "ours,eager,Liger",
        "--seconds",
        "0.1",
        "--sessions",
        "2",
    ]
    printed, results = bench(file, *options)
    assert results.command == f"python -m benchmarks --results {file} {' '.join(options)}"
    assert "Liger: " in printed
    rows = results.rows
    assert {row.provider for row in rows} == {"ours", "eager"}
    assert all(row.of_peak > 0 and row.noise >= 0 for row in rows)
    assert all(row.over_ours == 1 for row in rows if row.provider == "ours")
    assert report.main([str(file)]) == 0
    table = capsys.readouterr().out
    for row in rows:
        assert f"| {row.case} | {row.provider} | {row.seconds * 1e3:.3f} |" in table
        assert row.case in printed
    assert f"torch {importlib.metadata.version('torch')}, " in table


@pytest.mark.slow
def test_ctrl_c_writes_the_completed_rounds(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    process = start("--results", str(file), "--op", "rms_norm", "--seconds", "600")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/4] "):  # the first of four cases; four more sessions follow
            break
    process.send_signal(signal.SIGINT)
    printed = process.stdout.read()
    assert process.wait() == 130
    assert "interrupted: the rounds completed so far are reported" in printed
    assert Results.load(file).rows


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = synthetic()
    slower = base.rows[0]
    slower = replace(slower, seconds=slower.seconds * 1.5, noise=0.0)
    for name, rows in (("base", base.rows), ("slower", [slower, *base.rows[1:]])):
        replace(base, rows=rows).save(tmp_path / f"{name}.json")
    base_file, slower_file = (str(tmp_path / f"{name}.json") for name in ("base", "slower"))
    assert report.main([slower_file, "--base", base_file]) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("1 slower")
    count = len(base.rows)
    assert f"\n{count - 1} of {count} medians lie within the noise" in printed
    assert report.main([base_file, "--base", base_file]) == 0


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": [{"op": "attention"}]}'])
def test_a_bad_results_file_is_named(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    assert report.main([str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_difference_below_its_noise_is_marked() -> None:
    row = synthetic().rows[1]
    tie, clear = (replace(row, over_ours=1.1, over_ours_noise=noise) for noise in (0.2, 0.05))
    assert "| ~1.10 |" in report.table([tie])
    assert "| 1.10 |" in report.table([clear])


def synthetic() -> Results:
    """Return rows of every kind, as from a machine with a GPU and every provider."""
    rows = []
    lengths = [1024, 2048, 4096, 8192]
    for operator, direction, sizes in (
        ("attention", "forward", [{"B": 1, "S": n, "W": 4096, "H": 32} for n in lengths]),
        ("attention", "backward", [{"B": 1, "S": n, "W": None, "H": 32} for n in lengths]),
        ("generation", "decode", [{"model": "7B", "B": 1, "tokens": n} for n in lengths]),
        ("generation", "prefill", [{"model": "7B", "B": 1, "tokens": n} for n in lengths]),
        ("training_step", "step", [{"model": "7B", "S": n} for n in lengths]),
        ("rms_norm", "forward", [{"tokens": 512, "residual": True}]),
    ):
        for i, size in enumerate(sizes):
            for j, provider in enumerate(("ours", "eager", "flash-attn 2")):
                row = Row(
                    op=operator,
                    sizes=size,
                    dtype="bfloat16",
                    direction=direction,
                    provider=provider,
                    bound="FLOP",
                    work=1e9,
                    seconds=0.01 * (i + 1) * (j + 1),
                    noise=0.1,
                    of_peak=0.1,
                    over_ours=float(j + 1),
                    over_ours_noise=0.1,
                    peak_memory=10_000_000 * (i + j + 1),
                )
                rows.append(row)
    return Results("a GPU", {"device": "cuda"}, "2000-01-01", "python -m benchmarks", rows)


def test_saved_results_are_read_back(tmp_path: Path) -> None:
    results = synthetic()
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    (row,) = results.select(op="attention", S=1024, W=None, provider="eager")
    assert row.case == "B=1 S=1024 W=none H=32, bfloat16, backward"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    from benchmarks import plots

    names = {path.stem for path in plots.draw_all(synthetic(), tmp_path, "gpu-")}
    expected = "attention attention-tflops decode decode-position prompt memory of-peak"
    assert names == {f"gpu-{name}" for name in expected.split()}
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in names)
    assert plots.draw_all(replace(synthetic(), rows=[]), tmp_path) == []


def test_a_provider_has_one_color_and_marker() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    from benchmarks.plots import MARKERS

    looks = [(provider.color, MARKERS[name]) for name, provider in PROVIDERS.items()]
    assert len(set(looks)) == len(looks) == len(MARKERS)


def test_pages_show_the_committed_results() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    from benchmarks import pages

    for page in pages.PAGES:
        text = page.read_text(encoding="utf-8")
        assert pages.filled(text) == text, f"{page} is outdated: run python -m benchmarks.pages"
    # Every measured number of the front page is in a block made from the results.
    front = pages.BLOCK.sub("", pages.PAGES[0].read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```", "", front, flags=re.DOTALL)
    units = r"(ms\b|us\b|GB/s|TB/s|TFLOP/s|tokens/s|times|%)"
    measured = re.compile(rf"\b\d[\d.]* {units}")
    assert [line for line in prose.splitlines() if measured.search(line)] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--providers", "oars"), "--providers must be of ours, "),
        (("--op", "attraction"), "--op must be of attention, "),
        (("--sessions", "0"), "--sessions must be 1 to 100, got 0"),
    ],
)
def test_bad_options(options: Options, message: str) -> None:
    process = start(*options)
    printed, _ = process.communicate()
    assert process.returncode not in (0, 130)
    assert message in printed


def test_help_lists_operators_and_providers() -> None:
    printed, _ = start("--help").communicate()
    for name in (*PROVIDERS, *registry.SHAPES, "attention", "training_step"):
        assert re.search(rf"^  {re.escape(name)}(  |$)", printed, re.MULTILINE), name


@pytest.mark.slow
def test_every_gpu_case_runs_on_meta_tensors(tmp_path: Path) -> None:
    _, results = bench(tmp_path / "results.json", "--device", "meta")
    ours = [row for row in results.rows if row.provider == "ours"]
    assert len({row.op for row in ours}) == len(list((ROOT / "benchmarks").glob("test_*.py")))
    assert max(row.sizes.get("S", 0) for row in ours) == 131072
