"""Vocabulary of a tokenizer: named special tokens, and the conversion between tokens and ids."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from mistral_kernels.checkpoint.tokenizer_files import NAMED_TOKENS, TokenizerFiles
from mistral_kernels.tokenizer.arguments import (
    TokenIds,
    check_choice,
    check_count,
    check_id,
    check_ids,
)
from mistral_kernels.tokenizer.errors import TokenizerError
from mistral_kernels.tokenizer.output import SIDES

_WAY_OUT = (
    "tokens cannot be added; choose a token of get_vocab(), such as eos_token, or add the token "
    "with transformers, resize the model's embeddings there and save both"
)


class _NamedId:
    """Descriptor of the id of a named special token, such as `bos_token_id`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_token_id")

    def __get__(self, tokenizer: Vocabulary | None, owner: type | None = None) -> int | None:
        return self if tokenizer is None else tokenizer._special[self.name]  # type: ignore[return-value]

    def __set__(self, tokenizer: Vocabulary, token_id: int | None) -> None:
        if token_id is not None and check_id(token_id) not in tokenizer._known_ids:
            raise TokenizerError(
                f"{self.name}_token_id must be the id of a token, got {token_id}; {_WAY_OUT}"
            )
        tokenizer._set_special(self.name, None if token_id is None else check_id(token_id))


