"""Operators called with malformed arguments raise or are correct; they never crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_kernels.ops.extension import BUILD_VARIABLE

PROGRAM = Path(__file__).parents[1] / "support" / "fuzz_operators.py"


def fuzz(seed: int, count: int, **environment: str) -> None:
    command = [sys.executable, "-X", "faulthandler", str(PROGRAM), str(seed), str(count)]
    path = os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    shown = [line for line in lines if line.startswith("FAILED")] or lines[-20:]
    assert done.returncode == 0, f"seed {seed}, exit code {done.returncode}:\n" + "\n".join(shown)


def test_malformed_calls(request):
    fuzz(request.config.option.seed, 300)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_malformed_calls(part, request):
    fuzz(request.config.option.seed + part + 1, 2500)


@pytest.mark.slow
def test_malformed_calls_without_csrc(request):
    fuzz(
        request.config.option.seed,
        2500,
        **{BUILD_VARIABLE: "never", "TORCH_EXTENSIONS_DIR": "/nonexistent"},
    )
