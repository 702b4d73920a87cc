"""One tokenizer interface over sentencepiece models, tekken.json and tokenizer.json."""

from __future__ import annotations

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles

# Or anything that gives these: other tensors, arrays, NumPy's integers.
TokenIds = int | Iterable[int] | torch.Tensor

_PADDING = {True: True, "longest": True, False: False, "do_not_pad": False}


class TokenizerError(ValueError):
    """Error in a tokenizer file, a text, a token id or a conversation, in one line."""


class TokenizerOutput(dict[str, Any]):
    """`input_ids` and `attention_mask`, as items, as attributes, or as `**inputs`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str | int) -> TokenizerOutput:
        """Return the same with its tensors on `device`."""
        return TokenizerOutput(
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        )


class StreamDecoder:
    """Decode token ids as they arrive, in constant time per token.

    The texts that `push` returns, then that of `flush`, join to what `decode` returns for all the
    ids (as a continuation of the prompt, if there is one). `push` returns only what no later token
    can change, so never a part of a character.
    """

    def __init__(
        self, tokenizer: MistralTokenizer, piece: Callable[[int], bytes | str], errors: str
    ) -> None:
        # `piece` returns a token's bytes, or text, which ends a run of bytes.
        self._tokenizer, self._piece = tokenizer, piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int | torch.Tensor) -> str:
        """Return the text that this token makes certain: often "" inside a character."""
        ids = _checked(token_id)
        if len(ids) != 1:
            raise TokenizerError(f"push takes one token id, got {len(ids)}")
        return self._advance(ids[0]) if ids[0] in self._tokenizer._known_ids else ""

    def _start_behind(self, prompt_ids: list[int]) -> None:
        for token_id in prompt_ids:
            self._advance(token_id)

    def _advance(self, token_id: int) -> str:
        piece = self._piece(token_id)
        return self._utf8.decode(piece) if isinstance(piece, bytes) else self.flush() + piece

    def flush(self) -> str:
        """Return what is held back at the end of the text: U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


