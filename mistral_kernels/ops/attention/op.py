"""Attention as PyTorch sees it: two `torch.library` operators, forward and backward, and autograd.

One pair serves a rectangular batch, (batch, seqlen, heads, head_dim), and a packed one, (tokens,
heads, head_dim) with `cu_seqlens`; on the torch backend and on Triton. Windows arrive resolved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.attention import backward, forward, packed
from mistral_kernels.ops.attention.bands import banded_backward, banded_forward
from mistral_kernels.ops.attention.packed import Offsets
from mistral_kernels.ops.attention.scoring import Scoring
from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.dispatch import run_backward, uses_triton

# What the schemas below name between v and the flags, and autograd hands on unread.
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float? softmax_scale, SymInt window_left, SymInt window_right, float softcap, "
    "Tensor? alibi_slopes"
)


def _resolve(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> tuple[Offsets | None, int, int, float, Window, float, Tensor | None]:
    """What `_OPTIONS` mean for these tensors, in the order in which both backends take them."""
    offsets, max_seqlen_q, max_seqlen_k = packed.check(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = Window(window_left, window_right)
    return offsets, max_seqlen_q, max_seqlen_k, scale, window, softcap, alibi_slopes


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    *options, return_lse = args
    resolved = _resolve(q, k, *options)
    if uses_triton(q):
        return forward.launch(q, k, v, *resolved)
    offsets, _, _, scale, window, softcap, slopes = resolved
    scoring = Scoring(window, scale, softcap, slopes, return_lse)
    return banded_forward(q, k, v, offsets, scoring)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor | None]:
    return_lse = options[-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not (return_lse or uses_triton(q)):
        return out, None
    *batch, seqlen, num_heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out, torch.empty((*batch, num_heads, seqlen), dtype=dtype, device=q.device)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *args: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *options, output_mask = args
    resolved = _resolve(q, k, *options)
    if uses_triton(q):
        assert lse is not None
        return backward.launch(dout, q, k, v, out, lse, *resolved, output_mask)
    offsets, _, _, scale, window, softcap, slopes = resolved
    scoring = Scoring(window, scale, softcap, slopes, return_lse=False)
    dq, dk, dv = banded_backward(dout, q, k, v, offsets, scoring, output_mask)
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((q, k, v), options[-1])
    )


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention can be differentiated only once; its gradients have no gradients")


torch.library.define(
    "mistral_kernels::attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_lse) -> (Tensor out, Tensor? lse)",
)
torch.library.impl("mistral_kernels::attention_forward", ("cpu", "cuda"), _forward)
torch.library.register_fake("mistral_kernels::attention_forward", _forward_fake)

torch.library.define(
    "mistral_kernels::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? lse, {_OPTIONS}, "
    "bool[3] output_mask) -> (Tensor? dq, Tensor? dk, Tensor? dv)",
)
torch.library.impl("mistral_kernels::attention_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("mistral_kernels::attention_backward", _backward_fake)
torch.library.register_autograd("mistral_kernels::attention_backward", _backward_twice)

_forward_op = torch.ops.mistral_kernels.attention_forward.default
_backward_op = torch.ops.mistral_kernels.attention_backward.default


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = _forward_op(q, k, v, *options)
        cu_seqlens_q, cu_seqlens_k, *numbers, slopes, _ = options
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, slopes)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, slopes = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if dout is not None:
            mask = list(ctx.needs_input_grad[:3])
            grads = run_backward(_backward_op, dout, *tensors, *ctx.numbers, slopes, mask)
        return *grads, *[None] * (len(ctx.numbers) + 4)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attention` of arguments that have been checked. The log-sum-exp may come unasked."""
    if cu_seqlens_k is cu_seqlens_q:  # torch.compile takes no tensor twice
        cu_seqlens_k = None
    options = (
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[1] if max_seqlen_q is None else max_seqlen_q,
        k.shape[1] if max_seqlen_k is None else max_seqlen_k,
        softmax_scale,
        *window,
        softcap,
        alibi_slopes,
        return_lse,
    )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return AttentionFunction.apply(q, k, v, *options)
    return _forward_op(q, k, v, *options)
