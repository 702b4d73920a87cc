"""Prepare the process of a command, before the imports that take seconds.

`python -m mistral_kernels.generate` imports the package, and with it PyTorch, before it runs the
command. Importing this module first closes two gaps: Ctrl-C during those imports would print a
traceback, and a file that an import opens would take the number of a closed standard stream.
Nothing happens where the package is imported for any other reason.
"""

from __future__ import annotations

import contextlib
import os
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
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def end_on_interrupt(number: int, frame: FrameType | None) -> None:
    """End the process as an interrupted command ends. There is nothing to clean up yet."""
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def end_on_failed_import(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """End the process with one line where a dependency is missing or does not fit the memory."""
    ours = (getattr(error, "name", None) or "").startswith("mistral_kernels")
    if ours or not isinstance(error, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, traceback)
    with contextlib.suppress(OSError):
        text = " ".join(str(error).split()) or kind.__name__
        os.write(2, f"error: cannot import what the command needs: {text}\n".encode())
    os._exit(BAD_INPUT)


# Python's documentation of -m: sys.argv[0] is "-m" while the module is being located.
if getattr(sys, "argv", [])[:1] == ["-m"]:
    open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_on_interrupt)
    sys.excepthook = end_on_failed_import  # until `command.enter`
