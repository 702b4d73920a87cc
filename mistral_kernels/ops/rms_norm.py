"""RMSNorm, alone or fused with the residual addition before it (arXiv:1910.07467).

    h = x + residual                    in x.dtype; h = x without a residual
    rstd = 1 / sqrt(mean(h^2) + eps)    in fp32, one per row
    y = weight * (h * rstd)             h * rstd is rounded to x.dtype before the product

Backward, with g = weight * dy and n = h * rstd, all in fp32:

    dx = dresidual = rstd * (g - n * mean(g * n)) + dh, where dh is the gradient of the output h
    dweight = sum over rows of dy * n

x, residual, y, h: (..., hidden). weight: (hidden,). rstd: (...). Each of forward and backward reads
and writes each element once. dweight is summed without atomics: each program (in csrc, each block
of rows) writes one row of partial sums, and a second kernel adds these rows in a fixed order.

If a row has too many columns for the registers of one backward program, several programs share the
row. Each program then also reads the columns of the other programs, to compute the mean. The
programs of a row run at the same time, so that these reads hit L2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.checks import (
    check_optional_tensors,
    check_same_dtype,
    check_shape,
    check_tensors,
    is_number,
)
from mistral_kernels.ops.dispatch import as_rows, device_guard, device_properties
from mistral_kernels.ops.launch_configs import cdiv
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.operator import Function, Operator, absent, needs_gradient, run_backward

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    rows,
    eps,
    HIDDEN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SAVE_RSTD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < HIDDEN)

    weight = tl.load(weight_ptr + col, mask=col < HIDDEN, other=0.0)  # [1, BLOCK_COLS]
    h = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0)  # [BLOCK_ROWS, BLOCK_COLS]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
        tl.store(h_ptr + row * HIDDEN + col, h, mask=mask)

    h_fp32 = h.to(tl.float32)
    rstd = tl.rsqrt(
        tl.sum(h_fp32 * h_fp32, axis=1, keep_dims=True) / HIDDEN + eps
    )  # [BLOCK_ROWS, 1]
    if SAVE_RSTD:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    normed = (h_fp32 * rstd).to(h.dtype)
    y = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * HIDDEN + col, y.to(h.dtype), mask=mask)


@jit
def _backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    rows,
    HIDDEN: tl.constexpr,
    HAS_DH: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    chunk, program = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    lane = tl.arange(0, BLOCK_COLS)[None, :]
    col = chunk * BLOCK_COLS + lane
    weight = tl.load(weight_ptr + col, mask=col < HIDDEN, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)

    stride = tl.num_programs(0) // CHUNKS * BLOCK_ROWS
    for start in tl.range(program * BLOCK_ROWS, rows, stride, num_stages=NUM_STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
        mask = (row < rows) & (col < HIDDEN)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_stride + col, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = h.to(tl.float32) * rstd
        if NEEDS_DWEIGHT:
            dweight += dy * normed.to(h.dtype).to(tl.float32)
        if NEEDS_DX:
            g = dy * weight
            products = g * normed
            for i in tl.static_range(1, CHUNKS):  # the columns of the row's other programs
                far = (chunk + i) % CHUNKS * BLOCK_COLS + lane
                far_mask = (row < rows) & (far < HIDDEN)
                far_dy = tl.load(dy_ptr + row * dy_stride + far, mask=far_mask, other=0.0)
                far_h = tl.load(h_ptr + row * h_stride + far, mask=far_mask, other=0.0)
                far_weight = tl.load(weight_ptr + far, mask=far < HIDDEN, other=0.0)
                far_g = far_dy.to(tl.float32) * far_weight.to(tl.float32)
                products += far_g * (far_h.to(tl.float32) * rstd)
            mean = tl.sum(products, axis=1, keep_dims=True) / HIDDEN
            dx = (g - normed * mean) * rstd
            if HAS_DH:
                dx += tl.load(dh_ptr + row * dh_stride + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * HIDDEN + col, dx.to(h.dtype), mask=mask)

    if NEEDS_DWEIGHT:
        partial = tl.sum(dweight, axis=0)[None, :]
        partial_row = program.to(tl.int64) * HIDDEN
        tl.store(partial_ptr + partial_row + col, partial, mask=col < HIDDEN)


@jit
def _sum_partials_kernel(
    partial_ptr,
    dweight_ptr,
    partial_stride,
    programs,
    hidden,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for start in tl.range(0, programs, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < programs) & (col < hidden)
        offset = row.to(tl.int64) * partial_stride + col
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    dweight = tl.sum(total, axis=0)[None, :].to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + col, dweight, mask=col < hidden)


Outputs = tuple[Tensor, Tensor, Tensor]  # y, h, rstd; `absent` if not computed
Gradients = tuple[Tensor, Tensor]  # dx, dweight; `absent` if not computed


def _empty_outputs(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, save_rstd: bool
) -> Outputs:
    rstd_shape = x.shape[:-1] if save_rstd else (0,)
    rstd_dtype = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.empty(rstd_shape, dtype=rstd_dtype, device=x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, absent(x) if residual is None else torch.empty_like(y), rstd


def _empty_gradients(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dweight: bool,
) -> Gradients:
    return (
        torch.empty_like(h, memory_format=torch.contiguous_format) if needs_dx else absent(h),
        torch.empty(weight.shape if needs_dweight else (0,), dtype=h.dtype, device=h.device),
    )


def _forward_triton(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, save_rstd: bool
) -> Outputs:
    y, h, rstd = _empty_outputs(x, weight, residual, eps, save_rstd)
    if y.numel() == 0:
        return y, h, rstd
    hidden = weight.numel()
    rows = y.numel() // hidden
    config = launch_configs.rms_norm_forward(hidden)
    weight = weight.contiguous()
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    with device_guard(x):
        _forward_kernel[(cdiv(rows, config["BLOCK_ROWS"]),)](
            *(x, residual, weight, y, h, rstd, x_stride, residual_stride, rows, eps),
            HIDDEN=hidden,
            HAS_RESIDUAL=residual is not None,
            SAVE_RSTD=save_rstd,
            **config,
        )
    return y, h, rstd


def _backward_triton(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dweight: bool,
) -> Gradients:
    dx, dweight = _empty_gradients(dy, dh, h, weight, rstd, needs_dx, needs_dweight)
    if h.numel() == 0:
        return dx, dweight.zero_()
    hidden = weight.numel()
    rows = h.numel() // hidden
    inputs = 2 if dh is None else 3
    device = device_properties(h)
    config = launch_configs.rms_norm_backward(hidden, inputs * h.element_size(), device)
    programs = cdiv(rows, config["BLOCK_ROWS"])
    if needs_dweight:
        programs = min(programs, launch_configs.rms_norm_partial_sums(rows, device))
    partial = torch.empty(programs, hidden, device=h.device) if needs_dweight else None
    weight, rstd = weight.contiguous(), rstd.contiguous()
    dy, dy_stride = as_rows(dy)
    dh, dh_stride = (None, 0) if dh is None else as_rows(dh)
    h, h_stride = as_rows(h)
    with device_guard(h):
        _backward_kernel[(programs * config["CHUNKS"],)](
            *(dy, dh, h, weight, rstd, dx, partial, dy_stride, dh_stride, h_stride, rows),
            HIDDEN=hidden,
            HAS_DH=dh is not None,
            NEEDS_DX=needs_dx,
            NEEDS_DWEIGHT=needs_dweight,
            **config,
        )
        if needs_dweight:
            config = launch_configs.rms_norm_sum_partials()
            _sum_partials_kernel[(cdiv(hidden, config["BLOCK_COLS"]),)](
                partial, dweight, hidden, programs, hidden, **config
            )
    return dx, dweight


def _forward_torch(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, save_rstd: bool
) -> Outputs:
    h = (x if residual is None else x + residual).contiguous()
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    y = (wide * rstd).to(h.dtype).mul_(weight)
    rstd = rstd.squeeze(-1) if save_rstd else absent(rstd)
    return y, absent(x) if residual is None else h, rstd


def _backward_torch(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dweight: bool,
) -> Gradients:
    dx = dweight = absent(h)
    rstd = rstd.unsqueeze(-1)
    dy_fp32 = dy.to(rstd.dtype)
    normed = h.to(rstd.dtype) * rstd
    if needs_dx:
        g = dy_fp32 * weight
        mean = (g * normed).mean(-1, keepdim=True)
        dx = g.addcmul_(normed, mean, value=-1).mul_(rstd)
        dx = (dx if dh is None else dx.add_(dh)).to(h.dtype).contiguous()
    if needs_dweight:
        products = dy_fp32 * normed.to(h.dtype)
        dweight = products.reshape(rstd.numel(), weight.numel()).sum(0).to(h.dtype)
    return dx, dweight


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float = 0.0, *_: Any) -> None:
    if not is_number(eps):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be >= 0 and finite, got {eps}")
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x and weight must be (..., hidden) and (hidden,), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_same_dtype("weight", weight, "x", x)
    if residual is not None:
        check_shape("residual", residual, x.shape)
        check_same_dtype("residual", residual, "x", x)


def _check_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, *_: Any
) -> None:
    _check(h, weight, dh)
    check_shape("dy", dy, h.shape)
    check_shape("rstd", rstd, h.shape[:-1])
    check_same_dtype("dy", dy, "h", h)
    if rstd.dtype != torch.promote_types(h.dtype, torch.float32):
        raise TypeError(f"rstd must be float32, or float64 if h is float64, got {rstd.dtype}")


_forward_op = Operator(
    "rms_norm_forward",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, bool save_rstd)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    fake=_empty_outputs,
    check=_check,
    torch=_forward_torch,
    triton=_forward_triton,
    csrc=("cpu",),
)
_backward_op = Operator(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, bool needs_dx,"
    " bool needs_dweight) -> (Tensor dx, Tensor dweight)",
    fake=_empty_gradients,
    check=_check_backward,
    torch=_backward_torch,
    triton=_backward_triton,
    csrc=("cpu",),
    gradient_of="rms_norm",
)


class RMSNormFunction(Function):
    """Autograd function of `rms_norm`."""

    public_name = "rms_norm"

    @staticmethod
    def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> Outputs:
        """Return y, h and rstd."""
        return _forward_op(x, weight, residual, eps, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Outputs) -> None:
        """Save h, weight and rstd."""
        (x, weight, residual, _), (_, h, rstd) = inputs, output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        if residual is None or not (ctx.needs_input_grad[0] or ctx.needs_input_grad[2]):
            ctx.mark_non_differentiable(h)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> Any:
        """Return the gradients of x, weight and residual."""
        needs_dx, needs_dweight, needs_dresidual, _ = ctx.needs_input_grad
        if not ctx.has_residual:
            dh = None  # torch.compile passes a gradient for the absent h, too
        dx = dweight = None
        if dy is not None:
            mask = needs_dx or needs_dresidual, needs_dweight
            dx, dweight = run_backward(_backward_op, dy, dh, *ctx.saved_tensors, *mask)
        else:  # y is unused
            dx = dh
        return (
            dx if needs_dx else None,
            dweight if needs_dweight else None,
            dx if needs_dresidual else None,
            None,
        )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize the last dimension by its root mean square (arXiv:1910.07467).

        h = x + residual, or x without a residual
        y = weight * h / sqrt(mean(h^2) + eps)

    The residual addition and the norm take one pass over memory. The mean is float32 (float64 for
    float64 inputs). h / RMS is rounded to the dtype of ``x`` before the product with ``weight``, as
    in Mistral's own code. The function is differentiable once in ``x``, ``weight`` and
    ``residual``, through both outputs.

    Args:
        x: (..., hidden), float16, bfloat16, float32 or, on the torch backend, float64. Any strides;
            rows that are evenly spaced and contiguous are not copied.
        weight: (hidden,), dtype of ``x``.
        eps: added to the mean of the squares; finite and >= 0.
        residual: shape and dtype of ``x``; added to ``x`` before the norm.

    Returns:
        ``y``, or ``(y, x + residual)`` if ``residual`` is given; each (..., hidden), contiguous, of
        the dtype of ``x``.

    Raises:
        TypeError: a dtype is not supported or differs from the dtype of ``x``, or ``eps`` is not a
            number.
        ValueError: a shape does not fit ``x``, a tensor is on another device, or ``eps`` is
            negative or not finite.

    Example:
        >>> import torch
        >>> from mistral_kernels import rms_norm
        >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.ones(2)
        >>> rms_norm(x, weight)
        tensor([[0.8485, 1.1314]])
        >>> y, total = rms_norm(x, weight, residual=torch.tensor([[0.0, -1.0]]))
        >>> total
        tensor([[3., 3.]])
    """
    check_tensors(x=x, weight=weight)
    check_optional_tensors(residual=residual)
    if needs_gradient(x, weight, residual):
        y, h, _ = RMSNormFunction.call(x, weight, residual, eps)
    else:
        y, h, _ = _forward_op(x, weight, residual, eps, False)
    return y if residual is None else (y, h)
