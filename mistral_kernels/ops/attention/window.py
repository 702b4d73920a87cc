"""Windows: the keys that a query sees.

A window is given in one of two ways. `sliding_window` is the number of visible keys, including the
one at the query's own position. `window_size` (left, right) holds inclusive distances; -1 is no
bound. Sequences have bottom-right alignment: query i of `seqlen_q` has the position
p = i + seqlen_k - seqlen_q among the keys, so the last query has the position of the last key.
Query i sees the keys p - left to p + right.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


# Distance that kernels use for "no bound". It is longer than any sequence, and an int32 can still
# hold its sum with a position.
UNBOUNDED = 1 << 30


class Window(NamedTuple):
    """Inclusive distances that a query sees to either side of its position; -1 is no bound."""

    left: int
    right: int

    @property
    def reach(self) -> tuple[int, int]:
        """The distances with `UNBOUNDED` instead of -1, so that kernels can add positions."""
        left, right = self
        return (
            left if 0 <= left < UNBOUNDED else UNBOUNDED,
            right if 0 <= right < UNBOUNDED else UNBOUNDED,
        )


def resolve_window(
    causal: bool, window_size: Sequence[int] | Tensor | None, sliding_window: int | None
) -> Window:
    """Return the window that the arguments of `attention` describe.

    If `causal` is True, the right distance is 0. A `sliding_window` of W is the `window_size`
    (W - 1, 0) for every value of `causal`. A distance of None is no bound, as in flash-attn 4.

    Raises:
        ValueError: a distance is less than -1, `sliding_window` is not positive, both kinds of
            window are given, or `window_size` does not have two elements.
        TypeError: a distance or `sliding_window` is not an integer.
    """
    if sliding_window is not None:
        if window_size is not None:
            raise ValueError(f"sliding_window must be None with window_size, got {sliding_window}")
        count = _as_int("sliding_window", sliding_window, "an integer or None")
        if count <= 0:
            raise ValueError(f"sliding_window must be positive or None (no window), got {count}")
        return Window(min(count - 1, UNBOUNDED), 0)
    if window_size is None:
        return Window(-1, 0 if causal else -1)
    if not hasattr(window_size, "__len__") or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size}")
    left, right = map(_as_distance, window_size)
    if left < -1 or right < -1:
        raise ValueError(
            f"window_size must hold distances >= 0, or -1 for no bound, got ({left}, {right})"
        )
    return Window(left, 0 if causal else right)


def _as_distance(value: Any) -> int:
    return -1 if value is None else min(_as_int("window_size", value, "two integers"), UNBOUNDED)


def _as_int(name: str, value: Any, expected: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}") from None


@jit
def key_range(position, length, left, right):
    """Return the range [begin, end) of `length` keys that the query at a position sees.

    To get the range of queries that see a key, swap left and right, and pass the key's position
    among the queries.
    """
    return max(position - left, 0), min(position + right + 1, length)


def rows_with_keys(seqlen_q: int, seqlen_k: int, window: Window) -> range:
    """Return the range of the queries that see at least one key."""
    if seqlen_k == 0:
        return range(0)
    offset = seqlen_k - seqlen_q
    first = 0 if window.right < 0 else max(0, -offset - window.right)
    last = seqlen_q if window.left < 0 else min(seqlen_q, seqlen_k - offset + window.left)
    return range(first, max(first, last))


def keys_of_rows(rows: range, seqlen_q: int, seqlen_k: int, window: Window) -> range:
    """Return the keys that some query in `rows` sees."""
    offset = seqlen_k - seqlen_q
    begin, _ = key_range.fn(rows.start + offset, seqlen_k, *window.reach)
    _, end = key_range.fn(rows.stop - 1 + offset, seqlen_k, *window.reach)
    return range(begin, max(begin, end))


def triangle_rows(seqlen_q: int, seqlen_k: int, window: Window) -> int:
    """Return the number of leading rows i that see exactly the keys 0 to i.

    These rows are plain causal attention: the window's left edge does not reach them.
    """
    if window.right != 0 or seqlen_q != seqlen_k:
        return 0
    return seqlen_q if window.left < 0 else min(seqlen_q, window.left + 1)


def distances(
    num_rows: int, num_keys: int, first_distance: int, device: torch.device | None = None
) -> Tensor:
    """Return key position minus query position of each pair, (num_rows, num_keys).

    `first_distance` is the distance of the first query and the first key.
    """
    keys = torch.arange(first_distance, first_distance + num_keys, device=device)
    return keys - torch.arange(num_rows, device=device)[:, None]


def visible(distance: Tensor, window: Window) -> Tensor:
    """Return a boolean mask of `distance`'s shape: whether the window contains the distance."""
    mask = torch.ones_like(distance, dtype=torch.bool)
    if window.left >= 0:
        mask &= distance >= -window.left
    if window.right >= 0:
        mask &= distance <= window.right
    return mask


@jit
def block_ranges(
    first_position, last_position, length, left, right, BLOCK: tl.constexpr, NARROW: tl.constexpr
):
    """Return three ranges (first key, end) of the key blocks that a tile of queries needs.

    The queries have consecutive positions. Blocks of the first range cross left edges of windows
    only. Blocks of the second range cross no edge: every query sees every key. Blocks of the third
    range cross right edges only. In a `NARROW` window a block may cross both edges, and all blocks
    are in the third range. Blocks start at the first key that the tile sees, which gives the
    smallest number of blocks.
    """
    lo, full_hi = key_range(first_position, length, left, right)
    full_lo, hi = key_range(last_position, length, left, right)
    hi = max(hi, lo)
    if NARROW:
        return (lo, lo), (lo, lo), (lo, hi)
    full_lo = min(lo + tl.cdiv(full_lo - lo, BLOCK) * BLOCK, hi)
    full_hi = max(lo + max(full_hi - lo, 0) // BLOCK * BLOCK, full_lo)
    return (lo, full_lo), (full_lo, full_hi), (full_hi, hi)


@jit
def hide(s, position, key, length, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Return the scores `s` of queries at the given positions, -inf where they do not see `key`.

    `LEFT` and `RIGHT` select the edges that are checked, for blocks that cross no other edge.
    """
    if LEFT:
        s = tl.where(key >= position - left, s, float("-inf"))
    if RIGHT:
        s = tl.where(key < tl.minimum(position + right + 1, length), s, float("-inf"))
    return s


def is_narrow(left: int, right: int, positions: int, block: int) -> bool:
    """Return whether a block of `block` keys can cross both a left and a right edge of a tile.

    The edges are those of the windows of the tile's queries, which have `positions` consecutive
    positions. The end of the keys is not an edge here: callers must exclude keys past the end from
    left-edge blocks, or mask them.
    """
    return left + right + 2 < positions + block
