"""csrc's kernels of rms_norm, swiglu and rotary, for each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOATS, assert_matches_reference

from mistral_kernels.ops import reference, rotary
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rotary import rotary_tables
from mistral_kernels.ops.swiglu import swiglu

ops = torch.ops.mistral_kernels
eager_swiglu = reference.eager_arithmetic()(reference.swiglu)

# Widths that are no multiple of a vector; more rows than one block of partial sums has.
SHAPES = [(0, 7), (1, 1), (2, 15), (3, 64), (5, 1003), (17, 77), (33, 130), (71, 9)]


def make_rms_norm(shape, dtype, residual):
    names = {"x": shape, "weight": shape[-1:], **({"residual": shape} if residual else {})}
    return {name: torch.randn(x).to(dtype).requires_grad_() for name, x in names.items()}


def make_swiglu(shape, dtype, fused):
    if fused:
        shape = (*shape[:-1], 2 * shape[-1])
    return {
        name: (3 * torch.randn(shape)).to(dtype).requires_grad_()
        for name in (("gate",) if fused else ("gate", "up"))
    }


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_matches_the_reference(dtype, residual, operators):
    for shape in SHAPES:
        inputs = make_rms_norm(shape, dtype, residual)
        assert_matches_reference(rms_norm, reference.rms_norm, inputs)


@pytest.mark.parametrize("fused", [False, True], ids=["two", "fused"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_swiglu_matches_the_reference(dtype, fused, operators):
    for shape in SHAPES:
        assert_matches_reference(swiglu, eager_swiglu, make_swiglu(shape, dtype, fused))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotary_has_the_same_bits_as_pytorch(dtype, interleaved, operators):
    """Includes subnormal numbers, and rotation in place within a larger tensor."""
    for tokens, head_dim in ((0, 8), (1, 2), (7, 20), (3, 36), (5, 128), (2, 614)):
        q, k, q_out, k_out = (
            torch.randn(1 + tokens * heads * head_dim).to(dtype)[1:].view(tokens, heads, head_dim)
            for heads in (4, 2, 4, 2)
        )
        q[:, 1] *= torch.finfo(dtype).smallest_normal
        cos, sin = rotary_tables(50, head_dim, 1e4)
        positions = torch.randint(50, (tokens,), dtype=torch.int32 if head_dim % 4 else torch.int64)
        for inverse in (False, True):
            arguments = cos, sin, positions, interleaved, inverse
            rotation = rotary.Rotation(*arguments)
            rotary._rotate_torch(q, k, (q_out, k_out), rotation)
            assert all(map(torch.equal, ops.rotary(q, k, *arguments), (q_out, k_out)))
            assert torch.equal(ops.rotary(None, k, *arguments)[1], k_out)
            memory = torch.full((tokens, 7, head_dim), 9.0, dtype=dtype)
            parts = memory[:, 1:5].copy_(q), memory[:, 5:].copy_(k)
            if not inverse:
                ops.rotary_(*parts, *arguments[:-1])
                assert torch.equal(memory[:, 1:], torch.cat((q_out, k_out), dim=1))
            assert (memory[:, 0] == 9.0).all()


def calls(dtype):
    """Return each operator and its arguments: unaligned rows with gaps between them."""
    cos, sin = rotary_tables(50, 36, 1e4)

    def spaced(rows, *shape):
        width = torch.Size(shape).numel()
        memory = torch.randn(1 + rows * (width + 3)).to(dtype)
        return memory[1:].view(rows, width + 3)[:, :width].unflatten(1, shape)

    x, residual, dy, dh = (spaced(301, 1003) for _ in range(4))
    gate, up, dout = (spaced(3, 100_001) for _ in range(3))
    fused = spaced(3, 200_002)
    q, k, positions = spaced(997, 4, 36), spaced(997, 2, 36), torch.randint(50, (997,))
    weight, rstd = torch.randn(1003).to(dtype), torch.rand(301)
    arguments = {
        "rms_norm_forward": (x, weight, residual, 1e-5, True),
        "rms_norm_backward": (dy, dh, x, weight, rstd, True, True),
        "swiglu_forward": (gate, up),
        "swiglu_backward": (dout, fused, None, True, False),
        "rotary": (q, k, cos, sin, positions, False, False),
    }
    return {name: (getattr(ops, name), values) for name, values in arguments.items()}


def results(function, arguments):
    outs = function(*arguments)
    return [x for x in (outs if isinstance(outs, tuple) else (outs,)) if x is not None]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threads_strides_and_alignment_do_not_change_bits(dtype, operators):
    for name, (function, arguments) in calls(dtype).items():
        contiguous = [x.contiguous() if torch.is_tensor(x) else x for x in arguments]
        expected = results(function, contiguous)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, results(function, arguments), expected)), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_calls_without_gradients_have_the_same_bits(dtype, operators):
    wide = torch.randn(2, 5, 3, 44).to(dtype)
    x, residual = wide[..., :20], wide[..., 20:40]
    weight = torch.randn(20).to(dtype)
    tables, positions = rotary_tables(9, 20, 1e4), torch.randint(9, (2, 5))
    functions = {
        "rms_norm": lambda x, residual: rms_norm(x, weight, residual=residual),
        "rms_norm without residual": lambda x, residual: rms_norm(x, weight),
        "swiglu": swiglu,
        "swiglu of a fused gate": lambda x, residual: swiglu(x),
        "rotary": lambda x, residual: rotary.apply_rotary(x, residual, *tables, positions),
    }
    for name, function in functions.items():
        expected = results(function, (x.clone().requires_grad_(), residual))
        for arguments in ((x, residual), (x.contiguous(), residual.contiguous())):
            actual = results(function, arguments)
            assert all(map(torch.equal, actual, expected)), name
            assert all(y.is_contiguous() and not y.requires_grad for y in actual), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_are_independent(dtype, operators):
    """Each row has the same bits alone and in a batch. dweight is excluded: it sums all rows."""
    inputs = calls(dtype)
    for name in ("rms_norm_forward", "rms_norm_backward"):
        function, arguments = inputs[name]
        whole = [x for x in results(function, arguments) if len(x) == 301]
        for rows in (slice(0, 1), slice(5, 12), slice(300, 301)):
            part = [x[rows] if torch.is_tensor(x) and len(x) == 301 else x for x in arguments]
            actual = [x for x in results(function, part) if x.shape[:1] == part[0].shape[:1]]
            assert all(torch.equal(x, y[rows]) for x, y in zip(actual, whole, strict=True)), name


def test_extreme_gates(operators):
    gate = torch.tensor([float("nan"), -3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38])
    for dtype in (torch.float32, torch.bfloat16):
        out = swiglu(gate.to(dtype), torch.ones(8, dtype=dtype))
        assert out[0].isnan()
        assert (out[1:4].abs() < 1e-35).all()
        assert torch.equal(out[4:], gate[4:].to(dtype))
