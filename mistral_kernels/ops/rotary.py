"""Rotary position embedding of queries and keys (arXiv:2104.09864).

    angle_i(p) = p * theta^(-2i / d)            i = 0 .. d/2 - 1, p the token's absolute position
    (a, b) -> (a cos - b sin, b cos + a sin)      backward: the same with -sin

A pair (a, b) is channels (i, i + d/2) in Hugging Face checkpoints (half-split), (2i, 2i + 1) in raw
Mistral checkpoints (interleaved). Angles are formed in float64, tables and arithmetic are float32:
in bfloat16 position 4095 itself would become 4096, a whole radian off. Both products are rounded
before they are added (no fused multiply-add), so that every backend gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.checks import check_tensors
from mistral_kernels.ops.dispatch import device_guard, with_unit_stride
from mistral_kernels.ops.launch_configs import cdiv
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.operator import Function, Operator, absent, in_transform, needs_gradient
from mistral_kernels.ops.rotary_arguments import (
    by_token,
    check_memory,
    check_rotary,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit
def turn_heads(
    x_row, out_row, exists, head, cos, sin, x_stride_h, out_stride_h,
    HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_I: tl.constexpr,
    IN_PLACE: tl.constexpr = False,
):  # fmt: skip
    """Rotate a block of heads of a tile of tokens, from rows `x_row` on to rows `out_row` on.

    x_row, out_row, exists: [BLOCK_T, 1, 1]; head: [1, BLOCK_H, 1]; cos, sin: [BLOCK_T, 1, BLOCK_I].
    """
    exists = exists & (head < HEADS)
    x_head = x_row + tl.cast(head, tl.int64) * x_stride_h
    out_head = out_row + tl.cast(head, tl.int64) * out_stride_h
    out_type = out_row.dtype.element_ty
    if INTERLEAVED:  # one wide access; pairs lie side by side
        channel = tl.arange(0, 2 * BLOCK_I)[None, None, :]
        mask = exists & (channel < 2 * HALF)
        x = tl.load(x_head + channel, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK_I, 2)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        turned = tl.reshape(turned, (x.shape[0], x.shape[1], 2 * BLOCK_I))
        if IN_PLACE:  # a thread may store what another one has yet to load
            tl.debug_barrier()
        tl.store(out_head + channel, turned.to(out_type), mask=mask)
    else:
        channel = tl.arange(0, BLOCK_I)[None, None, :]
        mask = exists & (channel < HALF)
        a = tl.load(x_head + channel, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_head + HALF + channel, mask=mask, other=0.0).to(tl.float32)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(out_head + channel, (a * cos - b * sin).to(out_type), mask=mask)
        tl.store(out_head + HALF + channel, (b * cos + a * sin).to(out_type), mask=mask)


@jit
def load_angles(
    cos_ptr, sin_ptr, position, exists, cos_stride, sin_stride, HALF: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of the tokens' positions [BLOCK_T, 1, 1]: each [BLOCK_T, 1, BLOCK_I]."""
    pair = tl.arange(0, BLOCK_I)[None, None, :]
    mask = exists & (pair < HALF)
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + position * sin_stride + pair, mask=mask, other=0.0)


@jit
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_stride_s, q_stride_h, k_stride_s, k_stride_h, cos_stride, sin_stride, tokens,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACKWARDS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    exists = token < tokens
    position = tl.load(positions_ptr + token, mask=exists, other=0).to(tl.int64)
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position, exists, cos_stride, sin_stride, HALF, BLOCK_I
    )
    if BACKWARDS:
        sin = -sin
    head = tl.arange(0, BLOCK_H)[None, :, None]
    if Q_HEADS:
        q_row = q_ptr + token * q_stride_s
        q_out_row = q_row if IN_PLACE else q_out_ptr + token * (Q_HEADS * 2 * HALF)
        q_out_stride_h = q_stride_h if IN_PLACE else 2 * HALF
        for first_head in tl.range(0, Q_HEADS, BLOCK_H):
            turn_heads(
                q_row, q_out_row, exists, first_head + head, cos, sin, q_stride_h,
                q_out_stride_h, Q_HEADS, HALF, INTERLEAVED, BLOCK_I, IN_PLACE,
            )  # fmt: skip
    if K_HEADS:
        k_row = k_ptr + token * k_stride_s
        k_out_row = k_row if IN_PLACE else k_out_ptr + token * (K_HEADS * 2 * HALF)
        k_out_stride_h = k_stride_h if IN_PLACE else 2 * HALF
        for first_head in tl.range(0, K_HEADS, BLOCK_H):
            turn_heads(
                k_row, k_out_row, exists, first_head + head, cos, sin, k_stride_h,
                k_out_stride_h, K_HEADS, HALF, INTERLEAVED, BLOCK_I, IN_PLACE,
            )  # fmt: skip


