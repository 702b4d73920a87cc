"""Choose a backend inside a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from mistral_kernels.ops import dispatch, extension
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE
from mistral_kernels.ops.operator import choose_again

SetBackend = Callable[[str | None], object]  # what the fixture `set_backend` returns


@contextmanager
def use_backend(setting: str | None) -> Iterator[None]:
    """Set MISTRAL_KERNELS_BACKEND, or remove it."""
    before = os.environ.get(BACKEND_VARIABLE)
    _set(setting)
    try:
        yield
    finally:
        _set(before)


@contextmanager
def without_csrc() -> Iterator[None]:
    """Let PyTorch serve CPU tensors on the torch backend, as where nothing can be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "uses_csrc", lambda device_type: False)
        choose_again()
        yield
    choose_again()


def select_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Select what a fixture's parameter names: PyTorch without csrc, csrc, or Triton."""
    if request.param == "csrc" and (device.type != "cpu" or not extension.load("cpu")):
        pytest.skip(f"csrc for {device.type} tensors: {extension.status(device.type)}")
    fixtures = {"torch": ("torch_backend", "no_csrc"), "csrc": ("torch_backend",)}
    for fixture in fixtures.get(request.param, ("triton_backend",)):
        request.getfixturevalue(fixture)
    return request.param


def _set(setting: str | None) -> None:
    if setting is None:
        os.environ.pop(BACKEND_VARIABLE, None)
    else:
        os.environ[BACKEND_VARIABLE] = setting
    choose_again()
