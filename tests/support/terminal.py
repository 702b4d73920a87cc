"""A process at a pseudo-terminal, for tests of interactive commands."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from typing import Any

SECONDS = 240  # limit of each wait; a test never depends on a shorter time
PASTE_START, PASTE_END = "\x1b[200~", "\x1b[201~"


class Terminal:
    """A command whose standard streams are a pseudo-terminal, which is its controlling terminal."""

    def __init__(
        self, *arguments: str, columns: int = 80, stdout: Any = None, **environment: str
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        kept = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        kept |= {"TERM": "xterm", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=kept,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._bytes, self.output = b"", ""  # everything so far
        self._read = 0  # characters of `output` that `expect` has returned

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def send(self, text: str) -> None:
        r"""Type `text`. "\r" is Enter, "\x03" is Ctrl-C, "\x04" is Ctrl-D."""
        os.write(self.master, text.encode())

    def expect(self, text: str) -> str:
        """Wait for `text`, and return the output up to its end, from the end of the last call."""
        deadline = time.monotonic() + SECONDS
        while text not in self.output[self._read :]:
            more = self._receive(deadline)
            assert more, f"no {text!r} in {self.output[self._read :]!r}"
        start = self._read
        self._read = self.output.index(text, start) + len(text)
        return self.output[start : self._read]

    def interrupt(self, text: str) -> str:
        """Send Ctrl-C until `text` appears, and return the output up to its end.

        Python's readline notices a Ctrl-C that arrives while it draws a key only at the next key.
        """
        deadline = time.monotonic() + SECONDS
        while text not in self.output[self._read :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output[self._read :]!r}"
            self.send("\x03")
            while self._receive(time.monotonic() + 2):
                pass
        return self.expect(text)

    def end(self) -> int:
        """Wait for the end of the process, read the rest of its output, and return its code."""
        deadline = time.monotonic() + SECONDS
        while self._receive(deadline):
            pass
        return self.process.wait(SECONDS)

    def _receive(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # Linux: all processes at the terminal have ended
            return False
        self._bytes += data
        self.output = self._bytes.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)
