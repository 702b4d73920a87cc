"""What the forward and the backward kernels share: how tiles are placed, loaded and scored.

A program owns a tile of rows. A row of a query tile is a query and one of the `GROUP` query heads
that read the same kv head, heads fastest: the keys and values of a block are then loaded once for
all of them, and a tile spans `GROUP` times fewer positions, so fewer of its blocks straddle an edge
of the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def program_place(tiles, num_kv_heads):
    """The tile, kv head and sequence of a program; neighbours share a kv head and most keys."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % num_kv_heads, program // tiles // num_kv_heads


@jit
def rows_of_tile(tile, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The query and the query head of each row, and the first and the last query."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP
    return row // GROUP, kv_head * GROUP + row % GROUP, first, last


@jit
def sequence_bounds(cu_seqlens_ptr, batch, seqlen, VARLEN: tl.constexpr):
    """Where sequence `batch` begins in a packed tensor, and its length."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + batch)
        return start, tl.load(cu_seqlens_ptr + batch + 1) - start
    return 0, seqlen


@jit
def sequence_pointer(ptr, batch, start, batch_stride, token_stride, VARLEN: tl.constexpr):
    """The first token of a sequence. Sequences may lie further apart than int32 counts."""
    if VARLEN:
        return ptr + start.to(tl.int64) * token_stride
    return ptr + batch.to(tl.int64) * batch_stride


@jit
def load_block(
    ptr,
    desc,
    first,
    length,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Rows `first` to `first + ROWS` as [ROWS, BLOCK_D]; 0 beyond HEAD_DIM.

    Beyond `length` a descriptor gives 0, and so do pointers with `MASK`; without, all rows must be
    there.
    """
    if DESCRIPTOR:
        return desc.load([first, 0])
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    if OFFSETS == "block":  # one 64-bit product a block; in a block 32 bits do, and are kept
        pointers = ptr + tl.cast(first, tl.int64) * stride + (row * stride + col)
    elif OFFSETS == "tensor":  # 32 bits do in the whole tensor
        pointers = ptr + ((first + row) * stride + col)
    else:
        pointers = ptr + (tl.cast(first + row, tl.int64) * stride + col)
    if MASK and HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(first + row < length) & (col < HEAD_DIM), other=0.0)
    if MASK:
        return tl.load(pointers, mask=first + row < length, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=col < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@jit
def _row_pointers(
    ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each row the vector of its query and head, [rows, BLOCK_D], and which of it exist."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    offset = query.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return ptr + offset[:, None] + dim, (query[:, None] < seqlen) & (dim < HEAD_DIM)


@jit
def load_rows(
    ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D]: for each row, the vector of its query and head; 0 outside."""
    pointers, mask = _row_pointers(
        ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM, BLOCK_D
    )
    return tl.load(pointers, mask=mask, other=0.0)


@jit
def store_rows(
    ptr, x, query, head, seqlen, token_stride, head_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows`, rounded to the tensor's dtype."""
    pointers, mask = _row_pointers(
        ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM, BLOCK_D
    )
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)
