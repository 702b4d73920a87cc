"""Open tokenizer.json with Hugging Face's tokenizers library."""

from __future__ import annotations

import base64
import codecs
import functools
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.tokenizer.base import MistralTokenizer
from mistral_kernels.tokenizer.chat import render_template
from mistral_kernels.tokenizer.errors import TokenizerError, library_errors, missing_package
from mistral_kernels.tokenizer.stream import StreamDecoder
from mistral_kernels.utils.files import read_json

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles


# Largest factor by which a normalizer or decoder may lengthen a text. A larger factor could expand
# one character to gigabytes of text.
_MAX_GROWTH = 10_000
# Parts of regular expressions that can match the empty string. Such an expression matches next to
# every character, so each match lengthens the text.
_MAY_BE_EMPTY = re.compile(r"^$|[*?|^$]|\(\)|\{0*,|\{0+[,}]|\\[AbBGKyYzZ]")


class HuggingFace(MistralTokenizer):
    """Tokenizer in a tokenizer.json.

    Args:
        path: The file.
        contents: Parsed contents of the file.
        files: Contents of the files that accompany it.

    Raises:
        TokenizerError: The file is invalid or a package is missing.
    """

    is_fast = True

    def __init__(self, path: Path, contents: dict[str, Any], files: TokenizerFiles) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise missing_package("reading", path, "tokenizers", "hf") from error
        self.path = path
        self._init_settings(files)
        with library_errors(f"{path}: not a tokenizer.json"):
            _check_merges(contents.get("model"))
            for part in ("normalizer", "decoder"):
                if (growth := _growth(contents.get(part))) > _MAX_GROWTH:
                    raise TokenizerError(
                        f"{path}: {part} must lengthen a text at most {_MAX_GROWTH} times, "
                        f"got up to {growth:.3g} times"
                    )
            self._model: Any = tokenizers.Tokenizer.from_str(json.dumps(contents))
            # Some training scripts leave truncation enabled in the file. It would shorten prompts
            # without a warning.
            model = self._model
            model.no_truncation()
            model.no_padding()
            self._add_tokens()
            vocab = model.get_vocab(with_added_tokens=True)
            added = model.get_added_tokens_decoder()
            self._prefix_ids, self._suffix_ids = self._find_prefix_and_suffix(vocab)
            self._boundary = _find_boundary(model.decoder)
        self._known_ids = frozenset(vocab.values())
        self.vocab_size = max(self._known_ids, default=-1) + 1
        # The library skips special tokens by name. A normalizer may have changed the name of an
        # added token.
        special = {token.content for token in added.values() if token.special}
        self.all_special_ids = frozenset(i for i in added if model.id_to_token(i) in special)
        self._names = files.names_with_defaults(vocab)
        self._init_special(
            **{name.removesuffix("_token"): vocab.get(x) for name, x in self._names.items()}
        )
        self.chat_version = "jinja" if files.templates else None

    def _add_tokens(self) -> None:
        """Add the tokens that the accompanying files define, as transformers does."""
        from tokenizers import AddedToken

        model, files = self._model, self._files
        new = [x for x in files.added.items() if model.token_to_id(x[1].content) is None]
        model.add_tokens([AddedToken(**asdict(token)) for token in files.added.values()])
        for token_id, token in new:
            if (actual := model.token_to_id(token.content)) != token_id:
                raise TokenizerError(
                    f"{self.path}: the added token {reprlib.repr(token.content)} must have the id "
                    f"{token_id}, as in the file that adds it, got {actual}"
                )
        added = model.get_added_tokens_decoder().values()
        missing = files.special.keys() - {token.content for token in added if token.special}
        special = [token for token in files.special.values() if token.content in missing]
        model.add_special_tokens([AddedToken(**asdict(token)) for token in special])

    def _find_prefix_and_suffix(self, vocab: dict[str, int]) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor puts before a text, and the ids after it."""
        bare: list[int] = []
        for text in itertools.chain("a", itertools.islice(vocab, 100)):
            bare = self._model.encode(text, add_special_tokens=False).ids
            if bare:
                break
        encoding = self._model.encode(text)
        special = [*encoding.special_tokens_mask, 0]
        start = special.index(0)
        prefix, suffix = encoding.ids[:start], encoding.ids[start + len(bare) :]
        if encoding.ids != prefix + bare + suffix or not all(special[start + len(bare) : -1]):
            raise ValueError(
                "post_processor must only add special tokens before and after the tokens of a text"
            )
        return prefix, suffix

    @property
    def _file_name(self) -> str:
        return "tokenizer.json"

    def _changed_vocabulary(self) -> dict[str, bytes]:
        if not self._changes.keys() & {"add_bos_token", "add_eos_token"}:
            return {}
        from tokenizers.processors import TemplateProcessing

        ids = self._prefix_ids + self._suffix_ids
        tokens = [self._model.id_to_token(i) for i in ids]
        count = len(self._prefix_ids)
        processor = TemplateProcessing(
            single=[*tokens[:count], "$A", *tokens[count:]],
            special_tokens=[*dict(zip(tokens, ids, strict=True)).items()],
        )
        contents = read_json(self.path) | {"post_processor": json.loads(processor.__getstate__())}
        return {self._file_name: json.dumps(contents, ensure_ascii=False).encode()}

    def _id_to_token(self, token_id: int) -> str | None:
        token: str | None = self._model.id_to_token(token_id)
        return token

    def _make_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        return vocab

    def _check_template_settable(self) -> None:
        pass  # transformers renders any template

    def _token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._model.token_to_id(token)
        return token_id

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Return the text of tokens."""
        decoder = self._model.decoder
        with library_errors(f"{self.path}: the tokens cannot be decoded"):
            text: str = decoder.decode(list(tokens)) if decoder else " ".join(tokens)
        return text

    def _encode(self, text: str) -> list[int]:
        with library_errors(f"{self.path}: the text cannot be encoded"):
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if not ids:  # some decoders panic on an empty list
            return ""
        with library_errors(f"{self.path}: the ids cannot be decoded"):
            text: str = self._model.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        return _WindowDecoder(self, skip_special_tokens)

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
        text = render_template(self.path, self._templates, self._names, messages, **options)
        return self._encode(text), text


