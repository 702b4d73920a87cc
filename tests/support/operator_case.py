"""`OperatorCase`, a row of the table of operators, and helpers for the inputs of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.declared import NAMESPACE
from support.helpers import FLOATS, Target, assert_matches_reference

Inputs = dict[str, Any]
Far = tuple[Iterable[str], tuple[int, ...]]


class Missing(str):
    """Reason why a row lacks a property, or ``file::test``, the test that replaces it."""


class Traffic(NamedTuple):
    """Limits on the memory traffic of one call and its backward pass, as counted by ptxrun.

    The minimum traffic reads each input once and writes each output once. The inputs of the
    backward pass are the gradients and the tensors in `saved`.

    Attributes:
        tokens: size of the sample.
        width: size of the sample.
        sizes: further arguments of `make`.
        layout: name in `LAYOUTS` of the inputs' layout.
        slow: run in the slow tests.
        launches: kernels of the forward pass and, if it is measured, of the backward pass.
        slack: allowed ratio of the traffic to the minimum, forward and backward.
        request: smallest mean of useful bytes per request of a warp, forward; 512 is the most.
        saved: inputs by name, or ``output N``.
        accessed: allowed bytes accessed forward, instead of the minimum.
    """

    tokens: int
    width: int
    sizes: Mapping[str, Any] = MappingProxyType({})
    layout: str | None = None
    slow: bool = False
    launches: tuple[int, ...] = (1,)
    slack: tuple[float, ...] = (1.02,)
    request: float = 512
    saved: tuple[str, ...] = ()
    accessed: int | None = None


class Matrix(NamedTuple):
    """Widths for which the slow tests compile a row's kernels for each target.

    Attributes:
        widths: all widths.
        default: width that is compiled in every run.
        frozen: by width, groups of inputs that are frozen in additional compilations.
        excludes: whether to skip a target, dtype and width.
    """

    widths: tuple[int, ...]
    default: int | None = None
    frozen: Mapping[int, tuple[tuple[str, ...], ...]] = MappingProxyType({})
    excludes: Callable[[str, torch.dtype, int], bool] = lambda target, dtype, width: False


class Bad(NamedTuple):
    """Call that raises.

    `change` maps names of inputs to new values, or to functions of the old value.
    """

    change: Inputs
    error: type[Exception]
    message: str


@dataclass(frozen=True, kw_only=True)
class OperatorCase:
    """One way to call a public operator, and the properties that its tests check.

    A property may be `Missing`.

    Attributes:
        name: name of the row.
        function: operator, called with the inputs by name.
        reference: the same function in plain PyTorch.
        make: function of (tokens, dtype, device, width) that returns inputs by name.
        width: width of ordinary samples.
        differentiable: inputs with gradients; the first determines the dtype of all.
        public_name: name of the operator in messages about derivatives.
        operators: names in ``torch.ops.mistral_kernels`` that are called.
        kernels: Triton kernels that are launched.
        traffic: limits on memory traffic, one per size.
        matrix: widths for which the kernels are compiled.
        far: (inputs, dimensions) whose strides reach past 2^31 elements.
        large: (tokens, width) at which several programs share rows or sums.
        bad: calls that raise.
        frozen: groups of inputs that require no gradient while the others do.
        layouts: names in `LAYOUTS` that the operator must accept.
        empty: (tokens, width) of a sample without elements.
        transforms: whether test_transforms.py tests the row.
        derivative: whether gradients exist.
        checks: whether this package checks devices, dtypes and types of the inputs.
        compiled: whether torch.compile makes one graph.
        backends: backends that run the operator.
        matches: function that asserts that a function and a reference agree for inputs.
        pure: `function` on copies of its inputs, for operators that write to their inputs.
        writes: inputs to which `function` writes.
        optional: inputs that may be None.
        unit_stride: inputs whose last dimension must be contiguous.
        far_slow: as `far`, in the slow tests.
        compiled_tokens: numbers of tokens for which one compiled graph must be enough.
        compiled_width: width in the tests that count compilations.
        narrow: (tokens, width) small enough for numeric derivatives.
        twice_differentiable: whether second derivatives exist; if False, they raise an error that
            names the operator.
        triton_dtypes: dtypes in which these tests run Triton kernels.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., Inputs]
    width: int
    differentiable: tuple[str, ...]
    public_name: str
    operators: frozenset[str]
    kernels: frozenset[str] | Missing
    traffic: tuple[Traffic, ...] | Missing
    matrix: Matrix | Missing
    far: tuple[Far, ...] | Missing
    large: tuple[tuple[int, int], ...] | Missing
    bad: tuple[Bad, ...]
    frozen: tuple[tuple[str, ...], ...] | Missing
    layouts: tuple[str, ...] | Missing
    empty: tuple[int, int] | Missing
    transforms: bool | Missing = True
    derivative: bool | Missing = True
    checks: bool | Missing = True
    compiled: bool | Missing = True
    backends: tuple[str, ...] = ("torch", "csrc", "triton")
    matches: Callable[..., None] = assert_matches_reference
    pure: Callable[..., Any] | None = None
    writes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    unit_stride: tuple[str, ...] = ()
    far_slow: tuple[Far, ...] = ()
    compiled_tokens: tuple[int, ...] = (3, 8, 65)
    compiled_width: int = 128
    narrow: tuple[int, int] = (3, 4)
    twice_differentiable: bool | Missing = False
    triton_dtypes: tuple[torch.dtype, ...] = FLOATS

    def sample(
        self,
        tokens: int = 3,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        width: int | None = None,
        frozen: tuple[str, ...] = (),
        **sizes: Any,
    ) -> Inputs:
        """Return random inputs; the differentiable ones require gradients, except `frozen`."""
        inputs = self.make(tokens, dtype, device, self.width if width is None else width, **sizes)
        for name in self.differentiable:
            inputs[name].requires_grad_(name not in frozen)
        return inputs

    def call(self, **inputs: Any) -> Any:
        return (self.pure or self.function)(**inputs)

    def outputs(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return as_tuple(self.call(**inputs))

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        return [inputs[name] for name in self.differentiable if inputs[name].requires_grad]

    def assert_matches(
        self, inputs: Inputs, function: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        self.matches(function or self.call, self.reference, inputs, **options)

    def first(self) -> str:
        """Return the name of the first tensor, whose dtype and device the others must have."""
        return next(iter(self.tensors(self.sample())))

    @staticmethod
    def tensors(inputs: Inputs) -> dict[str, Tensor]:
        return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def detached(inputs: Inputs) -> Inputs:
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def backward(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of the leaves for random gradients of the outputs."""
    used = [y for y in outputs if y.requires_grad]
    return torch.autograd.grad(used, leaves, [torch.randn_like(y) for y in used])


def _swapped(x: Tensor, i: int, j: int) -> Tensor:
    return x.transpose(i, j).contiguous().transpose(i, j)


def _uneven(x: Tensor) -> Tensor:
    """Return a copy with contiguous rows within each group, and gaps between the groups."""
    wide = torch.cat((x, x), 0 if x.ndim < 3 else 1)
    return wide[: len(x)] if x.ndim < 3 else wide[:, : x.shape[1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "groups apart": _uneven,
    "transposed": lambda x: _swapped(x, 0, 1),
    "heads first": lambda x: _swapped(x, -3, -2) if x.ndim > 2 else x,
    "elements apart": lambda x: torch.stack((x, x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "one row": lambda x: x[(slice(1),) * (x.ndim - 1)].expand_as(x),
}


def laid_out(inputs: Inputs, layout: str, unit_stride: tuple[str, ...] = ()) -> Inputs:
    """Copy the inputs into a layout of `LAYOUTS`; vectors always get gaps between elements."""
    results = dict(inputs)
    for name, x in OperatorCase.tensors(inputs).items():
        kind = "elements apart" if x.ndim == 1 else layout
        copy = LAYOUTS[kind](x.detach()) if x.ndim else x
        if copy.ndim and not (name in unit_stride and copy.stride(-1) != 1):
            results[name] = copy.requires_grad_(x.requires_grad)
    return results


def far_apart(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Copy x with strides of `dims` that put its last element past element 2^31.

    Pages that are not written need no memory.
    """
    steps = math.prod(x.shape[dim] for dim in dims) - 1
    strides, size = [0] * x.ndim, 1
    for dim in (d for d in reversed(range(x.ndim)) if d not in dims):
        strides[dim], size = size, size * x.shape[dim]
    step = max(size, 2**31 // steps // 8 * 8 + 8)
    for dim in reversed(dims):
        strides[dim], step = step, step * x.shape[dim]
    last = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    assert last >= 2**31
    memory = torch.UntypedStorage((last + 1) * x.element_size(), device=x.device)
    far = torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, 0, x.shape, strides)
    return far.copy_(x.detach()).requires_grad_(x.requires_grad)


class OperatorCalls(TorchDispatchMode):
    """Mode that records calls of this package's operators, with copies of their arguments.

    `others` lists the names of the PyTorch operators that are called, except views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(NAMESPACE):
            copies = [same_strides(x) if isinstance(x, Tensor) else x for x in args]
            self.calls.append((func, tuple(copies)))
        elif not func.is_view:
            self.others.append(func.name())
        return func(*args, **(kwargs or {}))


def same_strides(x: Tensor) -> Tensor:
    """Copy x with its strides."""
    storage = x.detach().untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        storage, x.storage_offset(), x.shape, x.stride()
    )


def operator_calls(
    case: OperatorCase, inputs: Inputs, strided: bool = False
) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the operator calls of a row: without gradients, and with each frozen group."""
    groups = [()] if isinstance(case.frozen, Missing) else [(), *case.frozen]
    with OperatorCalls() as seen:
        case.call(**detached(inputs))
        for frozen in groups if case.differentiable else []:
            leaves = {
                name: x.detach().requires_grad_(name in case.differentiable and name not in frozen)
                if isinstance(x, Tensor)
                else x
                for name, x in inputs.items()
            }
            outputs = [y for y in case.outputs(leaves) if y.requires_grad]
            if outputs:
                gradients = [torch.randn_like(y) for y in outputs]
                if strided:
                    gradients = [_swapped(g, 0, 1) if g.ndim > 1 else g for g in gradients]
                torch.autograd.grad(outputs, case.leaves(leaves), gradients)
    return seen.calls


def half_dtype(target: Target) -> torch.dtype:
    """Return the dtype to compile for; float16 and bfloat16 need the same registers."""
    return target.dtypes()[-1]


def assert_devices_are_checked(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Check that the error for a tensor on another device names the tensor."""
    names = [argument.name for argument in operator._schema.arguments]
    tensors = [i for i, x in enumerate(arguments) if torch.is_tensor(x)]
    for i in tensors if len(tensors) > 1 else ():
        moved = [x.to("meta") if j == i else x for j, x in enumerate(arguments)]
        named = names[i if i != tensors[0] else tensors[1]]
        with pytest.raises(ValueError, match=rf"^{named} must be on \w+ like \w+, got "):
            operator(*moved)