Pair = tuple[Tensor | None, Tensor | None]


class Turn(NamedTuple):
    """How far each token is turned: the operator's arguments behind q and k."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    interleaved: bool
    backwards: bool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tables and positions as kernels read them."""
        cos, sin = (with_unit_stride(table.float()) for table in (self.cos, self.sin))
        return cos, sin, self.positions.contiguous()


def _empty_outputs(q: Tensor | None, k: Tensor | None, *_: Any) -> Pair:
    q_out, k_out = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k)
    )
    return q_out, k_out


def _rotate_triton(q: Tensor | None, k: Tensor | None, outputs: Pair, turn: Turn) -> None:
    in_place = q is outputs[0] and k is outputs[1]
    half = turn.cos.shape[-1]
    tokens = turn.positions.numel()
    (q, *q_strides), (k, *k_strides) = _with_strides(q), _with_strides(k)
    if q is None and k is None:
        return
    cos, sin, positions = turn.tensors()
    config = launch_configs.rotary(half)
    with device_guard(positions):
        _rotary_kernel[(cdiv(tokens, config["BLOCK_T"]),)](
            *(q, k, *outputs, cos, sin, positions),
            *(*q_strides, *k_strides),
            *(cos.stride(0), sin.stride(0), tokens),
            Q_HEADS=0 if q is None else q.shape[-2],
            K_HEADS=0 if k is None else k.shape[-2],
            HALF=half,
            INTERLEAVED=turn.interleaved,
            BACKWARDS=turn.backwards,
            IN_PLACE=in_place,
            **config,
        )


