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
from mistral_kernels.ops.attention.checks import (
    check_cu_seqlens,
    check_qkv,
    check_scoring,
    check_slopes,
)
from mistral_kernels.ops.attention.packed import Offsets
from mistral_kernels.ops.attention.scoring import Scoring
from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.checks import check_same_dtype, check_shape
from mistral_kernels.ops.dispatch import uses_triton
from mistral_kernels.ops.operator import Function, Operator, absent, needs_gradient, run_backward

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
    """Return the values of `_OPTIONS` for these tensors, in the order that both backends take."""
    offsets, max_seqlen_q, max_seqlen_k = packed.check(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = Window(window_left, window_right)
    return offsets, max_seqlen_q, max_seqlen_k, scale, window, softcap, alibi_slopes


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    *_: Any,
) -> None:
    if cu_seqlens_q is None:
        check_qkv(q, k, v, ndim=4)
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is for packed batches and needs cu_seqlens_q too")
        batch = q.shape[0]
        if k.shape[0] != batch:
            raise ValueError(f"k must have q's batch of {batch}, got {k.shape[0]}")
    else:
        check_qkv(q, k, v, ndim=3)
        batch = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
        if cu_seqlens_k is not None:
            batch_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
            if batch_k != batch:
                raise ValueError(
                    f"cu_seqlens_k must be of {batch} sequences like cu_seqlens_q, got {batch_k}"
                )
    check_slopes(alibi_slopes, q.shape[-2], batch)
    check_scoring(softmax_scale, softcap)


def _check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> None:
    _check(q, k, v, *args)
    check_shape("dout", dout, q.shape)
    check_shape("out", out, q.shape)
    *batch, seqlen, num_heads, _ = q.shape
    if lse.shape != (0,) or uses_triton(q):
        check_shape("lse", lse, (*batch, num_heads, seqlen))
    check_same_dtype("dout", dout, "q", q)
    check_same_dtype("out", out, "q", q)
    if lse.dtype != lse_dtype(q):
        raise TypeError(f"lse must be {lse_dtype(q)} for q of {q.dtype}, got {lse.dtype}")


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *options, return_lse = args
    resolved = _resolve(q, k, *options)
    if uses_triton(q):
        out, lse = forward.launch(q, k, v, *resolved)
        return out, lse if return_lse else absent(lse)
    offsets, _, _, scale, window, softcap, slopes = resolved
    scoring = Scoring(window, scale, softcap, slopes, return_lse)
    out, sums = banded_forward(q, k, v, offsets, scoring)
    return out, absent(q, lse_dtype(q)) if sums is None else sums


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the log-sum-exp: float32, or float64 like q."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Return `out` of q's shape and `lse` (..., num_heads, seqlen), or `absent`."""
    *batch, seqlen, num_heads, _ = q.shape
    lse_shape = (*batch, num_heads, seqlen) if return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=lse_dtype(q), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _forward_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, args[-1])


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    options, output_mask = args[:-3], list(args[-3:])
    resolved = _resolve(q, k, *options)
    if uses_triton(q):
        grads = list(backward.launch(dout, q, k, v, out, lse, *resolved, output_mask))
    else:
        offsets, _, _, scale, window, softcap, slopes = resolved
        scoring = Scoring(window, scale, softcap, slopes, return_lse=False)
        grads = banded_backward(dout, q, k, v, out, lse, offsets, scoring, output_mask)
    return tuple(absent(q) if grad is None else grad for grad in grads)


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((q, k, v), args[-3:], strict=True)
    )


_forward_op = Operator(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_lse) -> (Tensor out, Tensor lse)",
    fake=_forward_fake,
    check=_check,
    torch=_forward,
    triton=_forward,
)
_backward_op = Operator(
    "attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool needs_dq, bool needs_dk, bool needs_dv) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=_backward_fake,
    check=_check_backward,
    torch=_backward,
    triton=_backward,
    gradient_of="attention",
)


class AttentionFunction(Function):
    public_name = "attention"

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return _forward_op(q, k, v, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers, slopes, _ = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, slopes)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, slopes = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if dout is not None:
            found = run_backward(_backward_op, dout, *tensors, *ctx.numbers, slopes, *mask)
            grads = tuple(x if need else None for x, need in zip(found, mask, strict=True))
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
) -> tuple[Tensor, Tensor]:
    """Compute `attention` of checked options, and its log-sum-exp, `absent` unless it is wanted."""
    if cu_seqlens_k is cu_seqlens_q:  # torch.compile takes no tensor twice
        cu_seqlens_k = None
    differentiable = needs_gradient(q, k, v)
    # Triton's backward pass needs the log-sum-exp. A compiled graph must not depend on the backend:
    # Inductor finds it again by what it holds.
    needs_lse = differentiable and (torch.compiler.is_compiling() or uses_triton(q))
    options = (
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[1] if max_seqlen_q is None else max_seqlen_q,
        k.shape[1] if max_seqlen_k is None else max_seqlen_k,
        softmax_scale,
        *window,
        softcap,
        alibi_slopes,
        return_lse or needs_lse,
    )
    if differentiable:
        return AttentionFunction.call(q, k, v, *options)
    return _forward_op(q, k, v, *options)
