"""Processes that load or build the CPU library of csrc, each with its own build cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_kernels.ops.compiler import BUILD_VARIABLE
from mistral_kernels.ops.extension import CPU_VARIABLE

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)

STATUS = """
from mistral_kernels.ops import extension
print(extension.load("cpu"), extension.status("cpu"), sep="\\n")
"""


def settings(cache: Path, **environment: str) -> dict[str, str]:
    """Return the environment of a process with its own build cache.

    Its library is for the best instruction set only, unlike that of the tests.
    """
    inherited = {name: value for name, value in os.environ.items() if name != CPU_VARIABLE}
    own = {"TORCH_EXTENSIONS_DIR": str(cache), BUILD_VARIABLE: "auto"}
    return {**inherited, **own, **environment}


def start(
    cache: Path, code: str = STATUS, cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=settings(cache, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[bool, str, str]:
    """Return whether the library was loaded, its status without the instruction set, and stderr."""
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    loaded, status = out.splitlines()
    status, kernels, _ = status.partition(", kernels for ")
    assert bool(kernels) == (loaded == "True")
    return loaded == "True", status, error


def await_end(pid: int) -> None:
    """Wait until a process has ended. A zombie counts as ended."""
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def fake_compiler(folder: Path, *commands: str) -> str:
    """Write a compiler script that runs shell commands; return its path, a value of CXX."""
    path = folder / "compiler"
    path.write_text("\n".join(("#!/bin/sh", *commands)))
    path.chmod(0o755)
    return str(path)


def libraries(cache: Path) -> list[Path]:
    return list(cache.rglob("*.so"))


def caching_compiler(objects: Path) -> str:
    """Write a compiler script that caches objects in a folder; return its path, a value of CXX."""
    return fake_compiler(
        objects,
        'if [ "$1" = -c ]; then',
        "  for out; do :; done  # the last argument",
        "  all=$*",
        f"  object={objects}/$(echo \"${{all% -o *}}\" | cksum | tr ' ' -)",
        '  [ -e "$object" ] && exec cp "$object" "$out"',
        '  c++ "$@" && cp "$out" "$object.$$" && mv "$object.$$" "$object"',
        "else",
        '  exec c++ "$@"',
        "fi",
    )
