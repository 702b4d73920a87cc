"""Read files that come from elsewhere: regular files only, bounded sizes, JSON of a known shape."""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, NoReturn

# What a JSON value must be: a type, None, a list of one schema for all items, a mapping from keys
# to schemas (other keys are ignored, or have the schema of the key `...`; absent ones are allowed),
# or a tuple of alternatives.
Schema = type | None | list[Any] | dict[Any, Any] | tuple[Any, ...]

# Python objects take up to 24 times the memory of the JSON that describes them.
JSON_LIMIT = 64 << 20

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. The message names the file and the remedy."""


def check_regular(path: Path, limit: int | None = None) -> int:
    """Return the size in bytes of a regular file, or of the one that a symbolic link leads to.

    Every file that a library opens by name is checked here first: opening a FIFO waits forever, and
    reading a device may never end.

    Raises:
        CheckpointError: `path` is a folder, a FIFO, a socket or a device, or has more than `limit`
            bytes.
        OSError: there is no such file, or it cannot be accessed.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, got {_kind(status.st_mode)}")
    if limit is not None and status.st_size > limit:
        raise CheckpointError(f"{path} must have at most {limit} bytes, got {status.st_size}")
    return status.st_size


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


def read_json(path: Path, schema: dict[Any, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file, at most `JSON_LIMIT` bytes.
        schema: the types of the keys that the caller uses. Integers must fit into 64 bits, and
            numbers must be finite; `float` admits integers, `int` admits no bool.

    Raises:
        CheckpointError: the file is not JSON, is not an object, or has a value that `schema` does
            not admit; the message names the file and the value. Raises as `check_regular`, too.
    """
    try:
        contents = json.loads(read_text(path), parse_constant=_refuse_constant)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} must be JSON of moderate depth: nested too deeply") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(contents).__name__}")
    if problem := _mismatch("", contents, schema or {}):
        raise CheckpointError(f"{path}: {problem}")
    return contents


def _mismatch(name: str, value: Any, schema: Schema) -> str | None:
    """Describe the first part of `value` that `schema` does not admit; None if there is none."""
    alternatives = schema if isinstance(schema, tuple) else (schema,)
    for each in alternatives:
        if isinstance(each, dict) and isinstance(value, dict):
            prefix = f"{name}." if name else ""
            parts = (
                (prefix + key, value[key], each[key if key in each else ...])
                for key in value
                if key in each or ... in each
            )
        elif isinstance(each, list) and isinstance(value, list):
            parts = ((f"{name}[{i}]", item, each[0]) for i, item in enumerate(value))
        elif _admits(each, value):
            return None
        else:
            continue
        return next(filter(None, (_mismatch(*part) for part in parts)), None)
    expected = " or ".join(map(_describe, alternatives))
    return f"{name} must be {expected}, got {reprlib.repr(value)}"


def _admits(schema: Any, value: Any) -> bool:
    if schema is None or schema is str or schema is bool:
        return value is None if schema is None else type(value) is schema
    if type(value) is int:
        return schema in (int, float) and -(2**63) <= value < 2**63
    return schema is float and type(value) is float and math.isfinite(value)


def _describe(schema: Any) -> str:
    if schema is None:
        return "null"
    if isinstance(schema, dict):
        return "an object"
    return "a list" if isinstance(schema, list) else _TYPE_NAMES[schema]


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
