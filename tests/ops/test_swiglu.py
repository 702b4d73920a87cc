"""swiglu: values and gradients on every backend, memory traffic, compilation, bad input."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from helpers import FLOATS, TARGETS, assert_matches_reference, compile_only

from mistral_kernels.ops import reference
from mistral_kernels.ops.swiglu import swiglu

eager = reference.eager_arithmetic()(reference.swiglu)
ops = torch.ops.mistral_kernels


def make_inputs(shape, dtype, device, frozen=""):
    return {
        name: (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_(name != frozen)
        for name in ("gate", "up")
    }


@pytest.mark.parametrize("shape", [(), (0, 8), (5, 0), (1,), (65, 111), (2, 3, 1000), (3, 5000)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(shape, dtype, backend, device):
    assert_matches_reference(swiglu, eager, make_inputs(shape, dtype, device))


@pytest.mark.parametrize("frozen", ["gate", "up"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_frozen_inputs(frozen, dtype, backend, device):
    assert_matches_reference(swiglu, eager, make_inputs((65, 111), dtype, device, frozen))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_halves_of_a_fused_projection(dtype, backend, device):
    fused = torch.randn(5, 7, 64, device=device).to(dtype)
    for gate, up in (fused.chunk(2, dim=-1), fused.transpose(0, 1).chunk(2, dim=-1)):
        inputs = {"gate": gate.detach().requires_grad_(), "up": up.detach().requires_grad_()}
        assert_matches_reference(swiglu, eager, inputs, strided_gradients=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_gates(dtype, backend, device):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device).to(dtype)
    out = swiglu(gate, torch.full_like(gate, 2.0))
    assert out.tolist()[2:] == (2 * gate).tolist()[2:]
    assert (out[:2].abs() < 1e-6).all()


def test_float64_on_the_torch_backend(device, monkeypatch):
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "torch")
    gate, up = make_inputs((3, 7), torch.float64, device).values()
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_without_gradients(backend, device):
    """Inputs are left alone, and no graph is kept."""
    gate, up = torch.randn(2, 5, 11, device=device)
    before = gate.clone(), up.clone()
    out = swiglu(gate, up)
    torch.testing.assert_close(out, reference.swiglu(gate, up))
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
    assert out.grad_fn is None


def test_second_derivative_raises(backend, device):
    gate, up = make_inputs((3, 8), torch.float32, device).values()
    (dgate,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu can be differentiated only once"):
        dgate.sum().backward()


@pytest.mark.kernels
def test_offsets_past_int32(triton_backend, device):
    """The last row begins past element 2^31; pages that are not touched cost nothing."""
    stride = 2**30 + 8
    inputs = {}
    for name in ("gate", "up"):
        memory = torch.UntypedStorage((2 * stride + 64) * 2, device=device)
        x = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (3, 64), (stride, 1))
        inputs[name] = x.copy_(torch.randn(3, 64)).requires_grad_()
    assert_matches_reference(swiglu, eager, inputs)


def test_torch_compile(backend, device):
    """One graph, and one compilation, for every batch size; the same numbers as without."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 8, 65):
        assert_matches_reference(compiled, eager, make_inputs((2, rows, 64), torch.float32, device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_opcheck(transposed, backend, device):
    """Schemas and fakes, strides of the outputs included, agree with what the operators do."""
    dy, gate, up = (torch.randn(3, 5, 64, device=device) for _ in range(3))
    if transposed:
        dy, gate, up = (x.transpose(0, 1) for x in (dy, gate, up))
    torch.library.opcheck(ops.swiglu_forward.default, (gate, up))
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(ops.swiglu_backward.default, (dy, gate, up, mask))


def test_bytes_moved(triton_backend, device):
    """At Mistral-7B's size, at most 1.02 of the minimum, forward and backward, in full sectors."""
    ptxrun = pytest.importorskip("ptxrun", reason="ptxrun, which counts bytes, is absent")
    if device.type != "cpu":
        pytest.skip("ptxrun counts on CPU tensors")
    fused = torch.randn(256, 2 * 14336, device=device).bfloat16()
    gate, up = (x.detach().requires_grad_() for x in fused.chunk(2, dim=-1))
    size = gate.numel() * 2
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        y = swiglu(gate, up)
        torch.autograd.grad(y, (gate, up), torch.ones_like(y))
        forward, backward = ptxrun.profiles()
    for profile, tensors in ((forward, 3), (backward, 5)):
        assert profile.dram_bytes <= 1.02 * tensors * size
        useful = profile.global_read_bytes + profile.global_write_bytes
        assert useful / profile.global_requests == 512  # 16 bytes a lane


def test_no_races(triton_backend, device):
    ptxrun = pytest.importorskip("ptxrun", reason="ptxrun, which finds races, is absent")
    if device.type != "cpu":
        pytest.skip("ptxrun checks on CPU tensors")
    with ptxrun.options(racecheck=True):
        assert_matches_reference(swiglu, eager, make_inputs((70, 2100), torch.float32, device))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cols", [111, 14336])
def test_compile_matrix(cols, target, monkeypatch):
    """Within the target's registers, with the launch parameters chosen for it."""
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "triton")
    for dtype in TARGETS[target].dtypes():
        with compile_only(target) as kernels:
            y = swiglu(**make_inputs((65, cols), dtype, torch.device("cpu")))
            y.backward(torch.ones_like(y))
        assert {kernel.name for kernel in kernels} == {"_forward_kernel", "_backward_kernel"}
        for kernel in kernels:
            kernel.assert_healthy()


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (X, X[0], ValueError, r"up must have gate's shape \(3, 4\), got \(4,\)"),
        (X, X.half(), ValueError, "up must have gate's dtype torch.float32, got torch.float16"),
        (X, X.to("meta"), ValueError, "up must be on cpu like gate, got meta"),
        (X.int(), X.int(), TypeError, "gate must be floating point, got torch.int32"),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)


@pytest.mark.kernels
def test_float64_on_triton(triton_backend, device):
    x = X.double().to(device)
    with pytest.raises(TypeError, match="gate is torch.float64; the triton backend takes float16"):
        swiglu(x, x)
