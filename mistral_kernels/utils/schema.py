"""Check the values of untrusted files against a schema, with error messages of one line."""

from __future__ import annotations

import math
import reprlib
from typing import Any

# The schema of a JSON value is one of:
# - a type, or None for null;
# - a list with one schema, that of every item;
# - a dict from keys to schemas. Keys may be absent. The key `...` holds the schema of all other
#   keys; without `...`, other keys are ignored;
# - a tuple of alternative schemas.
Schema = type | None | list[Any] | dict[Any, Any] | tuple[Any, ...]

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_LONGEST_MESSAGE = 1000


class OneLineError(ValueError):
    """An error about the contents of a file. Its message is one line of at most 1000 characters.

    Control characters are escaped, because paths and tensor names may contain line breaks or
    terminal escape sequences.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


def escaped(text: str) -> str:
    """Return at most 1000 characters of `text`, with control characters escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * _LONGEST_MESSAGE])
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 3]}..."


def find_mismatch(value: Any, schema: Schema, name: str = "") -> str | None:
    """Return a description of the first mismatch of a JSON value and a schema, or None.

    Integers must fit in 64 bits, and numbers must be finite. `float` accepts integers; `int` does
    not accept a bool.

    Args:
        value: the JSON value.
        schema: the schema; see `Schema`.
        name: the name of `value` in the description. Its parts are `name.key` and `name[i]`.
    """
    alternatives = schema if isinstance(schema, tuple) else (schema,)
    for option in alternatives:
        if isinstance(option, dict) and isinstance(value, dict):
            prefix = f"{name}." if name else ""
            parts = (
                (value[key], option[key if key in option else ...], prefix + key)
                for key in value
                if key in option or ... in option
            )
        elif isinstance(option, list) and isinstance(value, list):
            parts = ((item, option[0], f"{name}[{i}]") for i, item in enumerate(value))
        elif _matches(option, value):
            return None
        else:
            continue
        return next(filter(None, (find_mismatch(*part) for part in parts)), None)
    expected = " or ".join(map(_describe, alternatives))
    return f"{name} must be {expected}, got {reprlib.repr(value)}"


def _matches(schema: Any, value: Any) -> bool:
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
