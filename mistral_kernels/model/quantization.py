"""Models with int8 weights, which are quantized while they are loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral_kernels.model.layers import Linear
from mistral_kernels.ops.linear_int8 import quantize_int8

_BLOCK = 1 << 18  # elements quantized at a time: 1 MB in float32, which fits in a CPU's cache


class Int8Rows(NamedTuple):
    """Rows of a quantized weight and their scales; `copy_` quantizes a tensor into both."""

    weight: Tensor
    scales: Tensor

    def copy_(self, tensor: Tensor) -> None:
        """Quantize `tensor`, (rows, columns), into the rows and the scales."""
        if tensor.shape != self.weight.shape:
            raise ValueError(
                f"tensor must be {tuple(self.weight.shape)}, got {tuple(tensor.shape)}"
            )
        rows = max(1, _BLOCK // tensor.shape[1])
        parts = (x.split(rows) for x in (tensor, self.weight, self.scales))
        for values, weight, scales in zip(*parts, strict=True):
            for own, quantized in zip((weight, scales), quantize_int8(values), strict=True):
                own.copy_(quantized)


def make_weights_int8(model: nn.Module) -> None:
    """Replace the weights of all projections and the head by int8 weights.

    `model` is on the meta device. A head that is tied to the embedding gets its own weight: a
    decode step reads the whole weight of the head, but only one row per token of the embedding.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            weight = torch.empty_like(module.weight, dtype=torch.int8)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.scales = torch.empty(len(weight), device="cpu")
    model.requires_grad_(False)


def destinations(model: nn.Module) -> dict[str, Tensor | Int8Rows]:
    """Map the name of each state dict tensor to its destination in a quantized model."""
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
