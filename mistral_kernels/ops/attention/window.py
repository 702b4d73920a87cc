"""Which keys a query may see: the one place where windows are interpreted.

Two words, two meanings. `sliding_window` W is a count of visible keys, the query's own included.
`window_size` (left, right) holds inclusive distances, -1 for no bound. Query i of `seqlen_q` stands
on key i + seqlen_k - seqlen_q (bottom-right alignment: the last query on the last key), and sees
the keys from `left` before that place to `right` after it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Inclusive distances a query sees to either side of its place; -1 is no bound."""

    left: int
    right: int


def resolve_window(
    causal: bool, window_size: Sequence[int] | Tensor | None, sliding_window: int | None
) -> Window:
    """The window that a caller's arguments mean. `causal` is a right distance of 0.

    A `sliding_window` W is `window_size` (W - 1, 0), causal or not.

    Raises `ValueError` for a negative distance other than -1, a `sliding_window` that is not
    positive, and both kinds of window at once; `TypeError` for what is not an integer.
    """
    if sliding_window is not None:
        if window_size is not None:
            raise ValueError("give sliding_window or window_size, not both")
        count = _as_int("sliding_window", sliding_window)
        if count <= 0:
            raise ValueError(f"sliding_window must be positive or None (no window), got {count}")
        return Window(count - 1, 0)
    if window_size is None:
        return Window(-1, 0 if causal else -1)
    if not hasattr(window_size, "__len__") or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size}")
    left, right = (_as_int("window_size", distance) for distance in window_size)
    if left < -1 or right < -1:
        raise ValueError(
            f"window_size must hold distances >= 0, or -1 for no bound, got ({left}, {right})"
        )
    return Window(left, 0 if causal else right)


def _as_int(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {type(value).__name__}") from None


def rows_with_keys(seqlen_q: int, seqlen_k: int, window: Window) -> range:
    """The queries that see at least one key; bottom-right alignment makes them one range."""
    if seqlen_k == 0:
        return range(0)
    offset = seqlen_k - seqlen_q
    first = 0 if window.right < 0 else max(0, -offset - window.right)
    last = seqlen_q if window.left < 0 else min(seqlen_q, seqlen_k - offset + window.left)
    return range(first, max(first, last))


def keys_of_rows(rows: range, seqlen_q: int, seqlen_k: int, window: Window) -> range:
    """The keys that some query in `rows` sees."""
    offset = seqlen_k - seqlen_q
    first = 0 if window.left < 0 else max(0, rows.start + offset - window.left)
    last = seqlen_k if window.right < 0 else min(seqlen_k, rows.stop + offset + window.right)
    return range(first, max(first, last))


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
