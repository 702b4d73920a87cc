"""Device functions that attention kernels share: rows of a tile, key blocks, scores, softmax.

Each program computes a tile of rows. A row of a query tile is a pair of a query and one of the
`GROUP` query heads that share a kv head; the head varies fastest. A key block is therefore loaded
once for all heads of the group. A tile spans `GROUP` times fewer positions, so fewer of its blocks
cross an edge of the window.

Kernels take tensors as a `View` (see `ops/device_functions.py`). Key blocks come from one of four
sources, the constexpr `SOURCE`:

    "dense"         tokens that are `token_stride` apart, read by pointers
    "descriptors"   the same, read by the tensor memory accelerator
    "ring"          the slots of a rolling cache
    "pages"         the pages of a cache, indexed by a block table
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from mistral_kernels.ops.attention.window import hide
from mistral_kernels.ops.device_functions import tanh
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.rolling_cache import slot_row

if TYPE_CHECKING:
    import triton.language as tl


class Scales(NamedTuple):
    """Factors of scores, for exponentials in base 2.

    The weight of a key is 2^(exp * s), where s is the product q k, or tanh(tanh * q k) with a
    softcap. `softmax` is the caller's softmax_scale.
    """

    softmax: float
    tanh: float | None
    exp: float


def softmax_scales(softmax_scale: float, softcap: float) -> Scales:
    """Return the factors for `softmax_scale` and `softcap`; a softcap of 0 means no softcap."""
    if softcap:
        return Scales(softmax_scale, softmax_scale / softcap, softcap * math.log2(math.e))
    return Scales(softmax_scale, None, softmax_scale * math.log2(math.e))


@jit
def program_indices(tiles, num_kv_heads):
    """Return a program's tile, kv head and sequence.

    Consecutive programs share a kv head and most keys.
    """
    program = tl.program_id(0)
    return program % tiles, program // tiles % num_kv_heads, program // tiles // num_kv_heads


@jit
def sequence_bounds(cu_seqlens_ptr, batch, seqlen):
    """Return the first token of sequence `batch` in a packed tensor, and its length."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + batch)
        return start, tl.load(cu_seqlens_ptr + batch + 1) - start
    return 0, seqlen


@jit
def sequence_pointer(x, batch, start, VARLEN: tl.constexpr):
    """Return a pointer to a sequence's first token. Its offset may exceed 32 bits."""
    if VARLEN:
        return x.ptr + start.to(tl.int64) * x.token_stride
    return x.ptr + batch.to(tl.int64) * x.batch_stride


@jit
def statistics_pointer(ptr, batch, start, num_heads, head_stride, VARLEN: tl.constexpr):
    """Return a pointer to a sequence in statistics (batch, heads, tokens) or (heads, total)."""
    if VARLEN:
        return ptr + start
    return ptr + batch.to(tl.int64) * num_heads * head_stride


