"""Define Triton kernels at module level without importing Triton.

``import mistral_kernels`` must be fast and must work without Triton. Kernels are therefore
decorated with this module's ``jit`` instead of ``triton.jit``::

    from mistral_kernels.ops.lazy_triton import jit

    if TYPE_CHECKING:
        import triton.language as tl

The first launch imports Triton, binds ``tl`` in the kernel's module, and rebinds the kernel's name
in that module to the result of ``triton.jit``. Later launches have no overhead. Device functions
are decorated in the same way; other modules import them by name.

Triton specializes a kernel on the alignment of parameters named ``*_ptr`` and ``*_stride*``. For
all other numbers (rows, lengths), ``jit`` disables specialization, because they may change at every
step. Specialization of ``lse_stride`` is disabled too: the distance between the log-sum-exps of two
heads is a length. Triton specializes every element of a tuple and ignores ``do_not_specialize`` for
it. Tuples must therefore hold pointers, strides and floating-point numbers only, never lengths. An
argument or tuple element of None is a constexpr.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["LazyKernel", "jit"]


class LazyKernel:
    """A Triton kernel that is created at its first launch."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._jit_function: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit_function()[grid]  # type: ignore[no-any-return]

    def jit_function(self) -> Any:
        """Return the ``triton.JITFunction``; in interpreter mode the ``InterpretedFunction``."""
        if self._jit_function is None:
            import triton
            import triton.language as tl

            scope = self.fn.__globals__
            scope["tl"] = tl
            for name in self.fn.__code__.co_names:
                if isinstance(scope.get(name), LazyKernel):
                    scope[name] = scope[name].jit_function()
            self._jit_function = triton.jit(self.fn, do_not_specialize=_unspecialized(self.fn))
            scope[self.fn.__name__] = self._jit_function
        return self._jit_function


def _unspecialized(fn: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(fn).parameters.items()
        if not name.endswith("_ptr")
        and ("_stride" not in name or name.startswith("lse_stride"))
        and "constexpr" not in str(parameter.annotation)
    ]


if TYPE_CHECKING:  # the parameters of kernels have no Python types
    from typing import no_type_check as jit
else:
    jit = LazyKernel
