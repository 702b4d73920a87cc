"""What tests of csrc's kernels for the CPU share."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch

from mistral_kernels.ops import compiler, extension, linear, linear_int8


def fill_fresh_memory(byte: int) -> None:
    """Let malloc fill what it returns with the other bits: csrc allocates its outputs itself.

    0x80 makes all bytes 0x7f, a float16 NaN and the largest numbers of other dtypes; 0 stops it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-6, byte)  # M_PERTURB


@pytest.fixture(params=compiler.INSTRUCTION_SETS)
def operators(request, monkeypatch):
    """Return the operators, with csrc's kernels for one instruction set."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    library = torch.ops.mistral_kernels
    best, *others = library.instruction_sets().split()
    if request.param not in (best, *others):
        pytest.skip(f"this processor has no {request.param}")
    usual = os.environ.get(extension.CPU_VARIABLE, best)
    monkeypatch.setenv(extension.CPU_VARIABLE, request.param)
    monkeypatch.setattr(extension, "_libraries", {})
    assert extension.status("cpu").endswith(f", kernels for {request.param}")
    fill_fresh_memory(0x80)
    yield library
    fill_fresh_memory(0)
    library.use_instruction_set(usual)
    torch.set_num_threads(1)


@pytest.fixture
def kernel_rows(monkeypatch):
    """How many rows each call of csrc's products had."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    seen = []
    for module in (linear, linear_int8):

        def call(x, *rest, operator=module._linear_op):
            seen.append(len(x))
            return operator(x, *rest)

        def leave_to_pytorch(*args, run=module._linear_op._torch):
            seen.pop()
            return run(*args)

        monkeypatch.setattr(module._linear_op, "_torch", leave_to_pytorch)
        monkeypatch.setattr(module, "_linear_op", call)
    return seen
