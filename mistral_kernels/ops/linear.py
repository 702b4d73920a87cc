"""y = x W^T: PyTorch's linear, but for few rows of float32 on the CPU.

Decoding multiplies every weight by one row a sequence. In float32 PyTorch's BLAS does so on a
single thread; as a batch of products, one for each block of W's rows, all threads take part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to how many rows of x blocks are faster (measured on two Zen 4 cores): a weight with more
# outputs than inputs gains for longer.
_FEW_ROWS, _FEW_ROWS_WIDE = 32, 512


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in_features) times the transpose of weight (out_features, in_features).

    Differentiable; dtypes and devices as for `torch.nn.functional.linear`.
    """
    threads = torch.get_num_threads()
    blocks = 2 * threads
    out_features, in_features = weight.shape
    if (
        threads > 1
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] <= (_FEW_ROWS_WIDE if out_features > in_features else _FEW_ROWS)
        and out_features % blocks == 0
    ):
        parts = x @ weight.unflatten(0, (blocks, -1)).mT  # (blocks, rows, out_features / blocks)
        return parts.transpose(0, 1).flatten(1)
    return F.linear(x, weight)
