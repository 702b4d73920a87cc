"""Select a backend inside a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from mistral_kernels.ops import dispatch, extension
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE
from mistral_kernels.ops.operator import reload_backend_setting

SetBackend = Callable[[str | None], object]  # type of the fixture `set_backend`


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
    """Run the torch backend without csrc, as on a machine without a C++ compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "uses_csrc", lambda device_type: False)
        reload_backend_setting()
        yield
    reload_backend_setting()


def select_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Select the backend in a fixture's parameter: "torch" (without csrc), "csrc" or "triton"."""
    if request.param == "csrc" and (device.type != "cpu" or not extension.load("cpu")):
        pytest.skip(f"no csrc for {device.type} tensors: {extension.status(device.type)}")
    fixtures = {"torch": ("torch_backend", "no_csrc"), "csrc": ("torch_backend",)}
    for fixture in fixtures.get(request.param, ("triton_backend",)):
        request.getfixturevalue(fixture)
    return request.param


def _set(setting: str | None) -> None:
    if setting is None:
        os.environ.pop(BACKEND_VARIABLE, None)
    else:
        os.environ[BACKEND_VARIABLE] = setting
    reload_backend_setting()
