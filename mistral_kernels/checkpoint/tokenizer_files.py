"""Read the files that accompany a tokenizer: named and added tokens, flags, chat templates."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_kernels.checkpoint.hub import TOKENIZER_PATTERNS
from mistral_kernels.utils.files import (
    CheckpointError,
    check_regular,
    read_json,
    read_text,
)
from mistral_kernels.utils.schema import Schema

TEMPLATES = "additional_chat_templates"  # subfolder, one file per template
TEMPLATE_LIMIT = 1 << 20  # bytes; the longest templates in use have about 20 KB
ADDED_ID_LIMIT = 1 << 31
NO_MAX_LENGTH = int(1e30)  # as in transformers

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_ADDED: Schema = {"content": str, **dict.fromkeys(_FLAGS, bool)}
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMES = [f"{name}_token" for name in NAMED_TOKENS]
_DEFAULT_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
_SPECIAL_TOKENS: dict[Any, Schema] = {
    **dict.fromkeys(_NAMES, (str, None, _ADDED)),
    "additional_special_tokens": ([(str, _ADDED)], None),
    "extra_special_tokens": ([(str, _ADDED)], None, {...: (str, None, _ADDED)}),
}
_CONFIG: dict[Any, Schema] = {
    **_SPECIAL_TOKENS,
    "added_tokens_decoder": {...: _ADDED},
    "add_bos_token": (bool, None),
    "add_eos_token": (bool, None),
    "legacy": (bool, None),
    "padding_side": (str, None),
    "truncation_side": (str, None),
    "chat_template": (str, None, [{"name": str, "template": str}], {...: str}),
}


@dataclass(frozen=True)
class AddedToken:
    """Token that is matched in a text first; the vocabulary then encodes the rest of the text.

    Attributes:
        content: Text of the token.
        special: Whether the token is a special token, such as BOS.
        lstrip: Whether the token includes the white space on its left.
        rstrip: Whether the token includes the white space on its right.
        single_word: Whether the token is matched only as a whole word.
        normalized: Whether the token is matched in the normalized text.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of the files that accompany a tokenizer, merged as transformers merges them.

    Attributes:
        names: Content of each named token, for example of "bos_token"; None if a file has null. A
            name that is in no file is absent.
        special: Special tokens by content: those of `names`, then those without a name.
        added: Added tokens by id, in ascending order of the ids.
        add_bos: Whether a text begins with BOS. Not used with tokenizer.json, which has a
            post-processor.
        add_eos: Whether a text ends with EOS. Not used with tokenizer.json.
        legacy: Whether a space is put before the text after an added token.
        templates: Chat templates by name; a single template has the name "default".
        has_config: Whether tokenizer_config.json exists.
        padding_side: Side on which texts are padded; "left" if the files have no value.
        truncation_side: Side on which texts are truncated; "right" if the files have no value.
        model_max_length: Maximum number of tokens; int(1e30) if the files have no value.
    """

    names: dict[str, str | None]
    special: dict[str, AddedToken]
    added: dict[int, AddedToken]
    add_bos: bool
    add_eos: bool
    legacy: bool
    templates: dict[str, str]
    has_config: bool
    padding_side: str
    truncation_side: str
    model_max_length: int

    @property
    def has_vendor_template(self) -> bool:
        """True if there is no chat template, or if one contains [INST], as all of Mistral's do."""
        return not self.templates or any("[INST]" in each for each in self.templates.values())

    def names_with_defaults(self, vocab: Container[str]) -> dict[str, str]:
        """Return the contents of the named tokens.

        A name that is in no file has its default content, for example `<s>` for "bos_token", if
        `vocab` contains this content.
        """
        defaults = {name: token for name, token in _DEFAULT_NAMES.items() if token in vocab}
        return {name: token for name, token in (defaults | self.names).items() if token is not None}

    def special_token(self, content: str) -> AddedToken:
        """Return the special token with this content: from the files, else with default flags."""
        return self.special.get(content) or AddedToken(content, special=True, normalized=False)


def find_tokenizer_files(folder: Path) -> list[Path]:
    """Return the paths of all tokenizer files in a folder, sorted.

    Raises:
        CheckpointError: One of the paths is neither a regular file nor a folder.
    """
    found = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)}
    files = sorted(path for path in found if not path.is_dir())
    for path in files:
        check_regular(path)
    return files


