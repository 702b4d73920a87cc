"""rotary_tables and apply_rotary: exact angles, both layouts, bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import FLOATS, assert_as_accurate

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
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [2, 20, 128])
def test_each_pair_turns_by_its_angle(head_dim, dtype, interleaved, device):
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


def test_layouts_differ_by_a_permutation(device):
    q, k, *rest = make_inputs(torch.float32, device)

    def interleave(x):
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    expected = [interleave(x) for x in apply_rotary(q, k, *rest)]
    actual = apply_rotary(interleave(q), interleave(k), *rest, interleaved=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_scores_depend_on_distance_alone(device):
    q, k, cos, sin, _ = make_inputs(torch.float64, device)
    positions = torch.arange(7, device=device).expand(2, 7)

    def scores(shift):
        turned = apply_rotary(q, k, cos, sin, positions + shift)
        return torch.einsum("bqhd,bkgd->bhgqk", *turned)

    torch.testing.assert_close(scores(0), scores(1234), rtol=0, atol=1e-5)


def test_inputs_stay_and_may_be_views(device):
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
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_without_gradients(dtype, interleaved, device):
    """The path of inference is another one, and as exact."""
    q, k, *rest = make_inputs(dtype, device)
    exact = reference.apply_rotary(q.double(), k.double(), *rest, interleaved)
    with reference.eager_arithmetic():
        plain = reference.apply_rotary(q, k, *rest, interleaved)
    with torch.no_grad():
        actual = apply_rotary(q, k, *rest, interleaved)
    for ours, eager, want in zip(actual, plain, exact):
        assert_as_accurate(ours, eager.detach(), want.detach(), "rotated")
