"""Checks of the arguments of tokenizers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mistral_kernels.tokenizer.errors import TokenizerError

# Arrays and integers of NumPy are accepted as well.
TokenIds = int | Iterable[int] | torch.Tensor


def check_ids(ids: Any) -> list[int]:
    """Return token ids as a list of int; raise TokenizerError if one is not an integer >= 0."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        ids = [ids]
    return [check_id(token_id) for token_id in ids]


def check_id(value: Any) -> int:
    """Return one token id as an int; raise TokenizerError if it is not an integer >= 0."""
    token_id = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
        hint = "; batch_decode takes a batch" if isinstance(token_id, list) else ""
        raise TokenizerError(f"token ids must be integers, got {type(value).__name__}{hint}")
    index = operator.index(token_id)
    if index < 0:
        raise TokenizerError(f"token ids must be at least 0, got {index}")
    return index


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise TokenizerError unless the value is one of the choices."""
    if not isinstance(value, (bool, str, type(None))) or value not in choices:
        offered = " or ".join(f'"{c}"' if isinstance(c, str) else str(c) for c in choices)
        raise TokenizerError(f"{name} must be {offered}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise TokenizerError unless the value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TokenizerError(f"{name} must be an integer of at least 1, got {value!r}")


def check_text(name: str, text: str) -> None:
    """Raise TokenizerError unless `text` is a str that can be encoded as UTF-8."""
    if not isinstance(text, str):
        raise TokenizerError(f"{name} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} has a lone surrogate, {text[error.start]!r}, at index {error.start}"
        ) from error
