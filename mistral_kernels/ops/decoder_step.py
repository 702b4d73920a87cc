"""The whole model for one new token a sequence, on the CPU, in one call of csrc.

    h = embedding[token_ids]                             for each layer:
    h = h + attention(rotary(x Wqkv^T), cache) Wo^T      x = RMSNorm(h)
    h = h + SwiGLU(x Wup^T) Wdown^T                      x = RMSNorm(h)
    logits = RMSNorm(h) Whead^T

A step reads every weight once, so Python and all it touches are out of the caches whenever it is
their turn: a call for each layer costs a tenth of a millisecond, and for each operator several.
Here their kernels run in the same order, so the bits are those of `rms_norm`, `linear`,
`rolling_cache_update_`, `rolling_cache_attention` and `swiglu`. There are no gradients. Even to
hand over so many weights, cold as they are, takes a fiftieth of a step of 160 M parameters: csrc
keeps them.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mistral_kernels.ops import extension
from mistral_kernels.ops.checks import is_plain
from mistral_kernels.ops.linear import KERNEL_ROWS


def serves(token_ids: Tensor, weight: Tensor, head_dim: int) -> bool:
    """Can a `Decoder` take steps of tokens such as these (batch,), with weights such as this one?

    Otherwise the operators have to be called one by one.
    """
    return (
        token_ids.shape[0] <= KERNEL_ROWS
        and token_ids.dtype == torch.int64
        and head_dim % 8 == 0
        and not torch.is_grad_enabled()  # of the weights, too
        and _is_eager()
        and is_plain(weight)
        and is_plain(token_ids)
        and token_ids.is_cpu
        and extension.serves(weight)
    )


def _is_eager() -> bool:
    """Return whether nothing of PyTorch's has to see the operators of a step."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )


class Decoder:
    """A model's weights, which csrc has checked and keeps alive as long as this lives.

    Args:
        embedding: (vocab_size, hidden), in float32, float16 or bfloat16, as all weights are.
        weights: those of each layer in turn, all layers of one shape:

            input_norm (hidden,)
            qkv ((num_heads + 2 num_kv_heads) head_dim, hidden), scales
            o (hidden, num_heads head_dim), scales
            mlp_norm (hidden,)
            gate_up (2 intermediate, hidden), scales
            down (hidden, intermediate), scales

            The scales (rows of the weight,) are those of `quantize_int8`, the weight is int8 then;
            else they are None.
        norm: (hidden,).
        head: (vocab_size, hidden).
        head_scales: (vocab_size,), or None.
        windows_left: of each layer, how many older keys a token sees; -1: all.
        head_dim: a multiple of 8.
        eps: of every norm.

    Raises:
        RuntimeError: naming the weight that does not fit.
    """

    def __init__(
        self,
        embedding: Tensor,
        weights: list[Tensor | None],
        norm: Tensor,
        head: Tensor,
        head_scales: Tensor | None,
        windows_left: list[int],
        head_dim: int,
        eps: float,
    ) -> None:
        operators = torch.ops.mistral_kernels
        self._step = operators.decoder_step.default
        # Tensors of its own: the `data` of a model's may be replaced, as `Module.to` does.
        embedding, norm, head = embedding.detach(), norm.detach(), head.detach()
        weights = [x if x is None else x.detach() for x in weights]
        self._number = operators.make_decoder.default(
            embedding, weights, norm, head, head_scales, windows_left, head_dim, eps
        )
        weakref.finalize(self, operators.drop_decoder.default, self._number)
        self._vocab_size, self._dtype = embedding.shape[0], embedding.dtype

    def step(
        self,
        token_ids: Tensor,
        tables: tuple[Tensor, Tensor],
        k_caches: list[Tensor],
        v_caches: list[Tensor],
        lengths: Tensor,
    ) -> Tensor:
        """Appends one token a sequence to the cache; where `serves` says so only.

        Args:
            token_ids: (batch,) int64.
            tables: cos and sin, (num_positions, head_dim / 2) float32, longer than any length.
            k_caches, v_caches: of each layer, (batch, capacity, num_kv_heads, head_dim),
                contiguous, in the embedding's dtype.
            lengths: (batch,) int32, tokens each sequence had seen before; one more afterwards.

        Returns:
            The next tokens' logits, (batch, vocab_size).

        Raises:
            RuntimeError: naming the argument that does not fit; caches and lengths are untouched.
        """
        # Not `len`, which of a tensor is a function in Python.
        logits = torch.empty(token_ids.shape[0], self._vocab_size, dtype=self._dtype)
        ids = token_ids.contiguous()
        self._step(self._number, ids, *tables, k_caches, v_caches, lengths, logits)
        return logits
