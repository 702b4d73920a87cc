"""Fixtures for the tests of ptxrun and sasscost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import ptxrun
import pytest
import torch


def _running(capability: int) -> Iterator[None]:
    if reason := ptxrun.missing():
        pytest.skip(f"ptxrun cannot execute PTX: {reason}")
    with ptxrun.running(capability, racecheck=False, profile=False):
        yield
    ptxrun.reset_profile()


@pytest.fixture
def sm_80() -> Iterator[None]:
    """Execute Triton kernels on CPU tensors, compiled for sm_80."""
    yield from _running(80)


@pytest.fixture
def sm_90a() -> Iterator[None]:
    """Execute Triton kernels on CPU tensors, compiled for sm_90a, and allocate their workspace."""
    triton = pytest.importorskip("triton")
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8))
    yield from _running(90)
    triton.set_allocator(before)


@pytest.fixture(scope="session")
def nvcc() -> str:
    """Return the path of nvcc."""
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not on PATH")
    return path