def _check_merges(model: Any) -> None:
    """Raise ValueError for merges that would abort the process.

    The tokenizers library removes the prefix of the second part of a merge without a check.
    """
    match model:
        case {"continuing_subword_prefix": str(prefix), "merges": list(merges)} if prefix:
            for merge in merges:
                parts = merge.split(" ") if isinstance(merge, str) else merge
                if not (prefix.isascii() and str(parts[-1]).startswith(prefix)):
                    raise ValueError(
                        "the second part of each merge must begin with continuing_subword_prefix "
                        f"{prefix!r}, which must be ASCII, got {merge!r}"
                    )


def _growth(stage: Any) -> float:
    """Return the largest factor by which a normalizer or decoder can lengthen a text."""
    match stage:
        case {"type": "Sequence", "normalizers": list(stages)}:
            return math.prod(map(_growth, stages), start=1.0)
        case {"type": "Sequence", "decoders": list(stages)}:
            return math.prod(map(_growth, stages), start=1.0)
        case {"type": "Prepend", "prepend": str(text)}:
            return 1.0 + len(text)
        case {"type": "Replace", "content": str(text), "pattern": {"String": str(pattern)}}:
            return max(1.0, len(text) / len(pattern)) if pattern else 1.0 + len(text)
        case {"type": "Replace", "content": str(text), "pattern": {"Regex": str(pattern)}}:
            return max(1.0, len(text) + bool(text and _MAY_BE_EMPTY.search(pattern)))
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:
            charsmap = base64.b64decode(encoded)  # size of a trie, the trie, replacement texts
            texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
            return max(1.0, *(len(text.decode("utf-8", "replace")) for text in texts))
    return 1.0


