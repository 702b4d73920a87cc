"""Test mangled weight files and configurations: correct values or an error of one line.

A crash or a hang fails the test.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "mangled_checkpoints.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("safetensors", 700), ("pickles", 700), ("configs", 600)]
)
def test_mangled_files_are_read_correctly_or_refused(
    kind: str, count: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Read mangled files in a subprocess: a mapped file that is truncated can kill the process."""
    folders = [str(Path(__file__).parent), str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    seed = request.config.option.seed
    ended = subprocess.run(
        [sys.executable, SCRIPT, kind, str(count), str(seed), tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if ended.returncode:
        inputs = [
            f"{path.name}: {base64.b85encode(zlib.compress(path.read_bytes())).decode()}"
            for path in (tmp_path / "mangled").iterdir()
        ]
        pytest.fail("\n".join([f"exit code {ended.returncode}", ended.stderr[-4000:], *inputs]))
    print(ended.stdout)
