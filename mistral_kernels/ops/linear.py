"""y = x W^T: PyTorch's linear, but for few rows on the CPU.

Decoding multiplies every weight by one row a sequence, and takes the time of reading it. csrc's
kernel reads it once for all rows and sums each product in the same order whatever their number: a
row's result has the same bits alone and in any batch of up to `KERNEL_ROWS`. It computes no
gradients; where some are wanted, and without the library, PyTorch serves. There, few rows of
float32 would be multiplied on a single thread: as a batch of products, one for each block of W's
rows, all threads take part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_kernels.ops.dispatch import direct_cpu_operators

# Up to how many rows of x the kernel serves: on Zen 4 (AVX-512 BF16) it is as fast as PyTorch at 64
# in bfloat16, and still faster in float32 and float16. Other processors' products may be better.
KERNEL_ROWS = 32
# Up to how many rows of x blocks are faster (measured on two Zen 4 cores): a weight with more
# outputs than inputs gains for longer.
_FEW_ROWS, _FEW_ROWS_WIDE = 32, 512


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in_features) times the transpose of weight (out_features, in_features).

    Differentiable; dtypes and devices as for `torch.nn.functional.linear`.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return F.linear(x, weight)
    if (
        x.shape[0] <= KERNEL_ROWS
        and x.dtype == weight.dtype
        and x.stride(-1) == weight.stride(-1) == 1
        and (operators := direct_cpu_operators(x, weight))
    ):
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        operators.linear.default(x, weight, y)
        return y
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
        return parts.transpose(0, 1).flatten(1)
    return F.linear(x, weight)
