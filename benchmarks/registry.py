"""Providers and operators to compare, and the checks that run before anything is timed.

A `Provider` is an implementation; an `Operator` is a computation: its cases, a function per
provider, its definition in plain PyTorch, and its number of FLOPs and bytes.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from support import helpers  # the tolerance rule of the tests
from torch import Tensor

from mistral_kernels.ops import reference

HALVES = (torch.float16, torch.bfloat16)

CPU_DTYPES = (torch.bfloat16, torch.float32)

SHAPES = {
    "cpu": "operators of Mistral-7B on short sequences, models of 10 M and 160 M parameters",
    "large": "a model of 1.2 billion parameters, on a CPU",
    "gpu": "Mistral-7B",
}


class Provider(NamedTuple):
    """Implementation to compare. `color` is its color in every plot."""

    name: str
    color: str
    modules: tuple[str, ...] = ()  # at least one of them must be importable
    needs_gpu: bool = False
    dtypes: tuple[torch.dtype, ...] | None = None

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the provider cannot run on this device; None if it can."""
        if self.modules and not any(map(_importable, self.modules)):
            return f"{self.modules[0]} is not installed"
        if self.needs_gpu and device.type == "cpu":
            return "needs a GPU"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"does not support {dtype}"
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


# Colors that color-blind readers can distinguish (Okabe and Ito; Tol's muted for the last).
OURS = Provider("ours", "#D55E00")
PROVIDERS = {
    provider.name: provider
    for provider in (
        OURS,
        Provider("eager", "#000000"),
        Provider("compiled eager", "#999999"),
        Provider("SDPA", "#0072B2"),
        Provider("SDPA flash", "#88CCEE", needs_gpu=True, dtypes=HALVES),
        Provider("flex_attention", "#56B4E9"),
        Provider("varlen_attn", "#009E73", needs_gpu=True, dtypes=HALVES),
        Provider("flash-attn 2", "#CC79A7", ("flash_attn",), True, HALVES),
        Provider("flash-attn 3", "#882255", ("flash_attn_interface",), True, HALVES),
        Provider("flash-attn 4", "#332288", ("flash_attn.cute",), True, HALVES),
        Provider("xformers", "#F0E442", ("xformers",), True, HALVES),
        Provider("Liger", "#E69F00", ("liger_kernel",), True),
        Provider("transformers eager", "#000000", ("transformers",)),
        Provider("transformers sdpa", "#0072B2", ("transformers",)),
        Provider("transformers flash-attn 2", "#CC79A7", ("flash_attn",), True, HALVES),
        Provider("transformers with our attention", "#E69F00", ("transformers",)),
        Provider("transformers with all of ours", "#56B4E9", ("transformers",)),
        Provider("llama.cpp", "#009E73", ("llama_cpp",)),
        Provider("ours int8", "#AA4499"),
    )
}


@dataclass(frozen=True)
class Case:
    """Sizes by name, dtype and direction of one measurement. W of None means no window."""

    sizes: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    direction: str = "forward"

    def __getitem__(self, name: str) -> Any:
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{value}" for name, value in self.sizes)
        return f"{sizes}-{str(self.dtype).removeprefix('torch.')}-{self.direction}"


# prepared(i) makes the inputs of the i-th call and returns the function to time.
Prepared = Callable[[int], Callable[[], object]]


class Operator:
    """Computation that several providers offer. Subclasses implement `check` and `prepare`."""

    name: str
    summary: str  # one line for --help
    bound: str  # the limit of its speed, "FLOP" or "byte"; `bound_of` may decide per case
    measures_memory = False  # also measure the peak memory of a call
    allocates_before: tuple[str, ...] = ()  # providers whose memory is allocated before the call
    only_reads = False  # its bytes are compared with those of a read, not of a copy
    providers: tuple[str, ...]

    def __init__(self, **cases: Iterable[Case]) -> None:
        """Store the cases under the names of `SHAPES`."""
        self.cases = {shapes: tuple(own) for shapes, own in cases.items()}
        self._verdicts: dict[Any, str | None] = {}

    def bound_of(self, case: Case) -> str:
        return self.bound

    def compares_dtypes(self, case: Case) -> bool:
        """Return whether a case is timed in every dtype; see `conftest.is_chosen`."""
        return False

    def flops(self, case: Case) -> float:
        """Return the FLOPs of the matrix products that the result requires."""
        raise NotImplementedError

    def bytes(self, case: Case) -> float:
        """Return the bytes of reading each input once and writing each output once."""
        raise NotImplementedError

    def bytes_of(self, provider: str, case: Case) -> float:
        """Return the bytes of a provider that stores its inputs in another format."""
        return self.bytes(case)

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        """Raise unless the values that the provider computes are right and accurate."""
        raise NotImplementedError

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        """Return the function that makes the calls to time."""
        raise NotImplementedError

    def profile(
        self, provider: str, case: Case, call: Callable[[], object], device: torch.device
    ) -> Any:
        """Return a profile of a call; None for most operators."""
        return None

    def release(self) -> None:
        """Free the memory held for cases. No case is timed after this call."""

    def beyond(self, provider: str, case: Case) -> str | None:
        """Return why a provider cannot compute the case on any device; None if it can."""
        return None

    def unfit(self, provider: str, case: Case, device: torch.device) -> str | None:
        """Return why a provider is not timed (it cannot run, or its values are wrong), or None."""
        missing = PROVIDERS[provider].missing(device, case.dtype)
        if reason := self.beyond(provider, case) or missing:
            return reason
        if device.type == "meta":
            return None
        key = provider, self.checked(case)
        if key not in self._verdicts:
            try:
                self.check(provider, case, device)
                self._verdicts[key] = None
            except Exception as error:
                self._verdicts[key] = first_line(error)
        return self._verdicts[key]

    def checked(self, case: Case) -> Any:
        """Return a key that is equal for cases covered by the same check."""
        return case.dtype, case.direction


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


