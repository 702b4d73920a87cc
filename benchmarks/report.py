"""Tables of results, and their changes since an earlier file.

    python -m benchmarks.report results.json
    python -m benchmarks.report results.json --base older.json

Prints Markdown. `ms` is a median. `noise` is the largest distance of a session's quartile from it.
`/ ours` is the median of the ratios to our time in the same round; `~` marks a ratio that differs
from 1 by less than its noise. `of peak` is the share of the machine's speed in the same round. This
speed is that of a matrix product for FLOPs, and that of a copy for bytes, or of a read for
operators that write few bytes. `MB` is the peak memory of the call, without the memory in use
before it.

With --base, a row is a regression if its time grew by more than 3 % and by more than the sum of the
noise of both files; the exit code is then 1. The line below the table counts the medians within the
noise of the base: about 90 % of them for two runs of one commit on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import step_profile
from benchmarks.registry import OURS
from benchmarks.results import Results, Row

LEAST_CHANGE = 0.03


def text(results: Results) -> str:
    """Return the tables of one file as Markdown."""
    parts = [heading(results), table(results.rows), profiles(results.rows)]
    return "\n\n".join(part for part in parts if part)


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table per operator and bound."""
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
            f"| {row.case} | {row.provider} | {row.seconds * 1e3:.3f} | {_percent(row.noise)} "
            f"| {row.rate / scale:.3g} | {_percent(row.of_peak)} | {_ratio(row)} "
            f"| {_megabytes(row.peak_memory)} |"
        )
    return "\n".join(lines[1:])


def profiles(rows: Iterable[Row]) -> str:
    """Return Markdown: the profile of each case's decode step, and ours operator by operator."""
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.profile is not None:
            cases.setdefault(row.case, {})[row.provider] = row.profile
    lines: list[str] = []
    for case, found in cases.items():
        lines += [f"**profile of a decode step: {case}**", "", step_profile.summary(found), ""]
        if OURS.name in found:
            lines += [f"{OURS.name}, by operator:", "", step_profile.table(found[OURS.name]), ""]
    return "\n".join(lines)


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def _ratio(row: Row) -> str:
    return "-" if row.over_ours is None else f"{'~' if row.is_tie else ''}{row.over_ours:.2f}"


def _megabytes(x: int | None) -> str:
    return "-" if x is None else f"{x / 1e6:.0f}"


def comparison(rows: Sequence[Row], base: Sequence[Row]) -> tuple[str, list[Row]]:
    """Return Markdown, ending with the number of rows that agree, and the rows that are slower."""
    before = {row.key: row for row in base}
    shared = [(row, before[row.key]) for row in rows if row.key in before]
    lines = ["| operator | case | provider | ms before | ms | change | noise | |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---|")
    slower, agreeing = [], 0
    for row, old in shared:
        change, noise = row.seconds / old.seconds - 1, (row.noise or 0) + (old.noise or 0)
        agreeing += abs(change) <= (old.noise or 0)
        verdict = ""
        if abs(change) > max(noise, LEAST_CHANGE):
            verdict = "slower" if change > 0 else "faster"
        if verdict == "slower":
            slower.append(row)
        lines.append(
            f"| {row.op} | {row.case} | {row.provider} | {old.seconds * 1e3:.3f} "
            f"| {row.seconds * 1e3:.3f} | {change:+.1%} | ±{noise:.1%} | {verdict} |"
        )
    lines += ["", f"{agreeing} of {len(shared)} medians lie within the noise of the base"]
    return "\n".join(lines), slower


def heading(results: Results) -> str:
    """Return the machine, the versions, the commit and the command."""
    parts = [results.machine, results.date]
    parts += [f"{name} {value}" for name, value in results.environment.items()]
    if results.transcribed:
        parts.append(f"transcribed from {results.transcribed}")
    return ", ".join(parts) + f"; `{results.command}`"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of the given files; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of `python -m benchmarks`")
    parser.add_argument("--base", type=Path, help="an older file to compare with")
    args = parser.parse_args(argv)
    try:
        loaded = [Results.load(path) for path in args.results]
        base = Results.load(args.base) if args.base else None
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if base is None:
        print("\n\n".join(map(text, loaded)))
        return 0
    for results in loaded:
        print(heading(results), end="\n\n")
    print(f"compared with {heading(base)}", end="\n\n")
    changes, slower = comparison([row for results in loaded for row in results.rows], base.rows)
    print(changes)
    print(f"\n{len(slower)} slower" if slower else "\nnothing slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
