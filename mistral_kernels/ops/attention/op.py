"""Attention as PyTorch sees it: two `torch.library` operators, forward and backward, and autograd.

One pair serves a rectangular batch, (batch, seqlen, heads, head_dim), and a packed one, (tokens,
heads, head_dim) with `cu_seqlens`; on the torch backend and on Triton. Windows arrive resolved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.attention.bands import banded_backward, banded_forward
from mistral_kernels.ops.attention.checks import (
    check_cu_seqlens,
    check_qkv,
    check_scoring,
    check_slopes,
)
from mistral_kernels.ops.attention.kernels.backward import attention_backward
from mistral_kernels.ops.attention.kernels.forward import attention_forward
from mistral_kernels.ops.attention.packed import check_sequences
from mistral_kernels.ops.attention.scoring import Scoring
from mistral_kernels.ops.attention.spec import SCHEMA, AttentionSpec
from mistral_kernels.ops.checks import check_same_dtype, check_shape
from mistral_kernels.ops.dispatch import uses_triton
from mistral_kernels.ops.operator import Function, absent, define, needs_gradient, run_backward


def _resolve(q: Tensor, k: Tensor, flat: Sequence[Any]) -> AttentionSpec:
    spec = AttentionSpec.unflatten(*flat)
    return replace(spec, sequences=check_sequences(q, k, spec.sequences))


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
    *flat, return_lse = args
    spec = _resolve(q, k, flat)
    if uses_triton(q):
        out, lse = attention_forward(q, k, v, spec)
        return out, lse if return_lse else absent(lse)
    out, sums = banded_forward(q, k, v, spec.sequences, Scoring.of(spec, q, return_lse))
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
    flat, output_mask = args[:-3], list(args[-3:])
    spec = _resolve(q, k, flat)
    if uses_triton(q):
        grads = list(attention_backward(dout, q, k, v, out, lse, spec, output_mask))
    else:
        scoring = Scoring.of(spec, q, return_lse=False)
        grads = banded_backward(dout, q, k, v, out, lse, spec.sequences, scoring, output_mask)
    return tuple(absent(q) if grad is None else grad for grad in grads)


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((q, k, v), args[-3:], strict=True)
    )


_forward_op = define(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}, bool return_lse) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    _check,
)
_backward_op = define(
    "attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {SCHEMA}, "
    "bool needs_dq, bool needs_dk, bool needs_dv) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
    _check_backward,
    gradient_of="attention",
)


class AttentionFunction(Function):
    public_name = "attention"

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return _forward_op(q, k, v, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *flat, _ = inputs
        tensors = [x if isinstance(x, Tensor) else None for x in flat]
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.flat = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if dout is not None:
            flat = [x if y is None else y for x, y in zip(ctx.flat, tensors, strict=True)]
            found = run_backward(_backward_op, dout, q, k, v, out, lse, *flat, *mask)
            grads = tuple(x if need else None for x, need in zip(found, mask, strict=True))
        return *grads, *[None] * (len(ctx.flat) + 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Compute `attention` of checked options, and its log-sum-exp, `absent` unless it is wanted."""
    differentiable = needs_gradient(q, k, v)
    # Triton's backward pass needs the log-sum-exp. A compiled graph must not depend on the backend:
    # Inductor finds it again by what it holds.
    needs_lse = differentiable and (torch.compiler.is_compiling() or uses_triton(q))
    args = (q, k, v, *spec.flatten(), return_lse or needs_lse)
    return AttentionFunction.call(*args) if differentiable else _forward_op(*args)
