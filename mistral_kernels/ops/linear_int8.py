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

from mistral_kernels.ops.dispatch import direct_cpu_operators

# Up to how many rows of x the kernel serves: on Zen 4 (AVX-512 BF16) it is faster up to 256, but
# other processors' products may be better.
_KERNEL_ROWS = 128
_BLOCK = 1 << 20  # elements of the weight that are in x's dtype at a time: what a cache holds


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weight and float32 scales (out_features,) nearest to `weight`.

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


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x (rows, in_features) times the transpose of a quantised weight: (rows, out_features).

    Args:
        x: any floating dtype, which is y's, too.
        weight: (out_features, in_features), int8.
        scales: (out_features,), float32.

    Raises:
        ValueError: the shapes or dtypes are not these.
        NotImplementedError: x is not on the CPU, or wants a gradient.
    """
    _check(x, weight, scales)
    if (
        x.shape[0] <= _KERNEL_ROWS
        and x.stride(-1) == weight.stride(-1) == 1
        and (operators := direct_cpu_operators(x, weight, scales))
    ):
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        operators.linear_int8.default(x, weight, scales, y)
        return y
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    blocks = zip(weight.split(rows), scales.split(rows), strict=True)
    return torch.cat([F.linear(x, _dequantized(*block, x.dtype)) for block in blocks], dim=1)


def _dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return weight.to(wide).mul_(scales.to(wide)[:, None]).to(dtype)


def _check(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    if not x.is_cpu:
        raise NotImplementedError(
            f"linear_int8: x is on {x.device}; quantised weights are for the CPU: "
            "use unquantised ones elsewhere"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(
            "linear_int8: x wants a gradient, and there is none; use torch.no_grad(), or an "
            "unquantised weight for training"
        )
    if (
        x.ndim != 2
        or weight.ndim != 2
        or x.shape[1] != weight.shape[1]
        or scales.shape != weight.shape[:1]
    ):
        raise ValueError(
            "linear_int8: x, weight and scales must be (rows, in_features), (out_features, "
            f"in_features) and (out_features,), got {tuple(x.shape)}, {tuple(weight.shape)} and "
            f"{tuple(scales.shape)}"
        )
    if (
        not x.is_floating_point()
        or weight.dtype != torch.int8
        or scales.dtype != torch.float32
        or not (weight.is_cpu and scales.is_cpu)
    ):
        raise ValueError(
            "linear_int8: x, weight and scales must be floating, int8 and float32 on the CPU, got "
            f"{x.dtype}, {weight.dtype} on {weight.device} and {scales.dtype} on {scales.device}"
        )
