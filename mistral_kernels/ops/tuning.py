"""`MISTRAL_KERNELS_AUTOTUNE=1`: launch parameters are measured at first use, and kept on disk.

Nobody needs this: the tables of `launch_configs` hold good parameters, and measuring takes a second
or two for each new kind of call. Answers are kept in `$XDG_CACHE_HOME/mistral_kernels/tuned.json`
(`~/.cache` by default); delete the file to measure again.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mistral_kernels.ops.dispatch import DeviceProperties
from mistral_kernels.ops.launch_configs import Config
from mistral_kernels.utils.files import read_json

VARIABLE = "MISTRAL_KERNELS_AUTOTUNE"


def enabled() -> bool:
    """Raises `ValueError` if the variable is neither 0 nor 1."""
    setting = os.environ.get(VARIABLE, "0")
    if setting not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is {setting!r}; expected '0' or '1'")
    return setting == "1"


def fastest(
    key: tuple[Any, ...],
    device: DeviceProperties,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
) -> Config:
    """The candidate with which `run` takes least time on this device, from the file or measured.

    `run` must be repeatable. While a CUDA graph is captured nothing can be measured; a kind of call
    not seen before then takes the first candidate.
    """
    name = ", ".join(map(str, (device.platform, device.arch, device.multiprocessors, *key)))
    kept = _kept(path()).get(name)
    for config in candidates:
        if kept == dict(config):
            return config
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = {i: _seconds(run, config) for i, config in enumerate(candidates)}
    best = candidates[min(times, key=lambda i: times[i])]
    _keep(path(), name, best)
    return best


def path() -> Path:
    """The file of answers."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as the XDG base directory specification has it
        cache = Path.home() / ".cache"
    return cache / "mistral_kernels" / "tuned.json"


def _seconds(run: Callable[[Config], None], config: Config) -> float:
    """Infinite for a configuration that the device cannot run."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(config), warmup=10, rep=50, return_mode="median")
    except OutOfResources:
        return float("inf")


@functools.cache  # forgotten when something new is kept
def _kept(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_json(file, {...: {}})
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to measure again") from None


def _keep(file: Path, name: str, config: Config) -> None:
    """Adds one answer to the file, which is whole at every moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _kept.cache_clear()  # another process may have written since
    answers = {**_kept(file), name: dict(config)}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(answers, temporary, indent=1)
    os.replace(temporary.name, file)
    _kept.cache_clear()
