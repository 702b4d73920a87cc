"""SwiGLU, the gated activation of Mistral's feed-forward (arXiv:2002.05202).

    y = silu(gate) * up,    silu(g) = g * s,    s = 1 / (1 + exp(-g))

The forward pass saves only gate and up. The backward pass computes

    dgate = dy * up * s * (1 + g * (1 - s)),    dup = dy * silu(g)

gate, up and y have the shape (..., intermediate). Alternatively, gate and up are the halves of one
tensor, the output of a fused projection; their gradients are then the halves of one tensor too. The
kernels compute in fp32 and read and write each element once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.checks import (
    check_optional_tensors,
    check_same_dtype,
    check_shape,
    check_tensors,
)
from mistral_kernels.ops.dispatch import as_rows, device_guard, width_of
from mistral_kernels.ops.launch_configs import cdiv
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.operator import Function, Operator, absent, needs_gradient, run_backward

if TYPE_CHECKING:
    import triton.language as tl

_CONTIGUOUS = torch.contiguous_format


@jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    rows,
    COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col = _tile(COLS, BLOCK_ROWS, BLOCK_COLS)
    mask = (row < rows) & (col < COLS)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * COLS + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    gradient_stride,
    rows,
    COLS: tl.constexpr,
    NEEDS_DGATE: tl.constexpr,
    NEEDS_DUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col = _tile(COLS, BLOCK_ROWS, BLOCK_COLS)
    mask = (row < rows) & (col < COLS)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    if NEEDS_DGATE:
        up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
        dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dgate = dgate.to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * gradient_stride + col, dgate, mask=mask)
    if NEEDS_DUP:
        dup = (dy * gate * sigmoid).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + row * gradient_stride + col, dup, mask=mask)


@jit
def _tile(COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return the row indices (64-bit) and the column indices of a program's tile."""
    tiles: tl.constexpr = (COLS + BLOCK_COLS - 1) // BLOCK_COLS
    first_row = tl.program_id(0) // tiles * BLOCK_ROWS
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
    return row, tl.program_id(0) % tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]


Gradients = tuple[Tensor, Tensor]  # dgate, dup; `absent` if not computed


