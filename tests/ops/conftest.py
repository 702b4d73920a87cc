"""What tests of csrc's kernels for the CPU share."""

from __future__ import annotations

import os

import pytest
import torch

from mistral_kernels.ops import extension


@pytest.fixture(params=extension._INSTRUCTION_SETS)
def operators(request, monkeypatch):
    """The library with its kernels for one instruction set."""
    library = extension.load("cpu")
    if library is None:
        pytest.skip(extension.status("cpu"))
    best, *others = library.instruction_sets().split()
    if request.param not in (best, *others):
        pytest.skip(f"this processor has no {request.param}")
    usual = os.environ.get(extension.CPU_VARIABLE, best)
    monkeypatch.setenv(extension.CPU_VARIABLE, request.param)
    monkeypatch.setattr(extension, "_libraries", {})
    assert extension.status("cpu").endswith(f", kernels for {request.param}")
    yield extension.load("cpu")
    library.use_instruction_set(usual)
    torch.set_num_threads(1)
