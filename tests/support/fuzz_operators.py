"""Call operators with mangled arguments: a program that tests run in a child process.

    python tests/support/fuzz_operators.py SEED COUNT

Each call starts from valid arguments of one operator (fuzz_arguments.py) and changes some: dtypes,
shapes, strides, devices, values, or arguments that are missing. The operator must raise an
exception, or return the results of its definition in float64 (fuzz_definitions.py) for the same
arguments. The operators of csrc, which run below the checks in Python, are called as well; they
must only stay within memory. The program prints the number of each call before the call: if the
process crashes, the last number and SEED identify the arguments.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import fuzz_arguments as valid
import fuzz_definitions as exact
import torch
from declared import declared_operators
from fuzz_arguments import CSRC, Arguments, mangle
from fuzz_definitions import FLOATS, Invalid, Undefined, close
from peak_memory import peak_memory
from torch import Tensor

from mistral_kernels.ops import extension

SECONDS = 20  # limit of one call
MEMORY = 2 << 30  # limit, in bytes, of the growth of the process


def copied(x: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    if x is None or x.is_meta:
        return x
    storage = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())


def functional(operator: Callable[..., Any], written: int) -> Callable[..., Any]:
    """Return a function that leaves its arguments alone.

    It returns the first `written` arguments, as the operator wrote them, and then the results.
    """

    def call(*arguments: Any) -> tuple[Any, ...]:
        arguments = [copied(x) if i < written else x for i, x in enumerate(arguments)]
        result = operator(*arguments)
        results = result if isinstance(result, (tuple, list)) else (result,)
        return (*arguments[:written], *(x for x in results if x is not None))

    return call


_OPS = torch.ops.mistral_kernels
OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    name: (functional(getattr(_OPS, name).default, written), definition, arguments)
    for name, written, definition, arguments in (
        ("rms_norm_forward", 0, exact.rms_norm, valid.rms_norm),
        ("rms_norm_backward", 0, exact.rms_norm_backward, valid.rms_norm_backward),
        ("rotary", 0, exact.rotary, valid.rotary),
        ("rotary_", 2, exact.rotary_in_place, valid.rotary_in_place),
        ("linear", 0, exact.linear, valid.linear),
        ("linear_int8", 0, exact.linear_int8, valid.linear_int8),
        ("cross_entropy_", 1, exact.cross_entropy, valid.cross_entropy),
        ("accumulate_", 1, exact.accumulate, valid.accumulate),
        ("matmul_", 1, exact.matmul, valid.matmul),
        ("swiglu_forward", 0, exact.swiglu, valid.swiglu),
        ("swiglu_backward", 0, exact.swiglu_backward, valid.swiglu_backward),
        ("linear_cross_entropy", 0, exact.linear_cross_entropy, valid.linear_cross_entropy),
        ("attention_forward", 0, exact.attention, valid.attention_forward),
        ("attention_backward", 0, exact.attention_backward, valid.attention_backward),
        ("cached_attention", 0, exact.cached_attention, valid.cached_attention),
        ("rolling_cache_update", 2, exact.cache_update, valid.cache_update),
        ("rotary_rolling_cache_update", 2, exact.rotary_cache_update, valid.rotary_cache_update),
    )
}


def describe(arguments: Arguments) -> str:
    return "; ".join(
        f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device} "
        f"{x.tolist() if not x.is_meta and not x.is_floating_point() else ''}"
        if isinstance(x, Tensor)
        else repr(x)
        for x in arguments
    )


def check_call(name: str, arguments: Arguments) -> str | None:
    """Call an operator; return a description of what is wrong, or None."""
    call, definition, _ = OPERATORS[name]
    try:
        results = call(*arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        return None if str(error).strip() else f"{type(error).__name__} has no message"
    except AttributeError as error:
        return repr(error)
    if any(x.is_meta for x in results if isinstance(x, Tensor)):
        return None  # meta tensors have no values to compare
    try:
        expected = definition(*arguments)
    except Invalid:
        return "the operator accepted invalid arguments"
    except Undefined:
        return None
    for i, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        if wanted is None:
            continue
        if actual.shape != wanted.shape:
            return f"result {i} has shape {tuple(actual.shape)}, expected {tuple(wanted.shape)}"
        dtype = next(x.dtype for x in arguments if isinstance(x, Tensor))
        if not close(actual, wanted, dtype):
            return f"result {i} is {actual.tolist()}, expected {wanted.tolist()}"
    return None


def call_csrc(name: str, dtype: torch.dtype) -> None:
    """Call an operator that only csrc has, with mangled arguments; it may raise."""
    arguments = mangle(CSRC[name](dtype))
    with contextlib.suppress(RuntimeError, ValueError, TypeError, NotImplementedError):
        getattr(_OPS, name)(*arguments)


def main(seed: int, count: int) -> int:
    torch.set_num_threads(2)
    has_library = extension.load("cpu")
    before = peak_memory()
    failures = 0
    if missing := declared_operators() - OPERATORS.keys():
        failures += 1
        print(f"FAILED: OPERATORS must have every declared operator, missing {missing}")
    for index in range(count):
        random.seed(f"{seed} {index}")
        torch.manual_seed(seed * 1_000_003 + index)
        if has_library and index % 6 == 5:
            name = random.choice(list(CSRC))
            print(f"call {index}: csrc {name}", flush=True)
            signal.alarm(SECONDS)
            call_csrc(name, random.choice(FLOATS[:3]))
            signal.alarm(0)
            continue
        name = random.choice(list(OPERATORS))
        dtype = random.choice(FLOATS)
        arguments = OPERATORS[name][2](dtype)
        if index % 10:  # every tenth call has valid arguments
            arguments = mangle(arguments)
        print(f"call {index}: {name}", flush=True)
        signal.alarm(SECONDS)
        problem = check_call(name, arguments)
        signal.alarm(0)
        if problem:
            failures += 1
            print(f"FAILED call {index}: {name}({describe(arguments)}): {problem}", flush=True)
    growth = peak_memory() - before
    if growth > MEMORY:
        failures += 1
        print(f"FAILED: memory must grow by at most {MEMORY >> 20} MiB, got {growth >> 20} MiB")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]), int(sys.argv[2])) else 0)
