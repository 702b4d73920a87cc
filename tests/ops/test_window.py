"""Tests of windows: arguments, masks, and ranges of rows and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral_kernels.ops import reference
from mistral_kernels.ops.attention.window import (
    Window,
    distances,
    keys_of_rows,
    resolve_window,
    rows_with_keys,
    triangle_rows,
    visible,
)

lengths = st.integers(0, 12)
windows = st.builds(Window, st.integers(-1, 13), st.integers(-1, 13))


def sees(i: int, j: int, seqlen_q: int, seqlen_k: int, window: Window) -> bool:
    distance = j - (i + seqlen_k - seqlen_q)
    return (window.left < 0 or distance >= -window.left) and (
        window.right < 0 or distance <= window.right
    )


@given(lengths, lengths, windows)
def test_rows_with_keys(seqlen_q, seqlen_k, window):
    rows = [
        i
        for i in range(seqlen_q)
        if any(sees(i, j, seqlen_q, seqlen_k, window) for j in range(seqlen_k))
    ]
    assert list(rows_with_keys(seqlen_q, seqlen_k, window)) == rows


@given(lengths, lengths, windows, st.data())
def test_keys_of_rows(seqlen_q, seqlen_k, window, data):
    rows = rows_with_keys(seqlen_q, seqlen_k, window)
    if not rows:
        return
    first = data.draw(st.sampled_from(rows))
    block = range(first, data.draw(st.integers(first + 1, rows.stop)))
    keys = {j for i in block for j in range(seqlen_k) if sees(i, j, seqlen_q, seqlen_k, window)}
    assert keys_of_rows(block, seqlen_q, seqlen_k, window) == range(min(keys), max(keys) + 1)


@given(lengths, lengths, windows)
def test_triangle_rows(seqlen_q, seqlen_k, window):
    def in_triangle(i):
        seen = [j for j in range(seqlen_k) if sees(i, j, seqlen_q, seqlen_k, window)]
        return seqlen_q == seqlen_k and seen == list(range(i + 1))

    rows = triangle_rows(seqlen_q, seqlen_k, window)
    assert all(map(in_triangle, range(rows)))
    # The next row is outside the triangle. Windows with right != 0 have no triangle.
    assert rows == seqlen_q or window.right != 0 or not in_triangle(rows)


@given(lengths, lengths, windows)
def test_visible(seqlen_q, seqlen_k, window):
    mask = visible(distances(seqlen_q, seqlen_k, seqlen_q - seqlen_k), window)
    assert mask.tolist() == [
        [sees(i, j, seqlen_q, seqlen_k, window) for j in range(seqlen_k)] for i in range(seqlen_q)
    ]
    assert torch.equal(mask, reference.visible(seqlen_q, seqlen_k, False, window))


@pytest.mark.parametrize("count", [1, 4096, np.int64(7), np.uint8(7), torch.tensor(7)], ids=repr)
@pytest.mark.parametrize("causal", [False, True])
def test_sliding_window_includes_the_query(count, causal):
    assert resolve_window(causal, None, count) == (count - 1, 0)


@pytest.mark.parametrize(
    "pair", [(3, 5), [3, 5], np.array([3, 5]), torch.tensor([3, 5]), (np.int32(3), 5)], ids=repr
)
def test_window_size_holds_distances(pair):
    for window in (resolve_window(False, pair, None), resolve_window(True, pair, None)):
        assert all(type(distance) is int for distance in window)
    assert resolve_window(False, pair, None) == (3, 5)
    assert resolve_window(True, pair, None) == (3, 0)


def test_no_window():
    assert resolve_window(False, None, None) == resolve_window(False, (-1, -1), None) == (-1, -1)
    assert resolve_window(True, None, None) == resolve_window(True, (-1, -1), None) == (-1, 0)


@pytest.mark.parametrize(
    ("window_size", "sliding_window", "error", "message"),
    [
        (None, 0, ValueError, r"sliding_window must be positive or None \(no window\), got 0"),
        (None, -3, ValueError, r"sliding_window must be positive or None \(no window\), got -3"),
        (None, 4.0, TypeError, "sliding_window must be an integer or None, got float"),
        (None, "4", TypeError, "sliding_window must be an integer or None, got str"),
        ((-2, 0), None, ValueError, r"distances >= 0, or -1 for no bound, got \(-2, 0\)"),
        ((0, -2), None, ValueError, r"distances >= 0, or -1 for no bound, got \(0, -2\)"),
        ((1.5, 0), None, TypeError, "window_size must be two integers, got float"),
        (torch.tensor([1.0, 0.0]), None, TypeError, "window_size must be two integers, got Tensor"),
        ((1, 2, 3), None, ValueError, r"window_size must be \(left, right\), got \(1, 2, 3\)"),
        (5, None, ValueError, r"window_size must be \(left, right\), got 5"),
        ((3, 0), 4, ValueError, "sliding_window must be None with window_size, got 4"),
    ],
)
def test_bad_windows_raise(window_size, sliding_window, error, message):
    for causal in (False, True):
        with pytest.raises(error, match=f"{message}$"):
            resolve_window(causal, window_size, sliding_window)
