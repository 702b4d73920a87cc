"""Linear + cross entropy without the logits of all tokens.

    loss = mean or sum over tokens of  logsumexp(W h) - (W h)[target]        in nats

The logits of 7B-class training (tokens x vocabulary) dwarf everything else in memory. Here they
exist for one chunk of tokens at a time, and since d loss / d logits = softmax - onehot is known as
soon as they are, both gradients are formed in the forward pass (as in arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mistral_kernels.ops.dispatch import require_torch_backend

# Logits alive at a time, in elements: 32 MiB of float32.
_CHUNK_ELEMENTS = 1 << 23


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy, in nats, of the logits hidden @ weight^T. Differentiable in both.

    Args:
        hidden: (num_tokens, hidden_size).
        weight: (vocab_size, hidden_size), of hidden's dtype.
        targets: (num_tokens,) int64 in [0, vocab_size), or `ignore_index`: such a token counts
            neither in the sum nor in the mean.
        reduction: "mean" or "sum".

    Returns:
        A float32 scalar (float64 for float64 inputs); NaN for the mean of no token, as PyTorch's.

    Raises:
        ValueError: naming the argument that does not fit; targets are looked at on the CPU only.
        TypeError: hidden is not floating point.
    """
    require_torch_backend("linear_cross_entropy")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1:] != weight.shape[1:]
        or not len(weight)
    ):
        raise ValueError(
            "hidden and weight must be (num_tokens, hidden_size) and (vocab_size, hidden_size), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be ({hidden.shape[0]},) of torch.int64, "
            f"got {tuple(targets.shape)} of {targets.dtype}"
        )
    # On a GPU the look would wait for it; tracing cannot branch on it.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        stray = targets[((targets < 0) | (targets >= len(weight))) & (targets != ignore_index)]
        if len(stray):
            raise ValueError(
                f"targets must lie in [0, {len(weight)}) or be {ignore_index}, got {stray[0]}"
            )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not torch.is_grad_enabled():  # forward forms the gradients of all that requires one
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        counted = targets != ignore_index
        scale = 1.0 / counted.sum().to(wide) if reduction == "mean" else 1.0
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = hidden.new_zeros((), dtype=wide)
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            inputs, valid = hidden[chunk], counted[chunk]
            target = targets[chunk].masked_fill(~valid, 0).unsqueeze(1)
            logits = (inputs @ weight.mT).to(wide)
            lse = logits.logsumexp(dim=1, keepdim=True)
            loss += ((lse - logits.gather(1, target)).squeeze(1) * valid).sum()
            if dhidden is None and dweight is None:
                continue
            # In place, the logits become their own gradient.
            dlogits = logits.sub_(lse).exp_()
            dlogits.scatter_add_(1, target, dlogits.new_full(target.shape, -1.0))
            dlogits = dlogits.mul_((valid * scale).masked_fill(~valid, 0).unsqueeze(1))
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[chunk])
            if dweight is not None:
                dweight += dlogits.mT @ inputs
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * dloss).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return *grads, None, None, None
