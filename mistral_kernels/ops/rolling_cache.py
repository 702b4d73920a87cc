"""Write new keys and values into the rolling cache, with the rotary embedding in the same launch.

The cache of a layer is a ring of `capacity` slots per sequence. The token at absolute position p is
stored in slot p % capacity. A window of `capacity` tokens therefore takes constant memory, and no
token is ever moved. `lengths` counts the tokens of each sequence before the call: new token i of a
sequence has position lengths + i. A cache that never wraps, paged or not, is updated in the same
way.

Four implementations return the same bits: csrc for the CPU, csrc for CUDA, Triton, and PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.cache_arguments import (
    check_cache,
    check_cache_indices,
    check_cu_seqlens_values,
    check_new_tokens,
    check_num_positions,
    check_one_sequence_per_row,
    check_packed_rotary,
)
from mistral_kernels.ops.checks import (
    check_int32,
    check_optional_tensors,
    check_tensors,
    check_writable,
)
from mistral_kernels.ops.device_functions import view
from mistral_kernels.ops.dispatch import device_guard, with_unit_stride
from mistral_kernels.ops.launch_configs import cdiv
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.operator import Operator, in_transform, needs_gradient
from mistral_kernels.ops.rotary import load_angles, rotary_op, rotate_heads, rotated

if TYPE_CHECKING:
    import triton.language as tl


@jit
def slot_row(table_ptr, table_stride, slot, exists, page_size, PAGED: tl.constexpr):
    """Return the cache row of a ring slot, and the slot within this row.

    The row is a page if PAGED. Otherwise it is 0, relative to the sequence's row.
    """
    if PAGED:
        page = tl.load(table_ptr + slot // page_size * table_stride, mask=exists, other=0)
        return page.to(tl.int64), slot % page_size
    return tl.zeros_like(slot).to(tl.int64), slot


@jit
def _copy_heads(
    x_row, out_row, exists, head, x_stride_h, out_stride_h, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Copy a block of heads in a tile of tokens: `rotate_heads` without rotation."""
    channel = tl.arange(0, 2 * BLOCK_I)[None, None, :]
    mask = exists & (head < HEADS) & (channel < HEAD_DIM)
    head = tl.cast(head, tl.int64)
    x = tl.load(x_row + head * x_stride_h + channel, mask=mask)
    tl.store(out_row + head * out_stride_h + channel, x, mask=mask)


