"""Which keys a query may see: what the numbers of a window mean.

Two words, two meanings. `sliding_window` W is a count of visible keys, the query's own included.
`window_size` (left, right) holds inclusive distances, -1 for no bound. Query i of `seqlen_q` stands
on key i + seqlen_k - seqlen_q (bottom-right alignment: the last query on the last key), and sees
the keys from `left` before that place to `right` after it.
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


# How far an open side of a window reaches, for kernels: past any sequence, and within int32 when a
# position is added.
UNBOUNDED = 1 << 30


class Window(NamedTuple):
    """Inclusive distances a query sees to either side of its place; -1 is no bound."""

    left: int
    right: int

    @property
    def reach(self) -> tuple[int, int]:
        """The distances as numbers to count with: `UNBOUNDED` for no bound."""
        left, right = self
        return (
            left if 0 <= left < UNBOUNDED else UNBOUNDED,
            right if 0 <= right < UNBOUNDED else UNBOUNDED,
        )


def resolve_window(
    causal: bool, window_size: Sequence[int] | Tensor | None, sliding_window: int | None
) -> Window:
    """Return the window that a caller's arguments mean. `causal` is a right distance of 0.

    A `sliding_window` W is `window_size` (W - 1, 0), causal or not. A distance of None is no bound,
    as in flash-attn 4.

    Raises `ValueError` for a negative distance other than -1, a `sliding_window` that is not
    positive, and both kinds of window at once; `TypeError` for what is not an integer.
    """
    if sliding_window is not None:
        if window_size is not None:
            raise ValueError("give sliding_window or window_size, not both")
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
def key_range(place, length, left, right):
    """Return the keys [begin, end), of `length`, that the query on key `place` sees.

    Turned round it gives the queries that see a key: stand on the key's place among the queries,
    and swap left and right.
    """
    return max(place - left, 0), min(place + right + 1, length)


def rows_with_keys(seqlen_q: int, seqlen_k: int, window: Window) -> range:
    """Return the queries that see at least one key: one range, by the bottom-right alignment."""
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
    """How many rows, from the first, see exactly the keys up to their own place: row i keys 0..i.

    Causal attention before the window's left edge bites.
    """
    if window.right != 0 or seqlen_q != seqlen_k:
        return 0
    return seqlen_q if window.left < 0 else min(seqlen_q, window.left + 1)


def distances(
    num_rows: int, num_keys: int, first_distance: int, device: torch.device | None = None
) -> Tensor:
    """(num_rows, num_keys) of key place minus query place, `first_distance` for the first pair."""
    keys = torch.arange(first_distance, first_distance + num_keys, device=device)
    return keys - torch.arange(num_rows, device=device)[:, None]


def visible(distance: Tensor, window: Window) -> Tensor:
    """Booleans of `distance`'s shape: does the window hold this pair?"""
    mask = torch.ones_like(distance, dtype=torch.bool)
    if window.left >= 0:
        mask &= distance >= -window.left
    if window.right >= 0:
        mask &= distance <= window.right
    return mask


@jit
def block_ranges(
    first_place, last_place, length, left, right, BLOCK: tl.constexpr, NARROW: tl.constexpr
):
    """Return three ranges (first key, end) of the key blocks that a tile of queries needs.

    The queries are neighbors. Blocks of the first range cross only left edges, those of the second
    none (every query sees every key), those of the third only right ones; in a `NARROW` window all
    may cross both, and all are in the third. Blocks are counted from the first key that the tile
    sees, so they are the fewest that hold what it sees.
    """
    lo, full_hi = key_range(first_place, length, left, right)
    full_lo, hi = key_range(last_place, length, left, right)
    hi = max(hi, lo)
    if NARROW:
        return (lo, lo), (lo, lo), (lo, hi)
    full_lo = min(lo + tl.cdiv(full_lo - lo, BLOCK) * BLOCK, hi)
    full_hi = max(lo + max(full_hi - lo, 0) // BLOCK * BLOCK, full_lo)
    return (lo, full_lo), (full_lo, full_hi), (full_hi, hi)


@jit
def hide(s, place, key, length, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Return the scores `s` of queries on `place`, -inf where they do not see `key`.

    Checks the edges named, for blocks that cross no other.
    """
    if LEFT:
        s = tl.where(key >= place - left, s, float("-inf"))
    if RIGHT:
        s = tl.where(key < tl.minimum(place + right + 1, length), s, float("-inf"))
    return s


def is_narrow(left: int, right: int, places: int, block: int) -> bool:
    """Can a block of `block` keys cross both edges of what some of `places` queries in a row see?

    The end of the keys is no edge here: whoever asks keeps keys past it out of left-edge blocks,
    or makes them harmless.
    """
    return left + right + 2 < places + block
