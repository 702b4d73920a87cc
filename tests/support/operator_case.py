"""One row of the table of operators, and what its tests do with a row's inputs."""

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
    """Why a row lacks a property: the reason, or ``file::test`` that tests it in another way."""


class Traffic(NamedTuple):
    """Bytes of one call and its backward pass, as ptxrun counts them at this size.

    The minimum reads each input and writes each output once. Backward, the inputs are gradients and
    `saved`: inputs by name, or ``output N``.
    """

    tokens: int
    width: int
    sizes: Mapping[str, Any] = MappingProxyType({})
    layout: str | None = None
    slow: bool = False
    launches: tuple[int, ...] = (1,)  # forward, and backward where that is measured
    slack: tuple[float, ...] = (1.02,)
    request: float = 512  # useful bytes per request of a warp, forward; 512 at most
    saved: tuple[str, ...] = ()
    accessed: int | None = None  # bytes that the kernel may access, in place of the minimum


class Matrix(NamedTuple):
    """Widths for which a row's kernels are compiled for each target, in the slow tests."""

    widths: tuple[int, ...]
    default: int | None = None  # the width compiled in every run
    # By width, groups of inputs that are frozen in further compilations.
    frozen: Mapping[int, tuple[tuple[str, ...], ...]] = MappingProxyType({})
    leaves_out: Callable[[str, torch.dtype, int], bool] = lambda target, dtype, width: False


class Bad(NamedTuple):
    """A call that raises: what it changes in a sample (functions of the tensor, or values)."""

    change: Inputs
    error: type[Exception]
    message: str


@dataclass(frozen=True, kw_only=True)
class OperatorCase:
    """One way to call a public operator, and what is true of the call.

    Attributes:
        function: called with the inputs by name.
        reference: the same in plain PyTorch.
        make: (tokens, dtype, device, width) to inputs by name, tensors and numbers.
        width: what `make` takes as width for ordinary samples.
        differentiable: inputs with gradients. Their dtype is that of the first.
        public_name: the operator's name in messages about derivatives.
        operators: names in ``torch.ops.mistral_kernels`` that calls reach.
        kernels: Triton kernels that calls launch.
        matches: asserts that a function, a reference and inputs agree.
        pure: `function` without writing to its inputs, for operators in place.
        writes: inputs that `function` writes.
        frozen: groups of inputs that need no gradient while the others do.
        layouts: names of `LAYOUTS` in which inputs are read where they lie.
        unit_stride: inputs whose last dimension must be contiguous.
        far: (inputs, dimensions) whose strides carry past 2^31 elements.
        far_slow: the same, in the slow tests.
        large: (tokens, width) at which several programs share rows or sums.
        compiled_tokens: numbers of tokens that one compiled graph serves.
        compiled_width: width of the tests that count compilations.
        optional: inputs that may be None.
        checks: devices, dtypes and types of the inputs are checked by this package.
        triton_dtypes: dtypes in which Triton compiles kernels of their own for these tests.
        narrow: (tokens, width) small enough for numeric derivatives.
        twice: second derivatives exist, or raise an error that names the operator.
        bad: calls that raise.
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
    twice: bool | Missing = False
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
        """Random inputs, with gradients for all that have any except the frozen ones."""
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
        """Name of the input that the others are compared with."""
        return next(iter(self.tensors(self.sample())))

    @staticmethod
    def tensors(inputs: Inputs) -> dict[str, Tensor]:
        return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def detached(inputs: Inputs) -> Inputs:
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def backward(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the outputs that have any, for random gradients of theirs."""
    wanted = [y for y in outputs if y.requires_grad]
    return torch.autograd.grad(wanted, leaves, [torch.randn_like(y) for y in wanted])


def _swapped(x: Tensor, i: int, j: int) -> Tensor:
    return x.transpose(i, j).contiguous().transpose(i, j)


def _uneven(x: Tensor) -> Tensor:
    """Return a copy whose rows are contiguous in each group, with gaps between groups."""
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
    """Lay the inputs out in memory; vectors always with room between their elements."""
    results = dict(inputs)
    for name, x in OperatorCase.tensors(inputs).items():
        kind = "elements apart" if x.ndim == 1 else layout
        moved = LAYOUTS[kind](x.detach()) if x.ndim else x
        if moved.ndim and not (name in unit_stride and moved.stride(-1) != 1):
            results[name] = moved.requires_grad_(x.requires_grad)
    return results


def far_apart(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Copy x so that the strides of `dims` carry its last element past element 2^31.

    Pages that are not touched cost nothing.
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
    """Inside, records the calls of operators of this package, with copies of their arguments.

    `others` names PyTorch's operators that are called beside them, except views.
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
    """Record the calls of operators without gradients, and with each group of inputs frozen."""
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
    """Return the half-precision dtype to compile for: both take as many registers."""
    return target.dtypes()[-1]


def assert_devices_are_checked(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Check that each tensor of an operator is named when it is on another device."""
    names = [argument.name for argument in operator._schema.arguments]
    tensors = [i for i, x in enumerate(arguments) if torch.is_tensor(x)]
    for i in tensors if len(tensors) > 1 else ():
        moved = [x.to("meta") if j == i else x for j, x in enumerate(arguments)]
        named = names[i if i != tensors[0] else tensors[1]]
        with pytest.raises(ValueError, match=rf"^{named} must be on \w+ like \w+, got "):
            operator(*moved)
