"""Checks of values that files from elsewhere hold: types by a schema, errors in one line."""

from __future__ import annotations

import math
import reprlib
from typing import Any

# What a JSON value must be: a type, None, a list of one schema for all items, a mapping from keys
# to schemas (other keys are ignored, or have the schema of the key `...`; absent ones are allowed),
# or a tuple of alternatives.
Schema = type | None | list[Any] | dict[Any, Any] | tuple[Any, ...]

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_LONGEST_MESSAGE = 1000


class OneLineError(ValueError):
    """An error about a file's contents, in one line of at most 1000 characters.

    Control characters are escaped: paths and names of tensors may hold line breaks, or sequences
    that a terminal obeys.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


def escaped(text: str) -> str:
    """Return at most 1000 characters of a text, control characters escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * _LONGEST_MESSAGE])
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 3]}..."


def find_mismatch(value: Any, schema: Schema, name: str = "") -> str | None:
    """Describe the first part of a JSON value that `schema` does not admit; None if there is none.

    Integers must fit into 64 bits, and numbers must be finite; `float` admits integers, `int`
    admits no bool. `name`: what the message calls `value`; its parts are `name.key`, `name[i]`.
    """
    alternatives = schema if isinstance(schema, tuple) else (schema,)
    for each in alternatives:
        if isinstance(each, dict) and isinstance(value, dict):
            prefix = f"{name}." if name else ""
            parts = (
                (value[key], each[key if key in each else ...], prefix + key)
                for key in value
                if key in each or ... in each
            )
        elif isinstance(each, list) and isinstance(value, list):
            parts = ((item, each[0], f"{name}[{i}]") for i, item in enumerate(value))
        elif _admits(each, value):
            return None
        else:
            continue
        return next(filter(None, (find_mismatch(*part) for part in parts)), None)
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