def path_in_folder(file: Path) -> str:
    """Return the path of a tokenizer file relative to the folder of its tokenizer."""
    return f"{TEMPLATES}/{file.name}" if file.parent.name == TEMPLATES else file.name


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat templates.

    Raises:
        CheckpointError: A value has a wrong type, two tokens have the same id, or a file cannot be
            read; see `read_json`.
    """
    path = folder / "tokenizer_config.json"
    config = _read_optional(path, _CONFIG)
    if "added_tokens_decoder" not in config:  # otherwise special_tokens_map.json is redundant
        more = _read_optional(folder / "special_tokens_map.json", _SPECIAL_TOKENS)
        config |= {key: more[key] for key in more if key in _SPECIAL_TOKENS}
    tokens, nameless = _special_tokens(path, config)
    special = {each.content: each for each in (*filter(None, tokens.values()), *nameless)}
    return TokenizerFiles(
        {name: token.content if token else None for name, token in tokens.items()},
        special,
        _added_tokens(folder, config, special),
        add_bos=config.get("add_bos_token", True) is True,
        add_eos=config.get("add_eos_token") is True,
        legacy=config.get("legacy") is not False,
        templates=_read_templates(folder, config.get("chat_template")),
        has_config=os.path.lexists(path),
        padding_side=_side(path, config, "padding_side", "left"),
        truncation_side=_side(path, config, "truncation_side", "right"),
        model_max_length=_model_max_length(path, config.get("model_max_length")),
    )


def _side(path: Path, config: dict[str, Any], name: str, default: str) -> str:
    side: str = config.get(name) or default
    if side not in ("left", "right"):
        got = reprlib.repr(side)
        raise CheckpointError(f'{path}: {name} must be "left" or "right", got {got}')
    return side


def _model_max_length(path: Path, value: Any) -> int:
    """Return the maximum number of tokens; transformers writes int(1e30) if there is none."""
    if value is None:
        return NO_MAX_LENGTH
    # Not in the schema, whose integers must fit in 64 bits.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
        got = reprlib.repr(value)
        raise CheckpointError(f"{path}: model_max_length must be at least 1, got {got}")
    return int(min(value, NO_MAX_LENGTH))


def _read_optional(path: Path, schema: dict[Any, Schema]) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is no file or link of that name."""
    return read_json(path, schema) if os.path.lexists(path) else {}


def _special_tokens(
    path: Path, config: dict[str, Any]
) -> tuple[dict[str, AddedToken | None], list[AddedToken]]:
    """Return the special tokens with a name, the standard names first, and those without a name."""
    values = {key: config[key] for key in _NAMES if key in config}
    # Names that only some models define, for example image_token. The check for a string excludes
    # the flags add_bos_token and add_eos_token.
    values |= {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        values |= extra
        extra = []
    tokens = {
        key: None if value in (None, "") else _special_token(path, value)
        for key, value in values.items()
    }
    return tokens, [_special_token(path, value) for value in extra]


def _special_token(path: Path, value: str | dict[str, Any]) -> AddedToken:
    """Return the special token that `value`, from the JSON file `path`, describes."""
    described = {"content": value} if isinstance(value, str) else value
    return _added_token(path, described | {"special": True})


def _added_token(path: Path, described: dict[str, Any]) -> AddedToken:
    """Return the token that `described`, a JSON object from the file `path`, describes."""
    content = described.get("content")
    if not content:
        raise CheckpointError(
            f"{path}: content of an added token must not be empty, got {content!r}"
        )
    try:
        content.encode()
    except UnicodeEncodeError:
        got = reprlib.repr(content)
        raise CheckpointError(
            f"{path}: content of an added token must be valid Unicode, got {got}"
        ) from None
    flags = {flag: described[flag] for flag in _FLAGS if flag in described}
    return AddedToken(content, **{"normalized": not flags.get("special", False), **flags})


def _added_tokens(
    folder: Path, config: dict[str, Any], special: Container[str]
) -> dict[int, AddedToken]:
    """Return the added tokens by id, from tokenizer_config.json or else from added_tokens.json."""
    if "added_tokens_decoder" in config:
        path = folder / "tokenizer_config.json"
        pairs = [(key, token) for key, token in config["added_tokens_decoder"].items()]
    else:
        path = folder / "added_tokens.json"
        pairs = [
            (str(token_id), {"content": x, "special": x in special})
            for x, token_id in _read_optional(path, {...: int}).items()
        ]
    added: dict[int, AddedToken] = {}
    for key, described in pairs:
        token = _added_token(path, described)
        name = f"{path}: the id of {reprlib.repr(token.content)}"
        is_number = key.isascii() and key.isdecimal() and len(key) <= 10
        if not (is_number and int(key) < ADDED_ID_LIMIT):
            got = reprlib.repr(key)
            raise CheckpointError(f"{name} must be in [0, {ADDED_ID_LIMIT}), got {got}")
        if (other := added.setdefault(int(key), token)) is not token:
            got = f"{key}, the id of {reprlib.repr(other.content)}"
            raise CheckpointError(f"{name} must be unique, got {got}")
    return dict(sorted(added.items()))


def _read_templates(folder: Path, configured: Any) -> dict[str, str]:
    """Return the chat templates by name; template files are preferred to tokenizer_config.json."""
    files = {path.stem: path for path in (folder / TEMPLATES).glob("*.jinja")}
    if os.path.lexists(folder / "chat_template.jinja"):
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: read_text(path, TEMPLATE_LIMIT) for name, path in files.items()}
    if isinstance(configured, list):
        if not all(each.keys() >= {"name", "template"} for each in configured):
            path = folder / "tokenizer_config.json"
            raise CheckpointError(
                f"{path}: each entry of chat_template must have a name and a template"
            )
        configured = {each["name"]: each["template"] for each in configured}
    if isinstance(configured, str):
        configured = {"default": configured}
    return {name: text for name, text in (configured or {}).items() if text}
