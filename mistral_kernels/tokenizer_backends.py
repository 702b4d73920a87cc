"""The three libraries behind `MistralTokenizer`, each imported when it is used."""

from __future__ import annotations

import codecs
import functools
import json
import re
from abc import abstractmethod
from datetime import datetime
from pathlib import Path
from typing import Any

from mistral_kernels.tokenizer import (
    _SENTENCEPIECE_NAME,
    MistralTokenizer,
    StreamDecoder,
    TokenizerError,
    _has_vendor_template,
    _one_line,
    _read_chat_template,
    _read_object,
)

_REPLACE_EACH_BYTE = "mistral_kernels.replace_each_byte"


class _MistralCommon(MistralTokenizer):
    """The vendor's instruct templates, for both kinds of vendor file."""

    @abstractmethod
    def _instruct_tokenizer(self) -> Any:
        """mistral-common's InstructTokenizer over this file."""

    def _chat(self, messages: list[dict[str, Any]], prompt: bool) -> tuple[list[int], str]:
        try:
            from mistral_common.exceptions import MistralCommonException
            from mistral_common.protocol.instruct.normalize import get_normalizer
            from mistral_common.protocol.instruct.request import ChatCompletionRequest
            from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Vendor
        except ImportError as error:
            raise _missing("the chat template of", self.path, "mistral-common", "chat") from error
        instruct = self._instruct_tokenizer()
        version = instruct.tokenizer.version
        finished = not prompt and messages and messages[-1].get("role") == "assistant"
        mode = ValidationMode.finetuning if finished else ValidationMode.test
        normalizer = get_normalizer(version, instruct.tokenizer.model_settings_builder)
        vendor: Any = Vendor(instruct, get_validator(version, mode=mode), normalizer)
        try:
            request: Any = ChatCompletionRequest.model_validate({"messages": messages})
            tokenized = vendor.encode_chat_completion(request)
        except (MistralCommonException, ValueError) as error:  # pydantic's is a ValueError
            raise TokenizerError(f"messages: {_one_line(error)}") from error
        return tokenized.tokens, self.decode(tokenized.tokens)


