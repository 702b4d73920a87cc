"""Fixtures of the tests of csrc's CPU kernels."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from mistral_kernels.ops import compiler, extension, linear, linear_int8


def fill_fresh_memory(byte: int) -> None:
    """Make malloc fill new memory with the complement of `byte`; 0 disables the filling.

    Outputs that a kernel of csrc does not write then hold wrong values. 0x80 makes all bytes 0x7f,
    which is NaN in float16 and close to the largest number in other dtypes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-6, byte)  # M_PERTURB


@pytest.fixture(params=compiler.INSTRUCTION_SETS)
def operators(request):
    """Return the operators, running csrc's kernels for one instruction set."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    library = torch.ops.mistral_kernels
    best, *others = library.instruction_sets().split()
    if request.param not in (best, *others):
        pytest.skip(f"this processor has no {request.param}")
    library.use_instruction_set(request.param)
    fill_fresh_memory(0x80)
    yield library
    fill_fresh_memory(0)
    library.use_instruction_set(best)
    torch.set_num_threads(1)


@pytest.fixture
def kernel_rows(monkeypatch):
    """Return a list that records the number of rows of each call of csrc's linear kernels."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    seen = []
    for module in (linear, linear_int8):

        def call(x, *rest, operator=module._linear_op):
            seen.append(len(x))
            return operator(x, *rest)

        def run_in_pytorch(*args, run=module._linear_op._torch):
            seen.pop()
            return run(*args)

        monkeypatch.setattr(module._linear_op, "_torch", run_in_pytorch)
        monkeypatch.setattr(module, "_linear_op", call)
    return seen
