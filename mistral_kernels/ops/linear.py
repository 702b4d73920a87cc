"""Linear layer y = x W^T on the CPU: kernels for few and for many rows; elsewhere PyTorch's linear.

Decoding is memory bound: each weight is multiplied by one row per sequence. csrc's kernel for few
rows reads the weight once for all rows, and sums each product in the same order for any number of
rows. A row's result therefore has the same bits alone and in any batch of up to `KERNEL_ROWS` rows.

`ops.matmul` multiplies more rows, and all rows if gradients are needed, unless PyTorch is faster.
If csrc's library is absent, PyTorch computes all calls. It multiplies few float32 rows on a single
thread. `_linear_torch` uses all threads: it splits W into blocks of rows and computes one product
per block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mistral_kernels.ops.checks import check_same_dtype, is_plain
from mistral_kernels.ops.matmul import kernel_multiplies, multiply
from mistral_kernels.ops.operator import Function, Operator, in_transform, needs_gradient

# Largest number of rows of x for the kernel. With 64 rows on Zen 4 (AVX-512 BF16), the kernel is as
# fast as PyTorch in bfloat16, and faster in float32 and float16. On other processors PyTorch may be
# faster.
KERNEL_ROWS = 32
# Largest numbers of rows of x for which `_linear_torch` uses blocks, measured on two Zen 4 cores.
# The second number is for a weight with more outputs than inputs.
_FEW_ROWS, _FEW_ROWS_WIDE = 32, 512


def _linear_torch(x: Tensor, weight: Tensor) -> Tensor:
    threads = torch.get_num_threads()
    blocks = 2 * threads
    out_features, in_features = weight.shape
    if (
        threads > 1
        and x.dtype == torch.float32
        and x.shape[0] <= (_FEW_ROWS_WIDE if out_features > in_features else _FEW_ROWS)
        and out_features % blocks == 0
    ):
        parts = x @ weight.unflatten(0, (blocks, -1)).mT  # (blocks, rows, out_features / blocks)
        return parts.transpose(0, 1).flatten(1)  # type: ignore[no-any-return]
    return F.linear(x, weight)


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def check_shapes(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x and weight are matrices that can be multiplied."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "x and weight must be (rows, in_features) and (out_features, in_features), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )


def _check(x: Tensor, weight: Tensor) -> None:
    check_shapes(x, weight)
    check_same_dtype("weight", weight, "x", x)


_linear_op = Operator(
    "linear",
    "(Tensor x, Tensor weight) -> Tensor",
    fake=_empty_output,
    check=_check,
    torch=_linear_torch,
    csrc=("cpu",),
)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x by the transpose of weight, like `torch.nn.functional.linear` without a bias.

    The function is differentiable. It accepts the dtypes and devices of
    `torch.nn.functional.linear`.

    Args:
        x: (rows, in_features).
        weight: (out_features, in_features), dtype of x.

    Returns:
        (rows, out_features), dtype of x.
    """
    if not x.is_cpu or torch.compiler.is_compiling() or not (is_plain(x) and is_plain(weight)):
        return F.linear(x, weight)
    if torch.is_autocast_enabled("cpu"):
        return _linear_with_autocast(x, weight)
    if x.dtype == weight.dtype and x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1]:
        gradient = needs_gradient(x, weight)
        if x.shape[0] <= KERNEL_ROWS and not gradient:
            return _linear_op(x, weight)
        if kernel_multiplies(x) and not in_transform() and forward_ad._current_level < 0:
            if gradient:
                return _LinearFunction.call(x, weight)  # type: ignore[no-any-return]
            return _multiplied(x, weight)
    return _linear_torch(x, weight)


def _multiplied(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(_empty_output(x, weight), x, weight.mT)


class _LinearFunction(Function):
    public_name = "linear"

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _multiplied(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs_input_grad
        dx = _differentiable(dy, weight.mT) if needs_dx else None
        dweight = _differentiable(dy.mT, x.mT) if needs_dweight else None
        return dx, dweight


def _differentiable(x: Tensor, weight: Tensor) -> Tensor:
    if needs_gradient(x, weight):
        return _LinearFunction.call(x, weight)  # type: ignore[no-any-return]
    return _multiplied(x, weight)


def _linear_with_autocast(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    if torch.float64 in (x.dtype, weight.dtype):  # autocast does not convert float64
        return F.linear(x, weight)
    with torch.autocast("cpu", enabled=False):
        return linear(x.to(dtype), weight.to(dtype))
