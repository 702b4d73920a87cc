"""Ranges of numbers that users pass: in command lines, arguments and files."""

from __future__ import annotations

import argparse
import math
import reprlib
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """An interval of integers or floating-point numbers.

    A range is an `argparse` type, and `check` validates a value.

    Attributes:
        kind: int or float. A float range includes integers. No range includes a bool.
        low: the lower bound.
        high: the upper bound, included. Values of a float range must be finite.
        above: whether `low` itself is excluded.
    """

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.above else '>='} {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}]"

    def __contains__(self, value: float) -> bool:
        if not (self.kind is int or math.isfinite(value)):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def check(self, name: str, value: Any) -> Any:
        """Return `value` as an int or float of Python; NumPy numbers are accepted.

        Args:
            name: the name of the value in error messages.
            value: the value to check.

        Raises:
            TypeError: `value` is not a number of this kind.
            ValueError: `value` is outside the interval.
        """
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            raise TypeError(f"{name} must be {self._noun} {self}, got {type(value).__name__}")
        number: Any = self.kind(value)  # type: ignore[call-overload]
        if number not in self:
            raise ValueError(f"{name} must be {self}, got {_shown(number)}")
        return number

    def __call__(self, text: str) -> Any:
        """Return the number in `text`.

        Raises:
            argparse.ArgumentTypeError: `text` is not a number in the interval.
        """
        try:
            number = self.kind(text)
        except ValueError:
            got = reprlib.repr(text)
            raise argparse.ArgumentTypeError(f"must be {self._noun} {self}, got {got}") from None
        if number not in self:
            raise argparse.ArgumentTypeError(f"must be {self}, got {_shown(number)}")
        return number

    @property
    def _noun(self) -> str:
        return "an integer" if self.kind is int else "a number"


def _shown(number: float) -> str:
    if isinstance(number, int) and number.bit_length() > 100:
        return f"an integer of {number.bit_length()} bits"  # Python prints at most 4300 digits
    return repr(number)


COUNT = Range(int, 1, 10**9)
SEED = Range(int, 0, 2**64 - 1)
