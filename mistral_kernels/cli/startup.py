"""Prepare the process of a command, before the imports that take seconds.

`python -m mistral_kernels.generate` imports the package, and with it PyTorch, before it runs the
command. Importing this module first closes three gaps: Ctrl-C during those imports would print a
traceback, a file that an import opens would take the number of a closed standard stream, and
PyTorch would log each error of a rank before it raises it.
Nothing happens where another program imports the package.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from types import FrameType, TracebackType

# Exit codes.
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed (`2>&-`).

    Without it, `print(..., file=sys.stderr)` writes to stdout, as `sys.stderr` is None, and what
    C++ writes to descriptor 2 goes into whatever file was opened next.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, open until the end
            setattr(sys, name, stream)


def end_on_interrupt(number: int, frame: FrameType | None) -> None:
    """End the process as an interrupted command ends. There is nothing to clean up yet."""
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def end_on_failed_import(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print one line in place of the traceback of an ImportError, MemoryError or OSError.

    A module of this package that is missing is a fault of the package: it keeps its traceback.
    """
    ours = (getattr(error, "name", None) or "").startswith("mistral_kernels")
    if ours or not isinstance(error, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, traceback)
    with contextlib.suppress(OSError):
        text = " ".join(str(error).split()) or kind.__name__
        os.write(2, f"error: cannot import what the command needs: {text}\n".encode())
    os._exit(BAD_INPUT)


def is_starting_command() -> bool:
    """Return whether Python is importing this package in order to run a module of it (`-m`)."""
    arguments = getattr(sys, "argv", [])
    if arguments[:1] != ["-m"]:  # what it is while the module is being located
        return False
    module = sys.orig_argv[-len(arguments)]  # behind it come the command's own arguments
    return re.match(r"(-\w*m)?mistral_kernels(\.|$)", module) is not None


if is_starting_command():
    open_closed_streams()
    if "RANK" in os.environ:
        # PyTorch reads it while it is imported. Its C++ writes a stack trace to stderr for each
        # error that it raises when another rank is missing or ends.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_on_interrupt)
    sys.excepthook = end_on_failed_import  # until `command.enter`