def _with_strides(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """As the kernel takes it, and the strides between tokens and heads; None without elements."""
    if x is None or x.numel() == 0:
        return None, 0, 0
    if x.is_contiguous():  # a view in the kernel's shape would cost more than all else here
        heads, head_dim = x.shape[-2:]
        return x, heads * head_dim, head_dim
    x = by_token(x)
    return x, x.stride(0), x.stride(1)


def _rotate_torch(q: Tensor | None, k: Tensor | None, outputs: Pair, turn: Turn) -> None:
    tables = turn.cos, turn.sin
    dtype = next(torch.promote_types(x.dtype, turn.cos.dtype) for x in (q, k) if x is not None)
    cos, sin = (table[turn.positions].unsqueeze(-2).to(dtype) for table in tables)
    sin = -sin if turn.backwards else sin
    for x, out in zip((q, k), outputs, strict=True):
        if x is not None and out is not None:
            _turn_torch(x, out, cos, sin, turn.interleaved)


def _turn_torch(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate in few passes over memory, in place where possible; never by fused products."""
    # Mixed products would be far slower.
    wide = out if out.dtype == cos.dtype else torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    if wide is not x:
        wide.copy_(x)
    half = x.shape[-1] // 2
    a, b = (
        (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    )
    from_a = a * sin
    a.mul_(cos).sub_(b * sin)
    b.mul_(cos).add_(from_a)
    if wide is not out:
        out.copy_(wide)


Rotate = Callable[[Tensor | None, Tensor | None, Pair, Turn], None]


def _out_of_place(rotate: Rotate) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the implementation of the operator `rotary`."""

    def rotary(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        outputs = _empty_outputs(q, k)
        rotate(q, k, outputs, Turn(*args))
        return _present(outputs, args[0])

    return rotary


def _in_place(rotate: Rotate) -> Callable[..., None]:
    """Return the implementation of the operator `rotary_`."""

    def rotary_(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
    ) -> None:
        rotate(q, k, (q, k), Turn(cos, sin, positions, interleaved, False))

    return rotary_


def _rotary_fake(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    return _present(_empty_outputs(q, k), args[0])


def _present(outputs: Pair, like: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (absent(like) if x is None else x for x in outputs)
    return q, k


def _check_in_place(q: Tensor, k: Tensor, *args: Any) -> None:
    check_rotary(q, k, *args)
    check_memory(q, k)


rotary_op = Operator(
    "rotary",
    "(Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor positions, bool interleaved,"
    " bool backwards) -> (Tensor q_out, Tensor k_out)",
    fake=_rotary_fake,
    check=check_rotary,
    torch=_out_of_place(_rotate_torch),
    triton=_out_of_place(_rotate_triton),
    csrc=("cpu",),
)
_rotary_in_place_op = Operator(
    "rotary_",
    "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor positions, bool interleaved)"
    " -> ()",
    fake=lambda *args: None,
    check=_check_in_place,
    torch=_in_place(_rotate_torch),
    triton=_in_place(_rotate_triton),
    csrc=("cpu",),
)


class RotaryFunction(Function):
    """The derivative is the inverse rotation, so there are derivatives of any order."""

    public_name = "apply_rotary"

    @staticmethod
    def forward(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        return rotary_op(q, k, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, *tables, ctx.interleaved, ctx.backwards = inputs
        ctx.save_for_backward(*tables)
        ctx.set_materialize_grads(False)
        frozen = [y for y, need in zip(output, ctx.needs_input_grad[:2], strict=True) if not need]
        ctx.mark_non_differentiable(*frozen)

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_dq, needs_dk, *_ = ctx.needs_input_grad
        dq, dk = dq if needs_dq else None, dk if needs_dk else None
        if dq is not None or dk is not None:
            inverse = rotated(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.backwards)
            dq, dk = (None if x is None else y for x, y in zip((dq, dk), inverse, strict=True))
        return dq, dk, None, None, None, None, None


class RotaryInPlaceFunction(torch.autograd.Function):
    """The history alone, so that what may not be overwritten is refused before it has been.

    Of one tensor, and backward one launch each: PyTorch lets no more be returned if they are views.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *tables, ctx.interleaved = args
        ctx.save_for_backward(*tables)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        turned, _ = rotated(dx, None, *ctx.saved_tensors, ctx.interleaved, True)
        return turned, None, None, None, None


def rotated(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """Return what `rotary_op` returns, differentiable."""
    if needs_gradient(q, k):
        return RotaryFunction.call(q, k, *args)  # type: ignore[no-any-return]
    return rotary_op(q, k, *args)


def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, each (num_positions, head_dim / 2) in float32.

    Raises:
        ValueError: `num_positions` is negative, `head_dim` odd or not positive (channels turn in
            pairs), or `theta` not positive and finite.
        TypeError: `num_positions` or `head_dim` is no integer.
    """
    for name, value in (("num_positions", num_positions), ("head_dim", head_dim)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if num_positions < 0:
        raise ValueError(f"num_positions must be >= 0, got {num_positions}")
    if head_dim % 2 or head_dim <= 0:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be positive and finite, got {theta}")
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, theta ** (-channels / head_dim))
    return angles.cos().float(), angles.sin().float()


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k to their tokens' positions. Differentiable; the inputs are left as they are.

    One launch for both, forward and backward.

    Args:
        q: (..., num_heads, head_dim), float16, bfloat16, float32 or, on the torch backend,
            float64. Any strides; heads and tokens that are evenly spaced are read in place.
        k: (..., num_kv_heads, head_dim), of q's dtype.
        cos, sin: (num_positions, head_dim / 2), from `rotary_tables`.
        positions: (...), int32 or int64 in [0, num_positions): each token's index in its own
            sequence.
        interleaved: pair channels (2i, 2i + 1) in place of (i, i + head_dim / 2).

    Returns:
        The rotated q and k, new tensors of the same shapes and dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or, on the CPU,
            a position outside the tables.
        TypeError: q is not floating point.
    """
    check_tensors(q=q, k=k, cos=cos, sin=sin, positions=positions)
    return rotated(q, k, cos, sin, positions, interleaved, False)


def apply_rotary_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`apply_rotary` in place, to the same bits: q and k are turned where they lie, and returned.

    Takes what `apply_rotary` does, if its tokens are evenly spaced and channels side by side: the
    parts of a fused projection do, transposed heads of more than one sequence do not.

    Differentiable where PyTorch lets a tensor be overwritten: not a leaf that requires gradients,
    nor an output of `split` or `chunk` that has a history (slice instead). PyTorch then raises its
    own RuntimeError, and q and k keep their values.

    Raises:
        ValueError: as `apply_rotary`; or tokens or channels are not so; or elements share memory,
            as in an expanded tensor, or where q and k overlap.
        TypeError: q is not floating point.
    """
    check_tensors(q=q, k=k, cos=cos, sin=sin, positions=positions)
    if needs_gradient(q, k):
        check_rotary(q, k, cos, sin, positions)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform():
            # There PyTorch takes no Function that works in place, or (before 2.13, in a compiled
            # graph) loses its history. Each by itself: vmap may batch only one of them.
            turn = cos, sin, positions, interleaved, False
            return q.copy_(rotated(q, None, *turn)[0]), k.copy_(rotated(None, k, *turn)[1])
        q, k = (
            RotaryInPlaceFunction.apply(x, cos, sin, positions, interleaved)  # type: ignore[no-untyped-call]
            if x.requires_grad
            else x
            for x in (q, k)
        )
    with torch.no_grad():
        _rotary_in_place_op(q, k, cos, sin, positions, interleaved)
    return q, k
