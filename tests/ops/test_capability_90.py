"""Attention tests on kernels compiled for sm_90a, with wgmma, TMA and mbarriers.

ptxrun executes these kernels in separate processes, because its compute capability is an option of
the test session.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ptxrun
import pytest
import torch

HERE = Path(__file__).parent
FILES = ["test_attention_kernels.py", "test_decode_kernels.py"]


@pytest.fixture(autouse=True)
def ptxrun_executes():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU executes only kernels compiled for its own architecture")
    if reason := ptxrun.missing():
        pytest.skip(f"ptxrun cannot execute PTX: {reason}")


def run_tests(request, *selection):
    """Run tests at capability 90 and check that they pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--capability=90"]
    command += [*selection, f"--seed={request.config.option.seed}"]
    result = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_forward_and_backward(request):
    """Run one case of values and gradients, which takes less than a minute."""
    run_tests(request, f"{HERE / FILES[0]}::test_values_and_gradients", "-k", "causal")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_all(file, request):
    """Run all tests of a file: values, gradients, races, addresses and memory traffic."""
    run_tests(request, str(HERE / file), "-m", "not slow", "-k", "not on_the_torch_backend")
