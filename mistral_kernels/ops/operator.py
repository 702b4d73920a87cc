"""Declare the operators of `torch.ops.mistral_kernels`: one `Operator` per operator.

A declaration consists of the schema, the fake implementation, the argument checks and the
implementations. This module registers them with PyTorch's dispatcher. It is the only module that
selects an implementation:

    <name>          If csrc's library is loaded, its kernel. Before that, the first call loads the
                    library, if csrc has this operator, and calls the operator again. In all other
                    cases `triton` or `torch`, selected by `dispatch.uses_triton`.
    <name>_python   `triton` or `torch`. csrc calls it for arguments that its kernel does not
                    support.

The derivative of an operator is a subclass of `Function`. `torch.func.vmap` calls an operator once
per example.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mistral_kernels.ops import dispatch, extension
from mistral_kernels.ops.checks import check_float, check_triton_dtype

NAMESPACE = "mistral_kernels"
_failure = threading.local()  # `error`: the last exception of an implementation that csrc called


R = TypeVar("R")  # type of an operator's result


class Operator(Generic[R]):
    """An operator. A call of the object calls `torch.ops.mistral_kernels.<name>`.

    Args:
        name: the name of the operator.
        schema: the arguments and results in the grammar of `torch.library`, without the name and
            without default values. Every result must be a tensor, because `torch.jit.trace` cannot
            record None. Return `absent` for a result that the caller did not request.
        fake: called with meta or fake tensors. It returns empty tensors with the shapes and strides
            of the results.
        check: called with the arguments before any implementation. It raises an exception for
            shapes, dtypes and numbers that do not fit. `Operator` itself checks that required
            tensors are given, that all tensors are dense and on one device, and that the backend
            supports the dtype of the first tensor.
        torch: the implementation in PyTorch, for any device and dtype.
        triton: the implementation in Triton, for float16, bfloat16 and float32. If it is None,
            `torch` is used instead.
        csrc: the device types for which csrc registers a kernel of this operator.
        gradient_of: the name of the public function whose backward pass this operator computes; see
            `run_backward`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        check: Callable[..., None],
        torch: Callable[..., R],
        triton: Callable[..., R] | None = None,
        csrc: Sequence[str] = (),
        gradient_of: str | None = None,
    ) -> None:
        self.overload = _define(name, schema)
        self._python = _define(f"{name}_python", schema) if csrc else None
        self._check, self._torch, self._triton, self._fake = check, torch, triton, fake
        self._csrc = frozenset(csrc)
        self.gradient_of = gradient_of
        arguments = self.overload._schema.arguments
        self._tensors = [(i, x.name) for i, x in enumerate(arguments) if "Tensor" in str(x.type)]
        self._required = [(i, x.name) for i, x in enumerate(arguments) if str(x.type) == "Tensor"]
        self._written = [
            i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write
        ]
        self._register(f"{NAMESPACE}::{name}")

    def _register(self, qualified: str) -> None:
        # Register an implementation for every device. When csrc's library is loaded, it registers
        # its own kernels, which have precedence for their device type.
        torch.library.impl(qualified, "default", self._load_and_run if self._csrc else self._run)
        if "cuda" not in self._csrc:
            torch.library.impl(qualified, "cuda", self._run)
        torch.library.register_fake(qualified, self._run_fake)
        torch.library.register_vmap(qualified, _vmap_rule(self))
        if self._python is not None:
            torch.library.impl(f"{qualified}_python", "default", self._run_for_csrc)

    def __call__(self, *args: Any) -> R:
        """Call the operator.

        Raises:
            TypeError: an argument has a wrong type or dtype.
            ValueError: an argument has a wrong shape, device or value.
            NotImplementedError: an argument has a forward-mode tangent.
        """
        if torch.compiler.is_compiling():
            return self.overload(*args)  # type: ignore[no-any-return]
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            _refuse_forward_mode(self.overload.name().partition("::")[2])
        try:
            result: R = self.overload(*args)
        except RuntimeError as error:
            failure = getattr(_failure, "error", None)
            if failure is None or str(error) != _describe(failure):
                raise
            _failure.error = None
            try:
                raise failure from None
            finally:
                del failure  # breaks the reference cycle of this frame and the traceback
        # Increment the version, so that autograd detects that a saved tensor has changed.
        for i in self._written:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return result

    def _load_and_run(self, *args: Any) -> Any:
        tensors = [args[i] for i, _ in self._tensors if args[i] is not None]
        device_type = tensors[0].device.type if tensors else ""
        if (
            device_type in self._csrc
            # For other devices and layouts, the dispatcher would call this function again.
            and all(x.device.type == device_type and _is_dense(x) for x in tensors)
            and dispatch.uses_csrc(device_type)
            and extension.load(device_type)
        ):
            if not self.overload.has_kernel_for_dispatch_key(device_type.upper()):
                raise RuntimeError(f"csrc must register {self.overload.name()} for {device_type}")
            return self.overload(*args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        name, x = self._check_arguments(args)
        implementation = self._torch
        if self._triton is not None and dispatch.uses_triton(x):
            check_triton_dtype(name, x)
            implementation = self._triton
        device_type = x.device.type
        # Autocast would cast the arguments of PyTorch's operators in the implementation.
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return implementation(*args)
        return implementation(*args)

    def _run_for_csrc(self, *args: Any) -> Any:
        _failure.error = None
        try:
            return self._run(*args)
        except BaseException as error:  # PyTorch's stable ABI does not pass exceptions on
            _failure.error = error
            raise

    def _run_fake(self, *args: Any) -> Any:
        self._check_arguments(args)
        return self._fake(*args)

    def _check_arguments(self, args: tuple[Any, ...]) -> tuple[str, Tensor]:
        """Check all arguments; return the name of the first tensor and the tensor.

        The dispatcher does not check these conditions: it accepts None for a tensor, and it calls
        the fake implementation if any tensor is a meta tensor.
        """
        for i, name in self._required:
            if args[i] is None:
                raise TypeError(f"{name} must be a tensor, got None")
        tensors = [(name, args[i]) for i, name in self._tensors if args[i] is not None]
        first, like = tensors[0]
        for name, x in tensors:
            if x.layout is not torch.strided:
                raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}")
            if x.device != like.device:
                raise ValueError(f"{name} must be on {like.device} like {first}, got {x.device}")
        check_float(first, like)
        self._check(*args)
        return first, like