class _NamedToken:
    """Descriptor of a named special token, such as `bos_token`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_token")

    def __get__(self, tokenizer: Vocabulary | None, owner: type | None = None) -> str | None:
        if tokenizer is None:
            return self  # type: ignore[return-value]
        token_id = tokenizer._special[self.name]
        return None if token_id is None else tokenizer._id_to_token(token_id)

    def __set__(self, tokenizer: Vocabulary, token: str | None) -> None:
        token_id = None
        if token is not None:
            token = getattr(token, "content", token)  # an AddedToken of the tokenizers library
            token_id = tokenizer._token_to_id(token) if isinstance(token, str) else None
            if token_id is None:
                got = reprlib.repr(token)
                raise TokenizerError(
                    f"{self.name}_token must be a token of the vocabulary, got {got}; {_WAY_OUT}"
                )
        tokenizer._set_special(self.name, token_id)


class Vocabulary(ABC):
    """Tokens and ids of a tokenizer, and the attributes that may be set.

    `MistralTokenizer` documents the attributes.
    """

    path: Path
    name_or_path: str
    vocab_size: int
    all_special_ids: frozenset[int]
    chat_version: str | None
    is_fast = False
    # Ids put before and after a text by default, and the ids that have a token.
    _prefix_ids: list[int]
    _suffix_ids: list[int]
    _known_ids: Container[int]
    _files: TokenizerFiles
    # Named tokens that are defined, for example {"bos_token": "<s>"}: variables of chat templates.
    _names: dict[str, str]
    # Ids of all named tokens, for example {"bos": 1, "cls": None}.
    _special: dict[str, int | None]
    # Settings that differ from the files, with the keys of tokenizer_config.json.
    _changes: dict[str, Any]

    bos_token, bos_token_id = _NamedToken(), _NamedId()
    eos_token, eos_token_id = _NamedToken(), _NamedId()
    unk_token, unk_token_id = _NamedToken(), _NamedId()
    sep_token, sep_token_id = _NamedToken(), _NamedId()
    pad_token, pad_token_id = _NamedToken(), _NamedId()
    cls_token, cls_token_id = _NamedToken(), _NamedId()
    mask_token, mask_token_id = _NamedToken(), _NamedId()

    @abstractmethod
    def _id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, or None."""

    @abstractmethod
    def _make_vocab(self) -> dict[str, int]:
        """Return the id of each token."""

    @property
    def _file_name(self) -> str:
        """Name under which `save_pretrained` writes the file of the tokenizer."""
        return self.path.name

    def _changed_vocabulary(self) -> dict[str, bytes]:
        """Return the new contents of the tokenizer's file, by name, if set attributes change it."""
        return {}

    def __setattr__(self, name: str, value: Any) -> None:
        is_new = name in Vocabulary.__annotations__ and name not in self.__dict__
        if not (is_new or name in SETTABLE or name.startswith("_")):
            raise AttributeError(
                f"{name} of a tokenizer cannot be set; settable: {', '.join(SETTABLE)}"
            )
        super().__setattr__(name, value)

    def _init_settings(self, files: TokenizerFiles) -> None:
        """Set the attributes whose values are in the files; `path` must have been set."""
        self._files, self._changes = files, {}
        self._padding_side, self._truncation_side = files.padding_side, files.truncation_side
        self._model_max_length = files.model_max_length
        self._templates: dict[str, str] = dict(files.templates)
        self.name_or_path = str(self.path)

    def _init_special(self, **ids: int | None) -> None:
        """Set the ids of the named tokens; without an id of PAD, that of EOS is used."""
        self._special = {name: ids.get(name) for name in NAMED_TOKENS}
        if self._special["pad"] is None:
            self._special["pad"] = self._special["eos"]

    def _set_special(self, name: str, token_id: int | None) -> None:
        self._special[name] = token_id
        self._names.pop(f"{name}_token", None)
        token = None if token_id is None else self._id_to_token(token_id)
        if token is not None:
            self._names[f"{name}_token"] = token
        self._changes[f"{name}_token"] = token

    @property
    def padding_side(self) -> str:
        """Side on which texts are padded, "left" or "right"."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        check_choice("padding_side", side, SIDES)
        self._padding_side = self._changes["padding_side"] = side

    @property
    def truncation_side(self) -> str:
        """Side on which texts are truncated, "left" or "right"."""
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        check_choice("truncation_side", side, SIDES)
        self._truncation_side = self._changes["truncation_side"] = side

    @property
    def model_max_length(self) -> int:
        """Default of `max_length`; int(1e30) if the files define none."""
        return self._model_max_length

    @model_max_length.setter
    def model_max_length(self, length: int) -> None:
        check_count("model_max_length", length)
        self._model_max_length = self._changes["model_max_length"] = length

    @property
    def add_bos_token(self) -> bool:
        """Whether a text begins with special tokens by default."""
        return bool(self._prefix_ids)

    @add_bos_token.setter
    def add_bos_token(self, add: bool) -> None:
        self._prefix_ids = self._added_id("add_bos_token", add, self.bos_token_id)

    @property
    def add_eos_token(self) -> bool:
        """Whether a text ends with special tokens by default."""
        return bool(self._suffix_ids)

    @add_eos_token.setter
    def add_eos_token(self, add: bool) -> None:
        self._suffix_ids = self._added_id("add_eos_token", add, self.eos_token_id)

    def _added_id(self, name: str, add: bool, token_id: int | None) -> list[int]:
        check_choice(name, add, (True, False))
        if add and token_id is None:
            token = name.split("_")[1].upper()
            raise TokenizerError(
                f"{name} must be False, got True: {self.path} has no {token} token"
            )
        self._changes[name] = add
        return [token_id] if add and token_id is not None else []

    @property
    def vocab(self) -> dict[str, int]:
        """Id of each token, the same as `get_vocab()`."""
        return self.get_vocab()

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token, including special and added tokens.

        Tokens of a tekken.json that are incomplete characters are omitted, because several of them
        have the same text.
        """
        return dict(self._vocab)

    @property
    def _vocab(self) -> dict[str, int]:
        if "_cached_vocab" not in self.__dict__:
            self._cached_vocab = self._make_vocab()
        return self._cached_vocab

    def _token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Return the id of a token, or the ids of several.

        A token that is not in the vocabulary has the id of `unk_token`; None if there is none.
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: TokenIds, skip_special_tokens: bool = False) -> Any:
        """Return the token of one id, or the tokens of several; None for an id without token."""
        check_choice("skip_special_tokens", skip_special_tokens, (True, False))
        plain = ids.tolist() if hasattr(ids, "tolist") else ids
        skipped = self.all_special_ids if skip_special_tokens else frozenset[int]()
        tokens = [
            self._id_to_token(i) if i in self._known_ids else None
            for i in check_ids(plain)
            if isinstance(plain, int) or i not in skipped
        ]
        return tokens[0] if isinstance(plain, int) else tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Contents of the named special tokens, for example of "bos_token"."""
        return dict(self._names)

    @property
    def all_special_tokens(self) -> list[str]:
        """Special tokens: the named tokens, then the other tokens of `all_special_ids`."""
        others = map(self._id_to_token, sorted(self.all_special_ids))
        return list(dict.fromkeys([*self._names.values(), *filter(None, others)]))

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any], **options: Any) -> int:
        """Set named special tokens to tokens of the vocabulary; return 0, the number of new tokens.

        Args:
            special_tokens_dict: Tokens by name, for example `{"pad_token": "</s>"}`.
            options: Accepted as in transformers, without effect.

        Raises:
            TokenizerError: A token is not in the vocabulary. Tokens cannot be added.
        """
        for name, token in special_tokens_dict.items():
            if name.removesuffix("_token") in NAMED_TOKENS and name.endswith("_token"):
                setattr(self, name, token)
            elif name in ("additional_special_tokens", "extra_special_tokens"):
                self.add_tokens(token)
            else:
                expected = ", ".join(f"{each}_token" for each in NAMED_TOKENS)
                raise TokenizerError(
                    f"special_tokens_dict must have the keys {expected} or "
                    f"extra_special_tokens, got {name!r}"
                )
        return 0

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Check that tokens are in the vocabulary; return 0, the number of new tokens.

        Args:
            new_tokens: One token or several.
            special_tokens: Accepted as in transformers, without effect.

        Raises:
            TokenizerError: A token is not in the vocabulary. Tokens cannot be added.
        """
        for token in new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]:
            content = getattr(token, "content", token)
            if not isinstance(content, str) or self._token_to_id(content) is None:
                got = reprlib.repr(content)
                raise TokenizerError(
                    f"new_tokens must be tokens of the vocabulary, got {got}; {_WAY_OUT}"
                )
        return 0


SETTABLE = (
    *(f"{name}_token{suffix}" for name in NAMED_TOKENS for suffix in ("", "_id")),
    "padding_side",
    "truncation_side",
    "model_max_length",
    "add_bos_token",
    "add_eos_token",
    "chat_template",
)
