"""History of the messages of all chats, in a private file of bounded size."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from mistral_kernels.utils.errors import one_line
from mistral_kernels.utils.files import read_text, write_atomically

_ENTRIES = 1000  # maximum number of messages to keep
_LONGEST = 4000  # maximum number of characters of a message to keep
_FILE_LIMIT = 64 << 20  # bytes
# Errors of a folder that this user may not write to. They need no note.
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class History:
    """Messages in `$XDG_STATE_HOME/mistral_kernels/chat_history`, one JSON string per line.

    XDG_STATE_HOME is ~/.local/state by default. If the file cannot be read or written, the history
    is not kept. One line on stderr gives the reason, unless the folder is read-only.
    """

    def __init__(self) -> None:
        state = os.environ.get("XDG_STATE_HOME", "")
        if not os.path.isabs(state):
            state = os.path.expanduser("~/.local/state")
        path = Path(state, "mistral_kernels", "chat_history")
        self._path: Path | None = path if path.is_absolute() else None

    def load(self) -> list[str]:
        """Return the newest messages, at most 1000, the oldest first."""
        if self._path is None:
            return []
        try:
            lines = read_text(self._path, _FILE_LIMIT).split("\n")[:-1]
            if len(lines) > 2 * _ENTRIES:
                lines = lines[-_ENTRIES:]
                contents = "".join(f"{line}\n" for line in lines).encode()
                write_atomically(self._path, contents, mode=0o600, replace=True)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self._give_up(error)
            return []
        texts = []
        for line in lines[-_ENTRIES:]:
            with suppress(ValueError):  # an incomplete line, or that of another program
                texts.append(json.loads(line))
        return [text for text in texts if isinstance(text, str) and "\0" not in text]

    def append(self, text: str) -> None:
        """Add a message. Messages of more than 4000 characters are not kept."""
        if self._path is None or len(text) > _LONGEST:
            return
        line = json.dumps(text, ensure_ascii=False) + "\n"
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # O_NONBLOCK: opening a FIFO would block.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._path, flags, 0o600), "ab") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(line.encode())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Stop keeping a history. Print the reason, unless the folder is read-only."""
        self._path = None
        if not (isinstance(error, OSError) and error.errno in _READ_ONLY):
            print(f"note: no history: {one_line(str(error))}", file=sys.stderr, flush=True)
