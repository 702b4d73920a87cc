"""Tensor arguments of Triton kernels, and device functions that several operators share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


class View(NamedTuple):
    """A kernel's tensor argument: pointer and strides in elements. Each head is contiguous."""

    ptr: Tensor
    batch_stride: int
    token_stride: int
    head_stride: int


def view(x: Tensor, packed: bool) -> View:
    """Return the view of (batch, seqlen, heads, head_dim), or packed (tokens, heads, head_dim)."""
    if packed:
        return View(x, 0, x.stride(0), x.stride(1))
    return View(x, x.stride(0), x.stride(1), x.stride(2))


@jit
def tanh(x):
    """Return the hyperbolic tangent in float32.

    Near 0, 1 - 2 / (exp(2x) + 1) cancels: use a polynomial with a relative error of 4e-8 there.
    """
    square = x * x
    near = x + x * square * (
        -0.33332947 + square * (0.13320724 + square * (-0.05267176 + square * 0.0164375))
    )
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))