class _Boundary(Enum):
    """Positions where token ids can be split so that the decoded parts join to the whole text."""

    ANYWHERE = auto()
    OUTSIDE_BYTE_TOKENS = auto()  # consecutive byte tokens are decoded together
    OUTSIDE_CHARACTERS = auto()  # not between two tokens of one UTF-8 character
    NOWHERE = auto()


def _find_boundary(decoder: Any) -> _Boundary:
    """Return the boundary of a decoder of the tokenizers library, derived from its stages."""
    boundary = _Boundary.ANYWHERE
    # Whether an earlier stage joins all tokens to one string. A later stage could then match text
    # that crosses a split.
    joined = False
    for i, stage in enumerate(_stages(json.loads(decoder.__getstate__()) if decoder else None)):
        match stage:
            case {"type": "Fuse"}:
                joined = True
            case {"type": "ByteLevel"} if i == 0:
                joined, boundary = True, _Boundary.OUTSIDE_CHARACTERS
            case {"type": "ByteFallback"} if not joined:
                boundary = _Boundary.OUTSIDE_BYTE_TOKENS
            case {"type": "Metaspace"} | {"type": "Strip", "stop": 0}:
                pass
            case {"type": "Replace", "pattern": {"String": str(pattern)}} if len(pattern) == 1:
                pass
            case {"type": "Replace" | "WordPiece" | "BPEDecoder"} if not joined:
                pass
            case _:
                return _Boundary.NOWHERE
    return boundary


def _stages(decoder: Any) -> Iterator[Any]:
    """Yield the stages of a decoder, without the nesting of sequences."""
    if decoder and decoder["type"] == "Sequence":
        for stage in decoder["decoders"]:
            yield from _stages(stage)
    elif decoder:
        yield decoder


class _WindowDecoder(StreamDecoder):
    """Decode new tokens together with the tokens before them, with the decoder of the library.

    Some decoders treat the first or the last token of a text differently. The text of any other
    token depends only on the neighbors of the token. New tokens are held until the next boundary.
    """

    def __init__(self, tokenizer: HuggingFace, skip_special_tokens: bool) -> None:
        self._tokenizer, self._known_ids = tokenizer, tokenizer._known_ids
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[int] = []
        # The last groups of tokens between two boundaries: enough groups for a nonempty text.
        # `_known` is this text.
        self._window: list[list[int]] = []
        self._known = ""

    def _feed_prompt(self, prompt_ids: list[int]) -> None:
        super()._feed_prompt(prompt_ids)
        if self._tokenizer._boundary is _Boundary.NOWHERE:
            self.flush()

    def _advance(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.all_special_ids:
            return ""
        self._held.append(token_id)
        return self.flush() if self._is_boundary(token_id) else ""

    def _is_boundary(self, token_id: int) -> bool:
        """Return whether the text can be split after this token."""
        token, kind = self._tokenizer._model.id_to_token(token_id), self._tokenizer._boundary
        if kind is _Boundary.OUTSIDE_BYTE_TOKENS:
            return "0x" not in token  # "<0xE2>"
        if kind is _Boundary.OUTSIDE_CHARACTERS:
            alphabet = _byte_level_alphabet()
            # The file holds an added token as plain text, not in the ByteLevel alphabet.
            encoded = all(c in alphabet for c in token)
            self._utf8.decode(bytes(alphabet[c] for c in token) if encoded else token.encode())
            return self._utf8.getstate()[0] == b""
        return kind is _Boundary.ANYWHERE

    def flush(self) -> str:
        """Return the text of the tokens that are held."""
        text = self._decode([*self._window, self._held])[len(self._known) :]
        self._window, self._held = [*self._window, self._held], []
        count = 1
        while not (known := self._decode(self._window[-count:])) and count < len(self._window):
            count *= 2
        self._window, self._known = self._window[-count:], known
        return text

    def _decode(self, groups: list[list[int]]) -> str:
        return self._tokenizer._decode([*itertools.chain(*groups)], self._skip)


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of a ByteLevel vocabulary (the alphabet of GPT-2).

    Printable Latin-1 characters represent their own byte. U+0100 and the following characters
    represent the other bytes, in ascending order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
