"""Read untrusted files: only regular files of bounded size, and JSON that matches a schema.

`create_anew` creates a file in a folder that may contain untrusted files. `write_atomically` writes
a file that is never incomplete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from mistral_kernels.utils.schema import OneLineError, find_mismatch

# Bytes. The Python objects of a JSON text take up to 24 times its size.
JSON_LIMIT = 64 << 20


class CheckpointError(OneLineError):
    """Error in a checkpoint that is read or written. The message has the remedy if there is one."""


def expand_user(path: str | Path) -> Path:
    """Return `path` with `~` replaced by the home folder.

    Raises:
        CheckpointError: the user of `~user` does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CheckpointError(f"no such user: {str(path)!r}; name the folder in full") from None


def is_taken(path: Path) -> bool:
    """Return whether `path` exists, including a broken symbolic link.

    Reading such a link raises an error that names it.

    Raises:
        OSError: the folder of `path` cannot be accessed.
    """
    return path.exists() or path.is_symlink()


def check_regular(path: Path, limit: int | None = None) -> int:
    """Return the size in bytes of a regular file. Symbolic links are followed.

    Call this function before a library opens a file by name: opening a FIFO blocks, and reading a
    device may never end.

    Raises:
        CheckpointError: `path` is a folder, a FIFO, a socket, a device or a broken symbolic link,
            or the file has more than `limit` bytes.
        OSError: the file does not exist or cannot be accessed.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        if nowhere and os.path.islink(path):
            got = "a broken symbolic link"
            raise CheckpointError(f"{path} must be a regular file, got {got}") from None
        raise
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, got {_kind(status.st_mode)}")
    if limit is not None and status.st_size > limit:
        raise CheckpointError(f"{path} must have at most {limit} bytes, got {status.st_size}")
    return status.st_size


def create_anew(path: Path) -> IO[bytes]:
    """Remove `path` unless it is a folder, then create it as a new file, open for writing.

    Opening an existing path could block on a FIFO, or overwrite the target of a link.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "wb")


def write_atomically(
    path: Path, contents: bytes, *, mode: int = 0o666, replace: bool = False
) -> None:
    """Write a file that appears under its name only when it is complete and on the disk.

    Args:
        path: the file.
        contents: its contents.
        mode: its permissions, before the umask.
        replace: replace an existing file.

    Raises:
        FileExistsError: `path` exists, and `replace` is false.
        OSError: the file cannot be written.
    """
    partial = path.parent / f".partial-{secrets.token_hex(8)}"  # also if `path` is "." or "/"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(partial, flags, mode), "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _rename_anew(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)


def _rename_anew(source: Path, target: Path) -> None:
    """Rename a file; raise FileExistsError if `target` exists, which os.rename would replace."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if is_taken(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(source, target)


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Return the contents of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: see `check_regular`.
        OSError: the file cannot be read, or it grows while it is read.
    """
    size = check_regular(path, limit)
    # O_NONBLOCK, because the file may have been replaced by a FIFO after the check.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        contents = file.read(size + 1)
    if len(contents) > size:
        raise OSError(errno.EBUSY, "the file grows while it is read", str(path))
    return contents


def read_text(path: Path, limit: int = JSON_LIMIT) -> str:
    """Return the text of a UTF-8 file, without the byte order mark.

    Raises:
        CheckpointError: the encoding is not UTF-8; see `check_regular` for other reasons.
        OSError: the file cannot be read.
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
        path: the file.
        schema: the types of the keys that the caller uses; see `schema.find_mismatch`.
        limit: the maximal size of the file in bytes.

    Raises:
        CheckpointError: the file is not JSON, does not contain an object, or contains a value that
            does not match `schema`; the message names the file and the value. See `check_regular`
            for other reasons.
        OSError: the file cannot be read.
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
    """Return the first 16 hexadecimal digits of the SHA-256 of `parts`, to compare contents."""
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
