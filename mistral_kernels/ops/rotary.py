"""Rotary position embedding of queries and keys (arXiv:2104.09864).

    angle_i(p) = p * theta^(-2i / d)            i = 0 .. d/2 - 1, p the token's absolute position
    (a, b) -> (a cos - b sin, b cos + a sin)    backward: the same with -sin

A pair (a, b) is channels (i, i + d/2) in Hugging Face checkpoints (half-split), and channels
(2i, 2i + 1) in raw Mistral checkpoints (interleaved). Angles are computed in float64; tables and
arithmetic are float32. bfloat16 would round position 4095 to 4096, an error of one radian. Both
products are rounded before they are added (no fused multiply-add), so that all backends return the
same bits.
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
    check_in_place_memory,
    check_rotary,
    flatten_tokens,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit
def rotate_heads(
    x_row, out_row, exists, head, cos, sin, x_stride_h, out_stride_h,
    HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_I: tl.constexpr,
    IN_PLACE: tl.constexpr = False,
):  # fmt: skip
    """Rotate a block of heads in a tile of tokens.

    x_row, out_row (pointers to the tokens' rows), exists: [BLOCK_T, 1, 1]; head: [1, BLOCK_H, 1];
    cos, sin: [BLOCK_T, 1, BLOCK_I].
    """
    exists = exists & (head < HEADS)
    x_head = x_row + tl.cast(head, tl.int64) * x_stride_h
    out_head = out_row + tl.cast(head, tl.int64) * out_stride_h
    out_type = out_row.dtype.element_ty
    if INTERLEAVED:  # the channels of a pair are adjacent: access both at once
        channel = tl.arange(0, 2 * BLOCK_I)[None, None, :]
        mask = exists & (channel < 2 * HALF)
        x = tl.load(x_head + channel, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK_I, 2)))
        rotated_x = tl.join(a * cos - b * sin, b * cos + a * sin)
        rotated_x = tl.reshape(rotated_x, (x.shape[0], x.shape[1], 2 * BLOCK_I))
        if IN_PLACE:  # all threads must have loaded before any of them stores
            tl.debug_barrier()
        tl.store(out_head + channel, rotated_x.to(out_type), mask=mask)
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
    """Return cosines and sines, each [BLOCK_T, 1, BLOCK_I], of the positions [BLOCK_T, 1, 1]."""
    pair = tl.arange(0, BLOCK_I)[None, None, :]
    mask = exists & (pair < HALF)
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + position * sin_stride + pair, mask=mask, other=0.0)


@jit
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_stride_s, q_stride_h, k_stride_s, k_stride_h, cos_stride, sin_stride, tokens,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    exists = token < tokens
    position = tl.load(positions_ptr + token, mask=exists, other=0).to(tl.int64)
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position, exists, cos_stride, sin_stride, HALF, BLOCK_I
    )
    if INVERSE:
        sin = -sin
    head = tl.arange(0, BLOCK_H)[None, :, None]
    if Q_HEADS:
        q_row = q_ptr + token * q_stride_s
        q_out_row = q_row if IN_PLACE else q_out_ptr + token * (Q_HEADS * 2 * HALF)
        q_out_stride_h = q_stride_h if IN_PLACE else 2 * HALF
        for first_head in tl.range(0, Q_HEADS, BLOCK_H):
            rotate_heads(
                q_row, q_out_row, exists, first_head + head, cos, sin, q_stride_h,
                q_out_stride_h, Q_HEADS, HALF, INTERLEAVED, BLOCK_I, IN_PLACE,
            )  # fmt: skip
    if K_HEADS:
        k_row = k_ptr + token * k_stride_s
        k_out_row = k_row if IN_PLACE else k_out_ptr + token * (K_HEADS * 2 * HALF)
        k_out_stride_h = k_stride_h if IN_PLACE else 2 * HALF
        for first_head in tl.range(0, K_HEADS, BLOCK_H):
            rotate_heads(
                k_row, k_out_row, exists, first_head + head, cos, sin, k_stride_h,
                k_out_stride_h, K_HEADS, HALF, INTERLEAVED, BLOCK_I, IN_PLACE,
            )  # fmt: skip


Pair = tuple[Tensor | None, Tensor | None]


class Rotation(NamedTuple):
    """Angles of a rotation: the arguments of the operator `rotary` after q and k."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    interleaved: bool
    inverse: bool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables as float32 with unit stride, and the positions as contiguous."""
        cos, sin = (with_unit_stride(table.float()) for table in (self.cos, self.sin))
        return cos, sin, self.positions.contiguous()


def _empty_outputs(q: Tensor | None, k: Tensor | None, *_: Any) -> Pair:
    q_out, k_out = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k)
    )
    return q_out, k_out


def _rotate_triton(q: Tensor | None, k: Tensor | None, outputs: Pair, rotation: Rotation) -> None:
    in_place = q is outputs[0] and k is outputs[1]
    half = rotation.cos.shape[-1]
    tokens = rotation.positions.numel()
    (q, *q_strides), (k, *k_strides) = _with_strides(q), _with_strides(k)
    if q is None and k is None:
        return
    cos, sin, positions = rotation.tensors()
    config = launch_configs.rotary(half)
    with device_guard(positions):
        _rotary_kernel[(cdiv(tokens, config["BLOCK_T"]),)](
            *(q, k, *outputs, cos, sin, positions),
            *(*q_strides, *k_strides),
            *(cos.stride(0), sin.stride(0), tokens),
            Q_HEADS=0 if q is None else q.shape[-2],
            K_HEADS=0 if k is None else k.shape[-2],
            HALF=half,
            INTERLEAVED=rotation.interleaved,
            INVERSE=rotation.inverse,
            IN_PLACE=in_place,
            **config,
        )


def _with_strides(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Return the tensor for the kernel and its strides between tokens and between heads.

    Return None and strides of 0 if the tensor is None or has no elements.
    """
    if x is None or x.numel() == 0:
        return None, 0, 0
    if x.is_contiguous():  # the kernel needs no view: creating one takes longer than this function
        heads, head_dim = x.shape[-2:]
        return x, heads * head_dim, head_dim
    x = flatten_tokens(x)
    return x, x.stride(0), x.stride(1)


def _rotate_torch(q: Tensor | None, k: Tensor | None, outputs: Pair, rotation: Rotation) -> None:
    tables = rotation.cos, rotation.sin
    dtype = next(torch.promote_types(x.dtype, rotation.cos.dtype) for x in (q, k) if x is not None)
    cos, sin = (table[rotation.positions].unsqueeze(-2).to(dtype) for table in tables)
    sin = -sin if rotation.inverse else sin
    for x, out in zip((q, k), outputs, strict=True):
        if x is not None and out is not None:
            _rotate_one_torch(x, out, cos, sin, rotation.interleaved)


def _rotate_one_torch(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate `x` into `out`, which may be `x`, in few passes and without fused multiply-adds."""
    # Convert to the dtype of the tables first: products of mixed dtypes are much slower.
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


Rotate = Callable[[Tensor | None, Tensor | None, Pair, Rotation], None]


def _make_rotary(rotate: Rotate) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the implementation of the operator `rotary`."""

    def rotary(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        outputs = _empty_outputs(q, k)
        rotate(q, k, outputs, Rotation(*args))
        return _absent_for_none(outputs, args[0])

    return rotary


def _make_rotary_in_place(rotate: Rotate) -> Callable[..., None]:
    """Return the implementation of the operator `rotary_`."""

    def rotary_(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
    ) -> None:
        rotate(q, k, (q, k), Rotation(cos, sin, positions, interleaved, False))

    return rotary_


def _rotary_fake(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    return _absent_for_none(_empty_outputs(q, k), args[0])


def _absent_for_none(outputs: Pair, like: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (absent(like) if x is None else x for x in outputs)
    return q, k


def _check_in_place(q: Tensor, k: Tensor, *args: Any) -> None:
    check_rotary(q, k, *args)
    check_in_place_memory(q, k)


rotary_op = Operator(
    "rotary",
    "(Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor positions, bool interleaved,"
    " bool inverse) -> (Tensor q_out, Tensor k_out)",
    fake=_rotary_fake,
    check=check_rotary,
    torch=_make_rotary(_rotate_torch),
    triton=_make_rotary(_rotate_triton),
    csrc=("cpu",),
)
_rotary_in_place_op = Operator(
    "rotary_",
    "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor positions, bool interleaved)"
    " -> ()",
    fake=lambda *args: None,
    check=_check_in_place,
    torch=_make_rotary_in_place(_rotate_torch),
    triton=_make_rotary_in_place(_rotate_triton),
    csrc=("cpu",),
)


class RotaryFunction(Function):
    """Autograd function of `apply_rotary`.

    The derivative is the inverse rotation, so that derivatives of any order exist.
    """

    public_name = "apply_rotary"

    @staticmethod
    def forward(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the rotated q and k."""
        return rotary_op(q, k, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the tables and positions."""
        _, _, *tables, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(*tables)
        ctx.set_materialize_grads(False)
        frozen = [y for y, need in zip(output, ctx.needs_input_grad[:2], strict=True) if not need]
        ctx.mark_non_differentiable(*frozen)

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        """Rotate the gradients by the negative angles."""
        needs_dq, needs_dk, *_ = ctx.needs_input_grad
        dq, dk = dq if needs_dq else None, dk if needs_dk else None
        if dq is not None or dk is not None:
            inverse = rotated(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
            dq, dk = (None if x is None else y for x, y in zip((dq, dk), inverse, strict=True))
        return dq, dk, None, None, None, None, None


class RotaryInPlaceFunction(torch.autograd.Function):
    """Autograd history of `apply_rotary_` for one tensor; `forward` does not rotate.

    `apply_rotary_` calls this function first and rotates afterwards. If `x` must not be
    overwritten, PyTorch raises during this call, and `x` keeps its values. q and k need separate
    calls, with one launch each in backward, because an in-place Function may return only one view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        """Mark `x` as overwritten and return it."""
        *tables, ctx.interleaved = args
        ctx.save_for_backward(*tables)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient by the negative angles."""
        inverse, _ = rotated(dx, None, *ctx.saved_tensors, ctx.interleaved, True)
        return inverse, None, None, None, None


def rotated(q: Tensor | None, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """Return the results of `rotary_op`, with history if q or k requires gradients."""
    if needs_gradient(q, k):
        return RotaryFunction.call(q, k, *args)  # type: ignore[no-any-return]
    return rotary_op(q, k, *args)


def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return tables of cosines and sines for `apply_rotary` (arXiv:2104.09864).

        angle[p, i] = p * theta^(-2i / head_dim)    i = 0 .. head_dim / 2 - 1

    Args:
        num_positions: number of positions p, which start at 0.
        head_dim: channels per head; even, because channels rotate in pairs.
        theta: base of the angles, `rope_theta` of a model's configuration.
        device: device of the tables.

    Returns:
        (cos, sin), each (num_positions, head_dim / 2) float32, computed in float64.

    Raises:
        ValueError: `num_positions` is negative, `head_dim` is odd or not positive, or `theta` is
            not positive and finite.
        TypeError: `num_positions` or `head_dim` is not an integer.

    Example:
        >>> from mistral_kernels import rotary_tables
        >>> cos, sin = rotary_tables(num_positions=4096, head_dim=128, theta=1e4)
        >>> cos.shape, cos.dtype
        (torch.Size([4096, 64]), torch.float32)
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
    """Rotate q and k by the angles of their tokens' positions (arXiv:2104.09864).

        (a, b) -> (a cos - b sin, b cos + a sin)    for each pair of channels (a, b)

    q and k are not modified. The function is differentiable to any order. The forward pass rotates
    q and k in one launch, and so does the backward pass.

    Args:
        q: (..., num_heads, head_dim), float16, bfloat16, float32 or, on the torch backend, float64.
            Any strides; evenly spaced heads and tokens are not copied.
        k: (..., num_kv_heads, head_dim), dtype of q.
        cos: (num_positions, head_dim / 2), cosines from `rotary_tables`.
        sin: shape and dtype of cos, sines from `rotary_tables`.
        positions: (...), int32 or int64 in [0, num_positions): each token's index in its sequence.
        interleaved: pair channels (2i, 2i + 1), as raw Mistral checkpoints do. The default pairs
            channels (i, i + head_dim / 2), as Hugging Face checkpoints do.

    Returns:
        The rotated q and k, new contiguous tensors of the same shapes and dtype.

    Raises:
        ValueError: a shape or device does not fit, or a position is outside the tables (checked on
            the CPU only).
        TypeError: a dtype is not supported, or k and q have different dtypes.

    Example:
        >>> import torch
        >>> from mistral_kernels import apply_rotary, rotary_tables
        >>> q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)  # (batch, seqlen, heads, dim)
        >>> cos, sin = rotary_tables(num_positions=1000, head_dim=8, theta=1e4)
        >>> positions = torch.arange(100, 105).expand(2, 5)
        >>> q_rotated, k_rotated = apply_rotary(q, k, cos, sin, positions)
        >>> torch.allclose(q_rotated.norm(dim=-1), q.norm(dim=-1))  # a rotation keeps lengths
        True
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
    """Rotate q and k in place, with the same bits as `apply_rotary`.

    The function is differentiable if PyTorch allows q and k to be overwritten. PyTorch does not
    allow this for a leaf that requires gradients, or for an output of `split` or `chunk` with
    history (use slices instead). It then raises RuntimeError, and q and k keep their values.

    Args:
        q: as for `apply_rotary`, with evenly spaced tokens and contiguous channels. Parts of a
            fused projection qualify; transposed heads of more than one sequence do not.
        k: like q, and without memory in common with q.
        cos: as for `apply_rotary`.
        sin: as for `apply_rotary`.
        positions: as for `apply_rotary`.
        interleaved: as for `apply_rotary`.

    Returns:
        q and k.

    Raises:
        ValueError: as for `apply_rotary`; or tokens are not evenly spaced, channels are not
            contiguous, or elements share memory (an expanded tensor, or q and k overlap).
        TypeError: as for `apply_rotary`.

    Example:
        >>> import torch
        >>> from mistral_kernels import apply_rotary, apply_rotary_, rotary_tables
        >>> qkv = torch.randn(5, 8, 16)  # fused projection of 5 tokens: 4 + 2 + 2 heads
        >>> q, k = qkv[:, :4], qkv[:, 4:6]
        >>> angles = *rotary_tables(100, 16, theta=1e4), torch.arange(5)
        >>> expected, _ = apply_rotary(q, k, *angles)
        >>> q, k = apply_rotary_(q, k, *angles)
        >>> torch.equal(qkv[:, :4], expected)
        True
    """
    check_tensors(q=q, k=k, cos=cos, sin=sin, positions=positions)
    if needs_gradient(q, k):
        check_rotary(q, k, cos, sin, positions)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform():
            # Here PyTorch does not support in-place Functions or, in graphs compiled by versions
            # before 2.13, drops their history. Rotate q and k separately: vmap may batch only one.
            angles = cos, sin, positions, interleaved, False
            return q.copy_(rotated(q, None, *angles)[0]), k.copy_(rotated(None, k, *angles)[1])
        q, k = (
            RotaryInPlaceFunction.apply(x, cos, sin, positions, interleaved)  # type: ignore[no-untyped-call]
            if x.requires_grad
            else x
            for x in (q, k)
        )
    with torch.no_grad():
        _rotary_in_place_op(q, k, cos, sin, positions, interleaved)
    return q, k
