"""Time our operators and models, and other implementations of them: `python -m benchmarks`.

An implementation is called a provider. The values of every provider that runs on this machine are
checked. Each round then times every provider once. The tables are printed, and the rows are written
to a JSON file. Ctrl-C ends the run early: the completed rounds are reported and written.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.conftest import OPTIONS, operator_names
from benchmarks.registry import PROVIDERS, SHAPES
from benchmarks.results import Results

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments select; return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(given)
    folder = Path(__file__).parent
    known = operator_names()
    chosen = [name for name in (args.op or "").split(",") if name in known] or known
    options = [
        *(str(folder / f"test_{name}.py") for name in chosen),
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--results",
        str(args.results),
    ]
    options += ["--command", shlex.join(["python", "-m", "benchmarks", *given])]
    for name in OPTIONS:
        if (value := getattr(args, name)) is not None:
            options += [f"--{name}", str(value)]
    if args.k:
        options += ["-k", args.k]
    before = _modified(args.results)
    code = int(pytest.main(options))
    if _modified(args.results) == before:  # nothing was timed
        return code or 1
    print(f"results: {args.results}")
    if args.plots:
        from benchmarks.plots import draw_all

        for path in draw_all(Results.load(args.results), args.plots):
            print(f"plot: {path}")
    return INTERRUPTED if code == pytest.ExitCode.INTERRUPTED else code


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=_choices(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, settings in OPTIONS.items():
        add(f"--{name}", **settings)
    add("-k", metavar="EXPRESSION", help="only cases whose names match, as pytest's -k: 'not B8'")
    add(
        "--results",
        type=Path,
        default=Path("results.json"),
        metavar="FILE",
        help="JSON file to write (default: results.json)",
    )
    add("--plots", type=Path, metavar="DIR", help="also draw PNG files into this folder")
    return parser


def _choices() -> str:
    """Describe operators, providers and shapes, for --help."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["operators:"]
    for name in operator_names():
        operator = importlib.import_module(f"benchmarks.test_{name}").OPERATOR
        lines.append(f"  {name:22}{operator.summary}")
    lines += ["", "providers, and why one cannot run here:"]
    for name, provider in PROVIDERS.items():
        missing = provider.missing(device, torch.bfloat16)
        lines.append(f"  {name:32}{missing or ''}".rstrip())
    lines += ["", "shapes:", *(f"  {name:8}{text}" for name, text in SHAPES.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
