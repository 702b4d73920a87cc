"""Define the tokenizer interface that all three file formats share.

The formats are sentencepiece models, tekken.json and tokenizer.json.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mistral_kernels.tokenizer.arguments import (
    TokenIds,
    check_choice,
    check_ids,
)
from mistral_kernels.tokenizer.conversation import ChatEncoder
from mistral_kernels.tokenizer.errors import TokenizerError, one_line
from mistral_kernels.tokenizer.output import TokenizerOutput
from mistral_kernels.tokenizer.special_tokens import SETTABLE
from mistral_kernels.tokenizer.stream import StreamDecoder
from mistral_kernels.utils.unsupported import (
    ANY_FLAG,
    OPENING,
    Unsupported,
    check_unsupported,
)

_OMIT = "leave it out"
_OPEN_UNSUPPORTED = {
    **OPENING,
    "use_fast": ANY_FLAG,  # the fast and the slow tokenizer of transformers return the same ids
    "clean_up_tokenization_spaces": ANY_FLAG,
    "verbose": ANY_FLAG,
    "mistral_format": ANY_FLAG,
    "device_map": Unsupported((None, "auto", "cpu", "cuda"), _OMIT),
    "config": Unsupported(remedy=_OMIT),
    "tokenizer_type": Unsupported(remedy=_OMIT),
    "from_slow": Unsupported((None, False), _OMIT),
    "add_prefix_space": Unsupported(remedy="change tokenizer.json"),
    "fix_mistral_regex": Unsupported((None, False), "change the pre_tokenizer of tokenizer.json"),
    "split_special_tokens": Unsupported((None, False), "encode the text in parts"),
    "additional_special_tokens": Unsupported((None, []), "add the tokens to tokenizer.json"),
    "extra_special_tokens": Unsupported((None, []), "add the tokens to tokenizer.json"),
}
_DECODE_UNSUPPORTED = {
    "spaces_between_special_tokens": ANY_FLAG,  # only the slow tokenizer reads it
    "clean_up_tokenization_space": ANY_FLAG,  # many model cards leave out the last "s"
    "use_source_tokenizer": Unsupported((None, False)),
}


class MistralTokenizer(ChatEncoder):
    """Tokenizer of a Mistral model; open one with `from_pretrained`.

    The tokenizer is stored in a sentencepiece model, a tekken.json or a tokenizer.json. Methods and
    attributes are those of transformers.

    Attributes:
        path: File of the tokenizer.
        name_or_path: Name that `from_pretrained` was called with.
        is_fast: Whether the tokenizer is a tokenizer.json.
        vocab_size: Largest token id plus one, including special and added tokens; equal to `len`.
        bos_token: Token at the beginning of a text; None if the files define none.
        eos_token: Token at the end of a text; None if the files define none.
        pad_token: Token for padding: the one in the files, else `eos_token`.
        unk_token, sep_token, cls_token, mask_token: Further named tokens, or None. Each named token
            also has an id, for example `bos_token_id`. Tokens and ids may be set to tokens of the
            vocabulary. `add_bos_token` and `add_eos_token` may be set as well.
        padding_side: Side on which texts are padded: `padding_side` of tokenizer_config.json, else
            "left", which generation requires. (transformers pads tokenizer.json without this value
            on the right.) May be set.
        truncation_side: Side on which texts are truncated, "right" by default. May be set.
        model_max_length: Default of `max_length`; int(1e30) if the files define none. May be set.
        chat_template: Template in the folder; None if there is none. May be set, except if
            mistral-common renders the template.
        all_special_ids: Ids that `skip_special_tokens` skips.
        chat_version: Kind of the chat template. "v1", "v2", "v3", "v7", ... are Mistral's own
            templates, rendered by mistral-common. "jinja" is a template in the folder, rendered by
            transformers. None means that there is no template.

    Example:
        >>> from mistral_kernels import MistralTokenizer
        >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
        >>> len(tokenizer), tokenizer.bos_token, tokenizer.eos_token_id
        (2048, '<s>', 2)
        >>> ids = tokenizer.encode("It is a truth")
        >>> ids
        [1, 592, 368, 261, 1905]
        >>> tokenizer.decode(ids, skip_special_tokens=True)
        'It is a truth'
        >>> tokenizer.convert_ids_to_tokens(ids)
        ['<s>', '\u2581It', '\u2581is', '\u2581a', '\u2581truth']
        >>> tokenizer.pad_token = tokenizer.unk_token
        >>> tokenizer(["It is", "It"], padding=True, padding_side="right").input_ids
        [[1, 592, 368], [1, 592, 0]]
    """

    _prefers_json = False

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def _stream(self, skip_special_tokens: bool) -> StreamDecoder: ...

    def _set_legacy(self, legacy: bool) -> None:
        """Set whether a space precedes the text after an added token of a sentencepiece model."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        legacy: bool | None = None,
        **settings: Any,
    ) -> MistralTokenizer:
        """Open the tokenizer in a file or a folder, or of a hub model.

        If a folder holds several tokenizers, the first of these is opened: tekken.json, the
        sentencepiece model of the highest version, tokenizer.json. A fine-tuned model is an
        exception: if its files define tokens that Mistral's own file lacks, or a chat template that
        is not Mistral's, tokenizer.json is opened. If there is no tokenizer.json, the tokens of
        tokenizer_config.json or added_tokens.json are added to the sentencepiece model, as in
        transformers. `AutoTokenizer` opens tokenizer.json first.

        Args:
            pretrained_model_name_or_path: A tokenizer file, a folder, `"tiny"` (the bundled model)
                or a hub id; see `mistral_kernels.checkpoint.resolve`.
            revision: Branch, tag or commit of the hub model; None: its main branch.
            cache_dir: Folder of downloaded files; None: the default of huggingface_hub.
            token: Access token of the hub; None: that of `hf auth login`.
            local_files_only: Whether to use only files that were downloaded before.
            force_download: Whether to download files again.
            legacy: Whether a space precedes the text after an added token of a sentencepiece
                model; None: as in the files, else True.
            settings: Initial values of the attributes that may be set, such as `padding_side`,
                `model_max_length`, `add_eos_token` or `pad_token`; None: as in the files. Other
                arguments of transformers are accepted at values without effect, such as
                `use_fast=False` and `trust_remote_code=True`.

        Returns:
            The opened tokenizer.

        Raises:
            TokenizerError: The path does not exist, the folder holds no tokenizer, a file is
                damaged, too large or not a regular file, a package is missing, or a setting is
                invalid.
            NotImplementedError: An argument of transformers is not supported.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny", add_eos_token=True)
            >>> tokenizer.path.name
            'tokenizer.model'
            >>> tokenizer.encode("It is a truth")
            [1, 592, 368, 261, 1905, 2]
        """
        from mistral_kernels.checkpoint import CheckpointError
        from mistral_kernels.tokenizer.opening import open_tokenizer

        rest = {name: value for name, value in settings.items() if name not in SETTABLE}
        check_unsupported("from_pretrained", rest, _OPEN_UNSUPPORTED)
        check_choice("legacy", legacy, (None, True, False))
        try:
            tokenizer = open_tokenizer(
                pretrained_model_name_or_path,
                prefer_json=cls._prefers_json,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        except (CheckpointError, OSError) as error:
            raise TokenizerError(one_line(error)) from error
        tokenizer.__dict__["name_or_path"] = str(pretrained_model_name_or_path)
        for name in SETTABLE:  # the tokens before the flags that use them
            if settings.get(name) is not None:
                setattr(tokenizer, name, settings[name])
        if legacy is not None:
            tokenizer._set_legacy(legacy)
            tokenizer._changes["legacy"] = legacy
        return tokenizer

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> tuple[str, ...]:
        """Write the files of the tokenizer to a folder, which may hold a model already.

        Attributes that were set are written to tokenizer_config.json. Other files are copied. If
        writing fails, the folder is unchanged.

        Args:
            save_directory: The folder; created if it does not exist.
            options: Accepted as in transformers at values without effect, such as
                `push_to_hub=False`.

        Returns:
            The paths of the files.

        Raises:
            TokenizerError: The folder holds another tokenizer, or a file cannot be read or written.
            NotImplementedError: An option is not supported.
        """
        from mistral_kernels.tokenizer.saving import save_tokenizer

        return save_tokenizer(self, Path(save_directory), options)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"MistralTokenizer({str(self.path)!r}, vocab_size={self.vocab_size}, "
            f"chat_version={self.chat_version!r})"
        )

    def decode(
        self,
        token_ids: TokenIds,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> str:
        """Return the text of token ids.

        Args:
            token_ids: A list of token ids, an integer tensor `(n,)`, one id, or the output of a
                call with one text. The vocabulary of a model may be larger than that of the
                tokenizer. An id without a token therefore has no text, as in transformers.
            skip_special_tokens: Whether to omit special tokens. Otherwise their names are part of
                the text.
            clean_up_tokenization_spaces: Accepted without effect, as in transformers 5 for BPE, the
                algorithm of Mistral's vocabularies.
            options: Accepted as in transformers at values without effect.

        Returns:
            The text. Bytes that are not valid UTF-8 become U+FFFD, as many as in the library of the
            tokenizer.

        Raises:
            TokenizerError: An id is not an integer or is negative.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> tokenizer.decode([1, 592, 368, 261, 1905])
            '<s>It is a truth'
            >>> tokenizer.decode([1, 592, 368, 261, 1905], skip_special_tokens=True)
            'It is a truth'
        """
        check_choice("skip_special_tokens", skip_special_tokens, (True, False))
        check_choice(
            "clean_up_tokenization_spaces", clean_up_tokenization_spaces, (True, False, None)
        )
        check_unsupported("decode", options, _DECODE_UNSUPPORTED)
        ids = token_ids["input_ids"] if isinstance(token_ids, TokenizerOutput) else token_ids
        known = [i for i in check_ids(ids) if i in self._known_ids]
        return self._decode(known, skip_special_tokens)

    def batch_decode(
        self,
        sequences: Iterable[TokenIds],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """Return the text of each row of a tensor `(batch, n)` or of each item of a list.

        Args:
            sequences: The rows; a list of ids `(n,)` is one row. For the other arguments, see
                `decode`.
            skip_special_tokens: Whether to omit special tokens.
            clean_up_tokenization_spaces: Accepted without effect.
            options: Accepted as in transformers at values without effect.

        Raises:
            TokenizerError: `sequences` is not a list of rows, or an id is not an integer or is
                negative.
        """
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise TokenizerError(
                f"sequences must be lists of token ids, got {type(sequences).__name__}"
            )
        options["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        if rows and not any(isinstance(row, Iterable) for row in rows):
            rows = [rows]  # the ids of one text, as in transformers 5
        return [self.decode(ids, skip_special_tokens, **options) for ids in rows]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Return the text of tokens."""
        ids: list[int] = self.convert_tokens_to_ids(list(tokens))
        return self.decode(ids)

    def stream(
        self, prompt_ids: TokenIds = (), *, skip_special_tokens: bool = True
    ) -> StreamDecoder:
        """Return a decoder for tokens that arrive one by one.

        Args:
            prompt_ids: Tokens before the first pushed token. Their text is not returned, but it
                affects the result: a space before the first word is kept only after a prompt.
            skip_special_tokens: Whether to omit special tokens from the text.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> stream = tokenizer.stream(tokenizer.encode("It is"))
            >>> [stream.push(token_id) for token_id in [261, 1905]] + [stream.flush()]
            [' a', ' truth', '']
        """
        check_choice("skip_special_tokens", skip_special_tokens, (True, False))
        stream = self._stream(skip_special_tokens)
        stream._feed_prompt([i for i in check_ids(prompt_ids) if i in self._known_ids])
        return stream
