"""rotary_tables, apply_rotary and apply_rotary_: exact angles, both layouts, memory layouts."""

from __future__ import annotations

import math
from fractions import Fraction

import ptxrun
import pytest
import torch
import torch._dynamo.testing
from support.helpers import FLOATS

from mistral_kernels.ops.rotary import apply_rotary, apply_rotary_, rotary_tables


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_tables_at_far_positions(theta):
    cos, sin = rotary_tables(131072, 128, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (131072, 64)
    for position in (0, 1, 4095, 32767, 131071):
        for i in range(64):
            # The float64 nearest to the exact product; its error is one rounding of the frequency.
            angle = float(position * Fraction(theta ** (-2 * i / 128)))
            allowed = 2**-24 + 4e-16 * max(1.0, angle)  # half a float32 ulp below 1, and float64
            assert abs(cos[position, i].item() - math.cos(angle)) <= allowed
            assert abs(sin[position, i].item() - math.sin(angle)) <= allowed


def make_inputs(dtype, device, head_dim=20, num_positions=5000):
    q = torch.randn(2, 7, 4, head_dim, device=device).to(dtype).requires_grad_()
    k = torch.randn(2, 7, 2, head_dim, device=device).to(dtype).requires_grad_()
    cos, sin = rotary_tables(num_positions, head_dim, 1e4, device)
    return q, k, cos, sin, torch.randint(num_positions, (2, 7), device=device)


def as_complex(x, interleaved):
    return torch.complex(*(x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1))


@pytest.mark.long
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "head_dim",
    [pytest.param(size, marks=pytest.mark.slow if size != 20 else ()) for size in (2, 20, 128)],
)
def test_each_pair_rotates_by_its_angle(head_dim, dtype, interleaved, backend, device):
    """Errors are at most one rounding of the result and two of float32.

    Gradients rotate by the negative angle.
    """
    q, k, cos, sin, positions = make_inputs(dtype, device, head_dim)
    rotation = torch.complex(cos.double(), sin.double())[positions].unsqueeze(2)
    wide = torch.promote_types(dtype, torch.float32)
    outs = apply_rotary(q, k, cos, sin, positions, interleaved)
    cotangents = [torch.randn_like(x) for x in (q, k)]
    gradients = torch.autograd.grad(outs, (q, k), cotangents)
    for x, out, dout, dx in zip((q, k), outs, cotangents, gradients, strict=True):
        assert out.dtype == dx.dtype == dtype
        assert out.shape == x.shape
        for start, end, angle in ((x, out, rotation), (dout, dx, rotation.conj())):
            exact = as_complex(start.double(), interleaved) * angle
            error = (as_complex(end.detach().double(), interleaved) - exact).abs()
            rounding = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(wide).eps
            assert (error <= rounding * exact.abs() + 1e-7 * (dtype == torch.float16)).all()


def test_layouts_differ_by_a_permutation(backend, device):
    q, k, *rest = make_inputs(torch.float32, device)

    def interleave(x):
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    expected = [interleave(x) for x in apply_rotary(q, k, *rest)]
    actual = apply_rotary(interleave(q), interleave(k), *rest, interleaved=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_scores_depend_on_distance_alone(device, torch_backend):
    q, k, cos, sin, _ = make_inputs(torch.float64, device)
    positions = torch.arange(7, device=device).expand(2, 7)

    def scores(shift):
        rotated = apply_rotary(q, k, cos, sin, positions + shift)
        return torch.einsum("bqhd,bkgd->bhgqk", *rotated)

    torch.testing.assert_close(scores(0), scores(1234), rtol=0, atol=1e-5)


def test_inputs_are_unchanged_and_may_be_views(backend, device):
    q, k, *rest = make_inputs(torch.float32, device)
    q, k = q.detach(), k.detach()
    fused = torch.cat((q, k), dim=2)
    before = fused.clone()
    views = apply_rotary(*fused.split((4, 2), dim=2), *rest)
    assert torch.equal(fused, before)
    assert all(torch.equal(a, b) for a, b in zip(views, apply_rotary(q, k, *rest), strict=True))
    packed = apply_rotary(q.flatten(0, 1), k.flatten(0, 1), *rest[:2], rest[2].flatten().int())
    assert all(torch.equal(a, b.flatten(0, 1)) for a, b in zip(packed, views, strict=True))
    none = apply_rotary(q[:, :0], k[:, :0], *rest[:2], rest[2][:, :0])
    assert [x.shape for x in none] == [(2, 0, 4, 20), (2, 0, 2, 20)]


# The shape of a tensor, and the function that slices q and k from it.
IN_MEMORY = {
    "apart": ((2, 2, 7, 4, 20), lambda x: (x[0], x[1, :, :, :2])),
    "fused": ((2, 7, 8, 20), lambda x: (x[:, :, :4], x[:, :, 4:6])),
    "packed, k first": ((7, 6, 20), lambda x: (x[:, 2:], x[:, :2])),
    "heads first": ((1, 6, 7, 20), lambda x: (x[:, :4].transpose(1, 2), x[:, 4:].transpose(1, 2))),
    "no queries": ((2, 7, 6, 20), lambda x: (x[:, :, 3:3], x)),
    "no tokens": ((2, 0, 6, 20), lambda x: (x[:, :, :4], x[:, :, 4:])),
}


@pytest.mark.parametrize(
    ("dtype", "interleaved"), [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("where", IN_MEMORY)
def test_in_place(where, dtype, interleaved, backend, device):
    """Results and gradients have the bits of `apply_rotary`; elements outside q and k are kept."""
    shape, slices = IN_MEMORY[where]
    memory, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    cos, sin = rotary_tables(5000, 20, 1e4, device)
    positions = torch.randint(5000, slices(memory)[0].shape[:-2], device=device)
    rest = cos, sin, positions, interleaved

    leaves = [x.clone().requires_grad_() for x in slices(memory)]
    outs = apply_rotary(*leaves, *rest)
    gradients = torch.autograd.grad(outs, leaves, slices(dout))
    expected, dexpected = memory.clone(), dout.clone()
    for whole, values in ((expected, outs), (dexpected, gradients)):
        for part, value in zip(slices(whole), values, strict=True):
            part.copy_(value.detach())

    leaf = memory.clone().requires_grad_()
    out = leaf.clone()
    apply_rotary_(*slices(out), *rest)
    (dx,) = torch.autograd.grad(out, leaf, dout)
    assert torch.equal(out, expected)
    assert torch.equal(dx, dexpected)

    q, k = slices(memory)
    rotated = apply_rotary_(q, k, *rest)
    assert rotated[0] is q
    assert rotated[1] is k
    assert torch.equal(memory, expected)


def make_fused(device):
    memory = torch.randn(2, 7, 6, 20, device=device)
    cos, sin = rotary_tables(5000, 20, 1e4, device)
    return memory, cos, sin, torch.randint(5000, (2, 7), device=device)


def test_tensors_that_autograd_needs_are_not_overwritten(backend, device):
    """PyTorch's own error is raised before anything is written."""
    memory, *rest = make_fused(device)
    leaf, plain = memory.clone().requires_grad_(), memory[..., 4:, :].clone()
    for q, k, message in (
        (leaf, plain, "a leaf Variable that requires grad"),
        (leaf[..., :4, :], plain, "a view of a leaf Variable that requires grad"),
        (*leaf.clone().split((4, 2), dim=-2), "the output of a function that returns multiple"),
    ):
        before = q.detach().clone(), k.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            apply_rotary_(q, k, *rest)
        assert torch.equal(q, before[0])
        assert torch.equal(k, before[1])
    saved = leaf.clone()
    square = saved.square()
    apply_rotary_(saved, plain, *rest)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        square.sum().backward()
    q, k = memory.split((4, 2), dim=-2)  # without history
    expected = apply_rotary(q, k, *rest)
    assert all(torch.equal(x, y) for x, y in zip(apply_rotary_(q, k, *rest), expected, strict=True))


@pytest.mark.parametrize(
    ("make_q_and_k", "message"),
    [
        (
            lambda x, y: (x[:, :, :1].expand_as(x), y),
            "q must have .* repeated elements, got .* 0, 1",
        ),
        (lambda x, y: (y, x[:1].expand_as(x)), r"k must have .* got .* strides \(0, 32, 8, 1"),
        (lambda x, y: (y, x[:, :1].expand_as(x)), r"k must have .* strides \(256, 0, 8, 1"),
        (lambda x, y: (x.as_strided((2, 8, 2, 8), (256, 32, 4, 1)), y), "q must have .* repeated"),
        (lambda x, y: (x.transpose(1, 2), y[:, :4]), "q must have evenly spaced tokens.*_rotary$"),
        (
            lambda x, y: (torch.stack((x, x), -1)[..., 0], y),
            "q must have .*contiguous channels",
        ),
        (lambda x, y: (x, x), "q and k must not share memory; use apply_rotary"),
        (lambda x, y: (x, x[:, :, 3:]), "q and k must not share memory"),
        (lambda x, y: (x[:, :, :3], x[:, :, 2:]), "q and k must not share memory"),
        (lambda x, y: (x[:, :, 1:], x[:, :, :2]), "q and k must not share memory"),
    ],
)
def test_in_place_requires_distinct_evenly_spaced_elements(make_q_and_k, message, backend, device):
    x, y = torch.zeros(2, 2, 8, 4, 8, device=device)
    q, k = make_q_and_k(x, y)
    cos, sin = rotary_tables(10, 8, 1e4, device)
    positions = torch.zeros(q.shape[:2], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=f"^{message}"):
        apply_rotary_(q, k, cos, sin, positions)


def test_odd_head_dim():
    with pytest.raises(ValueError, match="head_dim must be even and positive, got 7"):
        rotary_tables(10, 7, 1e4)


def test_torch_compile_in_place(backend, device):
    """Rotate slices of an argument, and of a tensor that the compiled function creates."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(memory, leaf, cos, sin, positions):
        inside = leaf * 1
        for x in (memory, inside):
            apply_rotary_(x[..., :4, :], x[..., 4:, :], cos, sin, positions)
        return inside

    for tokens in (3, 8, 65):
        memory, cos, sin, positions = make_fused(device)
        memory, positions = (x[:, :1].repeat_interleave(tokens, 1) for x in (memory, positions))
        leaf = memory.clone().requires_grad_()
        outs = apply_rotary(memory[..., :4, :], memory[..., 4:, :], cos, sin, positions)
        inside = compiled(memory, leaf, cos, sin, positions)
        assert torch.equal(memory, torch.cat(outs, dim=-2))
        assert torch.equal(inside, memory)
        (grad,) = torch.autograd.grad(inside.square().sum(), leaf)
        torch.testing.assert_close(grad, 2 * leaf)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize(("head_dim", "interleaved"), [(2, False), (36, False), (36, True)])
def test_in_place_without_races(head_dim, interleaved, triton_backend, device):
    """No thread stores channels that another thread has not loaded yet, at any access width."""
    if device.type != "cpu":
        pytest.skip("ptxrun checks on CPU tensors")
    memory = torch.randn(9, 12, head_dim).half()
    q, k = memory[:, :10], memory[:, 10:]
    rest = *rotary_tables(20, head_dim, 1e4), torch.randint(20, (9,)), interleaved
    expected = torch.cat(apply_rotary(q, k, *rest), dim=1)
    with ptxrun.options(racecheck=True):
        apply_rotary_(q, k, *rest)
    assert torch.equal(memory, expected)
