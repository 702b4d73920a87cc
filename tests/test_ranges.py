"""Ranges of numbers, in arguments and command lines, and their error messages."""

from __future__ import annotations

import argparse
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from mistral_kernels.utils.ranges import COUNT, SEED, Range

WHOLE, SHARE, POSITIVE = Range(int, 0, 9), Range(float, 0, 1, above=True), Range(float, 0)


def test_accepted_values_become_python_numbers() -> None:
    for value in (0, 9, np.int64(4), np.uint8(4), np.int32(0)):
        checked = WHOLE.check("x", value)
        assert type(checked) is int
        assert checked == value
    for value in (1, 0.25, np.float32(0.5), np.int8(1), Fraction(1, 4)):
        checked = SHARE.check("x", value)
        assert type(checked) is float
        assert checked == value
    assert COUNT.check("x", 10**9) == 10**9
    assert SEED.check("x", 2**64 - 1) == 2**64 - 1


@pytest.mark.parametrize(
    ("allowed", "value", "message"),
    [
        (WHOLE, -1, r"x must be in \[0, 9\], got -1"),
        (WHOLE, 10, r"x must be in \[0, 9\], got 10"),
        (SHARE, 0.0, r"x must be in \(0, 1\], got 0.0"),
        (SHARE, math.nan, r"x must be in \(0, 1\], got nan"),
        (POSITIVE, -0.5, r"x must be >= 0, got -0.5"),
        (POSITIVE, math.inf, r"x must be >= 0, got inf"),
    ],
)
def test_out_of_range(allowed: Range, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        allowed.check("x", value)


def test_huge_integers_are_reported_by_their_bits() -> None:
    with pytest.raises(ValueError, match=r"x must be in \[0, 9\], got an integer of 16610 bits$"):
        WHOLE.check("x", 10**5000)


@pytest.mark.parametrize("value", [1.0, True, "1", None, [1], b"1", 1j, np.bool_(1), np.float64(1)])
def test_values_that_are_not_integers(value: object) -> None:
    with pytest.raises(
        TypeError, match=r"x must be an integer in \[0, 9\], got " + type(value).__name__
    ):
        WHOLE.check("x", value)


@pytest.mark.parametrize("value", [True, "1", None, 1j, torch.tensor(0.5)])
def test_values_that_are_not_numbers(value: object) -> None:
    with pytest.raises(TypeError, match=r"x must be a number in \(0, 1\], got "):
        SHARE.check("x", value)


def test_parsed_texts() -> None:
    """Any text is a number in the range or raises `ArgumentTypeError` with one short line."""
    assert [WHOLE(text) for text in ("0", "+7", "9")] == [0, 7, 9]
    assert [SHARE(text) for text in ("1", "1e-320", ".5")] == [1.0, 1e-320, 0.5]
    for text in ("x", "", "1.5", "0x1", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match=r"^must be an integer in ") as caught:
            WHOLE(text)
        assert len(str(caught.value)) < 100
    for _ in range(300):
        text = "".join(random.choices("0123456789.-+eE_ naif\0é٣", k=random.randint(0, 12)))
        for allowed in (WHOLE, SHARE, POSITIVE, SEED):
            try:
                assert allowed(text) in allowed
            except argparse.ArgumentTypeError as error:
                assert "\n" not in str(error)
