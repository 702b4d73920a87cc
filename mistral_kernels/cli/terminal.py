"""Input and output of a chat at a terminal: styles, Ctrl-C, messages of one or several lines."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, ModuleType
from typing import NamedTuple, TextIO

from mistral_kernels.cli.command import read_stdin
from mistral_kernels.cli.history import History

DIM, BOLD = "\x1b[2m", "\x1b[1m"
_RESET = "\x1b[0m"
_QUOTES = '"""'  # first and last line of a message of several lines
_MESSAGE_LIMIT = 1 << 20  # characters of one message
# Maximum time between two lines of a paste. Two typed lines take longer.
_PASTE_SECONDS = 0.05


def is_styled(stream: TextIO) -> bool:
    """Return whether escape sequences may be written to `stream`."""
    known = os.environ.get("TERM", "dumb") not in ("", "dumb")
    return known and not os.environ.get("NO_COLOR") and stream.isatty()


def note(text: str, style: str = DIM) -> None:
    """Print a line to stderr, styled at a terminal."""
    if is_styled(sys.stderr):
        text = f"{style}{text}{_RESET}"
    print(text, file=sys.stderr, flush=True)


class Interrupts:
    """Handler of Ctrl-C that raises KeyboardInterrupt only in `allowed` blocks, once per block.

    A second Ctrl-C therefore cannot interrupt the `finally` blocks that the first one runs. Enter
    the object with `with` to install the handler. A handler that is not Python's default is kept.
    """

    def __init__(self) -> None:
        self._raises = False
        self._replaced = False

    def __enter__(self) -> Interrupts:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._replaced = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at the first Ctrl-C in the block."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False


class Entry(NamedTuple):
    """A message of the user, or a command such as "/help"."""

    text: str
    is_command: bool = False


class MessageReader:
    """Read the messages of a chat from stdin.

    From a pipe, each line is a message. At a terminal, a line that begins with "/" is a command.
    Pasted lines are one message, and so are the lines between two lines of three quotes. If stdout
    is a terminal too, lines are edited with readline, and the history is kept in a file.

    Args:
        quiet: show no prompt.

    Attributes:
        at_terminal: whether stdin is a terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._ended = False
        self.at_terminal = sys.stdin.isatty()
        self._readline: ModuleType | None = None
        if self.at_terminal and sys.stdout.isatty():
            self._readline = _import_readline()
        gnu = self._readline is not None and "GNU" in (self._readline.__doc__ or "")
        # GNU readline inserts a paste as a whole, unless the terminal is "dumb". Otherwise, lines
        # that arrive together are a paste.
        self._joins = self.at_terminal and not (gnu and os.environ.get("TERM", "dumb") != "dumb")
        self._history = History()
        if self._readline is not None:
            self._readline.set_auto_history(False)
            for text in self._history.load():
                with suppress(UnicodeError):  # not in the encoding of the locale
                    self._readline.add_history(text)

    def read(self) -> Entry | None:
        """Return the next message or command; None at the end of the input.

        Raises:
            ValueError: the message has more than 2^20 characters, or is not UTF-8.
            KeyboardInterrupt: Ctrl-C; the line is discarded.
        """
        text = self._lines("> ")
        if text is None or not self.at_terminal:
            return None if text is None else Entry(text.strip())
        one_line = "\n" not in text
        is_command = one_line and text.startswith("/")
        if one_line and text.startswith(_QUOTES):
            text = self._block(text.removeprefix(_QUOTES))
        if self._readline is not None and text.strip():
            self._readline.add_history(text.rstrip())
            self._history.append(text.rstrip())
        return Entry(text.strip(), is_command)

    @contextmanager
    def without_echo(self) -> Iterator[None]:
        """Disable the terminal's echo in the block, if readline shows the keys in its next line."""
        if self._readline is None:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        try:
            yield
        finally:
            with suppress(termios.error):  # the terminal has been closed
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def end_line(self) -> None:
        """End the line of the prompt, after Ctrl-C or Ctrl-D."""
        print(file=sys.stderr if self._readline is None else sys.stdout, flush=True)

    def _block(self, text: str) -> str:
        """Return the text up to three quotes at the end of a line, or up to Ctrl-D."""
        while not text.rstrip().endswith(_QUOTES):
            line = self._lines("... ")
            if line is None:
                self.end_line()
                return text
            text = f"{text}\n{line}"
            if len(text) > _MESSAGE_LIMIT:
                raise ValueError(
                    f"a message must have at most {_MESSAGE_LIMIT} characters, got {len(text)}"
                )
        return text.rstrip().removesuffix(_QUOTES)

    def _lines(self, prompt: str) -> str | None:
        """Return a line or a whole paste, without its last newline; None at the end of input."""
        if self._ended:
            return None
        text = self._line(prompt)
        while text and self._joins and select.select([sys.stdin], [], [], _PASTE_SECONDS)[0]:
            line = self._line("")
            if line is None:  # a terminal reports its end only once
                self._ended = True
                break
            text += line
        return text.removesuffix("\n") if text else None

    def _line(self, prompt: str) -> str | None:
        prompt = "" if self._quiet else prompt
        stream = sys.stderr if self._readline is None else sys.stdout
        if prompt and is_styled(stream):
            # readline does not count the characters between \1 and \2. The space is last: editline
            # omits an escape sequence at the end.
            prompt = f"\1{BOLD}\2{prompt[:-1]}\1{_RESET}\2{prompt[-1]}"
        if self._readline is None:
            if self.at_terminal:
                print(re.sub("[\1\2]", "", prompt), end="", file=stream, flush=True)
            return read_stdin(sys.stdin.readline, _MESSAGE_LIMIT) or None
        try:
            return read_stdin(lambda _: input(prompt) + "\n", _MESSAGE_LIMIT)
        except EOFError:
            return None


def _import_readline() -> ModuleType | None:
    """Import and return readline, which `input` then uses; None if this Python has no readline."""
    try:
        import readline
    except ImportError:
        return None
    if "GNU" in (readline.__doc__ or ""):  # the default since readline 8.1
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline
