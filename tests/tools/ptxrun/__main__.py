"""Run a program and execute its Triton kernels on CPU tensors.

python -m ptxrun [options] script.py args...
python -m ptxrun [options] -m module args...
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import ptxrun


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m ptxrun",
        description="Run a program and execute its Triton kernels on CPU tensors.",
    )
    parser.add_argument(
        "--capability",
        type=int,
        default=80,
        help="compute capability to compile for: 80 (default), 86, 89 or 90 (sm_90a)",
    )
    parser.add_argument("--racecheck", action="store_true", help="check for data races")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="count instructions and traffic; print a table of modeled times at the end",
    )
    parser.add_argument("--device", default="a100", help="GPU of the table: a100 or h100")
    parser.add_argument(
        "--autotune",
        default="first",
        choices=("first", "model"),
        help="configuration to use: the first that compiles, or the best by modeled time",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="host threads; ignored with --racecheck or --profile",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="target is a module name")
    parser.add_argument("target", help="path of a script, or with -m the name of a module")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    names = ("racecheck", "profile", "autotune", "threads")
    ptxrun.install(given.capability, **{name: getattr(given, name) for name in names})
    sys.argv = [given.target, *given.args]
    try:
        if given.module:
            runpy.run_module(given.target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(given.target).resolve().parent))
            runpy.run_path(given.target, run_name="__main__")
    finally:
        if given.profile:
            ptxrun.report(given.device)


if __name__ == "__main__":
    main()
