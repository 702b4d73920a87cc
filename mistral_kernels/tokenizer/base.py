"""Define the tokenizer interface that all three file formats share.

The formats are sentencepiece models, tekken.json and tokenizer.json.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mistral_kernels.tokenizer.arguments import (
    TokenIds,
    check_choice,
    check_id,
    check_ids,
    check_text,
)
from mistral_kernels.tokenizer.errors import (
    TokenizerError,
    one_line,
)
from mistral_kernels.tokenizer.stream import StreamDecoder

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles

_PADDING = {True: True, "longest": True, False: False, "do_not_pad": False}


class TokenizerOutput(dict[str, Any]):
    """Dict of `input_ids` and `attention_mask`, whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str | int) -> TokenizerOutput:
        """Return a copy whose tensors are on `device`."""
        return TokenizerOutput(
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        )


class MistralTokenizer(ABC):
    """Tokenizer of a Mistral model; open one with `from_pretrained`.

    The tokenizer is stored in a sentencepiece model, a tekken.json or a tokenizer.json.

    Attributes:
        path: File of the tokenizer.
        vocab_size: Largest token id plus one, including special and added tokens; equal to `len`.
        bos_token_id: Token at the beginning of a text; None if the files define none.
        eos_token_id: Token at the end of a text; None if the files define none.
        pad_token_id: Token for padding: the one in the files, else `eos_token_id`. This attribute
            may be set; all others are read-only.
        all_special_ids: Ids that `skip_special_tokens` skips.
        chat_version: Kind of the chat template. "v1", "v2", "v3", "v7", ... are Mistral's own
            templates, rendered by mistral-common. "jinja" is a template in the folder, rendered by
            transformers. None means that there is no template.

    Example:
        >>> from mistral_kernels import MistralTokenizer
        >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
        >>> len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
        (2048, 1, 2)
        >>> ids = tokenizer.encode("It is a truth")
        >>> ids
        [1, 592, 368, 261, 1905]
        >>> tokenizer.decode(ids, skip_special_tokens=True)
        'It is a truth'
    """

    path: Path
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: frozenset[int]
    chat_version: str | None
    # Ids put before and after a text by default, and the ids that have a token.
    _prefix_ids: list[int]
    _suffix_ids: list[int]
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
        """Open the tokenizer in a file or a folder, or of a hub model.

        If a folder holds several tokenizers, the first of these is opened: tekken.json, the
        sentencepiece model of the highest version, tokenizer.json. A fine-tuned model is an
        exception: if its files define tokens that Mistral's own file lacks, or a chat template that
        is not Mistral's, tokenizer.json is opened. If there is no tokenizer.json, the tokens of
        tokenizer_config.json or added_tokens.json are added to the sentencepiece model, as in
        transformers.

        Args:
            path: A tokenizer file, a folder, `"tiny"` (the bundled model) or a hub id; see
                `mistral_kernels.checkpoint.resolve`.

        Returns:
            The opened tokenizer.

        Raises:
            TokenizerError: The path does not exist, the folder holds no tokenizer, a file is
                damaged, too large or not a regular file, or a package is missing.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> tokenizer.path.name
            'tokenizer.model'
            >>> tokenizer.encode("It is a truth", bos=False)
            [592, 368, 261, 1905]
        """
        from mistral_kernels.checkpoint import CheckpointError
        from mistral_kernels.tokenizer.opening import open_tokenizer

        try:
            return open_tokenizer(path)
        except (CheckpointError, OSError) as error:
            raise TokenizerError(one_line(error)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        is_new = name in MistralTokenizer.__annotations__ and name not in self.__dict__
        if not (is_new or name == "pad_token_id" or name.startswith("_")):
            raise AttributeError(
                f"{name} of a tokenizer cannot be set; only pad_token_id can be set"
            )
        if name == "pad_token_id" and value is not None:
            value = check_id(value)
        super().__setattr__(name, value)

    @property
    def has_chat_template(self) -> bool:
        """True if the files appear to be those of an Instruct model.

        If the folder has a tokenizer_config.json or a chat template: whether there is a template.
        Otherwise the vocabulary and the name of the file decide, but base and Instruct models may
        share a file. The value is False for the plain `tokenizer.model` of Mistral-7B v0.1 and
        v0.2, and True for that of v0.3.
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
        """Return the `input_ids` and the `attention_mask` of one text or of several texts.

        Args:
            text: One text or a list of texts. Padding is not required for `generate` of the model,
                which accepts token lists of unequal lengths.
            add_special_tokens: Whether to add BOS and EOS to each text, as defined by the files.
            padding: True or "longest" pads each text on the left with `pad_token_id` to the length
                of the longest text; the mask of padding is 0. False or "do_not_pad": no padding.
            return_tensors: "pt" returns int64 tensors `(batch, seqlen)`. None returns a list of
                ids for one text, and a list of lists for several.

        Returns:
            A dict of `input_ids` and `attention_mask`, which are also attributes.

        Raises:
            TokenizerError: A text or an option is invalid, or texts of unequal lengths are to be
                returned as a tensor without padding.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> inputs = tokenizer(["It is", "It is a truth"], padding=True, return_tensors="pt")
            >>> inputs.input_ids
            tensor([[   2,    2,    1,  592,  368],
                    [   1,  592,  368,  261, 1905]])
            >>> inputs.attention_mask
            tensor([[0, 0, 1, 1, 1],
                    [1, 1, 1, 1, 1]])
        """
        check_choice("return_tensors", return_tensors, (None, "pt"))
        check_choice("padding", padding, tuple(_PADDING))
        check_choice("add_special_tokens", add_special_tokens, (True, False))
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        special = None if add_special_tokens else False
        rows = [self.encode(t, bos=special, eos=special) for t in texts]
        masks = [[1] * len(row) for row in rows]
        if _PADDING[padding] and rows:
            if self.pad_token_id is None:
                raise TokenizerError(
                    f"padding must be False: {self.path} has neither a padding token nor EOS; "
                    "set pad_token_id"
                )
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
                f'return_tensors="pt" requires texts of equal length, got {len(rows)} texts of '
                f"{sorted(map(len, rows))} tokens: pass padding=True, or omit return_tensors and "
                "pass the lists to the model"
            )
        return TokenizerOutput(
            input_ids=torch.tensor(rows, dtype=torch.int64),
            attention_mask=torch.tensor(masks, dtype=torch.int64),
        )

    def encode(self, text: str, *, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Text to encode. The name of a special token in it, such as "</s>", is plain text
                for Mistral's own files. It becomes the token if the tokenizer is a tokenizer.json
                or has added tokens, as in transformers.
            bos: Whether to put BOS before the text. None uses the default of the files: the
                post-processor of tokenizer.json, else `add_bos_token` of tokenizer_config.json,
                else True.
            eos: Whether to put EOS after the text. None uses the default of the files: the
                post-processor of tokenizer.json, else `add_eos_token` of tokenizer_config.json,
                else False.

        Returns:
            The token ids.

        Raises:
            TokenizerError: `text` is not a str or has a lone surrogate, or the tokenizer has no
                token for `bos=True` or `eos=True`.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> tokenizer.encode("It is a truth")
            [1, 592, 368, 261, 1905]
            >>> tokenizer.encode("It is a truth", bos=False, eos=True)
            [592, 368, 261, 1905, 2]
        """
        check_text("text", text)
        prefix = self._special_ids("bos", bos, self.bos_token_id, self._prefix_ids)
        suffix = self._special_ids("eos", eos, self.eos_token_id, self._suffix_ids)
        return prefix + self._encode(text) + suffix

    def _special_ids(
        self, name: str, choice: bool | None, token_id: int | None, default: list[int]
    ) -> list[int]:
        """Return the ids to put on one side of a text: those of `default` if `choice` is None."""
        check_choice(name, choice, (None, True, False))
        if choice is None:
            return default
        if not choice:
            return []
        if token_id is None:
            raise TokenizerError(
                f"{name} must be None or False, got True: {self.path} has no {name.upper()} token"
            )
        return [token_id]

    def decode(self, ids: TokenIds, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids.

        Args:
            ids: A list of token ids, an integer tensor `(n,)` or one id. An id without a token has
                no text, as in transformers: the vocabulary of a model may be padded.
            skip_special_tokens: Whether to omit special tokens. Otherwise their names are part of
                the text.

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
        known = [i for i in check_ids(ids) if i in self._known_ids]
        return self._decode(known, skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[TokenIds], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each row of a tensor `(batch, n)` or of each item of a list."""
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise TokenizerError(
                f"sequences must be lists of token ids, got {type(sequences).__name__}"
            )
        return [self.decode(ids, skip_special_tokens) for ids in rows]

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
        """Render a conversation with the chat template of the model.

        A template in a folder is code. The sandbox of jinja denies it access to files and the
        network, but does not limit its time and memory.

        Args:
            messages: The conversation, `[{"role": "user", "content": "..."}, ...]`. A key whose
                value is None counts as absent.
            tools: Functions that the model may call, as JSON schemas.
            documents: Documents that the model may quote; only for a template in a folder.
            chat_template: A template, or the name of one of several templates in the folder; only
                for a template in a folder.
            tokenize: Whether to return token ids. False returns the text, which is meant for
                reading only: `encode` of it may return other ids.
            add_generation_prompt: Whether to end where the answer of the assistant begins.
                Mistral's own templates always end there. With these templates, False has one
                effect: the last message may be an answer of the assistant, as in training data.
            return_tensors: "pt" returns an int64 tensor `(1, n)`; None returns a list.
            return_dict: Whether to return a `TokenizerOutput` with `input_ids` and
                `attention_mask`.

        Returns:
            The token ids, a `TokenizerOutput` or the text.

        Raises:
            TokenizerError: There is no template, a role is unknown or out of order, or the template
                raises another error.
        """
        expected = 'messages must be a list of {"role": ..., "content": ...}'
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
            raise TokenizerError(f"{expected}, got {type(messages).__name__}")
        messages = list(messages)
        for message in messages:
            if not isinstance(message, Mapping):
                raise TokenizerError(f"{expected}, got {type(message).__name__} in it")
            if isinstance(message.get("content"), str):
                check_text("messages: content", message["content"])
        check_choice("return_tensors", return_tensors, (None, "pt"))
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
