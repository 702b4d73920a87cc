"""Arguments that all attention kernels share: `Problem`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mistral_kernels.ops.attention.kernels.shared import softmax_scales
from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.window import is_narrow
from mistral_kernels.ops.device_functions import View, view
from mistral_kernels.ops.dispatch import float32_precision
from mistral_kernels.ops.launch_configs import LaunchConfig, cdiv, next_power_of_2


class Problem:
    """Shapes and options of one call of attention.

    Attributes:
        arguments: slopes, cu_seqlens and scales, for the kernels without a cache.
        constants: constexpr arguments that do not depend on the tile.
        lse_shape: (batch, num_heads, seqlen), or (num_heads, total) if packed.
    """

    def __init__(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> None:
        cu_seqlens_q, cu_seqlens_k, *_ = spec.sequences
        *batch, tokens, self.num_heads, self.head_dim = q.shape
        self.num_kv_heads = k.shape[-2]
        self.group = self.num_heads // self.num_kv_heads
        self.block_d = max(16, next_power_of_2(self.head_dim))
        self.packed = cu_seqlens_q is not None
        self.batch = batch[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        self.cu_seqlens_q = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
        self.cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
        self.lse_shape = (*batch, self.num_heads, tokens)
        self.left, self.right = spec.window.reach
        self.slopes = None
        if spec.alibi_slopes is not None:
            slopes = spec.alibi_slopes.float().contiguous()
            self.slopes = slopes, self.num_heads if slopes.ndim == 2 else 0
        self.scales = softmax_scales(spec.scale(self.head_dim), spec.softcap)
        self.arguments = self.slopes, (self.cu_seqlens_q, self.cu_seqlens_k), self.scales
        self.constants: dict[str, Any] = {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "PRECISION": float32_precision(q),
        }

    def view(self, x: Tensor | None) -> View | None:
        """Return the kernels' view of a tensor that has the layout of q."""
        return None if x is None else view(x, self.packed)

    def grid(self, tiles: int) -> tuple[int]:
        """Return the grid with `tiles` programs per kv head and sequence."""
        return (tiles * self.num_kv_heads * self.batch,)

    def narrow_for_queries(self, config: LaunchConfig) -> bool:
        """Return whether all key blocks of a tile of queries must check both edges."""
        positions = cdiv(config["BLOCK_M"], self.group) + 1
        block = config["BLOCK_N"]
        return self.left < block or is_narrow(self.left, self.right, positions, block)

    def narrow_for_keys(self, config: LaunchConfig) -> bool:
        """Return whether all query blocks of a tile of keys must check both edges."""
        return is_narrow(self.left, self.right, config["BLOCK_N"], config["BLOCK_M"])


def fits_descriptors(*tensors: Tensor) -> bool:
    """Return whether descriptors can read the tensors: addresses must be multiples of 16 bytes."""
    for x in tensors:
        *strides, _ = x.stride()
        step = math.gcd(*strides) * x.element_size()
        if x.data_ptr() % 16 or step % 16 or min(strides) <= 0:
            return False
    return True


def offsets_within(reach: str, tokens: int, *tensors: Tensor) -> str:
    """Return the kernel argument OFFSETS, which selects the offsets that are computed in 32 bits.

    The result is `reach` ("block" or "tensor") if 32 bits can hold all offsets within `tokens`
    tokens of each tensor, else "element": every offset is computed in 64 bits.
    """
    return reach if all(x.stride(-3) * tokens < 2**31 for x in tensors) else "element"


def same_strides(config: LaunchConfig, x: Tensor, y: Tensor) -> bool:
    """Return whether a kernel that reads x and y by pointers can use the same offsets for both."""
    return not config["DESCRIPTORS"] and x.stride(-3) == y.stride(-3)