class MistralTokenizer(ABC):
    """Text to token ids and back; `from_pretrained` opens one.

    `vocab_size` (also `len`) is the largest id plus one, special and added tokens included.
    `bos_token_id` and `eos_token_id` are None where the files have none; `pad_token_id` is the
    files', else `eos_token_id`, and may be set. `all_special_ids` are what `skip_special_tokens`
    skips.

    `chat_version` names the chat template: "v1", "v2", "v3", "v7", ... for the vendor's, rendered
    by mistral-common; "jinja" for the folder's own, rendered by transformers; None if there is
    none.
    """

    path: Path
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: frozenset[int]
    chat_version: str | None
    # What the files put before and behind a text, and the ids that have a token.
    _before: list[int]
    _behind: list[int]
    _known_ids: Container[int]
    _files: TokenizerFiles

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def _stream(self, skip_special_tokens: bool) -> StreamDecoder: ...

    @abstractmethod
    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]: ...

    @staticmethod
    def from_pretrained(path: str | Path) -> MistralTokenizer:
        """Open a tokenizer file, or the one in a folder; `"tiny"` and Hub ids are resolved.

        In a folder tekken.json comes first, then the sentencepiece model of the highest version,
        then tokenizer.json. But tokenizer.json comes first where a fine-tune made it the only
        right one: the files have tokens that the vendor's lacks, or a chat template that is not
        Mistral's. Without it, the tokens of tokenizer_config.json or added_tokens.json are added to
        the sentencepiece model, as in transformers.

        Raises:
            TokenizerError: no such path, no tokenizer in the folder, a file that is damaged,
                too large or not a regular file, or a missing package.
        """
        from mistral_kernels.checkpoint import CheckpointError
        from mistral_kernels.tokenizer.opening import open_tokenizer

        try:
            return open_tokenizer(path)
        except (CheckpointError, OSError) as error:
            raise TokenizerError(one_line(error)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        known = name in MistralTokenizer.__annotations__ and name not in self.__dict__
        if not (known or name == "pad_token_id" or name.startswith("_")):
            raise AttributeError(f"{name} of a tokenizer cannot be set; pad_token_id can")
        if name == "pad_token_id" and value is not None:
            value = _checked_id(value)
        super().__setattr__(name, value)

    @property
    def has_chat_template(self) -> bool:
        """True if the files are those of an Instruct model.

        With a tokenizer_config.json: whether a template comes with it. Else whether the vocabulary
        or the file's name has one: not so for the plain `tokenizer.model` of Mistral-7B v0.1 and
        v0.2, which base and Instruct share; so for v0.3's, which they share as well.
        """
        if self._files.has_config or self._files.templates:
            return bool(self._files.templates)
        bare_v1 = self.chat_version == "v1" and self.path.name == "tokenizer.model"
        return self.chat_version is not None and not bare_v1

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"MistralTokenizer({str(self.path)!r}, vocab_size={self.vocab_size}, "
            f"chat_version={self.chat_version!r})"
        )

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        return_tensors: str | None = None,
    ) -> TokenizerOutput:
        """Return `input_ids` and `attention_mask` of a text or a list of texts.

        Args:
            text: one text gives lists; several give lists of lists (the model takes unequal prompts
                packed, with no padding).
            add_special_tokens: put BOS and EOS around each text as the files have it.
            padding: True or "longest" fills up to the longest text, on the left, with
                `pad_token_id`, where `attention_mask` is 0; False or "do_not_pad" does not.
            return_tensors: None; or "pt" for int64 tensors `(batch, seqlen)`.
        """
        _check_choice("return_tensors", return_tensors, (None, "pt"))
        _check_choice("padding", padding, tuple(_PADDING))
        _check_choice("add_special_tokens", add_special_tokens, (True, False))
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        around = None if add_special_tokens else False
        rows = [self.encode(t, bos=around, eos=around) for t in texts]
        masks = [[1] * len(row) for row in rows]
        if _PADDING[padding] and rows:
            if self.pad_token_id is None:
                raise TokenizerError(f"padding: {self.path} has neither a padding token nor EOS")
            gaps = [max(map(len, rows)) - len(row) for row in rows]
            rows = [[self.pad_token_id] * n + row for n, row in zip(gaps, rows, strict=True)]
            masks = [[0] * n + mask for n, mask in zip(gaps, masks, strict=True)]
        if return_tensors is None:
            one = isinstance(text, str)
            return TokenizerOutput(
                input_ids=rows[0] if one else rows, attention_mask=masks[0] if one else masks
            )
        if len({len(row) for row in rows}) != 1:
            raise TokenizerError(
                f"{len(rows)} texts of {sorted(map(len, rows))} tokens do not make one tensor: "
                "pass padding=True, or no return_tensors and the lists to the model"
            )
        return TokenizerOutput(
            input_ids=torch.tensor(rows, dtype=torch.int64),
            attention_mask=torch.tensor(masks, dtype=torch.int64),
        )

    def encode(self, text: str, *, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: a name such as "</s>" in it is plain text for the vendor's files, and becomes the
                token where the tokenizer is tokenizer.json or has added tokens, as in transformers.
            bos: whether BOS comes first. None: as the files have it, which is the post-processor of
                tokenizer.json, else `add_bos_token` of tokenizer_config.json, by default true.
            eos: whether EOS comes last. None: likewise, with `add_eos_token`, by default false.

        Raises:
            TokenizerError: no text, a lone surrogate, or True for a token that there is not.
        """
        check_text("text", text)
        before = self._around("bos", bos, self.bos_token_id, self._before)
        behind = self._around("eos", eos, self.eos_token_id, self._behind)
        return before + self._encode(text) + behind

    def _around(
        self, name: str, wanted: bool | None, token_id: int | None, default: list[int]
    ) -> list[int]:
        _check_choice(name, wanted, (None, True, False))
        if wanted is None:
            return default
        if not wanted:
            return []
        if token_id is None:
            raise TokenizerError(f"{name}=True: {self.path} has no {name.upper()} token")
        return [token_id]

    def decode(self, ids: TokenIds, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids: a list, an integer tensor `(n,)` or one id.

        As in transformers, special tokens show by name unless skipped, and an id without a token,
        of a model's padded vocabulary for instance, is nothing. Bytes that are no UTF-8 become
        U+FFFD, as many as the library's own decoder writes.
        """
        _check_choice("skip_special_tokens", skip_special_tokens, (True, False))
        return self._decode([i for i in _checked(ids) if i in self._known_ids], skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[TokenIds], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return `decode` of each row of a tensor `(batch, n)` or of a list."""
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise TokenizerError(f"sequences must be lists of token ids, got {_type(sequences)}")
        return [self.decode(ids, skip_special_tokens) for ids in rows]

    def stream(
        self, prompt_ids: TokenIds = (), *, skip_special_tokens: bool = True
    ) -> StreamDecoder:
        """Return a decoder for tokens that continue `prompt_ids`.

        The prompt decides, for one, whether a space before the first word is kept.
        """
        _check_choice("skip_special_tokens", skip_special_tokens, (True, False))
        stream = self._stream(skip_special_tokens)
        stream._start_behind([i for i in _checked(prompt_ids) if i in self._known_ids])
        return stream

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Render a conversation, `[{"role": "user", "content": "..."}, ...]`, for the model.

        A folder's own template is code: jinja's sandbox keeps it from files and the network, but
        its time and memory are not bounded.

        Args:
            messages: a key whose value is None counts as absent.
            tools: functions that the model may call, as JSON schemas.
            documents: what the model may quote; only for a folder's own template.
            chat_template: a template, or the name of one of several that the folder has.
            tokenize: False returns the text, for reading only: encoding it again gives other ids.
            add_generation_prompt: end where the answer begins. The vendor's templates always do;
                there, False only admits a conversation that the assistant ends (training).
            return_tensors: "pt" returns a tensor `(1, n)` and not a list.
            return_dict: return a TokenizerOutput.

        Raises:
            TokenizerError: no template, roles that are unknown or out of order, or any other error
                of the template.
        """
        expected = 'messages must be a list of {"role": ..., "content": ...}'
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
            raise TokenizerError(f"{expected}, got {_type(messages)}")
        messages = list(messages)
        for message in messages:
            if not isinstance(message, Mapping):
                raise TokenizerError(f"{expected}, got {_type(message)} in it")
            if isinstance(message.get("content"), str):
                check_text("messages: content", message["content"])
        _check_choice("return_tensors", return_tensors, (None, "pt"))
        ids, text = self._chat(
            [{key: value for key, value in m.items() if value is not None} for m in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
        )
        if not tokenize:
            return text
        rows: Any = torch.tensor([ids]) if return_tensors else ids
        if not return_dict:
            return rows
        mask = torch.ones_like(rows) if return_tensors else [1] * len(ids)
        return TokenizerOutput(input_ids=rows, attention_mask=mask)


def _checked(ids: Any) -> list[int]:
    """Return token ids as a list of int."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        ids = [ids]
    return [_checked_id(token_id) for token_id in ids]


def _checked_id(value: Any) -> int:
    token_id = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
        hint = "; batch_decode takes a batch" if isinstance(token_id, list) else ""
        raise TokenizerError(f"token ids must be integers, got {_type(value)}{hint}")
    index = operator.index(token_id)
    if index < 0:
        raise TokenizerError(f"token ids must be at least 0, got {index}")
    return index


def _type(value: Any) -> str:
    return type(value).__name__


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not isinstance(value, (bool, str, type(None))) or value not in choices:
        offered = " or ".join(f'"{c}"' if isinstance(c, str) else str(c) for c in choices)
        raise TokenizerError(f"{name} must be {offered}, got {value!r}")


def check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"{name} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} has a lone surrogate, {text[error.start]!r}, at index {error.start}"
        ) from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."  # some hold a whole vocabulary


class library_errors:
    """Raise TokenizerError in the place of whatever a library raises, and say what failed.

    A class costs half of what a generator does, for every token that is decoded.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A panic of Rust code is an exception of pyo3 that does not derive from Exception.
        unknown = isinstance(error, Exception) and not isinstance(error, TokenizerError)
        if error and (unknown or kind.__name__ == "PanicException"):
            raise TokenizerError(f"{self.what}: {one_line(error)}") from error


def missing_package(purpose: str, path: Path, package: str, extra: str) -> TokenizerError:
    return TokenizerError(
        f'{purpose} {path} needs {package}: pip install "mistral_kernels[{extra}]"'
    )
