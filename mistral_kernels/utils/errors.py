"""Distinguish errors of the user's input or machine from bugs of the package."""

from __future__ import annotations

import re

import torch

from mistral_kernels.utils.schema import escaped

_LONGEST_TEXT = 4000  # characters of a message that are used
# PyTorch raises RuntimeError for too little memory and for sizes that exceed 64 bits.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|out of memory|bad_alloc", re.I
)
_TOO_LARGE = re.compile(r"(calculation|multiplication) overflow", re.I)
# RuntimeErrors that are caused by the input. pathlib raises one for an unknown user and, before
# Python 3.13, for a loop of symbolic links. ops.extension raises one if there is no library and
# MISTRAL_KERNELS_BUILD=always.
_BAD_INPUT = re.compile(
    r"Could not determine home directory|Symlink loop from |no library for \w+, and MISTRAL_"
)
# The prefix of PyTorch's messages that names the line of its source code.
_SOURCE_LOCATION = re.compile(r"^\[enforce fail at [^\]]*\] [^.]*\. ")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python or PyTorch reports insufficient memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def reason_of(error: BaseException) -> str | None:
    """Return one line that describes an error of the user's input or machine.

    It returns None for any other error, which is a bug of the package.
    """
    if is_out_of_memory(error) or (
        isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error))
    ):
        text = one_line(_SOURCE_LOCATION.sub("", str(error)))
        return text if text.startswith("out of memory") else f"out of memory: {text}".rstrip(": ")
    if isinstance(error, RecursionError):
        return one_line(f"the input is nested too deeply: {error}")
    expected = (ValueError, OSError, NotImplementedError, OverflowError)
    if isinstance(error, expected) or _BAD_INPUT.match(str(error)):
        return one_line(str(error)) or type(error).__name__
    return None


def one_line(text: str) -> str:
    """Return at most 1000 characters of `text` as one line, with control characters escaped."""
    return escaped(" ".join(text[:_LONGEST_TEXT].split()))