class SentencePiece(_MistralCommon):
    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path}: not a sentencepiece model ({error})") from error
        model = self._model
        self.vocab_size = model.vocab_size()
        # sentencepiece says -1 for a token that the vocabulary does not have.
        self.bos_token_id, self.eos_token_id, pad = (
            None if i < 0 else i for i in (model.bos_id(), model.eos_id(), model.pad_id())
        )
        self.pad_token_id = self.eos_token_id if pad is None else pad
        self.all_special_ids = frozenset(filter(model.IsControl, range(self.vocab_size)))
        self.chat_version = self._find_chat_version()

    def _find_chat_version(self) -> str | None:
        """By the file's name, else by the control tokens; v1 has none beyond <s> and </s>."""
        match = _SENTENCEPIECE_NAME.search(self.path.name)
        if match and match["version"]:
            return f"v{match['version']}"
        if not _has_vendor_template(self.path.parent):
            return None
        names = {self._model.id_to_piece(i) for i in self.all_special_ids}
        for version, token in (("v7", "[SYSTEM_PROMPT]"), ("v3", "[PREFIX]"), ("v2", "[INST]")):
            if token in names:
                return version
        return "v1" if self.vocab_size == 32000 else None  # any other is not the vendor's

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            return self._model.decode(ids)
        stream = self._stream(skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.flush()

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        model, at_start = self._model, True

        def piece(token_id: int) -> bytes | str:
            nonlocal at_start
            if model.IsControl(token_id):
                return "" if skip_special_tokens else model.id_to_piece(token_id)
            if model.IsByte(token_id):
                at_start = False
                return bytes.fromhex(model.id_to_piece(token_id)[3:5])  # "<0xE2>"
            if at_start:
                # encode() puts a space before the first word; decode() drops it there and only
                # there. A token that is nothing even twice leaves us at the start.
                at_start = not model.decode([token_id, token_id])
                return model.decode([token_id])
            if model.IsUnknown(token_id):
                return model.decode([token_id])
            return model.id_to_piece(token_id).replace("\u2581", " ")

        return StreamDecoder(self, piece, _REPLACE_EACH_BYTE)

    def _instruct_tokenizer(self) -> Any:
        from mistral_common.tokens.tokenizers import instruct
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

        version = self.chat_version
        if version is None:
            raise TokenizerError(f"{self.path}: no chat template is known for this vocabulary")
        kind = getattr(instruct, f"InstructTokenizer{version.upper()}", None)
        if kind is None:
            raise TokenizerError(f"{self.path}: mistral-common has no chat template {version}")
        # Not from_file(): that takes any file without a version in its name for v1.
        return kind(SentencePieceTokenizer(self.path, TokenizerVersion(version)))


class Tekken(_MistralCommon):
    def __init__(self, path: Path) -> None:
        try:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Vendor
        except ImportError as error:
            raise _missing("reading", path, "mistral-common", "chat") from error
        self.path = path
        try:
            self._instruct: Any = Vendor.from_file(path).instruct_tokenizer
        except Exception as error:  # a bad file brings errors of any kind out of the parser
            raise TokenizerError(f"{path}: not a tekken file ({_one_line(error)})") from error
        self._tekken: Any = self._instruct.tokenizer
        tekken = self._tekken
        self._policies = SpecialTokenPolicy.KEEP, SpecialTokenPolicy.IGNORE
        self.vocab_size = tekken.n_words
        self.bos_token_id, self.eos_token_id = tekken.bos_id, tekken.eos_id
        self.pad_token_id = tekken.pad_id if tekken.is_special("<pad>") else tekken.eos_id
        self.all_special_ids = frozenset(tekken.special_ids)
        self.chat_version = tekken.version.value

    def _encode(self, text: str) -> list[int]:
        return self._tekken.encode(text, bos=False, eos=False)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tekken.decode(ids, self._policies[skip_special_tokens])

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        def piece(token_id: int) -> bytes | str:
            if token_id in self.all_special_ids:  # as text: it ends a run of bytes
                return "" if skip_special_tokens else self._tekken.id_to_piece(token_id)
            return self._tekken.id_to_byte_piece(token_id)

        return StreamDecoder(self, piece, "replace")

    def _instruct_tokenizer(self) -> Any:
        return self._instruct


class HuggingFace(MistralTokenizer):
    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise _missing("reading", path, "tokenizers", "hf") from error
        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself
            raise TokenizerError(f"{path}: not a tokenizer.json ({_one_line(error)})") from error
        # Left in the file by training scripts: a prompt must not be cut in silence.
        self._model.no_truncation()
        self._model.no_padding()
        vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        added = self._model.get_added_tokens_decoder()
        self.all_special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_ids = {i for t, i in vocab.items() if re.fullmatch("<0x[0-9A-F]{2}>", t)}
        config = _read_object(path.parent / "tokenizer_config.json")
        self._names: dict[str, str] = {}  # as chat templates know them
        for name, usual in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"), ("unk", "<unk>")):
            token = config.get(f"{name}_token", usual)
            token = token["content"] if isinstance(token, dict) else token
            if token in vocab:
                self._names[f"{name}_token"] = token
        self.bos_token_id, self.eos_token_id, pad = (
            vocab.get(self._names.get(f"{name}_token", "")) for name in ("bos", "eos", "pad")
        )
        self.pad_token_id = self.eos_token_id if pad is None else pad
        self._template = _read_chat_template(path.parent)
        self.chat_version = "jinja" if self._template else None

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._model.decode(ids, skip_special_tokens=skip_special_tokens)

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        from tokenizers.decoders import ByteLevel

        if not isinstance(self._model.decoder, ByteLevel):
            return _WindowStream(self, skip_special_tokens)
        skipped = self.all_special_ids if skip_special_tokens else frozenset()
        alphabet = _byte_level_alphabet()

        def piece(token_id: int) -> bytes:
            token = (token_id not in skipped and self._model.id_to_token(token_id)) or ""
            if all(c in alphabet for c in token):
                return bytes(alphabet[c] for c in token)
            return token.encode()  # an added token is in the file as plain text

        return StreamDecoder(self, piece, "replace")

    def _chat(self, messages: list[dict[str, Any]], prompt: bool) -> tuple[list[int], str]:
        """Renders the folder's template as transformers does: in a sandbox, for it is code."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self._template is None:
            raise TokenizerError(
                f"{self.path.parent}: no chat template, neither chat_template.jinja nor in "
                "tokenizer_config.json; is it a base model?"
            )

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        jinja = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        jinja.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        jinja.globals["raise_exception"] = raise_exception
        jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            text = jinja.from_string(self._template).render(
                messages=messages, add_generation_prompt=prompt, **self._names
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise TokenizerError(f"messages: {_one_line(error)} (chat template)") from error
        return self._encode(text), text


class _WindowStream(StreamDecoder):
    """For tokenizer.json without ByteLevel: decodes new tokens together with the one before.

    Its decoder makes characters of a run of byte tokens only if the *whole* run is valid, so a run
    is held back until a token of another kind ends it.
    """

    def __init__(self, tokenizer: HuggingFace, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._byte_ids = tokenizer._byte_ids
        self._before: list[int] = []
        self._held: list[int] = []

    def _advance(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.all_special_ids:
            return ""
        self._held.append(token_id)
        return "" if token_id in self._byte_ids else self.flush()

    def flush(self) -> str:
        known = self._tokenizer._decode(self._before, self._skip)
        text = self._tokenizer._decode(self._before + self._held, self._skip)[len(known) :]
        self._before, self._held = self._held[-1:] or self._before, []
        return text


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a ByteLevel vocabulary stands for (GPT-2's alphabet):
    printable Latin-1 for itself, the other bytes, in order, as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """sentencepiece writes U+FFFD for each undecodable byte, Python's "replace" for each run."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)


def _missing(purpose: str, path: Path, package: str, extra: str) -> TokenizerError:
    return TokenizerError(
        f'{purpose} {path} needs {package}: pip install "mistral_kernels[{extra}]"'
    )
