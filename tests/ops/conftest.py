"""What tests of csrc's kernels for the CPU share."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from mistral_kernels.ops import compiler, extension


@pytest.fixture(params=compiler.INSTRUCTION_SETS)
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


@pytest.fixture
def kernel_rows(monkeypatch):
    """How many rows each call of csrc's products had."""
    operators = extension.load("cpu")
    if operators is None:
        pytest.skip(extension.status("cpu"))
    seen = []

    def watched(operator):
        def call(x, *rest):
            seen.append(len(x))
            operator.default(x, *rest)

        return SimpleNamespace(default=call)

    products = {name: watched(getattr(operators, name)) for name in ("linear", "linear_int8")}
    monkeypatch.setattr(extension, "cpu_operators", lambda x: SimpleNamespace(**products))
    return seen
