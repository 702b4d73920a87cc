"""The same kernel tests under Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when it is first imported, hence another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting")
def test_kernels_in_the_interpreter(request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernels and not slow"]
    command += [str(Path(__file__).parent), f"--seed={request.config.option.seed}"]
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
