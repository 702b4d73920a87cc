"""Properties that every operator must have: one test per property, over support/operators.py.

Values and numerics of a single operator are tested in its own file, transforms in
test_transforms.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ptxrun
import pytest
import torch
import torch._dynamo.testing
from support.backends import select_backend
from support.declared import declared_operators
from support.helpers import FLOATS, TARGETS, compile_only
from support.operator_case import (
    NAMESPACE,
    Missing,
    OperatorCalls,
    OperatorCase,
    Traffic,
    as_tuple,
    assert_devices_are_checked,
    backward,
    detached,
    far_apart,
    half_dtype,
    laid_out,
    operator_calls,
)
from support.operators import OPERATORS
from torch import Tensor

OTHERS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int32, torch.bool)


def has(case: OperatorCase, *properties: str) -> bool:
    return not any(isinstance(getattr(case, name), Missing) for name in properties)


def every(
    *properties: str, where: Callable[[OperatorCase], Any] = lambda case: True
) -> pytest.MarkDecorator:
    """Parametrize `case` over the operators that have the properties."""
    rows = [case for case in OPERATORS if has(case, *properties) and where(case)]
    return pytest.mark.parametrize("case", rows, ids=lambda case: case.name)


def on_every_backend(
    *properties: str, where: Callable[[OperatorCase], Any] = lambda case: True
) -> pytest.MarkDecorator:
    """Parametrize over the operators that have the properties, on each of their backends."""
    params = [
        pytest.param(
            *(case, backend),
            marks=[pytest.mark.kernels] if backend == "triton" else [],
            id=f"{case.name}-{backend}",
        )
        for case in OPERATORS
        if has(case, *properties) and where(case)
        for backend in case.backends
    ]
    return pytest.mark.parametrize(("case", "backend"), params, indirect=["backend"])


def in_every_dtype(*properties: str) -> pytest.MarkDecorator:
    """Parametrize like `on_every_backend`, in each dtype of the backend."""
    params = [
        pytest.param(
            *(case, backend, dtype),
            marks=[pytest.mark.kernels] if backend == "triton" else [],
            id=f"{case.name}-{backend}-{dtype}",
        )
        for case in OPERATORS
        if has(case, *properties)
        for backend in case.backends
        for dtype in (case.triton_dtypes if backend == "triton" else FLOATS)
    ]
    return pytest.mark.parametrize(("case", "backend", "dtype"), params, indirect=["backend"])


def on_triton(*properties: str) -> pytest.MarkDecorator:
    return every("kernels", *properties, where=lambda case: "triton" in case.backends)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    return select_backend(request, device)


@pytest.fixture
def ptxrun_counters(triton_backend: None) -> None:
    """Require ptxrun, which runs Triton kernels on CPU tensors and counts their accesses."""
    if not ptxrun.installed():
        pytest.skip("requires ptxrun")


# The table in support/operators.py.

INNER = {"accumulate_", "cross_entropy_", "matmul_"}  # called by the public operators


def test_every_operator_has_a_row():
    """Operators that csrc alone declares have no fake implementation, and no row."""
    assert declared_operators() - INNER == set().union(*(case.operators for case in OPERATORS))


def test_missing_properties_have_a_reason():
    """A reason is a sentence, or the name of an existing test."""
    for case in OPERATORS:
        for field in dataclasses.fields(case):
            reason = getattr(case, field.name)
            if isinstance(reason, Missing):
                file, _, test = reason.partition("::")
                text = (Path(__file__).parent / file).read_text() if test else ""
                assert f"def {test}(" in text if test else " " in reason, (case.name, field.name)


# Values and gradients, for all layouts, dtypes and sets of frozen inputs.


@pytest.mark.long
@in_every_dtype("frozen")
def test_gradients_with_frozen_inputs(case, backend, dtype, device):
    for frozen in case.frozen:
        case.assert_matches(case.sample(65, dtype, device, frozen=frozen))


@pytest.mark.long
@on_every_backend("layouts")
def test_strided_inputs_and_gradients(case, backend, device):
    dtype = case.triton_dtypes[0] if backend == "triton" else torch.float32
    for layout in case.layouts:
        inputs = laid_out(case.sample(65, dtype, device), layout, case.unit_stride)
        case.assert_matches(inputs, strided_gradients=True)


@every(where=lambda case: case.unit_stride)
def test_strided_last_dimension_is_refused(case):
    for name in case.unit_stride:
        inputs = detached(case.sample())
        inputs[name] = torch.stack((inputs[name],) * 2, -1)[..., 0]
        with pytest.raises(ValueError, match=f"^{name}'s last dimension must be contiguous, got "):
            case.function(**inputs)


@in_every_dtype("empty")
def test_empty_inputs(case, backend, dtype, device):
    tokens, width = case.empty
    inputs = case.sample(tokens, dtype, device, width)

    def with_zero_terms(function: Callable[..., Any], **given: Any) -> Any:
        """Make inputs that no output depends on have a gradient of 0 instead of None."""
        zero = sum(0 * given[name].sum() for name in case.differentiable)
        first, *others = as_tuple(function(**given))
        return (first + zero, *others)

    functions = (functools.partial(with_zero_terms, f) for f in (case.call, case.reference))
    case.matches(*functions, inputs)


@on_every_backend(where=lambda case: case.differentiable)
def test_gradients_through_a_single_output(case, backend, device):
    """Inputs that the output does not depend on have a gradient of 0."""
    groups = [()] if isinstance(case.frozen, Missing) else [(), *case.frozen]
    inputs = case.sample(9, device=device)
    count = len(case.outputs(inputs))
    for i, frozen in itertools.product(range(count) if count > 1 else (), groups):
        inputs = case.sample(9, device=device, frozen=frozen)

        def alone(outputs: tuple[Tensor, ...], given: dict[str, Any], i: int = i) -> Tensor:
            return outputs[i] + sum(0 * given[name].sum() for name in case.differentiable)

        case.matches(
            lambda **given: alone(case.call(**given), given),
            lambda **given: alone(case.reference(**given), given),
            inputs,
        )


@pytest.mark.long
@in_every_dtype()
def test_without_gradients(case, backend, dtype, device):
    """Outputs are correct, contiguous and without a graph. Inputs are not modified."""
    inputs = case.sample(9, dtype, device)
    before = {name: x.detach().clone() for name, x in case.tensors(inputs).items()}
    with torch.no_grad():
        outputs = case.outputs(inputs)
    for out in (*outputs, *case.outputs(detached(inputs))):
        assert out.grad_fn is None
        assert not out.requires_grad
        assert out.is_contiguous()
    case.assert_matches(detached(inputs))
    for name, x in before.items():
        assert torch.equal(inputs[name], x), name


@pytest.mark.long
@in_every_dtype("large")
def test_results_are_bitwise_repeatable(case, backend, dtype, device):
    for tokens, width in case.large:
        inputs = case.sample(tokens, dtype, device, width)
        outputs = case.outputs(inputs)
        assert all(map(torch.equal, outputs, case.outputs(inputs)))
        outputs = [y for y in outputs if y.requires_grad]
        cotangents = [torch.randn_like(y) for y in outputs]
        gradients = [
            torch.autograd.grad(outputs, case.leaves(inputs), cotangents, retain_graph=True)
            for _ in range(4 if outputs else 0)
        ]
        for first, later in itertools.pairwise(gradients):
            assert all(map(torch.equal, first, later))


def assert_matches_past_int32(case: OperatorCase, far: Any, device: torch.device) -> None:
    for names, dims in far:
        inputs = case.sample(3, torch.float16, device)
        inputs |= {name: far_apart(inputs[name], dims) for name in names}
        case.assert_matches(inputs)
        if case.writes:
            near = {
                key: x.clone(memory_format=torch.contiguous_format) if torch.is_tensor(x) else x
                for key, x in detached(inputs).items()
            }
            case.function(**near)
            inputs = detached(inputs)
            case.function(**inputs)
            assert all(torch.equal(inputs[key], near[key]) for key in case.writes)


@pytest.mark.kernels
@pytest.mark.long
@on_triton("far")
def test_offsets_past_int32(case, triton_backend, device):
    assert_matches_past_int32(case, case.far, device)


@pytest.mark.slow
@pytest.mark.kernels
@every(where=lambda case: case.far_slow)
def test_more_offsets_past_int32(case, triton_backend, device):
    assert_matches_past_int32(case, case.far_slow, device)


# Dtypes and derivatives.


@every()
def test_float64_on_the_torch_backend(case, torch_backend, device):
    """The results and derivatives match the reference and numerical differentiation."""
    tokens, width = case.narrow
    inputs = case.sample(tokens, torch.float64, device, width)
    exact = as_tuple(case.reference(**detached(inputs)))
    for actual, expected in zip(case.outputs(detached(inputs)), exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    if not has(case, "derivative"):
        return

    def function(*leaves: Tensor) -> Any:
        return case.call(**{**inputs, **dict(zip(case.differentiable, leaves, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(case.leaves(inputs)))
    if case.twice_differentiable is True:
        assert torch.autograd.gradgradcheck(function, tuple(case.leaves(inputs)))


@pytest.mark.kernels
@on_triton()
def test_float64_is_refused_on_triton(case, triton_backend, device):
    """The error is raised before anything is written."""
    message = r"^\w+ must be float16, bfloat16 or float32 on the triton backend, got torch.float64"
    inputs = case.sample(3, torch.float64, device)
    before = {name: inputs[name].detach().clone() for name in case.writes}
    # If PyTorch's attention computes calls with gradients, it supports float64.
    for given in (detached(inputs), *([inputs] if has(case, "twice_differentiable") else [])):
        with pytest.raises(TypeError, match=message):
            case.call(**given)
    given = detached(inputs)
    with pytest.raises(TypeError, match=message):
        case.function(**given)
    assert all(torch.equal(given[name], x) for name, x in before.items())


@on_every_backend(
    "twice_differentiable",
    where=lambda case: case.differentiable and not case.twice_differentiable,
)
def test_second_derivative_is_refused(case, backend, device):
    inputs = case.sample(3, device=device)
    outputs = [y for y in case.outputs(inputs) if y.requires_grad]
    for leaf in case.leaves(inputs):
        (slope,) = torch.autograd.grad(sum(y.sum() for y in outputs), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{case.public_name} can be differentiated only on"):
            slope.sum().backward()


# torch.compile and the dispatcher.


@pytest.mark.long
@on_every_backend("compiled")
def test_torch_compile(case, backend, device):
    """The graph of the first call is reused for every number of tokens.

    The first call may compile twice: PyTorch restarts if a size need not be dynamic.
    """
    torch._dynamo.reset()
    compiler = "aot_eager" if backend == "torch" else "inductor"  # inductor is slow to compile
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    function = case.pure or case.function
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in case.compiled_tokens:
        case.assert_matches(case.sample(tokens, device=device), compiled)
        counts.append(counter.frame_count)
    assert 1 <= counts[0] == counts[-1] <= 2


@pytest.mark.long
@on_every_backend()
def test_opcheck(case, backend, device):
    """Schemas and fakes, including the strides of outputs, match the operators."""
    only = {"test_utils": ("test_schema", "test_faketensor")} if backend == "torch" else {}
    reached = set()
    layouts = [None] if isinstance(case.layouts, Missing) else [None, "transposed"]
    for layout in layouts:
        inputs = case.sample(5, device=device)
        inputs = inputs if layout is None else laid_out(inputs, layout, case.unit_stride)
        checked = []
        for operator, arguments in operator_calls(case, inputs, strided=layout is not None):
            reached.add(operator.name().removeprefix(NAMESPACE).partition(".")[0])
            if (key := (operator, signature_of(arguments))) not in checked:
                checked.append(key)
                torch.library.opcheck(operator, arguments, **only)
    assert reached - INNER == case.operators


def signature_of(arguments: tuple[Any, ...]) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype) if torch.is_tensor(x) else x for x in arguments]


# Costs, races and machine code of the Triton kernels.


def traffic_params(slow: bool) -> Any:
    return [
        pytest.param(case, traffic, id=f"{case.name}-{traffic.width}")
        for case in OPERATORS
        if has(case, "traffic")
        for traffic in case.traffic
        if traffic.slow == slow
    ]


def assert_minimal_traffic(case: OperatorCase, traffic: Traffic) -> None:
    """Check the number of launches, the bytes moved and the bytes per memory request."""
    inputs = case.sample(traffic.tokens, torch.bfloat16, "cpu", traffic.width, **traffic.sizes)
    if traffic.layout:
        inputs = laid_out(inputs, traffic.layout)

    def profiled(run: Callable[[], Any]) -> tuple[tuple[Tensor, ...], list[Any]]:
        with ptxrun.options(profile=True):
            ptxrun.reset_profile()
            results = run()
            return results if isinstance(results, tuple) else (results,), list(ptxrun.profiles())

    def bytes_of(*tensors: Tensor) -> int:
        memory = {(x.data_ptr(), x.shape): x.numel() * x.element_size() for x in tensors}
        return sum(memory.values())

    measures_backward = len(traffic.launches) > 1
    given = inputs if measures_backward else detached(inputs)
    tensors = case.tensors(given).values()
    sizes = bytes_of(*tensors)
    outputs, profiles = profiled(lambda: case.function(**given))
    written = [y for y in outputs if all(y is not x for x in tensors)]
    minimum = sizes + bytes_of(*(outputs if case.writes else written))
    useful = sum(p.global_read_bytes + p.global_write_bytes for p in profiles)
    assert len(profiles) == traffic.launches[0]
    if traffic.accessed is None:
        assert sum(p.dram_bytes for p in profiles) <= traffic.slack[0] * minimum
    else:
        assert useful <= traffic.slack[0] * traffic.accessed
    assert useful / sum(p.global_requests for p in profiles) >= traffic.request
    if not measures_backward:
        return
    cotangents = [torch.randn_like(y) for y in outputs]
    saved = [
        outputs[int(name.removeprefix("output "))] if name.startswith("output") else inputs[name]
        for name in traffic.saved
    ]
    with OperatorCalls() as seen:
        gradients, profiles = profiled(
            lambda: torch.autograd.grad(outputs, case.leaves(inputs), cotangents)
        )
    assert not seen.others
    assert len(profiles) == traffic.launches[1]
    minimum = bytes_of(*cotangents, *saved, *gradients)
    assert sum(p.dram_bytes for p in profiles) <= traffic.slack[1] * minimum


@pytest.mark.parametrize(("case", "traffic"), traffic_params(slow=False))
def test_memory_traffic_is_minimal(case, traffic, ptxrun_counters):
    assert_minimal_traffic(case, traffic)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "traffic"), traffic_params(slow=True))
def test_memory_traffic_of_wide_rows_is_minimal(case, traffic, ptxrun_counters):
    assert_minimal_traffic(case, traffic)


@pytest.mark.long
@on_triton("large")
def test_kernels_have_no_races(case, ptxrun_counters):
    with ptxrun.options(racecheck=True):
        for tokens, width in case.large:
            case.assert_matches(case.sample(tokens, torch.float32, "cpu", width))


def compiled_kernels(
    case: OperatorCase, target: str, dtype: torch.dtype, width: int, frozen: tuple[str, ...] = ()
) -> set[str]:
    """Compile and check the kernels of a call and its backward pass; return their names."""
    with compile_only(target) as kernels:
        inputs = case.sample(65, dtype, "cpu", width, frozen)
        case.function(**detached(inputs))
        if case.differentiable:
            backward(case.outputs(inputs), case.leaves(inputs))
    for kernel in kernels:
        kernel.assert_healthy()
    return {kernel.name for kernel in kernels}


@pytest.mark.parametrize("target", TARGETS)
@every("matrix", where=lambda case: has(case, "matrix") and case.matrix.default)
def test_compiles_for_target(case, target, set_backend):
    """The kernels fit in the shared memory and registers of the target."""
    set_backend("triton")
    dtype = half_dtype(TARGETS[target])
    assert compiled_kernels(case, target, dtype, case.matrix.default) == case.kernels


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@every("matrix")
def test_compile_matrix(case, target, set_backend):
    set_backend("triton")
    matrix = case.matrix
    for dtype in (torch.float32, half_dtype(TARGETS[target])):
        for width in matrix.widths:
            if matrix.excludes(target, dtype, width):
                continue
            assert compiled_kernels(case, target, dtype, width) == case.kernels
            for frozen in matrix.frozen.get(width, ()):
                compiled_kernels(case, target, dtype, width, frozen)


@pytest.mark.slow
@on_triton()
def test_other_numbers_of_tokens_compile_no_kernel(case, set_backend):
    set_backend("triton")
    with compile_only("sm_90") as launched:

        def compiled_for(*lengths):
            for tokens in lengths:
                inputs = case.sample(tokens, torch.bfloat16, width=case.compiled_width)
                case.function(**detached(inputs))
                if case.differentiable:
                    backward(case.outputs(inputs), case.leaves(inputs))
            return {kernel.files["cubin"]: kernel.name for kernel in launched}

        # One, few and many tokens; multiples of 16 and other numbers.
        kernels = compiled_for(1, 7, 512, 4097)
        assert case.kernels <= set(kernels.values())
        assert compiled_for(5, 11, 640, 3001) == kernels


# Calls that raise. They must not write to any argument.


def assert_raises(
    case: OperatorCase, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    for trained in (False, True):
        inputs = case.sample() if trained else detached(case.sample())
        for name in case.writes:  # autograd refuses writes to leaves that require gradients
            inputs[name] = inputs[name].detach()
        for name, new in change.items():
            inputs[name] = new(inputs[name]) if callable(new) else new
        written = {name: inputs[name] for name in case.writes if name not in change}
        before = {name: x.clone() for name, x in written.items()}
        with pytest.raises(error, match=message):
            case.function(**inputs)
        assert all(torch.equal(written[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("case", "bad"),
    [
        pytest.param(case, bad, id=f"{case.name}-{'-'.join(bad.change)}-{i}")
        for case in OPERATORS
        for i, bad in enumerate(case.bad)
    ],
)
def test_bad_input_is_refused(case, bad):
    assert_raises(case, bad.change, bad.error, bad.message)


@every("checks")
def test_tensors_on_another_device(case):
    names = list(case.tensors(case.sample()))
    for name in names if len(names) > 1 else ():
        message = rf"^{name} must be on cpu like \w+, got meta$"
        if name == case.first():
            message = rf"^\w+ must be on meta like {name}, got cpu$"
        assert_raises(case, {name: lambda x: x.detach().to("meta")}, ValueError, message)


@every()
def test_operators_refuse_tensors_on_another_device(case):
    """Operators are called by name. The dispatcher selects the kernel by any of the tensors."""
    for operator, arguments in operator_calls(case, case.sample()):
        assert_devices_are_checked(operator, arguments)


@every("checks")
def test_unsupported_and_mixed_dtypes(case):
    """Unsupported dtypes and differing dtypes raise different messages."""
    first = case.first()
    floating = list(case.differentiable or (first,))
    for dtype in OTHERS:
        message = rf"^\w+ must be float16, bfloat16, float32 or float64, got {dtype}$"
        change = {name: lambda x, dtype=dtype: x.detach().to(dtype) for name in floating}
        assert_raises(case, change, TypeError, message)
    for name in floating:
        message = (
            rf"^{name} must have \w+'s dtype torch.float32, got torch.float16$|"
            rf"^\w+ must have {name}'s dtype torch.float16, got torch.float32$"
        )
        if len(floating) > 1:
            change = {name: lambda x: x.detach().half()}
            assert_raises(case, change, TypeError, message)


@every("checks")
def test_arguments_that_are_not_tensors(case):
    for name in case.tensors(case.sample()):
        for value in (3, [1.0], "x", np.ones(8), None):
            message = f"^{name} must be a tensor, got {type(value).__name__}$"
            if value is not None or name not in case.optional:
                assert_raises(case, {name: value}, TypeError, message)
