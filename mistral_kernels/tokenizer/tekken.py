"""Open tekken.json with the mistral-common library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.tokenizer.errors import library_errors, missing_package
from mistral_kernels.tokenizer.stream import StreamDecoder
from mistral_kernels.tokenizer.vendor import Vendor

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles

_MAX_SPECIAL_TOKENS = 1 << 20  # mistral-common allocates a name for each of them


class Tekken(Vendor):
    """Tokenizer in a tekken.json.

    Args:
        path: The file.
        contents: Parsed contents of the file.
        files: Contents of the files that accompany it.

    Raises:
        TokenizerError: The file is invalid or a package is missing.
    """

    def __init__(self, path: Path, contents: dict[str, Any], files: TokenizerFiles) -> None:
        try:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Common
        except ImportError as error:
            raise missing_package("reading", path, "mistral-common", "chat") from error
        self.path = path
        self._init_settings(files)
        with library_errors(f"{path}: not a tekken file"):
            if not 0 <= contents["config"]["default_num_special_tokens"] <= _MAX_SPECIAL_TOKENS:
                raise ValueError(f"more than {_MAX_SPECIAL_TOKENS} special tokens")
            self._instruct: Any = Common.from_file(path).instruct_tokenizer
            self._tekken: Any = self._instruct.tokenizer
            tekken = self._tekken
            special = {"bos": tekken.bos_id, "eos": tekken.eos_id, "unk": tekken.unk_id}
            special |= {"pad": tekken.pad_id} if tekken.is_special("<pad>") else {}
            self.all_special_ids = frozenset(tekken.special_ids)
        self._policies = SpecialTokenPolicy.KEEP, SpecialTokenPolicy.IGNORE
        self.vocab_size = self._vendor_size = tekken.n_words
        self._known_ids = range(self.vocab_size)
        self.chat_version = tekken.version.value
        self._names = {f"{name}_token": tekken.id_to_piece(i) for name, i in special.items()}
        own = {tekken.id_to_piece(i): i for i in self.all_special_ids}
        for name, token in files.names.items():
            token_id = own.get(token or "")
            token_id = self._token_to_id(token) if token and token_id is None else token_id
            if token and token_id is not None:
                self._names[name] = token
                special[name.removesuffix("_token")] = token_id
        self._init_special(**special)
        self._apply_flags()

    @property
    def _file_name(self) -> str:
        return "tekken.json"

    def _id_to_token(self, token_id: int) -> str | None:
        token: str = self._tekken.id_to_piece(token_id)
        return token

    def _make_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = {}
        for token_id in range(self.vocab_size):
            token = self._tekken.id_to_piece(token_id)
            is_special = token_id in self.all_special_ids
            # A token that is a part of a character has the text U+FFFD.
            if is_special or self._tekken.id_to_byte_piece(token_id) == token.encode():
                vocab[token] = token_id
        return vocab

    def _encode(self, text: str) -> list[int]:
        with library_errors(f"{self.path}: the text cannot be encoded"):
            ids: list[int] = self._tekken.encode(text, bos=False, eos=False)
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        with library_errors(f"{self.path}: the ids cannot be decoded"):
            text: str = self._tekken.decode(ids, self._policies[skip_special_tokens])
        return text

    def _stream(self, skip_special_tokens: bool) -> StreamDecoder:
        text_of: Callable[[int], str] = self._tekken.id_to_piece
        bytes_of: Callable[[int], bytes] = self._tekken.id_to_byte_piece

        def piece(token_id: int) -> bytes | str:
            if token_id in self.all_special_ids:  # a str, not bytes: it ends a sequence of bytes
                return "" if skip_special_tokens else text_of(token_id)
            return bytes_of(token_id)

        return StreamDecoder(self._known_ids, piece, "replace")

    def _instruct_tokenizer(self) -> Any:
        return self._instruct
