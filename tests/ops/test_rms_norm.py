"""rms_norm: values and gradients on every backend, memory traffic, compilation, bad input."""

from __future__ import annotations

import ptxrun
import pytest
import torch
import torch._dynamo.testing
from support.helpers import FLOATS, TARGETS, assert_matches_reference, compile_only
from torch import Tensor

from mistral_kernels.ops import reference
from mistral_kernels.ops.rms_norm import rms_norm

forward_op = torch.ops.mistral_kernels.rms_norm_forward.default
backward_op = torch.ops.mistral_kernels.rms_norm_backward.default

# The widest are shared by programs in backward.
SHAPES = [
    (0, 64),
    (1, 4096),
    (65, 1),
    (63, 7),
    (65, 64),
    (2, 33, 111),
    (9, 1000),
    (5, 9001),
    (3, 16384),
]

# Half of all, in which every two of shape, dtype and residual meet.
CASES = [
    pytest.param(
        *(shape, dtype, residual),
        id=f"{'x'.join(map(str, shape))}-{dtype}{'-residual' if residual else ''}",
    )
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(FLOATS)
    for residual in (False, True)
    if (i + j + residual) % 2 == 0
]


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    residual: bool = False,
    frozen: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    shapes = {"x": shape, "weight": shape[-1:], **({"residual": shape} if residual else {})}
    return {
        name: torch.randn(shape, device=device).to(dtype).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("shape", "dtype", "residual"), CASES)
def test_values_and_gradients(shape, dtype, residual, backend, device):
    inputs = make_inputs(shape, dtype, device, residual)
    if residual and shape[-1] == 1:
        # y is then the sign of x + residual: where they cancel, their rounding decides, by luck.
        inputs["residual"].detach().copysign_(inputs["x"].detach())
    assert_matches_reference(rms_norm, reference.rms_norm, inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "frozen",
    [("weight",), ("x", "residual"), ("x",), ("x", "weight", "residual")],
    ids=lambda names: "+".join(names),
)
def test_frozen_inputs(frozen, dtype, backend, device):
    inputs = make_inputs((65, 64), dtype, device, residual=True, frozen=frozen)
    assert_matches_reference(rms_norm, reference.rms_norm, inputs)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, :64],  # rows of a fused projection: evenly spaced
        lambda x: x[::2, :, 64:128],  # not evenly spaced
        lambda x: x.transpose(0, 1)[:, :, :64],
        lambda x: x[:, :, ::3],  # elements not contiguous
        lambda x: x[:1, :1, :64].expand(5, 7, 64),
    ],
    ids=["slice", "uneven", "transposed", "strided", "expanded"],
)
def test_strides(view, backend, device):
    memory = make_inputs((5, 7, 192), torch.float32, device, residual=True)
    inputs = {name: view(x.detach()) for name, x in memory.items() if name != "weight"}
    inputs["weight"] = torch.randn(2 * inputs["x"].shape[-1], device=device)[::2]
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    assert_matches_reference(rms_norm, reference.rms_norm, inputs, strided_gradients=True)


def test_one_output_alone(backend, device):
    """Gradients through either output when the other is not used."""
    inputs = make_inputs((9, 64), torch.float32, device, residual=True)
    for i in (0, 1):
        assert_matches_reference(
            lambda i=i, **kw: rms_norm(**kw)[i] + 0 * kw["weight"],
            lambda i=i, **kw: reference.rms_norm(**kw)[i] + 0 * kw["weight"],
            inputs,
        )


def test_float64_on_the_torch_backend(device, torch_backend):
    x, weight, residual = make_inputs((3, 7), torch.float64, device, residual=True).values()
    assert torch.autograd.gradcheck(rms_norm, (x, weight, 1e-5, residual))


def test_no_gradient_no_graph(backend, device):
    x, weight = make_inputs((3, 64), torch.float32, device).values()
    with torch.no_grad():
        assert rms_norm(x, weight).grad_fn is None
    assert rms_norm(x.detach(), weight.detach()).grad_fn is None


def test_second_derivative_raises(backend, device):
    x, weight = make_inputs((3, 64), torch.float32, device).values()
    (dx,) = torch.autograd.grad(rms_norm(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm can be differentiated only once"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(300, 111), (70, 9001)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward_is_bitwise_repeatable(dtype, shape, backend, device):
    inputs = make_inputs(shape, dtype, device, residual=True)
    y, h = rms_norm(**inputs)
    gradients = torch.randn_like(y), torch.randn_like(h)

    def backward():
        return torch.autograd.grad((y, h), list(inputs.values()), gradients, retain_graph=True)

    first = backward()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, backward(), strict=True))


