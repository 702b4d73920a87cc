"""Preparation of a command's process, before the imports that take seconds.

`python -m mistral_kernels.generate` and the script `mistral-kernels` import the package and PyTorch
before they run a command. The package imports this module first, because it prevents three faults
during those imports:

- Ctrl-C prints a traceback.
- A file that an import opens gets the file descriptor of a closed standard stream.
- PyTorch logs each error of a rank before it raises the error.

The module does nothing when another program imports the package.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from types import FrameType, TracebackType

SCRIPT = "mistral-kernels"  # installed by pip; see pyproject.toml

# Exit codes.
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed (`2>&-`).

    If stderr is closed, `sys.stderr` is None, and `print(..., file=sys.stderr)` writes to stdout.
    Output of C++ code to descriptor 2 goes into the next file that the process opens.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # opens the lowest free descriptor
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, open until the end
            setattr(sys, name, stream)


def end_on_interrupt(number: int, frame: FrameType | None) -> None:
    """Print "interrupted" and end the process at once. There is nothing to clean up yet."""
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def end_on_failed_import(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print one line instead of the traceback of an ImportError, MemoryError or OSError.

    A missing module of this package is a bug of the package and keeps its traceback.
    """
    ours = (getattr(error, "name", None) or "").startswith("mistral_kernels")
    if ours or not isinstance(error, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, traceback)
    with contextlib.suppress(OSError):
        text = " ".join(str(error).split()) or kind.__name__
        os.write(2, f"error: cannot import a module that the command needs: {text}\n".encode())
    os._exit(BAD_INPUT)


def is_starting_command() -> bool:
    """Return whether Python imports this package to run one of its modules or `mistral-kernels`."""
    arguments = getattr(sys, "argv", [])
    if arguments and os.path.basename(arguments[0]) == SCRIPT:
        return True
    if arguments[:1] != ["-m"]:  # argv[0] is "-m" while Python locates the module
        return False
    module = sys.orig_argv[-len(arguments)]  # the command's own arguments follow the module
    return re.match(r"(-\w*m)?mistral_kernels(\.|$)", module) is not None


if is_starting_command():
    open_closed_streams()
    if "RANK" in os.environ:
        # PyTorch reads this variable during its import. Without it, PyTorch's C++ code writes a
        # stack trace to stderr for each error about a rank that is missing or ends.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_on_interrupt)
    sys.excepthook = end_on_failed_import  # until `command.enter`
