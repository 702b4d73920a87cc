"""y = x W^T with W of 8 bits: W[o, i] = scales[o] weight[o, i], weight of int8.

Few rows take the time of reading the weight, and half of bfloat16's bytes take half of that. The
scales are per output ("channel"), symmetric: the largest of a row becomes +-127, as in LLM.int8()
(arXiv:2208.07339) and torchao's int8 weight-only. With scales per group of 128 inputs, 8 rows would
take 1.15 times as long (measured with AVX-512 BF16), more than those of a bfloat16 weight.

int8 is exact in all dtypes of x: csrc's kernel multiplies as `ops.linear`'s does, in the same
order, and scales the float32 sums. So here, too, a row has the same bits in any batch of up to
`_KERNEL_ROWS`. More rows are multiplied by PyTorch, with a block of the weight at a time brought to
x's dtype; and so are all without csrc's library, which is slower than an unquantised weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.checks import check_dtype, check_shape
from mistral_kernels.ops.linear import check_shapes
from mistral_kernels.ops.operator import Operator

# The most rows of x for the kernel: on Zen 4 (AVX-512 BF16) it is faster up to 256, but other
# processors' products may be better.
_KERNEL_ROWS = 128
_BLOCK = 1 << 20  # elements of the weight that are in x's dtype at a time: what a cache holds


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 weight and float32 scales (out_features,) nearest to `weight`.

        scales[o] = max |weight[o]| / 127,    int8[o, i] = round(weight[o, i] / scales[o])

    Args:
        weight: (out_features, in_features), of any floating dtype.

    Raises:
        ValueError: weight is no floating matrix.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            "weight must be (out_features, in_features), floating, got "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    weight = weight.detach().float()
    # A row of zeros has a scale, too, since it is divided by.
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
    """x (rows, in_features) times the transpose of a quantized weight: (rows, out_features).

    Args:
        x: any floating dtype, which is y's, too.
        weight: (out_features, in_features), int8.
        scales: (out_features,), float32.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: x is not on the CPU, or requires a gradient.
    """
    if not x.is_cpu:
        raise NotImplementedError(
            f"linear_int8: x is on {x.device}; quantized weights are for the CPU: "
            "use unquantized ones elsewhere"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(
            "linear_int8: x requires a gradient, and there is none; use torch.no_grad(), or an "
            "unquantized weight for training"
        )
    if x.ndim and x.shape[0] > _KERNEL_ROWS:
        _check(x, weight, scales)
        return _linear_torch(x, weight, scales)
    return _linear_op(x, weight, scales)