@jit
def rows_of_tile(tile, kv_head, seqlen_q, seqlen_k, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the query, head and position of each row, and the first and the last position.

    Positions are indices among the keys, and have shape [rows, 1] to broadcast against keys.
    """
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    first, last = tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP
    last = min(last, seqlen_q - 1) + seqlen_k - seqlen_q
    position = (query + seqlen_k - seqlen_q)[:, None]
    return query, head, position, first + seqlen_k - seqlen_q, last


@jit
def load_slopes(slopes, batch, head, exp_scale):
    """Return the ALiBi slope of each head, in units of the scores that `scores` returns."""
    slope = tl.load(slopes[0] + batch * slopes[1] + head)
    return slope * (1.4426950408889634 / exp_scale)


@jit
def _row_pointers(
    ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return pointers to the elements of each row, [rows, BLOCK_D], and a mask of valid ones."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    offset = query.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return ptr + offset[:, None] + dim, (query[:, None] < seqlen) & (dim < HEAD_DIM)


@jit
def load_rows(
    ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load the vector of each row's query and head, [rows, BLOCK_D]; 0 outside the tensor."""
    pointers, mask = _row_pointers(
        ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM, BLOCK_D
    )
    return tl.load(pointers, mask=mask, other=0.0)


@jit
def store_rows(
    ptr, x, query, head, seqlen, token_stride, head_stride, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store `x`, rounded to the tensor's dtype, to the elements that `load_rows` loads."""
    pointers, mask = _row_pointers(
        ptr, query, head, seqlen, token_stride, head_stride, HEAD_DIM, BLOCK_D
    )
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def load_sequence_rows(
    x, batch, start, query, head, seqlen, VARLEN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Call `load_rows` for one sequence of the view `x`."""
    ptr = sequence_pointer(x, batch, start, VARLEN)
    return load_rows(ptr, query, head, seqlen, x.token_stride, x.head_stride, HEAD_DIM, BLOCK_D)


@jit
def store_sequence_rows(
    x, values, batch, start, query, head, seqlen, VARLEN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Call `store_rows` for one sequence of the view `x`."""
    ptr = sequence_pointer(x, batch, start, VARLEN)
    store_rows(ptr, values, query, head, seqlen, x.token_stride, x.head_stride, HEAD_DIM, BLOCK_D)


@jit
def dense_keys(
    k, v, batch, start, kv_head, seqlen_k, VARLEN: tl.constexpr, SAME_STRIDES: tl.constexpr,
    SOURCE: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the arguments of `load_keys` for one kv head's keys and values of a sequence."""
    k_ptr = sequence_pointer(k, batch, start, VARLEN) + kv_head.to(tl.int64) * k.head_stride
    v_ptr = sequence_pointer(v, batch, start, VARLEN) + kv_head.to(tl.int64) * v.head_stride
    if SOURCE == "descriptors":
        keys = tl.make_tensor_descriptor(
            k_ptr, [seqlen_k, HEAD_DIM], [k.token_stride, 1], [BLOCK_N, BLOCK_D]
        )
        values = tl.make_tensor_descriptor(
            v_ptr, [seqlen_k, HEAD_DIM], [v.token_stride, 1], [BLOCK_N, BLOCK_D]
        )
    else:
        keys = k_ptr, k.token_stride
        values = v_ptr, k.token_stride if SAME_STRIDES else v.token_stride
    return keys, values


@jit
def load_block(
    ptr, stride, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Load the rows [first, first + ROWS) as [ROWS, BLOCK_D], with 0 beyond HEAD_DIM.

    With `MASK`, rows beyond `length` are 0. Without it, all rows must exist.
    """
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    if OFFSETS == "block":  # one 64-bit product per block; offsets within a block fit 32 bits
        pointers = ptr + tl.cast(first, tl.int64) * stride + (row * stride + col)
    elif OFFSETS == "tensor":  # all offsets fit 32 bits
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
def _load_cached(
    ptr, batch_stride, token_stride, ring, first, length, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Load a block of keys from a cache, like `load_block`. Key 0 is the oldest in the cache."""
    first_slot, capacity, page_size, table_ptr, table_stride = ring
    key = first + tl.arange(0, ROWS)
    exists = key < length
    slot = first_slot + key
    slot = tl.where(slot >= capacity, slot - capacity, slot)
    page, slot = slot_row(table_ptr, table_stride, slot, exists, page_size, PAGED)
    row = page * batch_stride + slot.to(tl.int64) * token_stride
    dim = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + (row[:, None] + dim)
    if MASK and HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=exists[:, None] & (dim < HEAD_DIM), other=0.0)
    if MASK:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=dim < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@jit
def load_keys(
    keys, first, length, SOURCE: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Load the keys (or values) [first, first + BLOCK_N) as [BLOCK_N, BLOCK_D].

    `keys` is a descriptor, (pointer, stride), or (pointer, strides, ring) for a cache. Keys beyond
    `length` are 0 for a descriptor, and for pointers with `MASK`. For pointers without `MASK`, all
    keys must exist.
    """
    if SOURCE == "descriptors":
        block = keys.load([first, 0])
    elif SOURCE == "dense":
        block = load_block(
            keys[0], keys[1], first, length, BLOCK_N, HEAD_DIM, BLOCK_D, MASK, OFFSETS
        )
    else:
        block = _load_cached(
            keys[0], keys[1], keys[2], keys[3], first, length, BLOCK_N, HEAD_DIM, BLOCK_D, MASK,
            SOURCE == "pages",
        )  # fmt: skip
    return block


@jit
def scores(
    s, scales, slopes, position, key, length, window, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Return the scores of the products `s` of queries and keys, and the derivative of the softcap.

    A score is -inf where the key is outside the window. `LEFT` and `RIGHT` select the edges that
    are checked. The weight of a key is 2^(scales.exp * score).
    """
    cap_slope = 1.0
    if scales.tanh is not None:
        s = tanh(s * scales.tanh)
        cap_slope = 1.0 - s * s
    if slopes is not None:
        s -= slopes * tl.abs(key - position).to(tl.float32)
    if LEFT or RIGHT:
        s = hide(s, position, key, length, window[0], window[1], LEFT, RIGHT)
    return s, cap_slope


@jit
def empty_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the initial softmax state: running maximum, sum of weights, weighted sum of values."""
    row_max = tl.full([BLOCK_M], -1.0e38, tl.float32)  # finite, since -inf - -inf is NaN
    return row_max, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@jit
def softmax_over_keys(
    state, q, position, slopes, k, v, ranges, length, window, scales,
    SOURCE: tl.constexpr, LEFT_EDGE: tl.constexpr, NARROW: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, OFFSETS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Update the online softmax of a tile of queries with its key blocks (arXiv:2307.08691).

    `state` holds, per row, the running maximum m, the sum of weights relative to m, and the
    weighted sum of values, in base 2. It comes from `empty_softmax` or from a previous call. `k`
    and `v` are the arguments of `load_keys` for `SOURCE`.

    `ranges` comes from `window.block_ranges`. Its three parts are the blocks that cross left edges,
    the blocks that cross no edge, and the blocks that cross right edges. With `RAGGED`, the keys
    may end inside a block that crosses left edges.
    """
    row_max, row_sum, acc = state
    if SOURCE == "descriptors":
        ahead = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if length > 0:  # a descriptor without rows must not be read
            ahead = tl.dot(q, k.load([ranges[0][0], 0]).T, input_precision=PRECISION)
    for PART in tl.static_range(3):
        if PART == 2 or (not NARROW and (PART == 1 or LEFT_EDGE)):
            begin, end = ranges[PART]
            for first in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
                if SOURCE == "descriptors":
                    s = ahead
                else:
                    k_block = load_keys(
                        k, first, length, SOURCE, BLOCK_N, HEAD_DIM, BLOCK_D,
                        PART == 2 or (RAGGED and PART == 0), OFFSETS,
                    )  # fmt: skip
                    s = tl.dot(q, k_block.T, input_precision=PRECISION)
                key = first + tl.arange(0, BLOCK_N)[None, :]
                # Right-edge blocks check both edges: otherwise ptxas spills on sm_90.
                s, _ = scores(
                    s, scales, slopes, position, key, length, window,
                    PART == 0 or (PART == 2 and (NARROW or SOURCE == "descriptors")),
                    PART == 2 or (RAGGED and PART == 0),
                )  # fmt: skip
                new_max = tl.maximum(row_max, tl.max(s, 1) * scales.exp)
                p = tl.exp2(s * scales.exp - new_max[:, None])
                rescale = tl.exp2(row_max - new_max)
                row_sum = row_sum * rescale + tl.sum(p, 1)
                row_max = new_max
                p = p.to(q.dtype)  # convert before waiting for v, to halve the registers of p
                if SOURCE == "descriptors":
                    # Start the product of the next block after this block's exponentials. The
                    # exponentials then overlap with the previous product p v, still in flight.
                    k_block = k.load([first + BLOCK_N, 0])
                    ahead = tl.dot(q, k_block.T, input_precision=PRECISION)
                acc = acc * rescale[:, None]
                v_block = load_keys(
                    v, first, length, SOURCE, BLOCK_N, HEAD_DIM, BLOCK_D,
                    PART == 2 or (RAGGED and PART == 0), OFFSETS,
                )  # fmt: skip
                acc = tl.dot(p, v_block, acc, input_precision=PRECISION)
    return row_max, row_sum, acc


@jit
def store_softmax(
    state, out, lse_ptr, lse_stride, batch, start, query, head, seqlen_q, num_heads,
    VARLEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the output and the log-sum-exp; 0 and -inf for a row that sees no key."""
    row_max, row_sum, acc = state
    result = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    store_sequence_rows(out, result, batch, start, query, head, seqlen_q, VARLEN, HEAD_DIM, BLOCK_D)
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)
    lse_ptr = statistics_pointer(lse_ptr, batch, start, num_heads, lse_stride, VARLEN)
    tl.store(lse_ptr + (head.to(tl.int64) * lse_stride + query), lse, mask=query < seqlen_q)
