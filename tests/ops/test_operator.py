"""Declared operators: selection of the implementation, and errors of bad calls."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from contextlib import suppress

import pytest
import torch
from support.backends import use_backend, without_csrc

import mistral_kernels as mk
from mistral_kernels.ops import extension
from mistral_kernels.ops.operator import Operator

ops = torch.ops.mistral_kernels
X = torch.randn(3, 8)


@pytest.fixture
def python_calls(monkeypatch):
    """Return the list of operators that have run in Python instead of csrc."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    seen = []
    original = Operator._run

    def run(self, *args):
        seen.append(self.overload.name())
        return original(self, *args)

    monkeypatch.setattr(Operator, "_run", run)
    return seen


UNREGISTERED = """
import torch
from mistral_kernels.ops.operator import Operator
double = Operator(
    "double", "(Tensor x) -> Tensor", fake=torch.empty_like, check=lambda x: None,
    torch=lambda x: 2 * x, csrc=("cpu",),
)
print(double(torch.ones(2)))
"""


def test_missing_csrc_kernel_is_named(python_calls):
    """Without this error the operator would call itself without end."""
    done = subprocess.run([sys.executable, "-c", UNREGISTERED], capture_output=True, text=True)
    message = "RuntimeError: csrc must register mistral_kernels::double for cpu"
    assert done.stderr.splitlines()[-1] == message


def test_csrc_runs_cpu_tensors(python_calls):
    expected = torch.nn.functional.silu(X) * X
    for call in (mk.swiglu, ops.swiglu_forward, torch.compile(mk.swiglu, backend="aot_eager")):
        torch.testing.assert_close(call(X, X), expected)
    with torch.inference_mode():
        torch.testing.assert_close(mk.swiglu(X, X), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.swiglu(X, X).dtype == torch.float32
    assert python_calls == []


def test_csrc_runs_attention(python_calls):
    """A silent fallback to PyTorch would be correct but much slower."""
    q, k, v = (torch.randn(1, 5, heads, 16) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    mk.attention(q, k, v, sliding_window=3, softcap=9.0, return_lse=True)
    mk.attention(q[0], k[0], v[0], cu_seqlens_q=offsets)
    ring = (q[0, :2], None, None, k[:, :4].repeat(2, 1, 1, 1), v[:, :4].repeat(2, 1, 1, 1))
    lengths, ends = (torch.tensor(x, dtype=torch.int32) for x in ([3, 9], [0, 1, 2]))
    counters = torch.zeros(16, dtype=torch.int32)
    mk.rolling_cache_attention(*ring, lengths, ends, 1, sliding_window=3, counters=counters)
    mk.flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=5, causal=True)
    assert python_calls == []


def test_unsupported_calls_fall_back_to_python(python_calls):
    double = X.double()
    expected = torch.nn.functional.silu(double) * double
    for call in (mk.swiglu, ops.swiglu_forward):
        torch.testing.assert_close(call(double, double), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(double, double), expected)
    mk.rolling_cache_update_(
        *(torch.zeros(1, 4, 1, 12) for _ in range(2)),  # csrc requires multiples of 8 as head_dim
        *(torch.ones(1, 1, 12) for _ in range(2)),
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        1,
    )
    assert len(python_calls) == 5


def test_disabled_csrc_is_not_called(python_calls):
    with without_csrc():
        mk.swiglu(X, X)
    mk.swiglu(X, X)
    assert len(python_calls) == 1


def test_triton_on_cpu_tensors(python_calls, triton_runs):
    """Triton can be selected and deselected while csrc's library is loaded."""
    expected = mk.swiglu(X, X)
    with use_backend("triton"):
        torch.testing.assert_close(mk.swiglu(X, X), expected)
        torch.testing.assert_close(ops.swiglu_forward(X, X), expected)
        with pytest.raises(TypeError, match=r"gate must be .* on the triton backend, got torch.fl"):
            mk.swiglu(X.double(), X.double())
    assert len(python_calls) == 3
    mk.swiglu(X, X)
    assert len(python_calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_errors_of_public_functions_and_operators_match(dtype):
    """A public function raises ValueError; an operator called by name has the same message."""
    x, other = X.to(dtype), X[:2].to(dtype)
    with pytest.raises(ValueError, match=r"^up must be \(3, 8\), got \(2, 8\)$"):
        mk.swiglu(x, other)
    with pytest.raises((ValueError, RuntimeError), match=r"up must be \(3, 8\), got \(2, 8\)$"):
        ops.swiglu_forward(x, other)


def test_errors_of_pytorch_are_not_replaced(monkeypatch):
    """The exception of an earlier call must not be raised again."""
    with pytest.raises((ValueError, RuntimeError)):
        ops.swiglu_forward(X.double(), X[:2].double())
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
        ops.swiglu_forward(3, None)
    assert mk.swiglu(X, X).shape == X.shape


def test_invalid_backend_is_named():
    code = "import torch, mistral_kernels as mk; mk.swiglu(torch.ones(2), torch.ones(2))"
    environment = {**os.environ, "MISTRAL_KERNELS_BACKEND": "fast"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "ValueError: MISTRAL_KERNELS_BACKEND must be 'auto', 'triton' or" in done.stderr


def written_calls():
    """Return calls that write to tensors, each with these tensors."""
    q, k, tables = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(2, 10, 4)
    ring = [torch.zeros(1, 4, 2, 8) for _ in range(2)]
    lengths, offsets = (torch.tensor(x, dtype=torch.int32) for x in ([0], [0, 3]))
    return (
        (lambda: mk.apply_rotary_(q, k, *tables, torch.arange(3)), (q, k)),
        (lambda: mk.rolling_cache_update_(*ring, q, k, lengths, offsets, 3), ring),
    )


def test_writes_increment_versions(backend):
    """Autograd then refuses a tensor that was saved before a write."""
    for call, written in written_calls():
        before = [x._version for x in written]
        call()
        assert all(x._version > y for x, y in zip(written, before, strict=True))
    saved = torch.randn(3, 2, 8, requires_grad=True) * 1
    result = saved.pow(2).sum()
    with torch.no_grad():
        mk.apply_rotary_(saved, torch.randn(3, 2, 8), *torch.randn(2, 10, 4), torch.arange(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_sparse_and_quantized_tensors_are_refused():
    weight = torch.ones(8)
    for x in (X.to_sparse(), X.to_sparse_csr()):
        with pytest.raises(ValueError, match=r"^x must be a dense tensor, got layout "):
            mk.rms_norm(x, weight)
        with pytest.raises(ValueError, match=r"^up must be a dense tensor, got layout "):
            mk.swiglu(X, x)
    with pytest.raises(TypeError, match=r"^x must be float"):
        mk.rms_norm(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), weight)


def test_interrupt_in_python_passes_through_csrc(monkeypatch):
    with pytest.raises((RuntimeError, ValueError)):
        ops.swiglu_forward(torch.randn(3), None)

    def interrupt(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Operator, "_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mk.swiglu(X.double(), X.double())


def test_a_failed_call_keeps_no_tensor():
    x = torch.randn(3, 7)
    alive = weakref.ref(x)
    gc.disable()
    try:
        with suppress(ValueError):
            mk.rms_norm(x, torch.ones(8))
        del x
        assert alive() is None
    finally:
        gc.enable()
