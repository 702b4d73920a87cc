"""Settings that apply to every launch."""

from __future__ import annotations

import contextlib
import os


class Options:
    """Settings that apply to every launch, as class attributes."""

    racecheck = False
    profile = False
    threads = int(os.environ.get("PTXRUN_THREADS", "1"))  # ignored with either of the above
    max_steps = int(os.environ.get("PTXRUN_MAX_STEPS", str(100_000_000)))  # basic blocks per CTA
    max_shared = 166912  # bytes per block on sm_80
    seed = 0  # if not 0, seed of a random order of warps and asynchronous work


@contextlib.contextmanager
def options(**changes):
    """Change `Options` inside a with statement: ``with ptxrun.options(racecheck=True): ...``.

    All options are restored on exit. Raises TypeError for an unknown option.
    """
    before = {name: x for name, x in vars(Options).items() if not name.startswith("_")}
    if unknown := sorted(changes.keys() - before.keys()):
        raise TypeError(f"options must be among {sorted(before)}, got {unknown}")
    try:
        for name, value in changes.items():
            setattr(Options, name, value)
        yield Options
    finally:
        for name, value in before.items():
            setattr(Options, name, value)
