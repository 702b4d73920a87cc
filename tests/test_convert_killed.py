"""Test the convert command ended by signals at random times: no partial result, no remains."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.small_checkpoints import random_state

from mistral_kernels import MistralConfig, convert
from mistral_kernels.checkpoint import save_hf

CONFIG = MistralConfig(
    vocab_size=5000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_until(source: Path, target: Path, number: int, seconds: float) -> tuple[int, str]:
    """Convert; send the signal `seconds` after writing began; return the exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mistral_kernels.convert", str(source), str(target)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not partial_folders(target.parent):
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def partial_folders(parent: Path) -> set[Path]:
    return {path for path in parent.iterdir() if ".partial-" in path.name}


@pytest.mark.slow
def test_signals_leave_no_partial_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check SIGKILL, SIGTERM, SIGHUP and SIGINT.

    Only SIGKILL may leave a partial folder, which the next conversion removes.
    """
    source, out = tmp_path / "hf", tmp_path / "out"
    save_hf(random_state(CONFIG).items(), CONFIG, source, dtype=torch.float32)
    out.mkdir()
    started = time.perf_counter()
    assert convert.main([str(source), str(out / "whole")]) == 0
    duration = time.perf_counter() - started
    expected = files(out / "whole")
    codes = {number: -number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)}
    codes[signal.SIGINT] = 130
    for i in range(16):
        number, target = list(codes)[i % 4], out / f"target{i}"
        seconds = 0 if i < 4 else random.uniform(0, duration)
        code, errors = run_until(source, target, number, seconds)
        partial = partial_folders(out)
        if target.exists():  # the signal came after the end of the conversion
            assert files(target) == expected
        else:
            assert code == codes[number]
            assert "Traceback" not in errors
        assert not partial or number == signal.SIGKILL
        caplog.clear()
        assert convert.main([str(source), str(out / f"again{i}")]) == 0
        assert files(out / f"again{i}") == expected
        assert not partial_folders(out)
        assert [record.message for record in caplog.records] == [
            f"removed {path}, which an interrupted run had left" for path in partial
        ]
        shutil.rmtree(out / f"again{i}")
        shutil.rmtree(target, ignore_errors=True)
