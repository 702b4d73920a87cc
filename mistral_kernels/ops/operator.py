"""Declare the operators of `torch.ops.mistral_kernels`, and what PyTorch's transforms do with them.

`define` registers everything that the dispatcher must know of an operator in one place: its schema,
its implementation for CPU and GPU tensors, its fake, a rule for `torch.func.vmap`, and errors for
derivatives that do not exist. Derivatives that exist are those of an operator's `Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "mistral_kernels"


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    *,
    gradient_of: str | None = None,
) -> Any:
    """Define `torch.ops.mistral_kernels.<name>` and return its overload.

    Args:
        schema: without the name, in the grammar of `torch.library`, without default values. Every
            result is a tensor, since `torch.jit.trace` cannot record None: return `absent` for one
            that the caller did not request.
        implementation: called with CPU or CUDA tensors, all on one device.
        fake: called with meta or fake tensors; returns empty tensors with true shapes and strides.
        check: called with the arguments before either; raises for shapes, dtypes and numbers that
            do not fit. `define` itself checks that tensors are given, on one device.
        gradient_of: the public function whose backward pass this operator is, for `run_backward`.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    check_present, check_devices = _tensor_checks(operator)

    def run(*args: Any, device_type: str = "cpu") -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            _refuse_forward_mode(name)
        check_present(args)
        check(*args)
        if torch.is_autocast_enabled(device_type):  # it would cast for PyTorch's operators in here
            with torch.autocast(device_type, enabled=False):
                return implementation(*args)
        return implementation(*args)

    def run_on_gpu(*args: Any) -> Any:
        check_devices(args)  # the dispatcher calls this for CPU tensors among others
        return run(*args, device_type="cuda")

    def run_fake(*args: Any) -> Any:
        check_present(args)
        check_devices(args)
        check(*args)
        return fake(*args)

    torch.library.impl(qualified, "cpu", run)
    torch.library.impl(qualified, "cuda", run_on_gpu)
    torch.library.register_fake(qualified, run_fake)
    torch.library.register_vmap(qualified, _one_by_one(operator))
    if gradient_of is not None:
        _gradient_of[operator] = gradient_of
    return operator


class Function(torch.autograd.Function):
    """Base class of the operators' derivatives.

    A subclass has `forward` without a context, and `setup_context`, as `torch.func` needs them.
    """

    generate_vmap_rule = True
    public_name: ClassVar[str]  # of the function that it is the derivative of, for messages

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Return what `apply` returns, sooner."""
        if torch.compiler.is_compiling():
            if in_transform():
                # There torch.compile runs `forward` alone, and takes its derivative for ours: zero.
                # Where it may, it leaves the transform to eager execution instead.
                raise NotImplementedError(
                    f"{cls.public_name} inside torch.func cannot be compiled: transform a compiled "
                    "function, do not compile a transformed one"
                )
            return cls.apply(*args)
        if in_transform():
            if forward_ad._current_level >= 0:
                _refuse_forward_mode(cls.public_name)
            return cls.apply(*args)
        # Not the method of torch.autograd.Function, which inspects the signature of `forward` to
        # fill in defaults: 20 us per call.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the empty tensor that stands for a result which was not asked for."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a call with these tensors must go through a `Function`.

    Always inside a transform of `torch.func`: `requires_grad` of outer levels cannot be read.
    """
    if in_transform():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def in_transform() -> bool:
    """Return whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


def run_backward(operator: Any, *args: Any) -> Any:
    """Call a backward operator, whose results cannot be differentiated again."""
    if torch.compiler.is_compiling() or not needs_gradient(
        *(x for x in args if isinstance(x, Tensor))
    ):
        return operator(*args)
    return _OnceFunction.call(operator, *args)


_gradient_of: dict[Any, str] = {}


class _OnceFunction(Function):
    public_name = "a gradient"

    @staticmethod
    def forward(operator: Any, *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second_derivative(_gradient_of[ctx.operator])


def refuse_second_derivative(name: str) -> NoReturn:
    """Raise the error of a public function that can be differentiated only once."""
    raise RuntimeError(f"{name} can be differentiated only once; its gradients have no gradients")


def _refuse_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} has no forward-mode derivative: use reverse mode (torch.func.vjp, "
        "torch.autograd.grad), or the definition in mistral_kernels.ops.reference"
    )


def _has_tangent(x: Any) -> bool:
    if not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x, level=forward_ad._current_level).tangent is not None


Check = Callable[[tuple[Any, ...]], None]


def _tensor_checks(operator: Any) -> tuple[Check, Check]:
    """Return checks that the tensors of a call are there, and that they are on one device.

    The dispatcher hands on None for a tensor, and sends a call with a meta tensor among others to
    the fake, whose results nobody computes.
    """
    arguments = operator._schema.arguments
    tensors = [(i, x.name) for i, x in enumerate(arguments) if "Tensor" in str(x.type)]
    required = [(i, x.name) for i, x in enumerate(arguments) if str(x.type) == "Tensor"]

    def check_present(args: tuple[Any, ...]) -> None:
        for i, name in required:
            if args[i] is None:
                raise TypeError(f"{name} must be a tensor, got None")

    def check_devices(args: tuple[Any, ...]) -> None:
        (first, device), *others = [
            (name, args[i].device) for i, name in tensors if args[i] is not None
        ]
        for name, other in others:
            if other != device:
                raise ValueError(f"{name} must be on {device} like {first}, got {other}")

    return check_present, check_devices


def _one_by_one(operator: Any) -> Callable[..., Any]:
    """Return a rule for `vmap` that calls the operator once per example."""
    arguments = operator._schema.arguments

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        for argument, dim in zip(arguments, in_dims, strict=True):
            if dim is None and argument.alias_info is not None and argument.alias_info.is_write:
                raise NotImplementedError(
                    f"{operator.name()}: vmap over its other arguments would write every example "
                    f"into the same {argument.name}; give {argument.name} a batch dimension, too"
                )
        if info.batch_size == 0:
            raise NotImplementedError(
                f"vmap over {operator.name()} must have a batch size > 0, got 0"
            )
        results = [
            operator(
                *(
                    x.select(d, i) if isinstance(d, int) else x
                    for x, d in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if results[0] is None:
            return None, None
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule
