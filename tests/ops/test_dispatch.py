"""Selection of the backend, its reason, and the error if it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from support.helpers import TARGETS, compile_only

from mistral_kernels.ops import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def select_with(set_backend):
    def select_with(setting, device):
        set_backend(setting)
        return dispatch.choose_backend(device)

    return select_with


def test_selected_backends(select_with):
    pytest.importorskip("triton")
    selected = select_with("auto", CPU)
    assert selected == ("torch", "cpu tensors: csrc's kernels or PyTorch's own")
    assert select_with("auto", GPU) == ("triton", "GPU tensors: Triton kernels")
    assert select_with("torch", GPU) == ("torch", "MISTRAL_KERNELS_BACKEND=torch")
    assert select_with("triton", GPU).name == "triton"
    assert select_with(None, CPU).name == "torch"


def test_the_variable_is_read_once(select_with, monkeypatch):
    assert select_with("torch", GPU).name == "torch"
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "auto")
    assert dispatch.choose_backend(GPU).name == "torch"


def test_unknown_setting_is_refused(select_with):
    with pytest.raises(ValueError, match="must be 'auto', 'triton' or 'torch', got 'cuda'"):
        select_with("cuda", CPU)


def test_missing_triton_raises(select_with, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed; run `pip install triton`"):
        select_with("auto", GPU)


def test_triton_on_cpu_tensors_needs_a_driver_or_the_interpreter():
    pytest.importorskip("triton")
    code = "import torch; from mistral_kernels.ops.rms_norm import rms_norm; "
    code += "rms_norm(torch.ones(2, 8), torch.ones(8))"
    environment = {**os.environ, "MISTRAL_KERNELS_BACKEND": "triton"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nothing here runs Triton kernels on cpu tensors" in result.stderr
    assert "set TRITON_INTERPRET=1" in result.stderr


def test_triton_on_cpu_tensors_with_a_driver(select_with):
    pytest.importorskip("triton")
    with compile_only("sm_90"):
        reason = select_with("triton", CPU).reason
    assert "Triton's active driver runs compiled kernels on cpu tensors" in reason


@pytest.mark.parametrize("name", TARGETS)
def test_device_properties(name):
    pytest.importorskip("triton")
    target = TARGETS[name]
    with compile_only(name):
        properties = dispatch.device_properties(torch.empty(1))
    expected = target.backend, target.arch, target.multiprocessors, target.shared_memory
    assert properties == expected


def test_as_rows():
    x = torch.randn(4, 6, 8)
    for view, copied, stride in (
        (x, False, 8),
        (x[:, :, :5], False, 8),
        (x[:, :1], False, 48),
        (x[:, ::2], False, 16),
        (x[:, :5], True, 8),  # rows are evenly spaced only within a batch
        (x[..., ::2], True, 4),
        (x[:1, :1].expand(4, 6, 8), False, 0),
    ):
        rows, row_stride = dispatch.as_rows(view)
        assert (rows.data_ptr() != view.data_ptr(), row_stride) == (copied, stride)
        flat = rows.as_strided((view.numel() // view.shape[-1], view.shape[-1]), (row_stride, 1))
        assert torch.equal(flat, view.reshape(-1, view.shape[-1]))
