"""Weights of int8: a model that holds them, and quantization while its weights are loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral_kernels.model.layers import Linear
from mistral_kernels.ops.linear_int8 import quantize_int8

_BLOCK = 1 << 18  # elements that are quantised at a time, in float32: what a cache holds


class Int8Rows(NamedTuple):
    """Rows of a quantized weight and their scales, to which a tensor is copied."""

    weight: Tensor
    scales: Tensor

    def copy_(self, tensor: Tensor) -> None:
        if tensor.shape != self.weight.shape:
            raise ValueError(
                f"expected a tensor of {tuple(self.weight.shape)}, got {tuple(tensor.shape)}"
            )
        rows = max(1, _BLOCK // tensor.shape[1])
        parts = (x.split(rows) for x in (tensor, self.weight, self.scales))
        for values, weight, scales in zip(*parts, strict=True):
            for own, quantized in zip((weight, scales), quantize_int8(values), strict=True):
                own.copy_(quantized)


def hold_int8(model: nn.Module) -> None:
    """Give each product of a `model` on the meta device a weight of int8.

    These are all projections and the head. A tied head gets a weight of its own, since a step reads
    all of it, and of the embedding a row a token.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            weight = torch.empty_like(module.weight, dtype=torch.int8)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.scales = torch.empty(len(weight), device="cpu")
    model.requires_grad_(False)


def destinations(model: nn.Module) -> dict[str, Tensor | Int8Rows]:
    """Return where each tensor of a quantized `model`'s state dict is copied to, by its name."""
    found: dict[str, Tensor | Int8Rows] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Linear):
            assert module.scales is not None
            parts = module.parts_in_state_dict(f"{prefix}.")
            scales = module.scales.split([len(weight) for weight in parts.values()])
            found |= dict(zip(parts, map(Int8Rows, parts.values(), scales), strict=True))
        else:
            own = module.named_parameters(prefix, recurse=False)
            found |= {name: weight.detach() for name, weight in own}
    return found
