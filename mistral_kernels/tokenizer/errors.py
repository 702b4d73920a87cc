"""Errors of tokenizers: one line each, whichever library raised them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TokenizerError(ValueError):
    """Error in a tokenizer file, a text, a token id or a conversation; its message is one line."""


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of about 500 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # its message is only the key
        text = f"no key {text}"
    # Some messages of the libraries contain a whole vocabulary.
    return text if len(text) <= 500 else text[:500] + " ..."


class library_errors:
    """Context manager that converts the errors of a library to TokenizerError.

    A stream of `HuggingFace` enters it once per token: a class takes half the time of a generator.

    Args:
        what: Description of the failure, put before the message of the library.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A panic of Rust code raises an exception of pyo3 that does not derive from Exception.
        is_foreign = isinstance(error, Exception) and not isinstance(error, TokenizerError)
        if error and (is_foreign or kind.__name__ == "PanicException"):
            raise TokenizerError(f"{self.what}: {one_line(error)}") from error


def missing_package(purpose: str, path: Path, package: str, extra: str) -> TokenizerError:
    """Return the error for a missing package, with the command that installs it."""
    return TokenizerError(
        f'{purpose} {path} needs {package}: pip install "mistral_kernels[{extra}]"'
    )