def _parts(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up; without up, return the halves of the fused gate."""
    if up is None:
        size = gate.shape[-1] // 2
        return gate[..., :size], gate[..., size:]
    return gate, up


def _empty_output(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty(_output_shape(gate, up))


def _output_shape(gate: Tensor, up: Tensor | None) -> tuple[int, ...]:
    return gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)


def _empty_gradients(
    dy: Tensor, gate: Tensor, up: Tensor | None, needs_dgate: bool, needs_dup: bool
) -> Gradients:
    dgate, dup = (
        torch.empty_like(x, memory_format=_CONTIGUOUS) if x is not None and need else absent(gate)
        for x, need in ((gate, needs_dgate), (up, needs_dup))
    )
    return dgate, dup


def _forward_triton(gate: Tensor, up: Tensor | None) -> Tensor:
    y = _empty_output(gate, up)
    if y.numel() == 0:
        return y
    cols = width_of(y)
    rows = y.numel() // cols
    config = launch_configs.swiglu(cols)
    gate, up, *strides = _rows(gate, up)
    with device_guard(y):
        _forward_kernel[_grid(rows, cols, config)](
            *(gate, up, y, *strides, rows), COLS=cols, **config
        )
    return y


def _backward_triton(
    dy: Tensor, gate: Tensor, up: Tensor | None, needs_dgate: bool, needs_dup: bool
) -> Gradients:
    gradients = _empty_gradients(dy, gate, up, needs_dgate, needs_dup)
    if dy.numel() == 0:
        return gradients
    dgate, dup = _gradient_parts(gradients, up, needs_dgate, needs_dup)
    cols = width_of(dy)
    rows = dy.numel() // cols
    dy, dy_stride = as_rows(dy)
    config = launch_configs.swiglu(cols)
    gradient_stride = width_of(gate)
    gate, up, *strides = _rows(gate, up)
    with device_guard(dy):
        _backward_kernel[_grid(rows, cols, config)](
            *(dy, gate, up, dgate, dup, dy_stride, *strides, gradient_stride, rows),
            COLS=cols,
            NEEDS_DGATE=dgate is not None,
            NEEDS_DUP=dup is not None,
            **config,
        )
    return gradients


def _gradient_parts(
    gradients: Gradients, up: Tensor | None, needs_dgate: bool, needs_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the parts of `gradients` to write as dgate and dup; None for a part not needed."""
    dgate, dup = gradients
    if up is None:
        return _parts(dgate, None) if needs_dgate else (None, None)
    return dgate if needs_dgate else None, dup if needs_dup else None


def _rows(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """Return gate and up as rows, and their strides between rows in elements."""
    gate, gate_stride = as_rows(gate)
    if up is None:
        return *_parts(gate, None), gate_stride, gate_stride
    up, up_stride = as_rows(up)
    return gate, up, gate_stride, up_stride


def _grid(rows: int, cols: int, config: launch_configs.LaunchConfig) -> tuple[int]:
    return (cdiv(rows, config["BLOCK_ROWS"]) * cdiv(cols, config["BLOCK_COLS"]),)


def _forward_torch(gate: Tensor, up: Tensor | None) -> Tensor:
    gate, up = _parts(gate, up)
    return F.silu(gate).mul_(up).contiguous()


def _backward_torch(
    dy: Tensor, gate: Tensor, up: Tensor | None, needs_dgate: bool, needs_dup: bool
) -> Gradients:
    gradients = _empty_gradients(dy, gate, up, needs_dgate, needs_dup)
    dgate, dup = _gradient_parts(gradients, up, needs_dgate, needs_dup)
    gate, up = _parts(gate, up)
    if dgate is not None:
        torch.ops.aten.silu_backward(dy * up, gate, grad_input=dgate)
    if dup is not None:
        torch.mul(F.silu(gate), dy, out=dup)
    return gradients


def _check(gate: Tensor, up: Tensor | None) -> None:
    if up is not None:
        check_shape("up", up, gate.shape)
        check_same_dtype("up", up, "gate", gate)
    elif gate.ndim == 0 or gate.shape[-1] % 2:
        raise ValueError(
            "gate without up must be (..., 2 * intermediate) with an even last dimension, "
            f"got {tuple(gate.shape)}"
        )


def _check_backward(dy: Tensor, gate: Tensor, up: Tensor | None, *_: Any) -> None:
    _check(gate, up)
    check_shape("dy", dy, _output_shape(gate, up))
    check_same_dtype("dy", dy, "gate", gate)


_forward_op = Operator(
    "swiglu_forward",
    "(Tensor gate, Tensor? up) -> Tensor",
    fake=_empty_output,
    check=_check,
    torch=_forward_torch,
    triton=_forward_triton,
    csrc=("cpu",),
)
_backward_op = Operator(
    "swiglu_backward",
    "(Tensor dy, Tensor gate, Tensor? up, bool needs_dgate, bool needs_dup)"
    " -> (Tensor dgate, Tensor dup)",
    fake=_empty_gradients,
    check=_check_backward,
    torch=_backward_torch,
    triton=_backward_triton,
    csrc=("cpu",),
    gradient_of="swiglu",
)


class SwiGLUFunction(Function):
    """Autograd function of `swiglu`."""

    public_name = "swiglu"

    @staticmethod
    def forward(gate: Tensor, up: Tensor | None) -> Tensor:
        """Return silu(gate) * up."""
        return _forward_op(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        """Save gate and up."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate and up."""
        mask = ctx.needs_input_grad
        gradients = run_backward(_backward_op, dy, *ctx.saved_tensors, *mask)
        return tuple(x if need else None for x, need in zip(gradients, mask, strict=True))


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up, Mistral's gated activation (arXiv:2002.05202).

    Arithmetic is float32 (float64 for float64 inputs). The torch backend without csrc also rounds
    intermediate results to the dtype of `gate`. The function is differentiable once in both
    arguments.

    Args:
        gate: (..., intermediate), float16, bfloat16, float32 or, on the torch backend, float64. Any
            strides. Without `up`, (..., 2 * intermediate): the output of a fused projection, first
            gate, then up. The gradient of a fused `gate` is written directly, as one tensor.
        up: shape and dtype of `gate`, or None if `gate` is fused.

    Returns:
        (..., intermediate), contiguous, of gate's dtype.

    Raises:
        ValueError: shapes or devices differ, or a fused gate has an odd last dimension.
        TypeError: gate's dtype is not supported, or up has another dtype.

    Example:
        >>> import torch
        >>> from mistral_kernels import swiglu
        >>> gate, up = torch.randn(5, 16), torch.randn(5, 16)
        >>> y = swiglu(gate, up)
        >>> y.shape
        torch.Size([5, 16])
        >>> fused = torch.cat((gate, up), dim=-1)  # as a fused projection returns them
        >>> torch.equal(swiglu(fused), y)
        True
    """
    check_tensors(gate=gate)
    check_optional_tensors(up=up)
    if needs_gradient(gate, up):
        return SwiGLUFunction.call(gate, up)  # type: ignore[no-any-return]
    return _forward_op(gate, up)