def reload_backend_setting() -> None:
    """Read MISTRAL_KERNELS_BACKEND again. Without this call it is read only once, at first use."""
    dispatch.clear_backend_cache()
    extension.apply_backend_setting()


def python_error() -> str:
    """Return the message of the last exception of a Python implementation that csrc called."""
    return _describe(_failure.error)


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_quantized


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _define(name: str, schema: str) -> Any:
    torch.library.define(f"{NAMESPACE}::{name}", schema)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_define("python_error", "() -> str")
torch.library.impl(f"{NAMESPACE}::python_error", "default", python_error)


class Function(torch.autograd.Function):
    """Base class of the autograd functions of operators.

    A subclass defines `forward` without a context, and `setup_context`, as `torch.func` requires.
    """

    generate_vmap_rule = True
    public_name: ClassVar[str]  # the differentiated public function, for error messages

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Return what `apply` returns, with 20 us less overhead per call."""
        if torch.compiler.is_compiling():
            if in_transform():
                # torch.compile would run `forward` without its derivative, and the gradient would
                # be 0. With fullgraph=False, torch.compile then runs the transform eagerly.
                raise NotImplementedError(
                    f"{cls.public_name} inside a torch.func transform cannot be compiled; "
                    "transform the compiled function instead"
                )
            return cls.apply(*args)  # type: ignore[no-untyped-call]
        if in_transform():
            if forward_ad._current_level >= 0:
                _refuse_forward_mode(cls.public_name)
            return cls.apply(*args)  # type: ignore[no-untyped-call]
        # Skip the `apply` of torch.autograd.Function: it inspects the signature of `forward` to
        # fill in default values, which takes 20 us per call.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor, the placeholder of a result that the caller did not request."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a call with these tensors must go through a `Function`.

    The result is always True inside a transform of `torch.func`, because the `requires_grad` of
    outer levels cannot be read.
    """
    if in_transform():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def in_transform() -> bool:
    """Return whether a `torch.func` transform is active."""
    return torch._C._are_functorch_transforms_active()


def run_backward(operator: Operator[Any], *args: Any) -> Any:
    """Call a backward operator. Differentiating its results again raises a RuntimeError."""
    if torch.compiler.is_compiling() or not needs_gradient(
        *(x for x in args if isinstance(x, Tensor))
    ):
        return operator(*args)
    return _OnceFunction.call(operator, *args)


class _OnceFunction(Function):
    public_name = "a gradient"

    @staticmethod
    def forward(operator: Operator[Any], *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second_derivative(ctx.operator.gradient_of)


def refuse_second_derivative(name: str) -> NoReturn:
    """Raise the error for a second derivative of the public function `name`."""
    raise RuntimeError(f"{name} can be differentiated only once; its gradients have no derivative")


def _refuse_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} has no forward-mode derivative; use reverse mode (torch.func.vjp, "
        "torch.autograd.grad) or the definition in mistral_kernels.ops.reference"
    )


def _has_tangent(x: Any) -> bool:
    if not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x, level=forward_ad._current_level).tangent is not None


def _vmap_rule(operator: Operator[Any]) -> Callable[..., Any]:
    """Return the rule for `torch.func.vmap`, which calls the operator once per example."""
    arguments, name = operator.overload._schema.arguments, operator.overload.name()

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        for argument, dim in zip(arguments, in_dims, strict=True):
            if dim is None and argument.alias_info is not None and argument.alias_info.is_write:
                raise NotImplementedError(
                    f"{argument.name} must have a batch dimension in vmap over {name}, because "
                    "every example writes to it"
                )
        if info.batch_size == 0:
            raise NotImplementedError(f"vmap over {name} must have a batch size > 0, got 0")
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
