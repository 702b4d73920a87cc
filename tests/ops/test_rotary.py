"""rotary_tables and apply_rotary: exact angles, both layouts, every backend, traffic, bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch._dynamo.testing
from helpers import FLOATS, TARGETS, assert_as_accurate, compile_only

from mistral_kernels.ops import reference
from mistral_kernels.ops.rotary import apply_rotary, rotary_tables


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_tables_at_far_positions(theta):
    cos, sin = rotary_tables(131072, 128, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (131072, 64)
    for position in (0, 1, 4095, 32767, 131071):
        for i in range(64):
            # The double nearest to the exact product: off by one rounding of the frequency.
            angle = float(position * Fraction(theta ** (-2 * i / 128)))
            allowed = 2**-24 + 4e-16 * max(1.0, angle)  # half a float32 ulp below 1, and doubles
            assert abs(cos[position, i].item() - math.cos(angle)) <= allowed
            assert abs(sin[position, i].item() - math.sin(angle)) <= allowed


def make_inputs(dtype, device, head_dim=20, num_positions=5000):
    q = torch.randn(2, 7, 4, head_dim, device=device).to(dtype).requires_grad_()
    k = torch.randn(2, 7, 2, head_dim, device=device).to(dtype).requires_grad_()
    cos, sin = rotary_tables(num_positions, head_dim, 1e4, device)
    return q, k, cos, sin, torch.randint(num_positions, (2, 7), device=device)


def as_complex(x, interleaved):
    return torch.complex(*(x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_dim", [2, 20, 128])
def test_each_pair_turns_by_its_angle(head_dim, dtype, interleaved, backend, device):
    """Within one rounding of the result and two of float32; gradients turn the other way."""
    q, k, cos, sin, positions = make_inputs(dtype, device, head_dim)
    turn = torch.complex(cos.double(), sin.double())[positions].unsqueeze(2)
    wide = torch.promote_types(dtype, torch.float32)
    outs = apply_rotary(q, k, cos, sin, positions, interleaved)
    cotangents = [torch.randn_like(x) for x in (q, k)]
    gradients = torch.autograd.grad(outs, (q, k), cotangents)
    for x, out, dout, dx in zip((q, k), outs, cotangents, gradients):
        assert out.dtype == dx.dtype == dtype and out.shape == x.shape
        for start, end, angle in ((x, out, turn), (dout, dx, turn.conj())):
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
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_float64_on_the_torch_backend(device, monkeypatch):
    """The formula itself, differentiated twice."""
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "torch")
    q, k, *rest = make_inputs(torch.float64, device, head_dim=4)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, *rest), (q, k))
        assert torch.autograd.gradgradcheck(lambda q, k: apply_rotary(q, k, *rest), (q, k))
        exact = reference.apply_rotary(q, k, *rest, interleaved)
        actual = apply_rotary(q, k, *rest, interleaved)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(actual, exact))


@pytest.mark.parametrize("frozen", ["q", "k"])
@pytest.mark.parametrize("used", ["q", "k", "qk"])
def test_frozen_inputs_and_unused_outputs(used, frozen, backend, device):
    q, k, *rest = make_inputs(torch.float32, device)
    (q if frozen == "q" else k).requires_grad_(False)
    outs = dict(zip("qk", apply_rotary(q, k, *rest)))
    (leaf,) = (x for x in (q, k) if x.requires_grad)
    loss = sum((outs[name].square().sum() for name in used), 0 * leaf.sum())
    (grad,) = torch.autograd.grad(loss, leaf)
    # Turning keeps lengths: the gradient of a sum of squares is twice the input, or 0.
    expected = 2 * leaf if ("k" if frozen == "q" else "q") in used else 0 * leaf
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_alone(device):
    q, k, cos, sin, _ = make_inputs(torch.float64, device)
    positions = torch.arange(7, device=device).expand(2, 7)

    def scores(shift):
        turned = apply_rotary(q, k, cos, sin, positions + shift)
        return torch.einsum("bqhd,bkgd->bhgqk", *turned)

    torch.testing.assert_close(scores(0), scores(1234), rtol=0, atol=1e-5)


def test_inputs_stay_and_may_be_views(backend, device):
    q, k, *rest = make_inputs(torch.float32, device)
    q, k = q.detach(), k.detach()
    fused = torch.cat((q, k), dim=2)
    before = fused.clone()
    views = apply_rotary(*fused.split((4, 2), dim=2), *rest)
    assert torch.equal(fused, before)
    assert all(torch.equal(a, b) for a, b in zip(views, apply_rotary(q, k, *rest)))
    packed = apply_rotary(q.flatten(0, 1), k.flatten(0, 1), *rest[:2], rest[2].flatten().int())
    assert all(torch.equal(a, b.flatten(0, 1)) for a, b in zip(packed, views))
    none = apply_rotary(q[:, :0], k[:, :0], *rest[:2], rest[2][:, :0])
    assert [x.shape for x in none] == [(2, 0, 4, 20), (2, 0, 2, 20)]


Q, K, P = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.arange(3)
COS, SIN = torch.ones(10, 4), torch.ones(10, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0, 0], K, COS, SIN, P), ValueError, r"q must be \(..., num_heads, head_dim\), got .8,"),
        ((Q.int(), K.int(), COS, SIN, P), TypeError, "q must be floating point, got torch.int32"),
        ((Q, K[:2], COS, SIN, P), ValueError, r"k must be .* of q \(3, 4, 8\), got \(2, 2, 8\)"),
        ((Q, K[..., :6], COS, SIN, P), ValueError, r"k must be .* got \(3, 2, 6\)"),
        ((Q, K.half(), COS, SIN, P), ValueError, "k must have q's dtype torch.float32, got .*16"),
        ((Q, K, COS, SIN, P[:2]), ValueError, r"positions must be \(3,\), .* got \(2,\)"),
        ((Q, K, COS, SIN, P.float()), ValueError, "positions must be torch.int32 or .*float32"),
        ((Q, K, COS, SIN, P > 1), ValueError, "positions must be torch.int32 or .*torch.bool"),
        ((Q, K, COS, SIN, P + 8), ValueError, r"positions must lie in .*\[0, 10\), got 8 to 10"),
        ((Q, K, COS, SIN, P - 1), ValueError, r"positions must lie in .*\[0, 10\), got -1 to 1"),
        ((Q, K, COS[:, :3], SIN, P), ValueError, r"cos must be \(num_positions, 4\), got \(10, 3"),
        ((Q, K, COS, SIN[0], P), ValueError, r"sin must be \(num_positions, 4\), got \(4,\)"),
        ((Q, K, COS, SIN[:9], P), ValueError, r"sin must be .* got \(9, 4\)"),
        ((Q, K, COS, SIN.to("meta"), P), ValueError, "sin must be on cpu like q, got meta"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        apply_rotary(*arguments)


def test_odd_head_dim():
    with pytest.raises(ValueError, match="head_dim must be even, .* got 7"):
        rotary_tables(10, 7, 1e4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_gradients(dtype, interleaved, backend, device):
    q, k, *rest = make_inputs(dtype, device)
    exact = reference.apply_rotary(q.double(), k.double(), *rest, interleaved)
    with reference.eager_arithmetic():
        plain = reference.apply_rotary(q, k, *rest, interleaved)
    with torch.no_grad():
        actual = apply_rotary(q, k, *rest, interleaved)
    for ours, eager, want in zip(actual, plain, exact):
        assert_as_accurate(ours, eager.detach(), want.detach(), "rotated")


@pytest.mark.kernels
def test_offsets_past_int32(triton_backend, device):
    """Tokens and heads whose strides carry past element 2^31; pages not touched cost nothing."""
    for strides in ((2**30 + 8, 20, 1), (20, 2**30 + 8, 1)):
        memory = torch.UntypedStorage((2 * strides[0] + 2 * strides[1] + 20) * 2, device=device)
        q = torch.empty(0, dtype=torch.float16, device=device).set_(memory, 0, (3, 3, 20), strides)
        q.copy_(torch.randn(3, 3, 20))
        _, _, cos, sin, _ = make_inputs(torch.float16, device)
        positions = torch.tensor([5, 0, 4999], device=device)
        far, _ = apply_rotary(q, q[:, :1], cos, sin, positions)
        near, _ = apply_rotary(q.clone().contiguous(), q[:, :1].clone(), cos, sin, positions)
        assert torch.equal(far, near)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_torch_compile(interleaved, backend, device):
    """One graph, and one compilation, for every number of tokens; the same numbers as without."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, cos, sin, positions):
        return apply_rotary(q, k, cos, sin, positions, interleaved)

    for tokens in (3, 8, 65):
        q, k, cos, sin, positions = make_inputs(torch.float32, device)
        q, k, positions = (
            x.detach()[:, :1].repeat_interleave(tokens, 1) for x in (q, k, positions)
        )
        q.requires_grad_(), k.requires_grad_()
        outs = (
            compiled(q, k, cos, sin, positions),
            apply_rotary(q, k, cos, sin, positions, interleaved),
        )
        grads = [torch.autograd.grad(sum(x.square().sum() for x in out), (q, k)) for out in outs]
        for a, b in zip((*outs[0], *grads[0]), (*outs[1], *grads[1])):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_opcheck(backend, device):
    """Schemas and fakes, strides of the outputs included, agree with what the operator does."""
    q, k, *rest = make_inputs(torch.float32, device)
    q, k = q.detach().transpose(1, 2).contiguous().transpose(1, 2), k.detach()
    for pair in ((q, k), (q, None), (None, k)):
        for flags in ((False, False), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.mistral_kernels.rotary.default, (*pair, *rest, *flags))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_bytes_moved(interleaved, triton_backend, device):
    """At Mistral-7B's size, at most 1.02 of the minimum, in full-width accesses."""
    ptxrun = pytest.importorskip("ptxrun", reason="ptxrun, which counts bytes, is absent")
    if device.type != "cpu":
        pytest.skip("ptxrun counts on CPU tensors")
    tokens, head_dim = 512, 128
    qkv = torch.randn(tokens, 48, head_dim, device=device).bfloat16()
    q, k, _ = qkv.split((32, 8, 8), dim=1)
    cos, sin = rotary_tables(tokens, head_dim, 1e4, device)
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        apply_rotary(q, k, cos, sin, torch.arange(tokens, device=device), interleaved)
        (profile,) = ptxrun.profiles()
    minimum = 2 * tokens * 40 * head_dim * 2 + 2 * tokens * head_dim // 2 * 4 + tokens * 8
    assert profile.dram_bytes <= 1.02 * minimum
    useful = profile.global_read_bytes + profile.global_write_bytes
    assert useful / profile.global_requests >= 400  # of 512, 16 bytes a lane; positions are scalar


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_compile_matrix(interleaved, target, monkeypatch):
    """Within the target's registers, with the launch parameters chosen for it."""
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "triton")
    for dtype in TARGETS[target].dtypes():
        with compile_only(target) as kernels:
            outs = apply_rotary(*make_inputs(dtype, torch.device("cpu"), 128), interleaved)
            sum(x.sum() for x in outs).backward()
        assert {kernel.name for kernel in kernels} == {"_rotary_kernel"}
        for kernel in kernels:
            kernel.assert_healthy()


@pytest.mark.kernels
def test_float64_on_triton(triton_backend, device):
    with pytest.raises(TypeError, match="q is torch.float64; the triton backend takes float16"):
        apply_rotary(*make_inputs(torch.float64, device))
