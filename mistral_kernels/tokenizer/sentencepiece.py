"""Open tokenizer.model with the sentencepiece library, and add the tokens of a fine-tuned model."""

from __future__ import annotations

import codecs
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.tokenizer.chat import render_template
from mistral_kernels.tokenizer.errors import TokenizerError, library_errors
from mistral_kernels.tokenizer.stream import StreamDecoder
from mistral_kernels.tokenizer.vendor import Vendor
from mistral_kernels.utils.files import read_bytes

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import AddedToken, TokenizerFiles

# tokenizer.model, tokenizer.model.v3, mistral_instruct_tokenizer_241114.model.v7m1, ...
FILE_NAME = re.compile(r"\.model(?:\.v(?P<version>\d+)(?:m\d+)?)?$")
_REPLACE_EACH_BYTE = "mistral_kernels.replace_each_byte"
# These bytes, appended to a serialized model, set normalizer_spec.add_dummy_prefix to false:
# protobuf merges repeated messages.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePiece(Vendor):
    """Tokenizer in a sentencepiece model.

    If a fine-tuned model adds tokens or a chat template, the names of special and added tokens in a
    text are encoded as those tokens, as by LlamaTokenizer of transformers.

    Args:
        path: The file.
        contents: Contents of the file.
        files: Contents of the files that accompany it.

    Raises:
        TokenizerError: The file is invalid, or an added token is not supported.
    """

    def __init__(self, path: Path, contents: bytes, files: TokenizerFiles) -> None:
        self.path = path
        self._init_settings(files)
        self._model = model = _load(path, contents)
        with library_errors(f"{path}: not a sentencepiece model"):  # a piece may be invalid UTF-8
            ids = list(range(model.vocab_size()))
            self._pieces: list[str] = model.id_to_piece(ids)
        self._vendor_size = len(ids)
        vocab = dict(zip(self._pieces, ids, strict=True))
        self._names = files.names_with_defaults(vocab)
        self._added = self._find_added(vocab)
        self._ids = {token.content: token_id for token_id, token in self._added.items()}
        self._known_ids = frozenset([*ids, *self._added])
        self.vocab_size = max(self._known_ids) + 1

        def find(name: str, own: int) -> int | None:
            if name in files.names:
                return (vocab | self._ids).get(self._names.get(name, ""))
            return None if own < 0 else own  # -1: the model does not define this token

        own = {name: getattr(model, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
        own |= dict.fromkeys(("sep", "cls", "mask"), -1)
        self._init_special(**{name: find(f"{name}_token", i) for name, i in own.items()})
        special = (token_id for token_id, token in self._added.items() if token.special)
        self.all_special_ids = frozenset(filter(model.IsControl, ids)).union(special)
        self.chat_version = self._find_chat_version()
        self._apply_flags()

        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._set_legacy(files.legacy, contents)

    def _set_legacy(self, legacy: bool, contents: bytes | None = None) -> None:
        # With "legacy", sentencepiece puts a space before each text between added tokens. Otherwise
        # it puts a space only before a text at the beginning of the input.
        self._inner_model = self._model
        if self._added and not legacy:
            contents = read_bytes(self.path) if contents is None else contents
            self._inner_model = _load(self.path, contents + _NO_DUMMY_PREFIX)

    def _find_added(self, vocab: dict[str, int]) -> dict[int, AddedToken]:
        """Return the tokens to match in a text, by id; none for Mistral's own tokenizer."""
        files, added = self._files, dict(self._files.added)
        found = {token.content for token in added.values()}
        named = dict.fromkeys([*self._names.values(), *files.special])
        absent = [content for content in named if content not in found]
        is_extended = max(added, default=-1) >= self._vendor_size or not vocab.keys() >= {*absent}
        if files.has_vendor_template and not is_extended:
            return {}
        for content in absent:
            after = max([self._vendor_size - 1, *added]) + 1
            added[vocab.get(content, after)] = files.special_token(content)
        for token in added.values():
            if token.single_word:
                raise TokenizerError(
                    f"{self.path}: single_word must be false for the added token "
                    f"{reprlib.repr(token.content)}; single_word requires a tokenizer.json"
                )
        return added

    def _find_chat_version(self) -> str | None:
        """Return "jinja", the version in the file name, or the version of the control tokens.

        Version 1 has no control tokens except <s> and </s>.
        """
        if self._files.templates and (self._added or not self._files.has_vendor_template):
            return "jinja"
        match = FILE_NAME.search(self.path.name)
        if match and match["version"]:
            return f"v{match['version']}"
        names = {self._pieces[i] for i in self.all_special_ids if i < self._vendor_size}
        for version, token in (("v7", "[SYSTEM_PROMPT]"), ("v3", "[PREFIX]"), ("v2", "[INST]")):
            if token in names:
                return version
        return "v1" if self._vendor_size == 32000 else None  # other sizes are not Mistral's

    def _id_to_token(self, token_id: int) -> str | None:
        added = self._added.get(token_id)
        return added.content if added else self._pieces[token_id]

    def _make_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self._pieces)} | self._ids

    def _check_template_settable(self) -> None:
        if self.chat_version != "jinja":
            super()._check_template_settable()

    def _encode(self, text: str) -> list[int]:
        encode: Callable[[str], list[int]] = self._model.encode
        if not self._added:
            return encode(text)
        parts = self._split(text)  # text, token, text, ..., token, text
        for i in range(1, len(parts), 2):
            token = self._added[self._ids[parts[i]]]
            if token.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
            if token.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._inner_model.encode(part) if i else encode(part)
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens and not self._added:
            text: str = self._model.decode(ids)  # 30 times as fast as the stream below
            return text
        stream = self._stream(skip_special_tokens)
        return "".join(map(stream._advance, ids)) + stream.flush()

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        model, at_start = self._model, True
        decode: Callable[[list[int]], str] = model.decode

        def piece(token_id: int) -> bytes | str:
            nonlocal at_start
            added = self._added.get(token_id)
            text = added.content if added else self._pieces[token_id]
            if token_id in self.all_special_ids:
                return "" if skip_special_tokens else text
            if added:
                at_start = False
                return text
            if model.IsByte(token_id):
                at_start = False
                return bytes.fromhex(text[3:5])  # "<0xE2>"
            if at_start:
                # encode() puts a space before the first word; decode() removes only this space. If
                # decode() returns "" for two copies of the token, the text has not begun yet.
                at_start = not decode([token_id, token_id])
                return decode([token_id])
            if model.IsUnknown(token_id):
                return decode([token_id])
            return text.replace("\u2581", " ")

        return StreamDecoder(self._known_ids, piece, _REPLACE_EACH_BYTE)

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
        if self.chat_version != "jinja":
            return super()._chat(messages, **options)
        text = render_template(self.path, self._templates, self._names, messages, **options)
        return self._encode(text), text

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
        # from_file() is not used: it assumes v1 for any file without a version in its name.
        with library_errors(f"{self.path}: not a vocabulary of {version}"):
            return kind(SentencePieceTokenizer(self.path, TokenizerVersion(version)))


def _load(path: Path, contents: bytes) -> Any:
    import sentencepiece

    with library_errors(f"{path}: not a sentencepiece model"):
        if not contents:  # the library ignores an empty model_proto
            raise ValueError("the file is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=contents)


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace each undecodable byte by U+FFFD, as sentencepiece does.

    Python's handler "replace" may write one U+FFFD for several bytes.
    """
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)
