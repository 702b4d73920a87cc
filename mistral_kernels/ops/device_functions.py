"""Tensors as kernels take them, and device functions that kernels of several operators call."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


class View(NamedTuple):
    """A tensor as kernels take it: its pointer, and strides in elements; heads are contiguous."""

    ptr: Tensor
    batch_stride: int
    token_stride: int
    head_stride: int


def view(x: Tensor, packed: bool) -> View:
    """Return the view of (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim)."""
    if packed:
        return View(x, 0, x.stride(0), x.stride(1))
    return View(x, x.stride(0), x.stride(1), x.stride(2))


@jit
def tanh(x):
    """Near 0, where 1 - 2 / (e^2x + 1) cancels, a polynomial fitted to a relative error of 4e-8."""
    square = x * x
    near = x + x * square * (
        -0.33332947 + square * (0.13320724 + square * (-0.05267176 + square * 0.0164375))
    )
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))
