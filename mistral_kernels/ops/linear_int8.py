"""Linear layer y = x W^T with an int8 weight: W[o, i] = scales[o] * weight[o, i].

With few rows of x, a product takes the time of reading the weight. An int8 weight has half the
bytes of a bfloat16 weight and takes half the time. There is one scale per output ("channel"), and
quantization is symmetric: the largest magnitude of a row becomes 127, as in LLM.int8()
(arXiv:2208.07339) and torchao's int8 weight-only quantization. One scale per group of 128 inputs is
not offered: a product of 8 rows would take 1.15 times as long (measured with AVX-512 BF16), which
is longer than with a bfloat16 weight.

All dtypes of x represent int8 exactly. csrc's kernel for few rows multiplies in the same order as
the kernel of `ops.linear`, then scales the float32 sums. A row's result therefore has the same bits
in any batch of up to 32 rows. `ops.matmul` multiplies more rows. Where PyTorch multiplies faster,
it converts one block of the weight at a time to the dtype of x. If csrc's library is absent,
PyTorch computes all products, which is slower than with an unquantized weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.checks import check_dtype, check_shape
from mistral_kernels.ops.linear import KERNEL_ROWS, check_shapes
from mistral_kernels.ops.matmul import kernel_multiplies, multiply
from mistral_kernels.ops.operator import Operator

# Largest number of rows of x for the kernel for few rows, where PyTorch multiplies more rows. On
# Zen 4 (AVX-512 BF16), the kernel is faster than PyTorch up to 256 rows.
_KERNEL_ROWS = 128
_BLOCK = 1 << 20  # elements of the weight that are converted at a time; they fit in a cache


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `weight` to int8, with one scale per output.

        scales[o] = max |weight[o]| / 127,    int8[o, i] = round(weight[o, i] / scales[o])

    Args:
        weight: (out_features, in_features), any floating-point dtype.

    Returns:
        The int8 weight (out_features, in_features) and the float32 scales (out_features,).

    Raises:
        ValueError: weight is not a floating-point matrix.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            "weight must be (out_features, in_features) of a floating-point dtype, got "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    weight = weight.detach().float()
    # Clamp: a row of zeros would have a scale of 0, and the weight is divided by the scale.
    scales = weight.abs().amax(dim=1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    return weight.div(scales[:, None]).round_().to(torch.int8), scales


def _linear_torch(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    blocks = zip(weight.split(rows), scales.split(rows), strict=True)
    return torch.cat([F.linear(x, _dequantized(*block, x.dtype)) for block in blocks], dim=1)


def _dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return weight.to(wide).mul_(scales.to(wide)[:, None]).to(dtype)


def _empty_output(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _check(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    check_shapes(x, weight)
    check_shape("scales", scales, weight.shape[:1])
    check_dtype("weight", weight, torch.int8)
    check_dtype("scales", scales, torch.float32)


_linear_op = Operator(
    "linear_int8",
    "(Tensor x, Tensor weight, Tensor scales) -> Tensor",
    fake=_empty_output,
    check=_check,
    torch=_linear_torch,
    csrc=("cpu",),
)


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Multiply x by the transpose of a quantized weight, without gradients.

    Args:
        x: (rows, in_features), any floating-point dtype, on the CPU.
        weight: (out_features, in_features), int8.
        scales: (out_features,), float32.

    Returns:
        (rows, out_features), dtype of x.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: x is not on the CPU, or requires a gradient.
    """
    if not x.is_cpu:
        raise NotImplementedError(
            f"x must be on the CPU for an int8 weight, got {x.device}; "
            "use an unquantized weight on other devices"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(
            "x must not require a gradient for an int8 weight, got requires_grad=True; use "
            "torch.no_grad(), or an unquantized weight for training"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and x.ndim and x.shape[0] > KERNEL_ROWS and kernel_multiplies(x):
        _check(x, weight, scales)
        return multiply(_empty_output(x, weight, scales), x, weight.mT, scales)
    if x.ndim and x.shape[0] > _KERNEL_ROWS:
        _check(x, weight, scales)
        return _linear_torch(x, weight, scales)
    return _linear_op(x, weight, scales)
