"""Read files that come from elsewhere: regular files only, bounded sizes, JSON of a known shape.

`create_anew` writes a file beside files that come from elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from mistral_kernels.utils.schema import OneLineError, find_mismatch

# Python objects take up to 24 times the memory of the JSON that describes them.
JSON_LIMIT = 64 << 20


class CheckpointError(OneLineError):
    """Error of reading or writing a checkpoint. The message names the file and the remedy."""


def expand_user(path: str | Path) -> Path:
    """Return `path` with the home folder in place of `~`; CheckpointError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CheckpointError(f"no such user: {str(path)!r}; name the folder in full") from None


def is_taken(path: Path) -> bool:
    """Return whether anything has this name; a symbolic link that leads nowhere has it, too.

    Raises OSError if that cannot be found out. Reading such a link raises an error that names it.
    """
    return path.exists() or path.is_symlink()


def check_regular(path: Path, limit: int | None = None) -> int:
    """Return the size in bytes of a regular file, or of the one that a symbolic link leads to.

    Every file that a library opens by name is checked here first: opening a FIFO waits forever, and
    reading a device may never end.

    Raises:
        CheckpointError: `path` is a folder, a FIFO, a socket, a device or a link that leads
            nowhere, or has more than `limit` bytes.
        OSError: there is no such file, or it cannot be accessed.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        if nowhere and os.path.islink(path):
            got = "a symbolic link that leads nowhere"
            raise CheckpointError(f"{path} must be a regular file, got {got}") from None
        raise
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, got {_kind(status.st_mode)}")
    if limit is not None and status.st_size > limit:
        raise CheckpointError(f"{path} must have at most {limit} bytes, got {status.st_size}")
    return status.st_size


def create_anew(path: Path) -> IO[bytes]:
    """Open a new file for writing, after removing what has its name, except a folder.

    An open by name alone would wait at a FIFO, and overwrite the file that a link leads to.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "wb")


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Return the contents of a regular file. Raises as `check_regular`."""
    size = check_regular(path, limit)
    # Not blocking: the file may have been replaced by a FIFO after the check.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        contents = file.read(size + 1)
    if len(contents) > size:
        raise OSError(errno.EBUSY, "the file grows while it is read", str(path))
    return contents


def read_text(path: Path, limit: int = JSON_LIMIT) -> str:
    """Return a text in UTF-8, without its byte order mark.

    Raises CheckpointError for another encoding, and as `check_regular`.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} must be UTF-8: {error}") from None


def read_json(
    path: Path, schema: dict[Any, Any] | None = None, limit: int = JSON_LIMIT
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file, at most `limit` bytes.
        schema: the types of the keys that the caller uses; see `schema.find_mismatch`.

    Raises:
        CheckpointError: the file is not JSON, is not an object, or has a value that `schema` does
            not admit; the message names the file and the value. Raises as `check_regular`, too.
    """
    try:
        contents = json.loads(read_text(path, limit), parse_constant=_refuse_constant)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} must be JSON of moderate depth: nested too deeply") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(contents).__name__}")
    if problem := find_mismatch(contents, schema or {}):
        raise CheckpointError(f"{path}: {problem}")
    return contents


def digest(*parts: bytes) -> str:
    """Return the beginning of a SHA-256: enough to find out whether two contents differ."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "another kind of file")
