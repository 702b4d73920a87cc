"""Triton kernels at the top of a module that must import without Triton.

``import mistral_kernels`` has to be quick and has to work where Triton is not installed, so kernels
are decorated with this module's ``jit`` instead of ``triton.jit``::

    from mistral_kernels.ops.lazy_triton import jit

    if TYPE_CHECKING:
        import triton.language as tl

The first launch imports Triton, binds ``tl`` in the kernel's module, and replaces the module's own
name for the kernel by what ``triton.jit`` makes of it, so that later launches cost nothing more.
Device functions are decorated in the same way and imported by name where other modules need them.

Parameters are named ``*_ptr`` and ``*_stride*``; Triton compiles a kernel for each alignment of
these. Any other number (rows, lengths) may change at every step and is not specialized; nor is
``lse_stride``, since the distance between two heads' log-sum-exps is a length. Of a tuple, named or
not, Triton specializes every element and ignores ``do_not_specialize``: tuples hold pointers,
strides and floating-point numbers, never lengths. None, in a tuple or alone, is a constexpr.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["LazyKernel", "jit"]


class LazyKernel:
    """A kernel waiting for its first launch."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._jit_function: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit_function()[grid]  # type: ignore[no-any-return]

    def jit_function(self) -> Any:
        """Return the ``triton.JITFunction``, or under the interpreter ``InterpretedFunction``."""
        if self._jit_function is None:
            import triton
            import triton.language as tl

            scope = self.fn.__globals__
            scope["tl"] = tl
            for name in self.fn.__code__.co_names:
                if isinstance(scope.get(name), LazyKernel):
                    scope[name] = scope[name].jit_function()
            self._jit_function = triton.jit(self.fn, do_not_specialize=_unspecialised(self.fn))
            scope[self.fn.__name__] = self._jit_function
        return self._jit_function


def _unspecialised(fn: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(fn).parameters.items()
        if not name.endswith("_ptr")
        and ("_stride" not in name or name.startswith("lse_stride"))
        and "constexpr" not in str(parameter.annotation)
    ]


if TYPE_CHECKING:  # a kernel's parameters have no Python types to check
    from typing import no_type_check as jit
else:
    jit = LazyKernel
