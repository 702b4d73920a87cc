"""One tokenizer face over sentencepiece models, tekken.json and tokenizer.json."""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TokenIds = int | Sequence[int] | torch.Tensor

# tokenizer.model, tokenizer.model.v3, mistral_instruct_tokenizer_241114.model.v7m1, ...
_SENTENCEPIECE_NAME = re.compile(r"\.model(?:\.v(?P<version>\d+)(?:m\d+)?)?$")
_LOOKED_FOR = "tekken.json, tokenizer.model, tokenizer.model.v* or tokenizer.json"


class TokenizerError(ValueError):
    """A tokenizer file, a text, a token id or a conversation is unusable; says why in one line."""


class TokenizerOutput(dict[str, Any]):
    """`input_ids` and `attention_mask`, as items, as attributes, or as `**inputs`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str | int) -> TokenizerOutput:
        """The same with its tensors on `device`."""
        return TokenizerOutput(
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        )


class StreamDecoder:
    """Turns token ids into text as they arrive, in constant time a token.

    The texts that `push` returns, then that of `flush`, join to what `decode` makes of all the ids
    (as a continuation of the prompt, if one was given). `push` returns only what no later token
    can change, so never a part of a character.
    """

    def __init__(
        self, tokenizer: MistralTokenizer, piece: Callable[[int], bytes | str], errors: str
    ) -> None:
        # `piece` gives a token's bytes, or text, which ends a run of bytes.
        self._tokenizer, self._piece = tokenizer, piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int | torch.Tensor) -> str:
        """The text that this token makes certain: often "" inside a character."""
        (token_id,) = self._tokenizer._checked(token_id)
        return self._advance(token_id)

    def _advance(self, token_id: int) -> str:
        piece = self._piece(token_id)
        return self._utf8.decode(piece) if isinstance(piece, bytes) else self.flush() + piece

    def flush(self) -> str:
        """What is held back at the end of the text: U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


