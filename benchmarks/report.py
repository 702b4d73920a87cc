"""Tables and plots of pytest-benchmark's results, and their changes since an earlier file.

    python -m pytest benchmarks --benchmark-json results.json
    python -m benchmarks.report results.json --plots plots
    python -m benchmarks.report results.json --base older.json

Prints Markdown. A time is a median, followed by its noise in percent: how far the quartiles of the
sittings reach from it. `/ ours` is the median of the ratios to our time in the same round. `of
peak` is that to what the machine did in the same round: a large matrix product for FLOPs, a copy
for bytes or, where hardly any are written, a read. `MB` is the peak memory of the call, beyond what
was there before it.

With --base, a row whose time grew by more than both noises together, and by 3 percent, is a
regression, and the exit code is 1. How many medians lie within the base's noise is told too: of
two runs of one commit, nine of ten should.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import step_profile
from benchmarks.registry import OURS

LEAST_CHANGE = 0.03


@dataclass(frozen=True)
class Row:
    """Result of one provider in one case."""

    op: str
    sizes: dict[str, Any]
    dtype: str
    direction: str
    provider: str
    bound: str
    median: float
    noise: float  # of the median, as a part of it
    rate: float  # of FLOPs or bytes a second
    of_peak: float | None
    over_ours: float | None
    peak_memory: int | None  # bytes
    profile: dict[str, Any] | None  # of `step_profile`

    @property
    def key(self) -> tuple[Any, ...]:
        return self.op, tuple(self.sizes.items()), self.dtype, self.direction, self.provider

    @property
    def case(self) -> str:
        sizes = " ".join(
            f"{name}={'none' if value is None else value}" for name, value in self.sizes.items()
        )
        return f"{sizes}, {self.dtype}, {self.direction}"


def rows_of(results: dict[str, Any]) -> list[Row]:
    return [
        row_of(x["extra_info"], x["stats"]["median"])
        for x in results["benchmarks"]
        if "op" in x["extra_info"]
    ]


def row_of(info: dict[str, Any], median: float) -> Row:
    work = info["flops" if info["bound"] == "FLOP" else "bytes"]
    over_ours = info.get("over_ours")
    return Row(
        **{name: info[name] for name in ("op", "sizes", "dtype", "direction", "provider", "bound")},
        median=median,
        noise=info["noise"],
        rate=work / median,
        of_peak=info.get("of_peak"),
        over_ours=statistics.median(over_ours) if over_ours else None,
        peak_memory=info.get("peak_memory"),
        profile=info.get("profile"),
    )


def table(rows: Iterable[Row]) -> str:
    """Return Markdown: operator after operator, and what limits each."""
    lines: list[str] = []
    shown = None
    for row in rows:
        if (row.op, row.bound) != shown:
            shown = row.op, row.bound
            rate = "TFLOP/s" if row.bound == "FLOP" else "GB/s"
            lines += ["", f"**{row.op}**", ""]
            lines.append(f"| case | provider | ms | noise | {rate} | of peak | / ours | MB |")
            lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
        scale = 1e12 if row.bound == "FLOP" else 1e9
        lines.append(
            f"| {row.case} | {row.provider} | {row.median * 1e3:.3f} | ±{row.noise:.1%} "
            f"| {row.rate / scale:.3g} | {_percent(row.of_peak)} | {_ratio(row.over_ours)} "
            f"| {_megabytes(row.peak_memory)} |"
        )
    return "\n".join(lines[1:])


def profiles(rows: Iterable[Row]) -> str:
    """Return Markdown: the parts of each case's steps, and ours operator by operator."""
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.profile is not None:
            cases.setdefault(row.case, {})[row.provider] = row.profile
    lines: list[str] = []
    for case, found in cases.items():
        lines += [f"**a step, profiled: {case}**", "", step_profile.summary(found), ""]
        if OURS.name in found:
            lines += [f"{OURS.name}, by operator:", "", step_profile.table(found[OURS.name]), ""]
    return "\n".join(lines)


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def _ratio(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def _megabytes(x: int | None) -> str:
    return "-" if x is None else f"{x / 1e6:.0f}"


def comparison(rows: Sequence[Row], base: Sequence[Row]) -> tuple[str, list[Row]]:
    """Return Markdown, ending with the number of rows that agree, and the slower rows."""
    before = {row.key: row for row in base}
    shared = [(row, before[row.key]) for row in rows if row.key in before]
    lines = ["| operator | case | provider | ms before | ms | change | noise | |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---|")
    slower, agreeing = [], 0
    for row, old in shared:
        change, noise = row.median / old.median - 1, row.noise + old.noise
        agreeing += abs(change) <= old.noise
        verdict = ""
        if abs(change) > max(noise, LEAST_CHANGE):
            verdict = "slower" if change > 0 else "faster"
        if verdict == "slower":
            slower.append(row)
        lines.append(
            f"| {row.op} | {row.case} | {row.provider} | {old.median * 1e3:.3f} "
            f"| {row.median * 1e3:.3f} | {change:+.1%} | ±{noise:.1%} | {verdict} |"
        )
    lines += ["", f"{agreeing} of {len(shared)} medians lie within the noise of the base"]
    return "\n".join(lines), slower


def heading(results: dict[str, Any]) -> str:
    """Return the machine, the versions and the commit."""
    machine = results.get("machine_info", {})
    commit = results.get("commit_info") or {}
    environment = next(
        (x["extra_info"]["environment"] for x in results["benchmarks"] if "op" in x["extra_info"]),
        {},
    )
    cpu = machine.get("cpu", {}).get("brand_raw") or machine.get("processor", "")
    parts = [environment.get("gpu"), cpu, f"{environment.get('threads')} threads"]
    parts += [f"{k} {v}" for k, v in environment.items() if k not in ("gpu", "cpu", "threads")]
    dirty = " with changes" if commit.get("dirty") else ""
    parts.append(f"commit {commit.get('id', 'unknown')[:12]}{dirty}")
    parts.append(results.get("datetime", ""))
    return ", ".join(str(part) for part in parts if part)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", nargs="+", type=Path, help="of --benchmark-json")
    parser.add_argument("--base", type=Path, help="an older one, to compare with")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNGs into it")
    args = parser.parse_args(argv)
    try:
        loaded = [json.loads(path.read_text()) for path in args.results]
        base = json.loads(args.base.read_text()) if args.base else None
    except (OSError, json.JSONDecodeError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    rows = [row for results in loaded for row in rows_of(results)]
    slower: list[Row] = []
    for results in loaded:
        print(heading(results), end="\n\n")
    if base is None:
        print(table(rows))
        if text := profiles(rows):
            print(f"\n{text}")
    else:
        print(f"compared with {heading(base)}", end="\n\n")
        text, slower = comparison(rows, rows_of(base))
        print(text)
        print(f"\n{len(slower)} slower" if slower else "\nnothing slower")
    if args.plots:
        from benchmarks.plots import draw_all

        for path in draw_all(rows, args.plots):
            print(path, file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
