"""The kernel tests, repeated under Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when it is first imported. Each test file therefore runs in a
process of its own, so that several cores can share the files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
KERNELS = re.compile(r"mark\.kernels|def test_\w+\([^)]*\bbackend\b")
FILES = [
    str(path.relative_to(TESTS))
    for path in sorted(TESTS.rglob("test_*.py"))
    if path != Path(__file__)
    and KERNELS.search(path.read_text())
    and path.parent == Path(__file__).parent  # tests in other folders run compiled, or are slow
]
NO_TESTS = 5  # pytest's exit code if all kernel tests of a file are slow


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file, request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist"]
    command += ["-m", "kernels and not slow"]
    command += [str(TESTS / file), f"--seed={request.config.option.seed}"]
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, NO_TESTS), result.stdout + result.stderr


def test_kernel_test_files_are_found():
    names = {Path(file).name for file in FILES}
    assert {"test_attention_kernels.py", "test_decode_kernels.py", "test_rms_norm.py"} <= names
