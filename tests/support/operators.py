"""Table of public operators, whose properties tests/ops/test_contract.py checks.

To add an operator, add its rows here, or in support/attention_operators.py. `OperatorCase` requires
every property; a row that lacks one gives the reason.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F

import mistral_kernels as mk
from mistral_kernels.ops import reference
from mistral_kernels.ops.linear import linear
from mistral_kernels.ops.linear_int8 import linear_int8
from support.attention_operators import ATTENTION
from support.helpers import assert_loss_matches
from support.operator_case import Bad, Inputs, Matrix, Missing, OperatorCase, Traffic

eager = reference.eager_arithmetic()
ROWS = ("rows apart", "groups apart", "transposed", "elements apart", "expanded", "one row")


def randn(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def rms_norm_inputs(
    tokens: int, dtype: torch.dtype, device: Any, width: int, residual: bool
) -> Inputs:
    like = {"dtype": dtype, "device": device}
    inputs = {"x": randn(2, tokens, width, **like), "weight": randn(width, **like)}
    return {**inputs, **({"residual": randn(2, tokens, width, **like)} if residual else {})}


def rms_norm_row(residual: bool) -> OperatorCase:
    streams = ("x", "residual") if residual else ("x",)
    kernels = {"_forward_kernel", "_backward_kernel", "_sum_partials_kernel"}
    bad = [
        Bad(
            {"weight": lambda x: x[:32]}, ValueError, r"x and weight must be .*, got .2, 3, 64. an"
        ),
        Bad({"weight": torch.ones(2, 64)}, ValueError, r"x and weight must .* and \(2, 64\)"),
        Bad({"x": torch.tensor(1.0)}, ValueError, r"x and weight must be .*, got \(\) and \(64,\)"),
        *(
            Bad({"eps": eps}, ValueError, f"^eps must be >= 0 and finite, got {eps}$")
            for eps in (-1.0, float("inf"), float("nan"))
        ),
    ]
    if residual:
        message = r"^residual must be \(2, 3, 64\), got \(1, 3, 64\)$"
        bad.append(Bad({"residual": lambda x: x[:1]}, ValueError, message))

    def excludes(target: str, dtype: torch.dtype, width: int) -> bool:
        if width == 111:  # short rows need the same registers in both dtypes
            return dtype == torch.float32
        # Several programs share a row of this width: compile for three targets, in float32 only.
        return width == 16384 and (
            target not in ("sm_80", "sm_90", "sm_120") or dtype != torch.float32
        )

    return OperatorCase(
        name="rms_norm residual" if residual else "rms_norm",
        function=mk.rms_norm,
        reference=reference.rms_norm,
        make=functools.partial(rms_norm_inputs, residual=residual),
        width=64,
        differentiable=("x", "weight", *streams[1:]),
        public_name="rms_norm",
        operators=frozenset({"rms_norm_forward", "rms_norm_backward"}),
        kernels=frozenset(kernels),
        traffic=tuple(
            Traffic(
                *(1024, hidden),
                slow=hidden > 4096,
                launches=(1, 2),
                slack=(1.02, 1.05),
                request=480,  # of 512: one store of rstd per row
                saved=("output 1" if residual else "x", "weight"),
            )
            for hidden in (4096, 16384)
        ),
        matrix=Matrix(
            *((111, 5120, 16384), 4096 if residual else None),
            # Frozen inputs need fewer registers: compile them at one width only.
            frozen={5120: (("weight",), streams)},
            excludes=excludes,
        ),
        far=((streams, (0, 1)),),
        large=((150, 111), (35, 9001)) if residual else ((35, 2100),),
        frozen=(("weight",), streams, ("x",), ("weight", *streams)),
        layouts=ROWS,
        empty=(0, 64),
        compiled_width=64,
        optional=("residual",),
        bad=tuple(bad),
    )


def swiglu_inputs(tokens: int, dtype: torch.dtype, device: Any, width: int, fused: bool) -> Inputs:
    names, factor = (("gate",), 2) if fused else (("gate", "up"), 1)
    shape = 2, tokens, factor * width
    return {name: (3 * torch.randn(shape, device=device)).to(dtype) for name in names}


def swiglu_row(fused: bool) -> OperatorCase:
    names = ("gate",) if fused else ("gate", "up")
    bad = (
        Bad({"gate": lambda x: x[..., :3]}, ValueError, "gate without up must .* even .* 3, 3"),
        Bad(
            {"gate": torch.tensor(1.0)},
            ValueError,
            r"gate without up must .* 2 \* inter.*, got \(\)",
        ),
    )
    if not fused:
        bad = (
            Bad({"up": lambda x: x[0]}, ValueError, r"^up must be \(2, 3, 64\), got \(3, 64\)$"),
        )
    return OperatorCase(
        name="swiglu fused" if fused else "swiglu",
        function=mk.swiglu,
        reference=eager(reference.swiglu),
        make=functools.partial(swiglu_inputs, fused=fused),
        width=64,
        differentiable=names,
        public_name="swiglu",
        operators=frozenset({"swiglu_forward", "swiglu_backward"}),
        kernels=frozenset({"_forward_kernel", "_backward_kernel"}),
        traffic=(
            # One launch forward and one backward: the fused form does not concatenate gradients.
            Traffic(
                *(128, 14336),
                layout=None if fused else "rows apart",
                launches=(1, 1),
                slack=(1.02, 1.02),
                saved=names,
            ),
        ),
        matrix=Matrix((111, 14336)),
        far=((names, (0, 1)),),
        large=((35, 2100),),
        frozen=Missing("one input") if fused else (("gate",), ("up",)),
        layouts=ROWS,
        empty=(0, 8),
        compiled_width=96,
        optional=("up",),
        bad=bad,
    )


def rotary_inputs(
    tokens: int, dtype: torch.dtype, device: Any, width: int, heads: tuple[int, int] = (4, 2)
) -> Inputs:
    """Return inputs in which each token has its own row of the tables."""
    like = {"dtype": dtype, "device": device}
    q, k = (randn(2, tokens, n, width, **like) for n in heads)
    cos, sin = mk.rotary_tables(2 * tokens, width, 1e4, device)
    positions = torch.randperm(2 * tokens, device=device).view(2, tokens)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}


ROTARY_BAD = (
    Bad({"q": torch.ones(8)}, ValueError, r"q must be \(..., num_heads, head_dim\), got \(8,\)"),
    Bad(
        {"k": lambda x: x[:1]}, ValueError, r"k must be .* of q .2, 3, 4, 16., got \(1, 3, 2, 16\)"
    ),
    Bad({"k": lambda x: x[..., :6]}, ValueError, r"k must be .* got \(2, 3, 2, 6\)"),
    Bad({"positions": lambda x: x[:1]}, ValueError, r"positions must be \(2, 3\), .* got \(1, 3\)"),
    Bad({"positions": lambda x: x.half()}, TypeError, "positions must be torch.int32 or .*float16"),
    Bad({"positions": lambda x: x > 1}, TypeError, "positions must be torch.int32 or .*torch.bool"),
    Bad({"positions": lambda x: x + 3}, ValueError, r"positions must be in .*\[0, 6\), got 3 to 8"),
    Bad({"positions": lambda x: x - 1}, ValueError, r"positions must .*\[0, 6\), got -1 to 4"),
    Bad({"cos": lambda x: x[:, :3]}, ValueError, r"cos must be \(num_positions, 8\), got \(6, 3\)"),
    Bad({"sin": lambda x: x[0]}, ValueError, r"sin must be \(num_positions, 8\), got \(8,\)"),
    Bad({"sin": lambda x: x[:5]}, ValueError, r"sin must be .* got \(5, 8\)"),
)


def rotary_row(interleaved: bool, in_place: bool) -> OperatorCase:
    function = mk.apply_rotary_ if in_place else mk.apply_rotary

    def pure(q: Any, k: Any, **rest: Any) -> Any:
        return function(q.clone(), k.clone(), interleaved=interleaved, **rest)

    name = f"apply_rotary{'_' if in_place else ''}{' interleaved' if interleaved else ''}"
    return OperatorCase(
        name=name,
        function=functools.partial(function, interleaved=interleaved),
        reference=eager(functools.partial(reference.apply_rotary, interleaved=interleaved)),
        pure=pure if in_place else None,
        writes=("q", "k") if in_place else (),
        make=rotary_inputs,
        width=16,
        differentiable=("q", "k"),
        public_name="apply_rotary",
        operators=frozenset({"rotary_", "rotary"} if in_place else {"rotary"}),
        kernels=frozenset({"_rotary_kernel"}),
        traffic=(
            Traffic(
                *(256, 128),
                {"heads": (32, 8)},
                layout=None if in_place else "rows apart",
                request=400,  # of 512: positions are scalars
            ),
        ),
        matrix=Matrix((128,)),
        far=((("q", "k"), (0, 1)), (("q", "k"), (2,))),
        large=((9, 2), (9, 36)),
        frozen=(("q",), ("k",)),
        layouts=Missing("test_rotary.py::test_in_place") if in_place else ROWS,
        empty=(0, 16),
        twice_differentiable=True,
        compiled=Missing("test_rotary.py::test_torch_compile_in_place") if in_place else True,
        transforms=Missing("the transforms are those of the half-split layout")
        if interleaved
        else True,
        triton_dtypes=(torch.float32,),
        bad=ROTARY_BAD,
    )


def cross_entropy_inputs(tokens: int, dtype: torch.dtype, device: Any, width: int) -> Inputs:
    like = {"dtype": dtype, "device": device}
    targets = torch.randint(width, (tokens,), device=device)
    targets[2::3] = -100
    return {
        "hidden": randn(tokens, 16, **like),
        "weight": randn(width, 16, **like),
        "targets": targets,
    }


CROSS_ENTROPY_BAD = (
    Bad(
        {"hidden": lambda x: x[0]}, ValueError, r"hidden and weight must .* got .16,. and .50, 16."
    ),
    Bad({"weight": lambda x: x[:, :2]}, ValueError, r"hidden and weight must .* and \(50, 2\)"),
    Bad({"weight": lambda x: x[:0]}, ValueError, r"hidden and weight must be .* and \(0, 16\)"),
    Bad({"targets": lambda x: x[:2]}, ValueError, r"^targets must be \(3,\), got \(2,\)$"),
    Bad({"targets": lambda x: x.int()}, TypeError, "^targets must be torch.int64, got torch.int32"),
    Bad({"targets": torch.tensor([0, 50, 1])}, ValueError, r"be in \[0, 50\) or -100, got 50"),
    Bad({"targets": torch.tensor([0, -1, 1])}, ValueError, r"targets must be in .* -100, got -1"),
    Bad({"reduction": "none"}, ValueError, "^reduction must be 'mean' or 'sum', got 'none'$"),
    Bad({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    Bad({"z_loss": -1.0}, ValueError, "z_loss must be >= 0 .*, got -1.0"),
    *(
        Bad({"softcap": softcap}, ValueError, "^softcap must be 0, or in .1.2e-38, 3.4e.38., got ")
        for softcap in (1e-46, 1e39, -1.0)
    ),
)


def cross_entropy_row(name: str, **options: Any) -> OperatorCase:
    function = functools.partial(mk.linear_cross_entropy, **options)
    definition = eager(functools.partial(reference.linear_cross_entropy, **options))
    return OperatorCase(
        name=name,
        function=function,
        reference=definition,
        matches=functools.partial(assert_loss_matches, summed=options.get("reduction") == "sum"),
        make=cross_entropy_inputs,
        width=50,
        differentiable=("hidden", "weight"),
        public_name="linear_cross_entropy",
        operators=frozenset({"linear_cross_entropy"}),
        kernels=frozenset({"_softmax_kernel"}),
        # The kernel reads a row of logits twice and writes it once; logits are not an input.
        traffic=(Traffic(64, 32000, request=490, accessed=3 * 64 * 32000 * 2),),
        matrix=Matrix((111, 32000)),
        far=Missing("kernels see chunks of logits, which are contiguous and below 2^31 elements"),
        large=((9, 9001),),
        frozen=(("hidden",), ("weight",)),
        layouts=("rows apart", "transposed", "elements apart", "expanded"),
        empty=Missing("test_cross_entropy.py::test_no_counted_tokens"),
        compiled=Missing("the graph is that of linear_cross_entropy") if options else True,
        transforms=Missing("the transforms are those of linear_cross_entropy") if options else True,
        compiled_width=32000,
        triton_dtypes=(torch.float32,),
        bad=CROSS_ENTROPY_BAD,
    )


def linear_inputs(tokens: int, dtype: torch.dtype, device: Any, width: int) -> Inputs:
    like = {"dtype": dtype, "device": device}
    return {"x": randn(tokens, 48, **like), "weight": randn(width, 48, **like)}


def int8_inputs(tokens: int, dtype: torch.dtype, device: Any, width: int) -> Inputs:
    weight = torch.randint(-128, 128, (width, 48), dtype=torch.int8, device=device)
    scales = torch.rand(width, device=device)
    return {"x": randn(tokens, 48, dtype=dtype, device=device), "weight": weight, "scales": scales}


def int8_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return F.linear(x, (weight.double() * scales.double()[:, None]).to(x.dtype))


NO_KERNEL = Missing("no Triton kernel: PyTorch computes the product on GPUs")
LINEAR = {
    "width": 64,
    "kernels": NO_KERNEL,
    "traffic": NO_KERNEL,
    "matrix": NO_KERNEL,
    "far": NO_KERNEL,
    "large": ((33, 67),),
    "empty": (0, 64),
    "backends": ("torch", "csrc"),
    "layouts": ("rows apart", "transposed", "elements apart"),
}


def linear_rows() -> list[OperatorCase]:
    torch_raises = Missing("test_linear.py::test_calls_that_pytorch_computes")
    no_gradient = Missing("test_cpu_linear_int8.py::test_bad_arguments")
    return [
        OperatorCase(
            name="linear",
            function=linear,
            reference=lambda x, weight: F.linear(x, weight),
            make=linear_inputs,
            differentiable=("x", "weight"),
            public_name="linear",
            operators=frozenset({"linear"}),
            frozen=(("x",), ("weight",)),
            transforms=torch_raises,
            checks=torch_raises,
            twice_differentiable=True,
            bad=(),
            **LINEAR,
        ),
        OperatorCase(
            name="linear_int8",
            function=linear_int8,
            reference=int8_product,
            make=int8_inputs,
            differentiable=(),
            public_name="linear_int8",
            operators=frozenset({"linear_int8"}),
            frozen=no_gradient,
            transforms=no_gradient,
            derivative=no_gradient,
            checks=no_gradient,
            bad=(),
            **LINEAR,
        ),
    ]


OPERATORS: tuple[OperatorCase, ...] = (
    *map(rms_norm_row, (False, True)),
    *map(swiglu_row, (False, True)),
    *itertools.starmap(rotary_row, itertools.product((False, True), (False, True))),
    cross_entropy_row("linear_cross_entropy"),
    cross_entropy_row(
        "linear_cross_entropy options",
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=9.0,
        reduction="sum",
    ),
    *linear_rows(),
    *ATTENTION,
)
