"""What the launches of the forward and the backward kernels share: one attention problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mistral_kernels.ops import tuning
from mistral_kernels.ops.attention import tile_table
from mistral_kernels.ops.attention.packed import Offsets
from mistral_kernels.ops.attention.window import UNBOUNDED, Window, is_narrow
from mistral_kernels.ops.checks import check_float, check_triton_dtype
from mistral_kernels.ops.dispatch import (
    device_guard,
    device_properties,
    float32_precision,
    with_workspace,
)
from mistral_kernels.ops.launch_configs import Config, cdiv, next_power_of_2


class Problem:
    """Shapes and bounds of one call, rectangular or packed, as kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        offsets: Offsets | None,
        window: Window,
        alibi_slopes: Tensor | None,
    ) -> None:
        check_float("q", q)
        check_triton_dtype("q", q)
        *batch, tokens, self.num_heads, self.head_dim = q.shape
        self.num_kv_heads = k.shape[-2]
        self.group = self.num_heads // self.num_kv_heads
        self.block_d = max(16, next_power_of_2(self.head_dim))
        self.packed = offsets is not None
        self.batch = batch[0] if offsets is None else offsets.q.numel() - 1
        self.cu_seqlens_q = None if offsets is None else offsets.q.contiguous()
        self.cu_seqlens_k = None if offsets is None else offsets.k.contiguous()
        self.lse_shape = (*batch, self.num_heads, tokens)
        self.left, self.right = window.reach
        self.slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        per_batch = self.slopes is not None and self.slopes.ndim == 2
        self.slopes_stride = self.num_heads if per_batch else 0
        self.slopes_view = None if self.slopes is None else (self.slopes, self.slopes_stride)
        self.precision = float32_precision(q)
        self.device = device_properties(q)
        self.like = q

    def strides(self, *tensors: Tensor | None) -> list[int]:
        """Between sequences, tokens and heads, of each tensor; packed sequences have no first."""
        strides: list[int] = []
        for x in tensors:
            if x is not None:
                strides += (0, *x.stride()[:2]) if self.packed else x.stride()[:3]
        return strides

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """Between sequences and heads."""
        return (0, lse.stride(0)) if self.packed else (lse.stride(0), lse.stride(1))

    def narrow_for_queries(self, config: Config) -> bool:
        """Must every key block of a tile of queries check both edges?"""
        places = cdiv(config["BLOCK_M"], self.group) + 1
        block = config["BLOCK_N"]
        return self.left < block or is_narrow(self.left, self.right, places, block)

    def narrow_for_keys(self, config: Config) -> bool:
        """Must every query block of a tile of keys check both edges?"""
        return is_narrow(self.left, self.right, config["BLOCK_N"], config["BLOCK_M"])

    def launch(self, kernel: str, descriptors: bool, run: Callable[[Config], None]) -> None:
        """Runs `kernel` as the table says, or as measured; may its tensors have `descriptors`?"""
        x = self.like
        arguments = kernel, self.block_d, x.element_size(), self.device, descriptors

        def run_config(config: Config) -> None:
            if config["DESCRIPTORS"]:
                with_workspace(x, lambda: run(config))
            else:
                run(config)

        with device_guard(x):
            if tuning.enabled():
                key = (kernel, self.head_dim, str(x.dtype)[6:], f"group {self.group}")
                edges = (self.left < UNBOUNDED, self.right < UNBOUNDED)
                candidates = tile_table.candidates(*arguments)
                run_config(tuning.fastest((*key, *edges), self.device, candidates, run_config))
            else:
                run_first_that_fits(arguments, run_config)


def fits_descriptors(*tensors: Tensor) -> bool:
    """Can the tensor memory accelerator read them? Its addresses come in steps of 16 bytes."""
    for x in tensors:
        *strides, _ = x.stride()
        step = math.gcd(*strides) * x.element_size()
        if x.data_ptr() % 16 or step % 16 or min(strides) <= 0:
            return False
    return True


def offsets_within(reach: str, tokens: int, *tensors: Tensor) -> str:
    """`reach` if 32 bits hold the offset of any of so many tokens, "element" if not."""
    return reach if all(x.stride(-3) * tokens < 2**31 for x in tensors) else "element"


def same_strides(config: Config, x: Tensor, y: Tensor) -> bool:
    """May a kernel that walks along both by pointers keep one set of offsets?"""
    return not config["DESCRIPTORS"] and x.stride(-3) == y.stride(-3)


# How many of the configurations for some arguments, from the first, do not fit.
_misfits: dict[tuple[Any, ...], int] = {}


def run_first_that_fits(arguments: tuple[Any, ...], run: Callable[[Config], None]) -> None:
    """Triton refuses a configuration that needs more shared memory than there is; then the next."""
    import triton

    configs = tile_table.configs(*arguments)
    for i in range(_misfits.get(arguments, 0), len(configs)):
        try:
            return run(configs[i])
        except triton.runtime.errors.OutOfResources:
            if i == len(configs) - 1:
                raise
            _misfits[arguments] = i + 1
    return None
