"""swiglu: values and gradients on every backend, memory traffic, compilation, bad input."""

from __future__ import annotations

import ptxrun
import pytest
import torch
import torch._dynamo.testing
from support.helpers import FLOATS, TARGETS, assert_matches_reference, compile_only
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_kernels.ops import reference
from mistral_kernels.ops.swiglu import swiglu

eager = reference.eager_arithmetic()(reference.swiglu)
ops = torch.ops.mistral_kernels


class Passes(TorchDispatchMode):
    """The operators, views aside, that run inside."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.operators.append(func.name())
        return func(*args, **(kwargs or {}))


both_forms = pytest.mark.parametrize("fused", [False, True], ids=["two", "fused"])


def make_inputs(shape, dtype, device, fused=False, frozen=""):
    """gate and up of this shape, or both in one."""
    if fused:
        shape = (*shape[:-1], 2 * shape[-1])
    return {
        name: (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_(name != frozen)
        for name in (("gate",) if fused else ("gate", "up"))
    }


@both_forms
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1,), (65, 111), (2, 3, 1000), (3, 5000)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(shape, dtype, fused, backend, device):
    assert_matches_reference(swiglu, eager, make_inputs(shape, dtype, device, fused))


def test_scalars(backend, device):
    assert_matches_reference(swiglu, eager, make_inputs((), torch.float32, device))


@pytest.mark.parametrize("frozen", ["gate", "up"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_frozen_inputs(frozen, dtype, backend, device):
    assert_matches_reference(swiglu, eager, make_inputs((65, 111), dtype, device, frozen=frozen))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_halves_of_a_fused_projection(dtype, backend, device):
    """Wherever its rows lie; as one tensor the same bits, of one gradient."""
    wide = torch.randn(5, 7, 66, device=device).to(dtype)
    spread = torch.stack((wide, wide), dim=-1)[..., 0]
    for fused in (wide, wide.transpose(0, 1), wide[..., :64], spread):
        halves = fused.chunk(2, dim=-1)
        inputs = dict(
            zip(("gate", "up"), (x.detach().requires_grad_() for x in halves), strict=True)
        )
        assert_matches_reference(swiglu, eager, inputs, strided_gradients=True)
        whole = {"gate": fused.detach().requires_grad_()}
        assert_matches_reference(swiglu, eager, whole, strided_gradients=True)
        outs = swiglu(**inputs), swiglu(**whole)
        assert torch.equal(*outs)
        dy = torch.randn_like(outs[0])
        *parts, dwhole = torch.autograd.grad(outs, (*inputs.values(), *whole.values()), (dy, dy))
        assert torch.equal(torch.cat(parts, dim=-1), dwhole)
        assert dwhole.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_gates(dtype, backend, device):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device).to(dtype)
    out = swiglu(gate, torch.full_like(gate, 2.0))
    assert out.tolist()[2:] == (2 * gate).tolist()[2:]
    assert (out[:2].abs() < 1e-6).all()


def test_float64_on_the_torch_backend(device, torch_backend):
    for fused in (False, True):
        inputs = make_inputs((3, 7), torch.float64, device, fused)
        assert torch.autograd.gradcheck(swiglu, tuple(inputs.values()))


def test_without_gradients(backend, device):
    """Inputs are left alone, and no graph is kept."""
    fused = torch.randn(5, 22, device=device)
    before = fused.clone()
    for inputs in (fused.chunk(2, dim=-1), (fused,)):
        out = swiglu(*inputs)
        torch.testing.assert_close(out, reference.swiglu(*inputs))
        assert torch.equal(fused, before)
        assert out.grad_fn is None


@both_forms
def test_second_derivative_raises(fused, backend, device):
    inputs = make_inputs((3, 8), torch.float32, device, fused)
    (dgate,) = torch.autograd.grad(swiglu(**inputs).sum(), inputs["gate"], create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu can be differentiated only once"):
        dgate.sum().backward()


@pytest.mark.kernels
@both_forms
def test_offsets_past_int32(fused, triton_backend, device):
    """The last row begins past element 2^31; pages that are not touched cost nothing."""
    stride = 2**30 + 8
    inputs = {}
    for name in ("gate",) if fused else ("gate", "up"):
        memory = torch.UntypedStorage((2 * stride + 64) * 2, device=device)
        x = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (3, 64), (stride, 1))
        inputs[name] = x.copy_(torch.randn(3, 64)).requires_grad_()
    assert_matches_reference(swiglu, eager, inputs)


@both_forms
def test_torch_compile(fused, backend, device):
    """One graph, and one compilation, for every batch size; the same numbers as without."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 8, 65):
        inputs = make_inputs((2, rows, 64), torch.float32, device, fused)
        assert_matches_reference(compiled, eager, inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_opcheck(transposed, backend, device):
    """Schemas and fakes, strides of the outputs included, agree with what the operators do."""
    dy, gate, up, fused = (torch.randn(3, 5, n, device=device) for n in (64, 64, 64, 128))
    if transposed:
        dy, gate, up, fused = (x.transpose(0, 1) for x in (dy, gate, up, fused))
    torch.library.opcheck(ops.swiglu_forward.default, (gate, up))
    torch.library.opcheck(ops.swiglu_forward.default, (fused, None))
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(ops.swiglu_backward.default, (dy, gate, up, *mask))
        torch.library.opcheck(ops.swiglu_backward.default, (dy, fused, None, *mask))


@both_forms
def test_bytes_moved(fused, triton_backend, device):
    """At Mistral-7B's size, at most 1.02 of the minimum, forward and backward, in full sectors.

    One launch each way, the gradient of the fused form included: nothing is put together.
    """
    if device.type != "cpu":
        pytest.skip("ptxrun counts on CPU tensors")
    whole = torch.randn(256, 2 * 14336, device=device).bfloat16()
    inputs = [x.detach().requires_grad_() for x in ([whole] if fused else whole.chunk(2, dim=-1))]
    size = whole.numel()
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        y = swiglu(*inputs)
        dy = torch.ones_like(y)
        with Passes() as passes:
            torch.autograd.grad(y, inputs, dy)
        forward, backward = ptxrun.profiles()
    assert passes.operators == ["mistral_kernels::swiglu_backward"]
    for profile, tensors in ((forward, 3), (backward, 5)):
        assert profile.dram_bytes <= 1.02 * tensors * size
        useful = profile.global_read_bytes + profile.global_write_bytes
        assert useful / profile.global_requests == 512  # 16 bytes a lane


@both_forms
def test_no_races(fused, triton_backend, device):
    if device.type != "cpu":
        pytest.skip("ptxrun checks on CPU tensors")
    with ptxrun.options(racecheck=True):
        inputs = make_inputs((70, 2100), torch.float32, device, fused)
        assert_matches_reference(swiglu, eager, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cols", [111, 14336])
def test_compile_matrix(cols, target, set_backend):
    """Within the target's registers, with the launch parameters chosen for it."""
    set_backend("triton")
    # Of the short types one: they take as many registers.
    for dtype in (torch.float32, TARGETS[target].dtypes()[-1]):
        with compile_only(target) as kernels:
            for fused in (False, True):
                y = swiglu(**make_inputs((65, cols), dtype, torch.device("cpu"), fused))
                y.backward(torch.ones_like(y))
        assert {kernel.name for kernel in kernels} == {"_forward_kernel", "_backward_kernel"}
        for kernel in kernels:
            kernel.assert_healthy()


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (X, X[0], ValueError, r"up must be \(3, 4\), got \(4,\)"),
        (X, X.half(), TypeError, "up must have gate's dtype torch.float32, got torch.float16"),
        (X, X.to("meta"), ValueError, "up must be on cpu like gate, got meta"),
        (X[:, :3], None, ValueError, r"gate without up must be .*, an even .*, got \(3, 3\)"),
        (X[0, 0], None, ValueError, r"gate without up must be \(..., 2 \* inter.*, got \(\)"),
        (X.int(), None, TypeError, "gate must be float16, .*, got torch.int32"),
        (X.int(), X.int(), TypeError, "gate must be float16, .*, got torch.int32"),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)


@pytest.mark.kernels
def test_float64_on_triton(triton_backend, device):
    x = X.double().to(device)
    with pytest.raises(TypeError, match="gate must be .* on the triton backend, got torch.float64"):
        swiglu(x, x)
