"""The same kernel tests under Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when it is first imported, hence other processes: one a file, so
that several cores share them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
# Those that mention a backend; not all of them have kernels to run.
FILES = [
    str(path.relative_to(TESTS))
    for path in sorted(TESTS.rglob("test_*.py"))
    if "backend" in path.read_text() and path != Path(__file__)
]
NO_TESTS = 5


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file, request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "kernels and not slow"]
    command += [str(TESTS / file), f"--seed={request.config.option.seed}"]
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, NO_TESTS), result.stdout + result.stderr


def test_there_are_kernels_to_interpret():
    """Files with kernels are found by a word in them: these are among them."""
    names = {Path(file).name for file in FILES}
    assert {"test_attention_kernels.py", "test_decode_kernels.py", "test_kvcache.py"} <= names
