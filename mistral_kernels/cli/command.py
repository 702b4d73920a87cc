"""Parts that the package's commands share: options, one-line errors, exit codes.

Every command is started by `enter`, and its `main` calls `run`. Only `run` converts exceptions into
exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NoReturn, TextIO, TypeVar

import torch

from mistral_kernels.cli.startup import (
    BAD_INPUT,
    INTERRUPTED,
    SCRIPT,
    end_on_interrupt,
    open_closed_streams,
)
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE, choose_backend
from mistral_kernels.utils.errors import one_line, reason_of
from mistral_kernels.utils.signals import unwinding_when_terminated

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
BROKEN_PIPE = 141  # exit code: 128 + SIGPIPE, as shells report it

_BLOCK = 1 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # except tabs and line ends

T = TypeVar("T")


def as_started(text: str) -> str:
    """Return a text with its commands in the form that started this process.

    `python -m mistral_kernels.NAME` becomes `mistral-kernels NAME` in a process of the script.
    """
    if os.path.basename(sys.argv[0]) != SCRIPT:
        return text
    text = text.replace("python -m mistral_kernels.", f"{SCRIPT} ")
    return text.replace("python -m mistral_kernels", SCRIPT)


def wrapped(text: str, indent: int = 0) -> str:
    """Return `text` wrapped at the width of the terminal; later lines are indented."""
    width = max(get_terminal_size().columns - 1, 20)
    spaces = " " * min(indent, width // 2)
    return textwrap.fill(
        text,
        width,
        subsequent_indent=spaces,
        break_long_words=False,
        break_on_hyphens=False,  # options and file names stay whole
    )


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that prints each error on one line.

    `as_started` is applied to the arguments `prog` and `epilog`.
    """

    def __init__(self, prog: str, epilog: str = "", **options: Any) -> None:
        super().__init__(as_started(prog), epilog=as_started(epilog), **options)

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line and exit with the code 2."""
        # Shorten "argument -m/--max-tokens/--max_tokens: must be ..." to
        # "--max-tokens must be ...".
        message = re.sub(r"^argument (?:-\w/)?(-[\w-]+|\w+)[^:]*: (?=must )", r"\1 ", message)
        self.exit(BAD_INPUT, f"error: {one_line(message)}; see {self.prog} --help\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.13 the value of `--stop=--` is an empty list.
        if action.option_strings and action.nargs is None:
            value = self._get_value(action, *arg_strings)
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def print_help(self, file: Any = None) -> None:
        """Write the help to stdout. An error of the write is raised; argparse would ignore it."""
        write_out(self.format_help())


def user_path(text: str) -> Path:
    """Return an option's value as a path, with `~` expanded. An argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}: no such user") from None


def device_of(name: str) -> torch.device:
    """Return the device for a value of `--device`.

    Raises:
        ValueError: the value is not "auto", "cpu", "cuda" or "cuda:N", or the GPU does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,9})?", name):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must be one of the {torch.cuda.device_count()} GPUs that PyTorch finds, got "
            f"{name!r}; use --device cpu, or install a PyTorch built for your GPU"
        )
    return torch.device(name)


def check_backend(device: torch.device, option: str | None = None) -> None:
    """Raise ValueError unless a backend can run on `device`.

    `option` is the value of --backend, if given. The error message then names this option instead
    of the environment variable.
    """
    try:
        choose_backend(device)
    except RuntimeError as error:
        reason = str(error)
        if option is not None:
            reason = reason.replace(f"unset {BACKEND_VARIABLE}", "leave out --backend")
            reason = reason.replace(f"set {BACKEND_VARIABLE}=", "use --backend ")
            reason = reason.replace(f"{BACKEND_VARIABLE}=", "--backend ")
        raise ValueError(reason) from None


def read_input(file: Path, limit: int) -> str:
    """Return the text of a file that the user names, normalized by `normalize_text`.

    The file may be a pipe, such as a shell's `<(...)`, which is read to its end. A pipe or a
    device, such as the endless /dev/zero, may hold at most `limit` bytes. A regular file may have
    any size.

    Raises:
        ValueError: the text has more than `limit` bytes, or is not UTF-8.
        OSError: the file cannot be read.
    """
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno())
        if stat.S_ISREG(size.st_mode):
            limit = max(limit, size.st_size)
        contents = io.BytesIO()
        while block := stream.read(min(_BLOCK, limit + 1 - contents.tell())):
            contents.write(block)
    if contents.tell() > limit:
        raise ValueError(f"{file} must have at most {limit} bytes, got more")
    try:
        return normalize_text(contents.getvalue().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from None


def read_stdin(read: Callable[[int], str], limit: int) -> str:
    """Return text from stdin, normalized by `normalize_text`.

    `read` is a method of `sys.stdin`: `read` for the whole input or `readline` for one line.

    Raises:
        ValueError: the text has more than `limit` characters, or is not UTF-8.
    """
    try:
        text = read(limit + 1)
        text.encode()  # in some locales, Python decodes invalid bytes to lone surrogates
    except UnicodeError as error:
        raise ValueError(f"standard input must be UTF-8: {error}") from None
    if len(text) > limit:
        raise ValueError(f"standard input must have at most {limit} characters, got more")
    return normalize_text(text)


def normalize_text(text: str) -> str:
    r"""Return a text without its byte order mark and with every line end replaced by "\n"."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def write_out(text: str) -> None:
    """Write to stdout and flush. Escape characters that the encoding of stdout lacks.

    At a terminal, control characters of generated text are escaped too: they could change its
    title, its colors or its keys.
    """
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    with _named_in_errors("standard output"):
        _write(sys.stdout, text)


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


@contextlib.contextmanager
def _named_in_errors(stream: str) -> Iterator[None]:
    """Add the name of the stream to any OSError that the block raises."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, stream) from None


def run(command: Callable[[T], int | None], argument: T) -> int:
    """Call `command(argument)` and return the exit code of the process.

    | exit code                   | condition                                                     |
    | --------------------------- | ------------------------------------------------------------- |
    | result of `command`, or 0   | `command` returns a number, or None                           |
    | 2, and one line on stderr   | bad input, or too little memory                               |
    | 130                         | interrupted                                                   |
    | 141                         | the reader of stdout or stderr has closed it                  |

    `run` flushes stdout and stderr before it returns. An error of the flush counts like an error of
    `command`. SIGTERM and SIGHUP end the process after the `finally` blocks of `command` have run.

    An exception that indicates a bug in this package passes through, so that its traceback is
    printed.
    """
    open_closed_streams()
    try:
        with unwinding_when_terminated():
            try:
                return command(argument) or 0
            finally:
                with _named_in_errors("standard output"):
                    sys.stdout.flush()
                sys.stderr.flush()
    except KeyboardInterrupt:
        _write_error("\ninterrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        # Write the line in one call, so that lines of several ranks do not mix.
        _write_error(f"error: {reason}\n")
        return BAD_INPUT


def _write_error(text: str) -> None:
    with contextlib.suppress(OSError):
        _write(sys.stderr, text)


def enter(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with the exit code that `main` returns."""
    code = INTERRUPTED
    sys.excepthook = sys.__excepthook__
    try:
        if signal.getsignal(signal.SIGINT) is end_on_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
    except KeyboardInterrupt:  # before `run`, or a second one while `run` reports the first
        _write_error("\ninterrupted\n")
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a later Ctrl-C prints no traceback
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # Python flushes again at exit and would print the error.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
