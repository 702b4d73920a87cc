"""SwiGLU, the gated activation of Mistral's feed-forward (arXiv:2002.05202).

    y = silu(gate) * up,    silu(g) = g * s,    s = 1 / (1 + exp(-g))

Backward, from gate and up alone (nothing else is saved):

    dgate = dy * up * s * (1 + g * (1 - s)),    dup = dy * silu(g)

gate, up, y: equal shapes (..., intermediate). Arithmetic in fp32; each element is read and written
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.dispatch import as_rows, device_guard, uses_triton
from mistral_kernels.ops.launch_configs import cdiv
from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        tl.store(dgate_ptr + row * COLS + col, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DUP:
        dup = dy * gate * sigmoid
        tl.store(dup_ptr + row * COLS + col, dup.to(dup_ptr.dtype.element_ty), mask=mask)


@jit
def _tile(COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The rows, in 64 bits, and the columns of a program's tile."""
    tiles: tl.constexpr = (COLS + BLOCK_COLS - 1) // BLOCK_COLS
    first_row = tl.program_id(0) // tiles * BLOCK_ROWS
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
    return row, tl.program_id(0) % tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]


Gradients = tuple[Tensor | None, Tensor | None]


def _empty_output(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _empty_gradients(dy: Tensor, gate: Tensor, up: Tensor, output_mask: list[bool]) -> Gradients:
    dgate, dup = (_empty_output(gate, up) if need else None for need in output_mask)
    return dgate, dup


def _forward_triton(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype == torch.float64:
        raise TypeError(
            "swiglu: gate is torch.float64; the triton backend takes float16, bfloat16 and "
            "float32, MISTRAL_KERNELS_BACKEND=torch float64 too"
        )
    y = _empty_output(gate, up)
    if y.numel() == 0:
        return y
    gate, gate_stride = as_rows(torch.atleast_1d(gate))
    up, up_stride = as_rows(torch.atleast_1d(up))
    cols = gate.shape[-1]
    rows = y.numel() // cols
    config = launch_configs.swiglu(cols)
    with device_guard(y):
        _forward_kernel[_grid(rows, cols, config)](
            *(gate, up, y, gate_stride, up_stride, rows), COLS=cols, **config
        )
    return y


def _backward_triton(dy: Tensor, gate: Tensor, up: Tensor, output_mask: list[bool]) -> Gradients:
    dgate, dup = _empty_gradients(dy, gate, up, output_mask)
    if gate.numel() == 0:
        return dgate, dup
    dy, dy_stride = as_rows(torch.atleast_1d(dy))
    gate, gate_stride = as_rows(torch.atleast_1d(gate))
    up, up_stride = as_rows(torch.atleast_1d(up))
    cols = gate.shape[-1]
    rows = gate.numel() // cols
    config = launch_configs.swiglu(cols)
    with device_guard(gate):
        _backward_kernel[_grid(rows, cols, config)](
            *(dy, gate, up, dgate, dup, dy_stride, gate_stride, up_stride, rows),
            COLS=cols,
            NEEDS_DGATE=dgate is not None,
            NEEDS_DUP=dup is not None,
            **config,
        )
    return dgate, dup


def _grid(rows: int, cols: int, config: launch_configs.Config) -> tuple[int]:
    return (cdiv(rows, config["BLOCK_ROWS"]) * cdiv(cols, config["BLOCK_COLS"]),)


def _forward_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up).contiguous()


def _backward_torch(dy: Tensor, gate: Tensor, up: Tensor, output_mask: list[bool]) -> Gradients:
    needs_dgate, needs_dup = output_mask
    dgate = torch.ops.aten.silu_backward(dy * up, gate).contiguous() if needs_dgate else None
    return dgate, F.silu(gate).mul_(dy).contiguous() if needs_dup else None


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    return (_forward_triton if uses_triton(gate) else _forward_torch)(gate, up)


def _backward(dy: Tensor, *args: Any) -> Gradients:
    return (_backward_triton if uses_triton(dy) else _backward_torch)(dy, *args)


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("swiglu can be differentiated only once; its gradients have no gradients")


torch.library.define("mistral_kernels::swiglu_forward", "(Tensor gate, Tensor up) -> Tensor")
torch.library.impl("mistral_kernels::swiglu_forward", ("cpu", "cuda"), _forward)
torch.library.register_fake("mistral_kernels::swiglu_forward", _empty_output)

torch.library.define(
    "mistral_kernels::swiglu_backward",
    "(Tensor dy, Tensor gate, Tensor up, bool[2] output_mask) -> (Tensor? dgate, Tensor? dup)",
)
torch.library.impl("mistral_kernels::swiglu_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("mistral_kernels::swiglu_backward", _empty_gradients)
torch.library.register_autograd("mistral_kernels::swiglu_backward", _backward_twice)

_forward_op = torch.ops.mistral_kernels.swiglu_forward.default
_backward_op = torch.ops.mistral_kernels.swiglu_backward.default


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward_op(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dgate, dup = _backward_op(dy, *ctx.saved_tensors, list(ctx.needs_input_grad))
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Differentiable once, in both.

    Args:
        gate, up: (..., intermediate), equal shapes; float16, bfloat16, float32 or, on the torch
            backend, float64. Any strides: the two halves of a fused projection go in as views,
            and are read where they are.

    Returns:
        (..., intermediate), contiguous, of gate's dtype.

    Raises:
        ValueError: shapes, dtypes or devices differ.
        TypeError: gate's dtype is not supported.
    """
    if gate.dtype not in DTYPES:
        raise TypeError(f"gate must be floating point, got {gate.dtype}")
    if gate.shape != up.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if gate.dtype != up.dtype:
        raise ValueError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    if gate.device != up.device:
        raise ValueError(f"up must be on {gate.device} like gate, got {up.device}")
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return SwiGLUFunction.apply(gate, up)
    return _forward_op(gate, up)
