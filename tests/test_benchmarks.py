"""The benchmark suite: wrong providers are not timed, GPU cases hold, reports list changes."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import registry, report, sittings, step_profile, test_attention, timing
from benchmarks.registry import PROVIDERS, Case, Operator, Prepared
from mistral_kernels import attention

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
Options = tuple[str, ...]


def bench(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run `python -m pytest benchmarks`; return its output and the results that it writes."""
    results = folder / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-rs", "-p", "no:cacheprovider"]
    # Within a worker of pytest-xdist, pytest-benchmark would do nothing.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--benchmark-json", str(results), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(results.read_text())


def test_who_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is off by one, in our kernel or a peer's, gives a reason and no time."""
    case = test_attention.cases([test_attention.sizes(1, 64, 16, 4)], (torch.float32,))[0]

    def off_by_one(case: Any, q: Any, k: Any, v: Any) -> Any:
        window = case["W"]
        return attention(q, k, v, sliding_window=window and window + 1)

    def broken(case: Any, q: Any, k: Any, v: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    runs = {"ours": off_by_one, "SDPA": test_attention.sdpa, "eager": broken}
    monkeypatch.setattr(test_attention.Attention, "runs", runs)
    operator = test_attention.Attention(cpu=[case])
    trial = sittings.Trial(operator, case, [*runs, "flash-attn 2"], CPU)
    trial.sit(0, sittings=1, seconds=0.0)
    assert "error" in trial.refused["ours"]
    assert trial.refused["eager"] == "RuntimeError: no kernel image"
    assert trial.refused["flash-attn 2"] == PROVIDERS["flash-attn 2"].missing(CPU, torch.float32)
    assert trial.times.keys() == {"SDPA", timing.GEMM, timing.COPY, timing.READ}
    assert len(trial.all_times("SDPA")) == sittings.MIN_ROUNDS
    assert trial.over_ours("SDPA") is None


class Counting(Operator):
    """Operator of two providers that note their calls; one of them breaks after a while."""

    name = "counting"
    providers = ("eager", "SDPA")

    def __init__(self, cases: list[Case], breaks_after: int, bound: str = "FLOP") -> None:
        super().__init__(cpu=cases)
        self.breaks_after, self.bound = breaks_after, bound
        self.called: list[tuple[Case, str]] = []
        self.turns: list[int] = []
        self.prepared = self.released = 0

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        pass

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        self.prepared += 1
        calls = itertools.count()

        def call(turn: int) -> None:
            self.called.append((case, provider))
            self.turns.append(turn)
            if provider == "SDPA" and next(calls) == self.breaks_after:
                raise MemoryError("no more")

        return lambda turn: functools.partial(call, turn)

    def release(self) -> None:
        self.released += 1


def test_sittings_are_spread_over_the_session() -> None:
    """Prepare every case once, and time it again after all others."""
    cases = registry.cases([{"n": 1}, {"n": 2}], (torch.float32,), ("forward",))
    operator = Counting(cases, breaks_after=3)
    plan = [(operator, case, list(operator.providers)) for case in cases]
    trials = sittings.hold(plan, CPU, seconds=0.0, sittings=3)
    assert operator.prepared == 4
    assert operator.released == 2
    order = [case for case, _ in operator.called]
    assert [case for case, _ in itertools.groupby(order)] == 3 * cases
    for case in cases:
        trial = trials["counting", case]
        assert [len(times) for times in trial.times["eager"]] == [1, 2, 2]
        assert trial.refused == {"SDPA": "MemoryError: no more"}
        assert "SDPA" not in trial.times


def test_what_moves_bytes_is_timed_after_a_call_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Call it on other tensors before."""
    (case,) = registry.cases([{"n": 1}], (torch.float32,), ("forward",))
    timed: list[int] = []

    def note(call: Any, device: torch.device) -> float:
        call()
        timed.append(operator.turns[-1])
        return 1.0

    monkeypatch.setattr(timing, "timed", note)
    monkeypatch.setattr(timing, "peaks", lambda *_: {})
    for bound in ("byte", "FLOP"):
        operator = Counting([case], breaks_after=99, bound=bound)
        sittings.hold([(operator, case, ["eager"])], CPU, seconds=0.0, sittings=1)
        turns = [0, 1, *range(5)]  # to compile, to see how long it takes, and five rounds
        if bound == "byte":
            assert timed == [2 * turn + 1 for turn in turns]
            assert operator.turns == [x for turn in turns for x in (2 * turn, 2 * turn + 1)]
        else:
            assert timed == operator.turns == turns
        timed.clear()


def test_noise_is_that_of_sittings_and_between_them() -> None:
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
    assert report.profiles(synthetic()) == ""
    rows = [replace(row, profile=found) for row in synthetic() if row.op == "generation"]
    printed = report.profiles(rows)
    assert printed.count("| aten::mm | 3 | 1.00 |") == len({row.case for row in rows})
    assert printed.count("| eager | ") == len({row.case for row in rows})


@pytest.mark.slow
def test_a_run_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, results = bench(
        *(
            tmp_path,
            "--op",
            "rms_norm",
            "--providers",
            "ours,eager,Liger",
            "--seconds",
            "0.1",
            "--sittings",
            "2",
        )
    )
    assert "Liger: " in printed
    rows = report.rows_of(results)
    assert {row.provider for row in rows} == {"ours", "eager"}
    assert all(0 < row.of_peak < 10 and row.noise >= 0 for row in rows)
    assert all(row.over_ours == 1 for row in rows if row.provider == "ours")
    file = str(tmp_path / "results.json")
    assert report.main([file]) == 0
    table = capsys.readouterr().out
    for row in rows:
        assert f"| {row.case} | {row.provider} | {row.median * 1e3:.3f} |" in table
        assert row.case in printed
    assert f"torch {importlib.metadata.version('torch')}, " in table

    slower = copy.deepcopy(results)
    entry = slower["benchmarks"][0]
    entry["stats"]["median"] *= 1.04 + entry["extra_info"]["noise"]
    entry["extra_info"]["noise"] = 0.0
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert report.main([str(tmp_path / "slower.json"), "--base", file]) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("1 slower")
    assert f"\n{len(rows) - 1} of {len(rows)} medians lie within the noise" in printed
    assert report.main([file, "--base", file]) == 0
    assert report.main([str(tmp_path / "absent.json")]) == 2


def synthetic() -> list[report.Row]:
    """Return rows of every kind, as a machine with a GPU and every provider might give."""
    rows = []
    for operator, direction, sizes in (
        ("attention", "forward", [{"B": 1, "S": n, "W": 4096, "H": 32} for n in (1024, 4096)]),
        ("attention", "backward", [{"B": 1, "S": n, "W": None, "H": 32} for n in (1024, 4096)]),
        ("generation", "decode", [{"model": "7B", "B": 1, "tokens": n} for n in (1024, 4096)]),
        ("training_step", "step", [{"model": "7B", "S": n} for n in (1024, 4096)]),
    ):
        for i, size in enumerate(sizes):
            for j, provider in enumerate(("ours", "eager", "flash-attn 2")):
                info = {
                    "op": operator,
                    "sizes": size,
                    "dtype": "bfloat16",
                    "direction": direction,
                    "provider": provider,
                    "bound": "FLOP",
                    "flops": 1e9,
                    "bytes": 1e6,
                    "of_peak": 0.1,
                    "peak_memory": 10_000_000 * (i + j + 1),
                    "noise": 0.1,
                }
                rows.append(report.row_of(info, median=0.01 * (i + 1) * (j + 1)))
    return rows


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    from benchmarks import plots

    names = {path.stem for path in plots.draw_all(synthetic(), tmp_path)}
    expected = "attention_over_eager attention_over_flash_attn decode memory of_peak"
    assert names == set(expected.split())
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in names)
    assert plots.draw_all([], tmp_path) == []


def test_a_provider_has_one_colour() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
    from benchmarks.plots import MARKERS

    looks = [(provider.colour, MARKERS[name]) for name, provider in PROVIDERS.items()]
    assert len(set(looks)) == len(looks) == len(MARKERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--providers", "oars"), "--providers knows no 'oars', but ours, "),
        (("--op", "attraction"), "--op knows no 'attraction', but attention, "),
        (("--sittings", "0"), "--sittings must be 1 to 100, got 0"),
    ],
)
def test_bad_options(options: Options, message: str) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.slow
def test_rehearsal_of_what_a_gpu_would_run(tmp_path: Path) -> None:
    """Run every case of the GPU's lists, shapes and providers on meta tensors."""
    _, results = bench(tmp_path, "--device", "meta")
    ours = [x for x in results["benchmarks"] if x["extra_info"]["provider"] == "ours"]
    operators = {x["extra_info"]["op"] for x in ours}
    assert len(operators) == len(list((ROOT / "benchmarks").glob("test_*.py")))
    lengths = {x["extra_info"]["sizes"].get("S", 0) for x in ours}
    assert max(lengths) == 131072
