"""A whole decoder layer for one new token a sequence, on the CPU, in one call of csrc.

    h = residual + delta                           x = RMSNorm(h)
    h = h + attention(rotary(x Wqkv^T), cache) Wo^T      delta = SwiGLU(RMSNorm(h) Wup^T) Wdown^T

A small model's step is over in milliseconds, and called one by one its operators spend as long on
their way through Python as on reading the weights. Here the same kernels run in the same order, so
the bits are those of `rms_norm`, `linear`, `rolling_cache_update_`, `rolling_cache_attention` and
`swiglu`. There are no gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.dispatch import direct_cpu_operators
from mistral_kernels.ops.linear import KERNEL_ROWS


class LayerWeights(NamedTuple):
    """`qkv` and `gate_up` hold several projections, one behind the other.

    The scales (rows of the weight,) are those of `quantize_int8`; None: the weight has x's dtype.
    """

    input_norm: Tensor  # (hidden,)
    qkv: Tensor  # ((num_heads + 2 num_kv_heads) head_dim, hidden)
    qkv_scales: Tensor | None
    o: Tensor  # (hidden, num_heads head_dim)
    o_scales: Tensor | None
    mlp_norm: Tensor  # (hidden,)
    gate_up: Tensor  # (2 intermediate, hidden)
    gate_up_scales: Tensor | None
    down: Tensor  # (hidden, intermediate)
    down_scales: Tensor | None


def serves(x: Tensor, head_dim: int) -> bool:
    """Can a layer take `x` (batch, hidden), the hidden states of one token a sequence?

    Otherwise their operators have to be called one by one.
    """
    return (
        x.shape[0] <= KERNEL_ROWS
        and head_dim % 8 == 0
        and not torch.is_grad_enabled()  # of the weights, too
        and direct_cpu_operators(x) is not None
    )


def decoder_layer(
    delta: Tensor,
    residual: Tensor | None,
    weights: LayerWeights,
    tables: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    *,
    sliding_window: int | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Appends one token a sequence to the cache; where `serves` says so only.

    Args:
        delta: (batch, hidden), contiguous, float32, float16 or bfloat16: what the layer before has
            yet to add to the stream.
        residual: the stream so far, like `delta`; None: `delta` is the stream.
        tables: cos and sin, (num_positions, head_dim / 2) float32, longer than any length.
        k_cache, v_cache: (batch, capacity, num_kv_heads, head_dim), contiguous; head_dim a multiple
            of 8.
        lengths: (batch,) int32, tokens each sequence had seen before.
        cu_seqlens: (batch + 1,) int32: 0, 1, ..., batch.
        sliding_window: how many keys a token sees, its own included; None: all.

    Returns:
        The next layer's `delta` and `residual`, new tensors.

    Raises:
        RuntimeError: naming the argument that does not fit; the caches are untouched.
    """
    out, stream = torch.empty_like(delta), torch.empty_like(delta)
    left = -1 if sliding_window is None else sliding_window - 1
    extension.load("cpu").decoder_layer.default(  # type: ignore[union-attr]
        *(delta, residual, *weights, *tables, k_cache, v_cache, lengths, cu_seqlens),
        *(left, eps, out, stream),
    )
    return out, stream
