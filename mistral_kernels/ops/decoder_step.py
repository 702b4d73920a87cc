"""The whole model for one new token a sequence, on the CPU, in one call of csrc.

    h = embedding[token_ids]                             for each layer:
    h = h + attention(rotary(x Wqkv^T), cache) Wo^T      x = RMSNorm(h)
    h = h + SwiGLU(x Wup^T) Wdown^T                      x = RMSNorm(h)
    logits = RMSNorm(h) Whead^T

A step reads every weight once, so Python and all it touches are out of the caches whenever it is
their turn: a call for each layer costs a tenth of a millisecond, and for each operator several.
Here their kernels run in the same order, so the bits are those of `rms_norm`, `linear`,
`rolling_cache_update_`, `rolling_cache_attention` and `swiglu`. There are no gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.dispatch import direct_cpu_operators
from mistral_kernels.ops.linear import KERNEL_ROWS


class Decoder(NamedTuple):
    """What of a model is the same in every step.

    `weights` are those of each layer in turn, all layers of one shape:

        input_norm (hidden,)
        qkv ((num_heads + 2 num_kv_heads) head_dim, hidden), scales
        o (hidden, num_heads head_dim), scales
        mlp_norm (hidden,)
        gate_up (2 intermediate, hidden), scales
        down (hidden, intermediate), scales

    The scales (rows of the weight,) are those of `quantize_int8`; None: the weight has the
    embedding's dtype.
    """

    embedding: Tensor  # (vocab_size, hidden)
    weights: list[Tensor | None]
    norm: Tensor  # (hidden,)
    head: Tensor  # (vocab_size, hidden)
    head_scales: Tensor | None
    windows_left: list[int]  # of each layer, how many older keys a token sees; -1: all
    eps: float


def serves(token_ids: Tensor, weight: Tensor, head_dim: int) -> bool:
    """Can a step take these tokens (batch,), and weights such as this one?

    Otherwise the operators have to be called one by one.
    """
    return (
        token_ids.shape[0] <= KERNEL_ROWS
        and token_ids.dtype == torch.int64
        and head_dim % 8 == 0
        and not torch.is_grad_enabled()  # of the weights, too
        and direct_cpu_operators(weight, token_ids) is not None
    )


def decoder_step(
    token_ids: Tensor,
    decoder: Decoder,
    tables: tuple[Tensor, Tensor],
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    lengths: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Appends one token a sequence to the cache; where `serves` says so only.

    Args:
        token_ids: (batch,) int64.
        decoder: of weights in float32, float16 or bfloat16, or int8.
        tables: cos and sin, (num_positions, head_dim / 2) float32, longer than any length.
        k_caches, v_caches: of each layer, (batch, capacity, num_kv_heads, head_dim), contiguous;
            head_dim a multiple of 8.
        lengths: (batch,) int32, tokens each sequence had seen before; one more afterwards.
        cu_seqlens: (batch + 1,) int32: 0, 1, ..., batch.

    Returns:
        The next tokens' logits, (batch, vocab_size).

    Raises:
        RuntimeError: naming the argument that does not fit; caches and lengths are untouched.
    """
    embedding, weights, norm, head, head_scales, windows_left, eps = decoder
    # Not `len`, which of a tensor is a function in Python.
    logits = torch.empty(token_ids.shape[0], head.shape[0], dtype=norm.dtype)
    extension.load("cpu").decoder_step.default(  # type: ignore[union-attr]
        *(token_ids.contiguous(), embedding, weights, norm, head, head_scales, *tables),
        *(k_caches, v_caches, lengths, cu_seqlens, windows_left, eps, logits),
    )
    return logits
