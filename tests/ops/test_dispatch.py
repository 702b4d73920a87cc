"""Which backend is chosen, why, and what is said when it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from support.helpers import TARGETS, compile_only
from torch._subclasses import FakeTensorMode

from mistral_kernels.ops import dispatch, extension

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget_choices():
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def choose(monkeypatch, setting, device):
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", setting)
    return dispatch.choose_backend(device)


def test_choices(monkeypatch):
    pytest.importorskip("triton")
    chosen = choose(monkeypatch, "auto", CPU)
    assert chosen == ("torch", "cpu tensors: csrc's kernels or PyTorch's own")
    assert choose(monkeypatch, "auto", GPU) == ("triton", "GPU tensors: Triton kernels")
    assert choose(monkeypatch, "torch", GPU) == ("torch", "MISTRAL_KERNELS_BACKEND=torch")
    assert choose(monkeypatch, "triton", GPU).name == "triton"
    monkeypatch.delenv("MISTRAL_KERNELS_BACKEND")
    assert dispatch.choose_backend(CPU).name == "torch"


def test_unknown_setting(monkeypatch):
    with pytest.raises(ValueError, match="is 'cuda'; expected 'auto', 'triton' or 'torch'"):
        choose(monkeypatch, "cuda", CPU)


def test_triton_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed; run `pip install triton`"):
        choose(monkeypatch, "auto", GPU)


def test_triton_on_cpu_tensors_needs_something_to_run_it():
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


def test_triton_on_cpu_tensors_by_a_driver(monkeypatch):
    pytest.importorskip("triton")
    with compile_only("sm_90"):
        reason = choose(monkeypatch, "triton", CPU).reason
    assert "Triton's active driver runs compiled kernels on cpu tensors" in reason


def test_what_goes_to_csrc_straight(monkeypatch):
    """Only what nothing of PyTorch's has to see on its way."""
    operators = extension.load("cpu")
    if operators is None:
        pytest.skip(extension.status("cpu"))
    x = torch.randn(3, 4)
    learned, subclass = torch.nn.Parameter(x), x.as_subclass(_Subclass)
    direct = dispatch.direct_cpu_operators
    assert direct(x) is direct(x, None, x) is operators
    for other in (learned, subclass):
        assert direct(x, None, other) is direct(other, x) is None
    with torch.no_grad():
        assert direct(x, learned) is operators
        assert direct(x, subclass) is None
    assert direct(x.double()) is direct(x.to("meta")) is None
    with torch.autocast("cpu"):
        assert direct(x) is None
    with FakeTensorMode():
        assert direct(x) is None
    inside = []
    torch.func.vmap(lambda row: (inside.append(direct(row)), row)[1])(x)
    assert inside == [None]
    traced = torch.compile(lambda x: x + (direct(x) is None), backend="eager", fullgraph=True)
    assert torch.equal(traced(x), x + 1)
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "torch")
    assert direct(x) is operators
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "triton")
    with compile_only("sm_90"):
        assert direct(x) is None


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", TARGETS)
def test_device_properties(name):
    pytest.importorskip("triton")
    target = TARGETS[name]
    with compile_only(name):
        properties = dispatch.device_properties(torch.empty(1))
    expected = target.backend, target.arch, target.multiprocessors, target.shared_memory
    assert properties == expected


def test_importing_operators_does_not_import_triton():
    code = "import sys, mistral_kernels.ops.rms_norm, mistral_kernels.ops.launch_configs; "
    code += "sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_as_rows():
    x = torch.randn(4, 6, 8)
    for view, copied, stride in (
        (x, False, 8),
        (x[:, :, :5], False, 8),
        (x[:, :1], False, 48),
        (x[:, ::2], False, 16),
        (x[:, :5], True, 8),  # evenly spaced within a batch only
        (x[..., ::2], True, 4),
        (x[:1, :1].expand(4, 6, 8), False, 0),
    ):
        rows, row_stride = dispatch.as_rows(view)
        assert (rows.data_ptr() != view.data_ptr(), row_stride) == (copied, stride)
        flat = rows.as_strided((view.numel() // view.shape[-1], view.shape[-1]), (row_stride, 1))
        assert torch.equal(flat, view.reshape(-1, view.shape[-1]))