@jit
def _update_kernel(
    q, k, v, q_out_ptr, k_cache, v_cache, tables, lengths_ptr, cu_seqlens_ptr, rows_ptr,
    block_table, tiles, capacity, page_size,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Write a tile of new tokens. Rotate q and k by `tables` (cos, sin, strides), unless None."""
    tile, sequence = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    start = tl.load(cu_seqlens_ptr + sequence)
    count = tl.load(cu_seqlens_ptr + sequence + 1) - start
    if tile * BLOCK_T >= count:
        return
    index = tile * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    token = (start + index).to(tl.int64)
    position = tl.load(lengths_ptr + sequence).to(tl.int64) + index
    exists = index < count
    if tables is not None:
        cos, sin = load_angles(
            tables[0], tables[1], position, exists, tables[2], tables[3], HEAD_DIM // 2, BLOCK_I
        )

    # Each program processes one block of heads of q, k or v.
    block = tl.program_id(1)
    head = tl.arange(0, BLOCK_H)[None, :, None]
    if tables is not None:
        if block * BLOCK_H < Q_HEADS:
            rotate_heads(
                q.ptr + token * q.token_stride, q_out_ptr + token * (Q_HEADS * HEAD_DIM), exists,
                block * BLOCK_H + head, cos, sin, q.head_stride, HEAD_DIM,
                Q_HEADS, HEAD_DIM // 2, INTERLEAVED, BLOCK_I,
            )  # fmt: skip
            return
        block -= tl.cdiv(Q_HEADS, BLOCK_H)
    kept = exists & (index >= count - capacity)  # the last `capacity` tokens
    slot = position % capacity
    if block_table is not None:
        table_ptr = block_table[0] + sequence * block_table[1]
        page, slot = slot_row(table_ptr, block_table[2], slot, kept, page_size, True)
    else:
        page = tl.zeros_like(slot).to(tl.int64)
        page += tl.load(rows_ptr + sequence) if rows_ptr is not None else sequence
    if block * BLOCK_H < KV_HEADS:
        k_row = k.ptr + token * k.token_stride
        k_cache_row = k_cache.ptr + page * k_cache.batch_stride + slot * k_cache.token_stride
        head += block * BLOCK_H
        if tables is not None:
            rotate_heads(
                k_row, k_cache_row, kept, head, cos, sin, k.head_stride, k_cache.head_stride,
                KV_HEADS, HEAD_DIM // 2, INTERLEAVED, BLOCK_I,
            )  # fmt: skip
        else:
            _copy_heads(
                k_row, k_cache_row, kept, head, k.head_stride, k_cache.head_stride, KV_HEADS,
                HEAD_DIM, BLOCK_I,
            )  # fmt: skip
    else:
        _copy_heads(
            v.ptr + token * v.token_stride,
            v_cache.ptr + page * v_cache.batch_stride + slot * v_cache.token_stride,
            kept, head + (block - tl.cdiv(KV_HEADS, BLOCK_H)) * BLOCK_H,
            v.head_stride, v_cache.head_stride, KV_HEADS, HEAD_DIM, BLOCK_I,
        )  # fmt: skip


def _update_triton(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: Tensor | None,
    block_table: Tensor | None,
    q: Tensor | None,
    q_out: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    batch, num_kv_heads, head_dim = lengths.numel(), *k.shape[1:]
    num_heads = 0 if q is None else q.shape[1]
    config = launch_configs.rolling_cache_update(head_dim, max_seqlen)
    tiles, block_h = cdiv(max_seqlen, config["BLOCK_T"]), config["BLOCK_H"]
    tables = None if cos is None or sin is None else (cos, sin, cos.stride(0), sin.stride(0))
    pages = None if block_table is None else (block_table, *block_table.stride())
    with device_guard(k_cache):
        _update_kernel[(tiles * batch, cdiv(num_heads, block_h) + 2 * cdiv(num_kv_heads, block_h))](
            None if q is None else view(q, packed=True),
            *(view(x, packed=True) for x in (k, v)),
            q_out,
            *(view(x, packed=False) for x in (k_cache, v_cache)),
            *(tables, lengths, cu_seqlens, rows, pages),
            *(tiles, capacity_of(k_cache, block_table), k_cache.shape[1]),
            Q_HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            INTERLEAVED=interleaved,
            **config,
        )


def capacity_of(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Return the number of slots per sequence: in its row, or in all its pages."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def token_positions(
    lengths: Tensor, cu_seqlens: Tensor, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each packed token's sequence, index among its sequence's new tokens, and position."""
    batch = torch.arange(lengths.numel(), device=lengths.device)
    sequence = torch.repeat_interleave(batch, cu_seqlens.diff(), output_size=total)
    index = torch.arange(total, device=lengths.device) - cu_seqlens.long()[sequence]
    return sequence, index, lengths[sequence] + index


def _slots_of_tokens(
    k_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    total: int,
    rows: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the tokens that are kept, and each token's row (or page) and slot."""
    capacity = capacity_of(k_cache, block_table)
    sequence, index, position = token_positions(lengths, cu_seqlens, total)
    kept = (index >= cu_seqlens.diff()[sequence] - capacity).nonzero().squeeze(1)
    sequence, slot = sequence[kept], position[kept] % capacity
    if block_table is not None:
        page_size = k_cache.shape[1]
        return kept, block_table[sequence, slot // page_size].long(), slot % page_size
    return kept, sequence if rows is None else rows.long()[sequence], slot


def _update_torch(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: Tensor | None,
    block_table: Tensor | None,
    q: Tensor | None,
    q_out: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    total = k.shape[0]
    if q is not None and q_out is not None and cos is not None:
        *_, position = token_positions(lengths, cu_seqlens, total)
        rotated_q, rotated_k = rotary_op(q, k, cos, sin, position, interleaved, False)
        q_out.copy_(rotated_q)
        k = rotated_k
    if k_cache.device.type == "cpu" and max_seqlen > 1 and block_table is None:
        _append_(k_cache, k, lengths, cu_seqlens, rows)
        _append_(v_cache, v, lengths, cu_seqlens, rows)
        return
    kept, row, slot = _slots_of_tokens(k_cache, lengths, cu_seqlens, total, rows, block_table)
    k_cache[row, slot] = k[kept]
    v_cache[row, slot] = v[kept]


def _append_(
    cache: Tensor, new: Tensor, lengths: Tensor, cu_seqlens: Tensor, rows: Tensor | None
) -> None:
    """Write the tokens as at most two slices per sequence: much faster on a CPU than indexing."""
    capacity = cache.shape[1]
    seen, offsets = lengths.tolist(), cu_seqlens.tolist()
    for sequence, row in enumerate(range(len(seen)) if rows is None else rows.tolist()):
        start, end = offsets[sequence : sequence + 2]
        kept = new[max(start, end - capacity) : end]
        slot = (seen[sequence] + end - start - len(kept)) % capacity
        before_wrap = min(len(kept), capacity - slot)
        cache[row, slot : slot + before_wrap] = kept[:before_wrap]
        cache[row, : len(kept) - before_wrap] = kept[before_wrap:]


Update = Callable[..., None]


def _without_rotation(update: Update) -> Callable[..., None]:
    """Return the implementation of the operator `rolling_cache_update`."""

    def rolling_cache_update(k_cache: Tensor, v_cache: Tensor, k: Tensor, *args: Any) -> None:
        if k.numel():
            update(k_cache, v_cache, k, *args, None, None, None, None, False)

    return rolling_cache_update


def _with_rotation(update: Update) -> Callable[..., Tensor]:
    """Return the implementation of the operator `rotary_rolling_cache_update`."""

    def rotary_update(k_cache: Tensor, v_cache: Tensor, k: Tensor, *args: Any) -> Tensor:
        *packed, q, cos, sin, interleaved = args
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if k.numel():
            tables = q, q_out, cos, sin, interleaved
            update(k_cache, v_cache, k, *packed, None, None, *tables)
        return q_out

    return rotary_update


def _rotary_update_fake(*args: Any) -> Tensor:
    q = args[7]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _check(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rows: Tensor | None,
    block_table: Tensor | None,
) -> None:
    batch = check_cache(k_cache, v_cache, lengths, rows, block_table)
    check_writable("k_cache", k_cache)
    check_writable("v_cache", v_cache)
    check_new_tokens("k", k, k_cache, k.shape[0] if k.ndim else 0)
    check_new_tokens("v", v, k_cache, k.shape[0])
    check_int32("cu_seqlens", cu_seqlens, (batch + 1,))
    check_cache_indices(k_cache, lengths, rows, block_table)
    check_cu_seqlens_values(cu_seqlens, max_seqlen, k.shape[0])


def _check_rotary(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, *args: Any) -> None:
    lengths, cu_seqlens, max_seqlen, q, cos, sin, _ = args
    _check(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, None, None)
    check_packed_rotary(q, cos, sin, k)
    check_num_positions(cos, lengths, cu_seqlens)


_CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v"
_LENGTHS = "Tensor lengths, Tensor cu_seqlens, SymInt max_seqlen"
update_op = Operator(
    "rolling_cache_update",
    f"({_CACHES}, {_LENGTHS}, Tensor? rows, Tensor? block_table) -> ()",
    fake=lambda *args: None,
    check=_check,
    torch=_without_rotation(_update_torch),
    triton=_without_rotation(_update_triton),
    csrc=("cpu", "cuda"),
)
_rotary_update_op = Operator(
    "rotary_rolling_cache_update",
    f"({_CACHES}, {_LENGTHS}, Tensor q, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    fake=_rotary_update_fake,
    check=_check_rotary,
    torch=_with_rotation(_update_torch),
    triton=_with_rotation(_update_triton),
    csrc=("cpu", "cuda"),
)


class RollingCacheUpdateFunction(torch.autograd.Function):
    """Autograd function of `rolling_cache_update_`.

    The gradient of a token is the gradient of the slot that it was written to. The gradient of the
    overwritten value is 0.
    """

    @staticmethod
    def forward(
        ctx: Any, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, *args: Any
    ) -> tuple[Tensor | None, ...]:
        """Update the caches in place; return them, and the rotated q or None."""
        lengths, cu_seqlens, max_seqlen, q, cos, sin, interleaved = args
        q_out = None
        if q is None:
            update_op(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, None, None)
        else:
            q_out = _rotary_update_op(k_cache, v_cache, k, v, *args)
        ctx.save_for_backward(lengths, cu_seqlens, cos, sin)
        ctx.mark_dirty(k_cache, v_cache)
        ctx.total, ctx.interleaved = k.shape[0], interleaved
        ctx.set_materialize_grads(False)
        return k_cache, v_cache, q_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Split the caches' gradients between the new tokens and the previous contents."""
        lengths, cu_seqlens, cos, sin = ctx.saved_tensors
        dk_cache, dv_cache, dq = grads
        dk, dk_cache = _split_gradient(dk_cache, lengths, cu_seqlens, ctx.total)
        dv, dv_cache = _split_gradient(dv_cache, lengths, cu_seqlens, ctx.total)
        if cos is not None and not (dq is None and dk is None):
            *_, position = token_positions(lengths, cu_seqlens, ctx.total)
            inverse = rotated(dq, dk, cos, sin, position, ctx.interleaved, True)
            dq, dk = (None if x is None else y for x, y in zip((dq, dk), inverse, strict=True))
        return dk_cache, dv_cache, dk, dv, None, None, None, dq, None, None, None


def _split_gradient(
    dcache: Tensor | None, lengths: Tensor, cu_seqlens: Tensor, total: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the new tokens and of the cache's previous contents."""
    if dcache is None:
        return None, None
    kept, row, slot = _slots_of_tokens(dcache, lengths, cu_seqlens, total, None, None)
    dnew = dcache.new_zeros(total, *dcache.shape[2:])
    dnew[kept] = dcache[row, slot]
    dcache = dcache.clone()
    dcache[row, slot] = 0
    return dnew, dcache


def rolling_cache_update_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    q: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor | None:
    """Append new tokens to the rolling cache of each sequence, in place.

    The token at position p of its sequence is written to slot p % capacity. The first new token of
    a sequence has position `lengths`. If q, cos and sin are given, q and k are rotated first, in
    the same launch. The function is differentiable in k, v, q and the previous contents of the
    caches. The errors listed below are raised before the caches are written to.

    Args:
        k_cache: (batch, capacity, num_kv_heads, head_dim), float16, bfloat16, float32 or, on the
            torch backend, float64. The last dimension must be contiguous.
        v_cache: like k_cache.
        k: (total_tokens, num_kv_heads, head_dim), packed, dtype of k_cache, any strides. If a
            sequence has more than `capacity` new tokens, only the last `capacity` are kept.
        v: like k.
        lengths: (batch,) int32, number of tokens of each sequence before this call. It is not
            updated.
        cu_seqlens: (batch + 1,) int32: 0, then the end of each sequence in k and v.
        max_seqlen: upper bound of the number of new tokens per sequence.
        q: (total_tokens, num_heads, head_dim), packed like k, dtype of k.
        cos: (num_positions, head_dim / 2) float32, cosines from `rotary_tables`. num_positions must
            exceed the position of every new token.
        sin: like cos, the sines.
        interleaved: pair channels (2i, 2i + 1), as raw Mistral checkpoints do. The default pairs
            channels (i, i + head_dim / 2), as Hugging Face checkpoints do.

    Returns:
        The rotated q, a new tensor; None without q.

    Raises:
        ValueError: a shape, device or value does not fit (values are checked on the CPU only).
        TypeError: a dtype does not fit.
        NotImplementedError: the call is inside a `torch.func` transform.

    Example:
        >>> import torch
        >>> from mistral_kernels import rolling_cache_update_
        >>> k_cache, v_cache = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)
        >>> k = torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 1, 8)
        >>> lengths = torch.tensor([3, 0], dtype=torch.int32)
        >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)  # 2 new tokens, and 1
        >>> rolling_cache_update_(k_cache, v_cache, k, k, lengths, cu_seqlens, max_seqlen=2)
        >>> k_cache[:, :, 0, 0]  # positions 3 and 4 of the first sequence: slots 3 and 0
        tensor([[2., 0., 0., 1.],
                [3., 0., 0., 0.]])
        >>> lengths += cu_seqlens.diff()
    """
    if in_transform():
        raise NotImplementedError(
            "rolling_cache_update_ writes into its caches and does not support torch.func; call it "
            "outside of transforms, or use mistral_kernels.ops.reference.rolling_cache_update"
        )
    check_tensors(
        k_cache=k_cache, v_cache=v_cache, k=k, v=v, lengths=lengths, cu_seqlens=cu_seqlens
    )
    check_optional_tensors(q=q, cos=cos, sin=sin)
    check_one_sequence_per_row(k_cache, lengths)
    if q is None and (cos is not None or sin is not None):
        raise ValueError("q is required when cos or sin is given, got None")
    k, v = with_unit_stride(k), with_unit_stride(v)
    q = q if q is None else with_unit_stride(q)
    args = lengths.contiguous(), cu_seqlens.contiguous(), max_seqlen
    if needs_gradient(k_cache, v_cache, k, v, q):
        tables = q, cos, sin, interleaved
        return RollingCacheUpdateFunction.apply(k_cache, v_cache, k, v, *args, *tables)[2]  # type: ignore[no-any-return, no-untyped-call]
    if q is None:
        return update_op(k_cache, v_cache, k, v, *args, None, None)
    return _rotary_update_op(k_cache, v_cache, k, v, *args, q, cos, sin, interleaved)