Inputs = dict[str, Tensor]
Runs = Mapping[str, Callable[..., Any]]


class TensorOperator(Operator):
    """Function of tensors, forward and backward.

    `runs[provider](case, **inputs)` computes it. `check` compares its error against `definition` in
    float64 with the error of `definition` in the case's own dtype.
    """

    runs: ClassVar[Runs]
    small: tuple[tuple[tuple[str, Any], ...], ...]  # sizes at which providers are checked

    @property
    def providers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.runs)

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """Return fresh random inputs, which require gradients in a backward case."""
        raise NotImplementedError

    def definition(self, case: Case, **inputs: Tensor) -> Any:
        raise NotImplementedError

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        for sizes in self.small:
            small = replace(case, sizes=sizes)
            if self.beyond(provider, small):
                continue
            inputs = self.inputs(small, device)
            whole = {name: x for name, x in inputs.items() if not x.is_floating_point()}
            with reference.eager_arithmetic():
                helpers.assert_matches_reference(
                    functools.partial(self.runs[provider], small, **whole),
                    functools.partial(self.definition, small, **whole),
                    {name: x for name, x in inputs.items() if name not in whole},
                )

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        run = functools.partial(self.runs[provider], case)
        copies = self._copies(case, device)
        if case.direction == "forward":  # no input has a gradient
            return lambda i: functools.partial(run, **copies[i % len(copies)])

        def backward(i: int) -> Callable[[], object]:
            inputs = copies[i % len(copies)]
            outputs = run(**inputs)
            outputs = [y for y in _as_tuple(outputs) if y.requires_grad]
            leaves = [x for x in inputs.values() if x.requires_grad]
            cotangents = [torch.ones_like(y) if y.ndim == 0 else _like(y) for y in outputs]
            # Without retain_graph, as in training; compiled code may then reuse what it saved.
            return lambda: torch.autograd.grad(outputs, leaves, cotangents)

        return backward

    @functools.lru_cache(maxsize=1)  # noqa: B019  # operators live as long as the process
    def _copies(self, case: Case, device: torch.device) -> list[Inputs]:
        """Return enough copies of the inputs that no call finds its inputs in a cache."""
        first = self.inputs(case, device)
        if device.type != "cpu":  # `timed` flushes the L2 cache of a GPU
            return [first, self.inputs(case, device)]
        size = sum(x.numel() * x.element_size() for x in first.values())
        count = min(max(2, -(-COLD_BYTES // size)), 16)
        return [first, *(_duplicate(first) for _ in range(count - 1))]

    def release(self) -> None:
        self._copies.cache_clear()
        _cotangent.cache_clear()


COLD_BYTES = 128 << 20  # more than a core's share of any cache


def _duplicate(inputs: Inputs) -> Inputs:
    """Copy the inputs to other memory."""
    return {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@functools.cache
def _cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _like(x: Tensor) -> Tensor:
    return _cotangent(x.shape, x.dtype, x.device)


def normal(*shape: int, case: Case, device: torch.device, grad: bool = True) -> Tensor:
    x = torch.randn(shape, device=device).to(case.dtype)
    return x.requires_grad_(grad and case.direction == "backward")


def cases(
    shapes: Iterable[Mapping[str, Any]],
    dtypes: Iterable[torch.dtype],
    directions: Iterable[str] = ("forward", "backward"),
) -> list[Case]:
    directions = tuple(directions)
    return [
        Case(tuple(shape.items()), dtype, direction)
        for shape in shapes
        for dtype in dtypes
        for direction in directions
    ]