class MistralTokenizer(ABC):
    """Text to token ids and back; `from_pretrained` makes one.

    `vocab_size` (also `len`) counts every id, special ones included, so it matches the model's.
    `bos_token_id` and `eos_token_id` are None where the file has none; `pad_token_id` is the
    file's, else `eos_token_id`. `all_special_ids` are what `skip_special_tokens` skips.

    `chat_version` names the chat template: "v1", "v2", "v3", "v7", ... for the vendor's, rendered
    by mistral-common; "jinja" for the folder's own (tokenizer.json only); None if none is known.
    """

    path: Path
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: frozenset[int]
    chat_version: str | None

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def _stream(self, skip_special_tokens: bool) -> StreamDecoder: ...

    @abstractmethod
    def _chat(self, messages: list[dict[str, Any]], prompt: bool) -> tuple[list[int], str]: ...

    @staticmethod
    def from_pretrained(path: str | Path) -> MistralTokenizer:
        """Opens a tokenizer file, or the one in a folder; `"tiny"` and Hub ids are resolved.

        In a folder tekken.json comes first, then the sentencepiece model of the highest version,
        then tokenizer.json. But tokenizer.json comes first where a fine-tune made it the only
        right one: it has tokens that the vendor's file lacks, or a chat template that is not
        Mistral's comes with it.

        Raises:
            TokenizerError: no such path, no tokenizer in the folder, a file that is not one, or
                a missing package.
        """
        local = Path(path).expanduser()
        if not local.exists():
            local = _resolve(path)
        return _open_folder(local) if local.is_dir() else _open_file(local)

    @property
    def has_chat_template(self) -> bool:
        """Whether the files speak for an Instruct model.

        With a tokenizer_config.json: whether a template comes with it. Else whether the vocabulary
        or the file's name has one: not so for the plain `tokenizer.model` of Mistral-7B v0.1 and
        v0.2, which base and Instruct share; so for v0.3's, which they share as well.
        """
        if (self.path.parent / "tokenizer_config.json").is_file():
            return _read_chat_template(self.path.parent) is not None
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
        padding: bool = False,
        return_tensors: str | None = None,
    ) -> TokenizerOutput:
        """`input_ids` and `attention_mask` of a text or a list of texts, as in transformers.

        Without `return_tensors`: a list for a text, a list of lists for a list (the model takes
        unequal prompts packed, with no padding). With "pt": int64 tensors `(batch, seqlen)`.
        `add_special_tokens` puts BOS in front. `padding` fills up to the longest on the left with
        `pad_token_id`, where `attention_mask` is 0.
        """
        if return_tensors not in (None, "pt"):
            raise TokenizerError(f'return_tensors must be None or "pt", got {return_tensors!r}')
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        rows = [self.encode(t, bos=add_special_tokens) for t in texts]
        masks = [[1] * len(row) for row in rows]
        if padding and rows:
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

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of a text. A name such as "</s>" in it is plain text, but for tokenizer.json,
        where it becomes the token, as in transformers."""
        _check_text("text", text)
        head = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        tail = [self.eos_token_id] if eos and self.eos_token_id is not None else []
        return head + self._encode(text) + tail

    def decode(self, ids: TokenIds, skip_special_tokens: bool = False) -> str:
        """The text of token ids (a list, a tensor `(n,)` or one id).

        As in transformers, special tokens show by name unless skipped. Bytes that are no UTF-8
        become U+FFFD, as many as the backend's own decoder writes.
        """
        return self._decode(self._checked(ids), skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[TokenIds], skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` of each row of a tensor `(batch, n)` or of a list."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def stream(
        self, prompt_ids: TokenIds = (), *, skip_special_tokens: bool = True
    ) -> StreamDecoder:
        """A decoder for tokens that continue `prompt_ids`.

        The prompt decides, for one, whether a space before the first word is kept.
        """
        stream = self._stream(skip_special_tokens)
        for token_id in self._checked(prompt_ids):
            stream._advance(token_id)
        return stream

    def _checked(self, ids: TokenIds) -> list[int]:
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        for token_id in ids:
            if not isinstance(token_id, int):
                raise TokenizerError(f"token ids must be int, got {type(token_id).__name__}")
            if not 0 <= token_id < self.vocab_size:
                raise TokenizerError(
                    f"token id {token_id} is not in the vocabulary of {self.vocab_size}: "
                    f"is {self.path} the tokenizer of this model?"
                )
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = False,
    ) -> Any:
        """A conversation, `[{"role": "user", "content": "..."}, ...]`, in the model's own form.

        Returns token ids (a list; with "pt" a tensor `(1, n)`; with `return_dict` a
        TokenizerOutput), or the text with `tokenize=False`, which is for reading only: encoding it
        again gives other ids. The vendor's templates end where the answer begins, so there
        `add_generation_prompt=False` only admits a conversation that the assistant ends (training).

        Raises:
            TokenizerError: no template, roles that are unknown or out of order.
        """
        if isinstance(messages, str) or not all(isinstance(m, Mapping) for m in messages):
            raise TokenizerError('messages must be a list of {"role": ..., "content": ...}')
        if return_tensors not in (None, "pt"):
            raise TokenizerError(f'return_tensors must be None or "pt", got {return_tensors!r}')
        for message in messages:
            if isinstance(message.get("content"), str):
                _check_text("messages: content", message["content"])
        ids, text = self._chat([dict(m) for m in messages], add_generation_prompt)
        if not tokenize:
            return text
        rows: Any = torch.tensor([ids]) if return_tensors else ids
        if not return_dict:
            return rows
        mask = torch.ones_like(rows) if return_tensors else [1] * len(ids)
        return TokenizerOutput(input_ids=rows, attention_mask=mask)


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"{name} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} has a lone surrogate, {text[error.start]!r}, at index {error.start}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _resolve(name: str | Path) -> Path:
    from mistral_kernels.checkpoint import resolve

    try:
        return Path(resolve(name))
    except ValueError as error:  # CheckpointError says it in one line
        raise TokenizerError(str(error)) from error


def _open_file(path: Path) -> MistralTokenizer:
    from mistral_kernels import tokenizer_backends

    if _is_lfs_pointer(path):
        raise TokenizerError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull` there")
    if _SENTENCEPIECE_NAME.search(path.name):
        return tokenizer_backends.SentencePiece(path)
    if path.suffix == ".json":
        tekken = "tekken" in path.name
        return (tokenizer_backends.Tekken if tekken else tokenizer_backends.HuggingFace)(path)
    raise TokenizerError(f"{path}: not a tokenizer's file name; expected {_LOOKED_FOR}")


def _open_folder(folder: Path) -> MistralTokenizer:
    def version(path: Path) -> tuple[int, str]:
        match = _SENTENCEPIECE_NAME.search(path.name)
        return int(match["version"] or 0) if match else -1, path.name

    models = [p for p in folder.iterdir() if p.is_file() and _SENTENCEPIECE_NAME.search(p.name)]
    vendor = folder / "tekken.json"
    if not vendor.is_file() and models:
        vendor = max(models, key=version)
    fast = folder / "tokenizer.json"
    if not vendor.is_file():
        if not fast.is_file():
            raise TokenizerError(f"{folder}: no tokenizer found; looked for {_LOOKED_FOR}")
        return _open_file(fast)
    tokenizer = _open_file(vendor)
    if fast.is_file():
        added = _read_object(fast).get("added_tokens", [])
        extended = any(token["id"] >= tokenizer.vocab_size for token in added)
        if extended or not _has_vendor_template(folder):
            return _open_file(fast)
    return tokenizer


def _has_vendor_template(folder: Path) -> bool:
    """False if a fine-tune brings a chat template of its own; Mistral's all have [INST]."""
    template = _read_chat_template(folder)
    return template is None or "[INST]" in template


def _read_chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({_one_line(error)})") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."
