"""Operators of attention: `attention_forward`, `attention_backward` and `cached_attention`.

`attention_forward` and its derivative accept rectangular batches, (batch, seqlen, heads, head_dim),
and packed batches, (tokens, heads, head_dim). `cached_attention` also attends to keys in rings,
flat caches and pages. Each operator has one implementation per backend, with the signature of the
schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.attention.checks import (
    check_attention,
    check_cached_attention,
    check_cached_values,
    check_sequences,
)
from mistral_kernels.ops.attention.kernels.backward import attention_backward
from mistral_kernels.ops.attention.kernels.decode import attention_decode
from mistral_kernels.ops.attention.kernels.forward import attention_forward
from mistral_kernels.ops.attention.spec import CACHE_SCHEMA, SCHEMA, TENSORS, AttentionSpec
from mistral_kernels.ops.attention.torch_backend import (
    accumulator_dtype,
    blocked_backward,
    blocked_forward,
    empty_outputs,
)
from mistral_kernels.ops.attention.torch_cache import cached_forward
from mistral_kernels.ops.checks import check_device, check_same_dtype, check_shape
from mistral_kernels.ops.dispatch import uses_triton
from mistral_kernels.ops.operator import Function, Operator, absent, needs_gradient, run_backward


def _no_check(*args: Any) -> None:
    """Check nothing: implementations and fakes check the arguments after unflattening the spec."""


def _checked_spec(q: Tensor, k: Tensor, v: Tensor, flat: Sequence[Any]) -> AttentionSpec:
    """Return the spec of flattened arguments after checking shapes, dtypes and options."""
    spec = AttentionSpec.unflatten(flat)
    check_attention(q, k, v, spec)
    return spec


def _with_checked_sequences(q: Tensor, k: Tensor, spec: AttentionSpec) -> AttentionSpec:
    """Return `spec` after checking the values of cu_seqlens, with tight maximum lengths."""
    if spec.sequences.cu_seqlens_q is None:
        return spec
    return spec._replace(sequences=check_sequences(q, k, spec.sequences))


def _forward_triton(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *flat, return_lse = args
    spec = _with_checked_sequences(q, k, _checked_spec(q, k, v, flat))
    out, lse = attention_forward(q, k, v, spec)
    return out, lse if return_lse else absent(lse)


def _forward_torch(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *flat, return_lse = args
    spec = _with_checked_sequences(q, k, _checked_spec(q, k, v, flat))
    return blocked_forward(q, k, v, spec, return_lse)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *flat, return_lse = args
    _checked_spec(q, k, v, flat)
    return empty_outputs(q, return_lse)


attention_forward_op = Operator(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}, bool return_lse) -> (Tensor out, Tensor lse)",
    fake=_forward_fake,
    check=_no_check,
    torch=_forward_torch,
    triton=_forward_triton,
    csrc=("cpu",),
)


def _check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> None:
    _checked_spec(q, k, v, args[:-3])
    check_shape("dout", dout, q.shape)
    check_shape("out", out, q.shape)
    *batch, seqlen, num_heads, _ = q.shape
    if lse.shape != (0,) or uses_triton(q):
        check_shape("lse", lse, (*batch, num_heads, seqlen))
    check_same_dtype("dout", dout, "q", q)
    check_same_dtype("out", out, "q", q)
    lse_dtype = accumulator_dtype(q.dtype)
    if lse.dtype != lse_dtype:
        raise TypeError(f"lse must be {lse_dtype} for q of {q.dtype}, got {lse.dtype}")


def _backward_triton(*args: Any) -> tuple[Tensor, ...]:
    (dout, q, k, v, out, lse, *flat), needed = args[:-3], args[-3:]
    spec = _with_checked_sequences(q, k, AttentionSpec.unflatten(flat))
    grads = attention_backward(dout, q, k, v, out, lse, spec, list(needed))
    return tuple(absent(q) if grad is None else grad for grad in grads)


def _backward_torch(*args: Any) -> tuple[Tensor, ...]:
    (dout, q, k, v, out, lse, *flat), needed = args[:-3], args[-3:]
    spec = _with_checked_sequences(q, k, AttentionSpec.unflatten(flat))
    grads = blocked_backward(dout, q, k, v, out, lse, spec, needed)
    return tuple(absent(q) if grad is None else grad for grad in grads)


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((q, k, v), args[-3:], strict=True)
    )


_backward_op = Operator(
    "attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {SCHEMA}, "
    "bool needs_dq, bool needs_dk, bool needs_dv) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=_backward_fake,
    check=_check_backward,
    torch=_backward_torch,
    triton=_backward_triton,
    csrc=("cpu",),  # except for large scores, see `_backward` in torch_backend.py
    gradient_of="attention",
)


class AttentionFunction(Function):
    """Autograd function of `attention_forward`. The log-sum-exp is not differentiable."""

    public_name = "attention"

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the output and the log-sum-exp."""
        return attention_forward_op(q, k, v, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the inputs, the output and the log-sum-exp for `backward`."""
        q, k, v, *rest, _ = inputs
        flat = list(rest)  # torch.compile of torch 2.10 makes `rest` a tuple
        ctx.save_for_backward(q, k, v, *output, *[flat[i] for i in TENSORS])
        for i in TENSORS:
            flat[i] = None
        ctx.flat = flat
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v, then None for each other argument."""
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if dout is not None:
            flat = list(ctx.flat)
            for i, x in zip(TENSORS, tensors, strict=True):
                flat[i] = x
            results = run_backward(_backward_op, dout, q, k, v, out, lse, *flat, *mask)
            grads = tuple(x if need else None for x, need in zip(results, mask, strict=True))
        return *grads, *[None] * (len(ctx.flat) + 1)


def attend_differentiably(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Call `attention_forward` and record it for autograd."""
    # The backward passes of Triton and csrc need the log-sum-exp. A compiled graph returns it on
    # every backend, because Inductor may reuse a cached graph with another backend.
    return_lse = (
        return_lse
        or torch.compiler.is_compiling()
        or uses_triton(q)
        or (needs_gradient(q, k, v) and extension.supports(q))
    )
    return AttentionFunction.call(q, k, v, *spec.flatten(), return_lse)  # type: ignore[no-any-return]


def _checked_cached_spec(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> AttentionSpec:
    """Return the spec of flattened arguments after checking shapes, dtypes and options."""
    *flat, _, num_splits, counters = args
    spec = AttentionSpec.unflatten(flat)
    check_cached_attention(q, k, v, spec, num_splits, counters)
    return spec


def _cached_triton(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return_lse, num_splits, counters = args[-3:]
    spec = _checked_cached_spec(q, k, v, *args)
    check_cached_values(q, spec)
    out, lse = attention_decode(q, k, v, spec, num_splits, counters)
    return out, lse if return_lse else absent(lse)


def _cached_torch(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    spec = _checked_cached_spec(q, k, v, *args)
    check_cached_values(q, spec)
    return cached_forward(q, k, v, spec, args[-3], _attend)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Call `attention_forward` without autograd."""
    return attention_forward_op(q, k, v, *spec.flatten(), return_lse)


def _cached_fake(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    _checked_cached_spec(q, k, v, *args)
    return empty_outputs(q, args[-3])


_cached_attention_op = Operator(
    "cached_attention",
    f"(Tensor q, Tensor? k, Tensor? v, {CACHE_SCHEMA}, bool return_lse, SymInt num_splits, "
    "Tensor? counters) -> (Tensor out, Tensor lse)",
    fake=_cached_fake,
    check=_no_check,
    torch=_cached_torch,
    triton=_cached_triton,
    csrc=("cpu",),  # for decode steps only: one new token per sequence, already in the cache
)


def attend_cached(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    spec: AttentionSpec,
    *,
    return_lse: bool = False,
    num_splits: int = 0,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output of attention of new tokens over a cache, and its log-sum-exp.

    A sequence consists of `spec.cache.lengths` tokens, then the new tokens. The queries are the
    last tokens of the sequence. If k and v are given, the cache holds the keys before the new
    tokens. If k and v are None, the cache holds all keys.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed as in `spec.sequences`.
        k: the new tokens' keys, packed like q; None if they are in the cache.
        v: the new tokens' values, like k.
        spec: layout, window and scoring, with a cache.
        return_lse: whether the log-sum-exp is computed; otherwise the second result is `absent`.
        num_splits: number of programs that share a sequence's keys; 0 derives the number from the
            number of keys.
        counters: see `rolling_cache_attention`.
    """
    cache = spec.cache
    assert cache is not None
    if not needs_gradient(q, k, v, cache.k_cache, cache.v_cache):
        return _cached_attention_op(q, k, v, *spec.flatten(), return_lse, num_splits, counters)
    tensors = {"k": k, "v": v, **cache._asdict(), "alibi_slopes": spec.alibi_slopes}
    tensors["cu_seqlens"] = spec.sequences.cu_seqlens_q
    check_device("q", q, **{n: x for n, x in tensors.items() if isinstance(x, Tensor)})
    check_cached_attention(q, k, v, spec, num_splits, counters)
    check_cached_values(q, spec)
    return cached_forward(q, k, v, spec, return_lse, attend_differentiably)