@pytest.mark.kernels
def test_offsets_past_int32(triton_backend, device):
    """The last row begins past element 2^31; pages that are not touched cost nothing."""
    stride, hidden = 2**30 + 8, 64
    memory = torch.UntypedStorage((2 * stride + hidden) * 2, device=device)
    x = torch.empty(0, dtype=torch.float16, device=device)
    x.set_(memory, 0, (3, hidden), (stride, 1))
    x.copy_(torch.randn(3, hidden))
    weight = torch.randn(hidden, device=device).half().requires_grad_()
    inputs = {"x": x.requires_grad_(), "weight": weight}
    assert_matches_reference(rms_norm, reference.rms_norm, inputs)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_torch_compile(residual, backend, device):
    """One graph, and one compilation, for every batch size; the same numbers as without."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(x, weight, residual=None):
        return rms_norm(x, weight, 1e-5, residual)

    for rows in (3, 8, 65):
        inputs = make_inputs((2, rows, 64), torch.float32, device, residual)
        assert_matches_reference(compiled, reference.rms_norm, inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_opcheck(residual, transposed, backend, device):
    """Schemas and fakes, strides of the outputs included, agree with what the operators do."""
    shape = (3, 5, 64)
    x, dy, dh = (torch.randn(shape, device=device) for _ in range(3))
    if transposed:
        x, dy, dh = x.transpose(0, 1), dy.transpose(0, 1), dh.transpose(0, 1)
    weight, rstd = torch.randn(64, device=device), torch.rand(x.shape[:2], device=device)
    for save_rstd in (False, True):
        args = x, weight, dy if residual else None, 1e-5, save_rstd
        torch.library.opcheck(forward_op, args)
    for mask in ([True, True], [True, False], [False, True]):
        args = dy, dh if residual else None, x, weight, rstd, *mask
        torch.library.opcheck(backward_op, args)


@pytest.mark.parametrize("hidden", [4096, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_bytes_moved(residual, hidden, triton_backend, device):
    """At most 1.02 of the minimum forward, 1.05 backward, in full-width accesses."""
    if device.type != "cpu":
        pytest.skip("ptxrun counts on CPU tensors")
    rows = 2048
    inputs = make_inputs((rows, hidden), torch.bfloat16, device, residual)
    tensor, vector = rows * hidden * 2, hidden * 2

    def launches(run):
        with ptxrun.options(profile=True):
            ptxrun.reset_profile()
            result = run()
            profiles = list(ptxrun.profiles())
        total = sum(p.dram_bytes for p in profiles)
        useful = sum(p.global_read_bytes + p.global_write_bytes for p in profiles)
        # A full request of a warp is 32 lanes of 16 bytes.
        return result, total, useful / sum(p.global_requests for p in profiles)

    outputs, total, request = launches(lambda: rms_norm(**inputs))
    assert total <= 1.02 * ((4 if residual else 2) * tensor + vector)
    assert request >= 480  # of 512; one store of rstd a row
    gradients = [torch.randn_like(y) for y in (outputs if residual else [outputs])]
    _, total, _ = launches(lambda: torch.autograd.grad(outputs, list(inputs.values()), gradients))
    assert total <= 1.05 * ((4 if residual else 3) * tensor + 2 * vector)


def test_no_races(triton_backend, device):
    if device.type != "cpu":
        pytest.skip("ptxrun checks on CPU tensors")
    with ptxrun.options(racecheck=True):
        for shape in ((300, 64), (70, 2100)):
            inputs = make_inputs(shape, torch.float32, device, residual=True)
            assert_matches_reference(rms_norm, reference.rms_norm, inputs)


def assert_compiles(target, dtype, hidden, residual, frozen=()):
    with compile_only(target) as kernels:
        inputs = make_inputs((65, hidden), dtype, torch.device("cpu"), residual, frozen)
        outputs = rms_norm(**inputs)
        outputs = [y for y in (outputs if residual else [outputs]) if y.requires_grad]
        wanted = [x for x in inputs.values() if x.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
    for kernel in kernels:
        kernel.assert_healthy()
    return {kernel.name for kernel in kernels}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(target, set_backend):
    """Within the target's shared memory and registers, with the launch parameters chosen for it."""
    set_backend("triton")
    compiled = assert_compiles(target, TARGETS[target].dtypes()[-1], 4096, residual=True)
    assert compiled == {"_forward_kernel", "_backward_kernel", "_sum_partials_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "hidden"),
    [
        (name, dtype, hidden)
        for name, target in TARGETS.items()
        for dtype in (torch.float32, target.dtypes()[-1])  # of the short ones one: equal registers
        for hidden in (111, 5120, 16384)
        if hidden == 5120
        or (hidden == 111 and dtype != torch.float32)
        # Rows that programs share: of each kind of architecture one.
        or (hidden == 16384 and name in ("sm_80", "sm_90", "sm_120") and dtype == torch.float32)
    ],
    ids=str,
)
def test_compile_matrix(target, dtype, hidden, set_backend):
    set_backend("triton")
    for residual in (False, True):
        assert_compiles(target, dtype, hidden, residual)
        # Less to do is fewer registers: a look where they are fewest.
        for frozen in (("weight",), ("x", "residual")) if hidden == 5120 else ():
            assert_compiles(target, dtype, hidden, residual, frozen)


X, W = torch.ones(3, 64), torch.ones(64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(), W.int()), TypeError, "x must be float16, bfloat16, .*, got torch.int32"),
        ((X, W.half()), TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
        ((X, W, 1e-5, X.half()), TypeError, "residual must have x's dtype .*, got torch.float16"),
        ((X, W[:32]), ValueError, r"x and weight must be .*, got \(3, 64\) and \(32,\)"),
        ((X, X), ValueError, r"x and weight must be .*, got \(3, 64\) and \(3, 64\)"),
        ((X[0, 0], W), ValueError, r"x and weight must be .*, got \(\) and \(64,\)"),
        ((X, W, 1e-5, X[:1]), ValueError, r"residual must be \(3, 64\), got \(1, 64\)"),
        ((X, W.to("meta")), ValueError, "weight must be on cpu like x, got meta"),
        ((X, W, 1e-5, X.to("meta")), ValueError, "residual must be on cpu like x, got meta"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments)


@pytest.mark.kernels
def test_float64_on_triton(triton_backend, device):
    with pytest.raises(TypeError, match="x must be .* on the triton backend, got torch.float64"):
        rms_norm(X.double().to(device), W.double().to(device))
