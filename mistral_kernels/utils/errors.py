"""Tell bad input and too little memory from faults of the package, in one line."""

from __future__ import annotations

import re

import torch

from mistral_kernels.utils.schema import escaped

_LONGEST_TEXT = 4000  # of what a line is made
# PyTorch raises plain RuntimeErrors for these: too little memory, and sizes past 64 bits.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|out of memory|bad_alloc", re.I
)
_TOO_LARGE = re.compile(r"(calculation|multiplication) overflow", re.I)
# RuntimeErrors that mean bad input. pathlib raises one for an unknown user and, before Python 3.13,
# for a symbolic link loop; ops.extension raises one if MISTRAL_KERNELS_BUILD=always and there is no
# library.
_BAD_INPUT = re.compile(
    r"Could not determine home directory|Symlink loop from |no library for \w+, and MISTRAL_"
)
# Where in PyTorch's sources an error was raised.
_PLACE = re.compile(r"^\[enforce fail at [^\]]*\] [^.]*\. ")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python or PyTorch says that memory does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def reason_of(error: BaseException) -> str | None:
    """Return in one line what the user's input or machine lacks; None for a fault of ours."""
    if is_out_of_memory(error) or (
        isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error))
    ):
        text = one_line(_PLACE.sub("", str(error)))
        return text if text.startswith("out of memory") else f"out of memory: {text}".rstrip(": ")
    if isinstance(error, RecursionError):
        return one_line(f"the input is nested too deeply: {error}")
    expected = (ValueError, OSError, NotImplementedError, OverflowError)
    if isinstance(error, expected) or _BAD_INPUT.match(str(error)):
        return one_line(str(error)) or type(error).__name__
    return None


def one_line(text: str) -> str:
    """Return at most 1000 characters of a text in one line, control characters escaped."""
    return escaped(" ".join(text[:_LONGEST_TEXT].split()))
