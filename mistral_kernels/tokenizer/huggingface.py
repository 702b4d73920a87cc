"""tokenizer.json, by Hugging Face's tokenizers."""

from __future__ import annotations

import base64
import codecs
import functools
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.tokenizer.base import (
    MistralTokenizer,
    StreamDecoder,
    TokenizerError,
    library_errors,
    missing_package,
)
from mistral_kernels.tokenizer.chat import render_template

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles


_MAX_GROWTH = 10_000
# Parts of regular expressions that match the empty string, which occurs beside every character.
_MAY_BE_EMPTY = re.compile(r"^$|[*?|^$]|\(\)|\{0*,|\{0+[,}]|\\[AbBGKyYzZ]")


class HuggingFace(MistralTokenizer):
    """A tokenizer.json."""

    def __init__(self, path: Path, contents: dict[str, Any], files: TokenizerFiles) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise missing_package("reading", path, "tokenizers", "hf") from error
        self.path, self._files = path, files
        with library_errors(f"{path}: not a tokenizer.json"):
            _check_merges(contents.get("model"))
            for part in ("normalizer", "decoder"):
                if (growth := _growth(contents.get(part))) > _MAX_GROWTH:
                    raise TokenizerError(
                        f"{path}: {part} must make a text at most {_MAX_GROWTH} times as long, its "
                        f"stages can make it {growth:.3g} times as long"
                    )
            self._model: Any = tokenizers.Tokenizer.from_str(json.dumps(contents))
            # Left in the file by training scripts: a prompt must not be cut in silence.
            model = self._model
            model.no_truncation()
            model.no_padding()
            self._add_tokens()
            vocab = model.get_vocab(with_added_tokens=True)
            added = model.get_added_tokens_decoder()
            self._before, self._behind = self._find_around(vocab)
            self._boundary = _find_boundary(model.decoder)
        self._known_ids = frozenset(vocab.values())
        self.vocab_size = max(self._known_ids, default=-1) + 1
        # The library skips by name, and a normalizer may have changed that of an added token.
        special = {token.content for token in added.values() if token.special}
        self.all_special_ids = frozenset(i for i in added if model.id_to_token(i) in special)
        self._names = files.names_with_usual(vocab)
        self.bos_token_id, self.eos_token_id, pad = (
            vocab.get(self._names.get(f"{name}_token", "")) for name in ("bos", "eos", "pad")
        )
        self.pad_token_id = self.eos_token_id if pad is None else pad
        self.chat_version = "jinja" if files.templates else None

    def _add_tokens(self) -> None:
        """Add the tokens that the files beside tokenizer.json have, as transformers does."""
        from tokenizers import AddedToken

        model, files = self._model, self._files
        new = [x for x in files.added.items() if model.token_to_id(x[1].content) is None]
        model.add_tokens([AddedToken(**asdict(token)) for token in files.added.values()])
        for token_id, token in new:
            if (actual := model.token_to_id(token.content)) != token_id:
                raise TokenizerError(
                    f"{self.path}: the added token {reprlib.repr(token.content)} must have the id "
                    f"{token_id} of the file that adds it, got {actual}"
                )
        added = model.get_added_tokens_decoder().values()
        missing = files.special.keys() - {token.content for token in added if token.special}
        special = [token for token in files.special.values() if token.content in missing]
        model.add_special_tokens([AddedToken(**asdict(token)) for token in special])

    def _find_around(self, vocab: dict[str, int]) -> tuple[list[int], list[int]]:
        """Return what the post-processor puts before and behind a text."""
        bare: list[int] = []
        for text in itertools.chain("a", itertools.islice(vocab, 100)):
            bare = self._model.encode(text, add_special_tokens=False).ids
            if bare:
                break
        encoding = self._model.encode(text)
        special = [*encoding.special_tokens_mask, 0]
        start = special.index(0)
        before, behind = encoding.ids[:start], encoding.ids[start + len(bare) :]
        if encoding.ids != before + bare + behind or not all(special[start + len(bare) : -1]):
            raise ValueError("its post-processor does more than to put tokens around a text")
        return before, behind

    def _encode(self, text: str) -> list[int]:
        with library_errors(f"{self.path}: the text cannot be encoded"):
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if not ids:  # on which some decoders panic
            return ""
        with library_errors(f"{self.path}: the ids cannot be decoded"):
            text: str = self._model.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        return _WindowDecoder(self, skip_special_tokens)

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
        text = render_template(self.path, self._files, self._names, messages, **options)
        return self._encode(text), text


def _check_merges(model: Any) -> None:
    """Refuse merges that abort the process: tokenizers cuts their prefix off without a check."""
    match model:
        case {"continuing_subword_prefix": str(prefix), "merges": list(merges)} if prefix:
            for merge in merges:
                parts = merge.split(" ") if isinstance(merge, str) else merge
                if not (prefix.isascii() and str(parts[-1]).startswith(prefix)):
                    raise ValueError(f"a merge must end in {prefix!r} and more, got {merge!r}")


def _growth(stage: Any) -> float:
    """Return how many times as long a normalizer or decoder can make a text of one character."""
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
            charsmap = base64.b64decode(encoded)  # the size of a trie, the trie, texts
            texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
            return max(1.0, *(len(text.decode("utf-8", "replace")) for text in texts))
    return 1.0


class _Boundary(Enum):
    """Return where to cut a text so that its parts, decoded one after another, join to the text."""

    ANYWHERE = auto()
    OUTSIDE_BYTE_TOKENS = auto()  # a run of them is decoded as a whole
    OUTSIDE_CHARACTERS = auto()
    NOWHERE = auto()


def _find_boundary(decoder: Any) -> _Boundary:
    """Go through the stages of a tokenizer.json's decoder."""
    boundary = _Boundary.ANYWHERE
    joined = False  # into one string, in which a later stage could find what crosses a cut
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
    if decoder and decoder["type"] == "Sequence":
        for stage in decoder["decoders"]:
            yield from _stages(stage)
    elif decoder:
        yield decoder


class _WindowDecoder(StreamDecoder):
    """Decode new tokens behind the ones before them, by the library's own decoder.

    Some decoders treat the first or the last token of a text differently; between the two, the text
    of a token depends on its neighbors alone. New tokens are held until there is a boundary.
    """

    def __init__(self, tokenizer: HuggingFace, skip_special_tokens: bool) -> None:
        self._tokenizer: HuggingFace = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[int] = []
        # The last tokens between boundaries, as few as have any text, and that text.
        self._window: list[list[int]] = []
        self._known = ""

    def _start_behind(self, prompt_ids: list[int]) -> None:
        super()._start_behind(prompt_ids)
        if self._tokenizer._boundary is _Boundary.NOWHERE:
            self.flush()

    def _advance(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.all_special_ids:
            return ""
        self._held.append(token_id)
        return self.flush() if self._is_boundary(token_id) else ""

    def _is_boundary(self, token_id: int) -> bool:
        token, kind = self._tokenizer._model.id_to_token(token_id), self._tokenizer._boundary
        if kind is _Boundary.OUTSIDE_BYTE_TOKENS:
            return "0x" not in token  # "<0xE2>"
        if kind is _Boundary.OUTSIDE_CHARACTERS:
            alphabet = _byte_level_alphabet()
            # An added token is in the file as plain text.
            encoded = all(c in alphabet for c in token)
            self._utf8.decode(bytes(alphabet[c] for c in token) if encoded else token.encode())
            return self._utf8.getstate()[0] == b""
        return kind is _Boundary.ANYWHERE

    def flush(self) -> str:
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
    """Return the byte of each character of a ByteLevel vocabulary (GPT-2's alphabet).

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
