"""Run a program whose Triton kernels ptxrun executes on CPU tensors.

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
        description="Run a program with Triton kernels executed on CPU tensors.",
    )
    parser.add_argument("--capability", type=int, default=80)
    parser.add_argument("--racecheck", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the model table at the end")
    parser.add_argument("--device", default="a100", help="device of the model table")
    parser.add_argument("--autotune", default="first", choices=("first", "model"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-m", dest="module", action="store_true", help="target is a module's name")
    parser.add_argument("target")
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
