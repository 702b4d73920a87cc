"""Encode texts, and truncate, pad and convert the result, as in transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mistral_kernels.tokenizer.arguments import check_choice, check_ids, check_text
from mistral_kernels.tokenizer.errors import TokenizerError
from mistral_kernels.tokenizer.output import (
    BatchOptions,
    TokenizerOutput,
    as_tensors,
    batch_options,
    pad_rows,
    truncate,
)
from mistral_kernels.tokenizer.special_tokens import Vocabulary
from mistral_kernels.utils.unsupported import ANY_FLAG, Unsupported, check_unsupported

# Arguments of transformers' calls that are accepted only at values without effect.
UNSUPPORTED = {
    "text_pair": Unsupported(remedy="join the two texts, or call the tokenizer twice"),
    "text_target": Unsupported(remedy="call the tokenizer again with the target as text"),
    "text_pair_target": Unsupported(remedy="call the tokenizer again with the target as text"),
    "stride": Unsupported((0, None), "split the token ids into overlapping parts"),
    "is_split_into_words": Unsupported((False, None), "join the words with spaces"),
    "split_special_tokens": Unsupported(
        (False, None), "encode the text around the special tokens in parts"
    ),
    "return_token_type_ids": Unsupported((False, None), "leave it out: Mistral has no token types"),
    "return_overflowing_tokens": Unsupported(
        (False, None), "omit truncation and split the token ids"
    ),
    "return_special_tokens_mask": Unsupported(
        (False, None), "compare the token ids with all_special_ids"
    ),
    "return_offsets_mapping": Unsupported(
        (False, None), "call the tokenizer of transformers, which returns offsets"
    ),
    "sanitize_control_tokens": Unsupported((False, None), "remove the tokens from the text"),
    "tokenizer_kwargs": Unsupported((None, {}), "pass the arguments themselves"),
    "verbose": ANY_FLAG,
}


class Encoder(Vocabulary):
    """Encoder of texts and batches of texts; `MistralTokenizer` documents the attributes."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the token ids of a text without BOS and EOS."""

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> TokenizerOutput:
        """Return the `input_ids` and the `attention_mask` of one text or of several texts.

        Args:
            text: One text or a list of texts. The model's `generate` accepts lists of token ids of
                unequal lengths, which must not be padded, and padded tensors.
            text_pair: Must be None.
            add_special_tokens: Whether to add BOS and EOS to each text, as defined by the files.
            padding: True or "longest" pads each text to the length of the longest text, and
                "max_length" to `max_length`, with `pad_token_id`; the mask of padding is 0. False
                or "do_not_pad": no padding.
            truncation: True, "longest_first" or "only_first" shortens each text to `max_length`
                tokens. BOS and EOS count, and are kept. None truncates only if `max_length` is
                given without padding. False or "do_not_truncate": no truncation.
            max_length: Number of tokens; None: `model_max_length`. If that is larger than 10^20,
                texts are neither truncated nor padded to a maximum.
            options: Further arguments of transformers:

                - padding_side: "left" or "right"; None: the attribute `padding_side`.
                - pad_to_multiple_of: padded lengths are rounded up to a multiple of this number.
                - return_tensors: "pt" returns int64 tensors `(batch, seqlen)`, and "np" arrays.
                  None returns a list of ids for one text, and a list of lists for several.
                - return_attention_mask: False omits the `attention_mask`.
                - return_length: True adds `length`, the number of tokens of each text, with
                  padding.

                Others are accepted only at values without effect.

        Returns:
            A dict of `input_ids` and `attention_mask`, which are also attributes.

        Raises:
            TokenizerError: A text or an option is invalid, or `return_tensors` is given for texts
                of unequal lengths without padding.
            NotImplementedError: An option is not supported.

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
        lengths = {"padding": padding, "truncation": truncation, "max_length": max_length}
        batch = self._options(text_pair=text_pair, **lengths, **options)
        check_choice("add_special_tokens", add_special_tokens, (True, False))
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        special = None if add_special_tokens else False
        rows = [self._encode_one(each, special, special, batch.limit) for each in texts]
        return self._collate(rows, batch, isinstance(text, (list, tuple)))

    def encode(
        self,
        text: str,
        text_pair: None = None,
        add_special_tokens: bool = True,
        *,
        bos: bool | None = None,
        eos: bool | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Text to encode. The name of a special token in it, such as "</s>", is plain text
                for Mistral's own files. It becomes the token if the tokenizer is a tokenizer.json
                or has added tokens, as in transformers.
            text_pair: Must be None.
            add_special_tokens: Default of `bos` and `eos`: True means None.
            bos: Whether to put BOS before the text. None uses the default of the files: the
                post-processor of tokenizer.json, else `add_bos_token` of tokenizer_config.json,
                else True.
            eos: Whether to put EOS after the text. None uses the default of the files: the
                post-processor of tokenizer.json, else `add_eos_token` of tokenizer_config.json,
                else False.
            options: `truncation`, `max_length`, `padding`, `return_tensors` and the other options
                of calling the tokenizer.

        Returns:
            The token ids; with `return_tensors`, a tensor or an array `(1, n)`.

        Raises:
            TokenizerError: `text` is not a str or has a lone surrogate, the tokenizer has no token
                for `bos=True` or `eos=True`, or an option is invalid.
            NotImplementedError: An option is not supported.

        Example:
            >>> from mistral_kernels import MistralTokenizer
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> tokenizer.encode("It is a truth")
            [1, 592, 368, 261, 1905]
            >>> tokenizer.encode("It is a truth", bos=False, eos=True)
            [592, 368, 261, 1905, 2]
            >>> tokenizer.encode("It is a truth", truncation=True, max_length=3)
            [1, 592, 368]
        """
        check_choice("add_special_tokens", add_special_tokens, (True, False))
        if not add_special_tokens:
            bos, eos = (False if choice is None else choice for choice in (bos, eos))
        if text_pair is None and not options:
            return self._encode_one(text, bos, eos, None)
        batch = self._options(text_pair=text_pair, **options)
        row = self._encode_one(text, bos, eos, batch.limit)
        ids: list[int] = self._collate([row], batch, is_batch=False)["input_ids"]
        return ids

    def tokenize(
        self, text: str, pair: None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Return the tokens of a text as strings; for the arguments, see `encode`."""
        ids = self.encode(text, pair, add_special_tokens, **options)
        tokens: list[str] = self.convert_ids_to_tokens(ids)
        return tokens

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        **options: Any,
    ) -> TokenizerOutput:
        """Pad the `input_ids` and the `attention_mask` of one text or of several.

        This method can be the `collate_fn` of a data loader. Other items, such as labels, are
        returned as they are.

        Args:
            encoded_inputs: A dict with `input_ids`, or a list of such dicts. The values may be
                tensors.
            padding: See `__call__`, also for `max_length`.
            max_length: Number of tokens to pad to.
            options: `padding_side`, `pad_to_multiple_of`, `return_tensors` and
                `return_attention_mask`; see `__call__`.

        Returns:
            A dict of the padded items: `(batch, seqlen)`, or `(seqlen,)` for one dict.

        Raises:
            TokenizerError: `encoded_inputs` or an option is invalid.
        """
        batch = self._options(padding=padding, truncation=False, max_length=max_length, **options)
        if isinstance(encoded_inputs, Mapping):
            columns = dict(encoded_inputs)
        else:
            first = encoded_inputs[0] if encoded_inputs else {}
            if not all(isinstance(each, Mapping) for each in encoded_inputs):
                got = type(first).__name__
                raise TokenizerError(f"encoded_inputs must be a dict or a list of dicts, got {got}")
            columns = {key: [each[key] for each in encoded_inputs] for key in first}
        if "input_ids" not in columns:
            raise TokenizerError(f"encoded_inputs must have input_ids, got {list(columns)}")
        if batch.return_tensors is None:
            batch = batch._replace(return_tensors=_kind(columns["input_ids"]))
        columns = {key: _plain(value) for key, value in columns.items()}
        is_batch = any(isinstance(row, list) for row in columns["input_ids"])
        if not is_batch:
            columns = {key: [value] for key, value in columns.items()}
        rows = [check_ids(row) for row in columns.pop("input_ids")]
        if (masks := columns.pop("attention_mask", None)) is not None:
            batch = batch._replace(return_attention_mask=True)
        output = self._collate(rows, batch, is_batch, masks, columns)
        if not is_batch and batch.return_tensors is not None:
            return TokenizerOutput({name: value[0] for name, value in output.items()})
        return output

    def _options(self, **options: Any) -> BatchOptions:
        """Check the options of a call; raise an error for those that are not supported."""
        offered = batch_options.__kwdefaults__ or {}
        rest = {key: options.pop(key) for key in list(options) if key not in offered}
        check_unsupported("tokenizer", rest, UNSUPPORTED)
        return batch_options(self.model_max_length, self.padding_side, **options)

    def _encode_one(
        self, text: str, bos: bool | None, eos: bool | None, limit: int | None
    ) -> list[int]:
        """Return the token ids of a text, truncated to `limit` tokens."""
        check_text("text", text)
        prefix = self._special_ids("bos", bos, self.bos_token_id, self._prefix_ids)
        suffix = self._special_ids("eos", eos, self.eos_token_id, self._suffix_ids)
        return truncate(self._encode(text), prefix, suffix, limit, self.truncation_side)

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

    def _collate(
        self,
        rows: list[list[int]],
        options: BatchOptions,
        is_batch: bool,
        masks: list[list[int]] | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> TokenizerOutput:
        """Pad the rows of a batch, and return them as `options` requires."""
        masks = [[1] * len(row) for row in rows] if masks is None else masks
        rows, masks = pad_rows(rows, masks, self.pad_token_id, options)
        columns: dict[str, Any] = {"input_ids": rows}
        if options.return_attention_mask:
            columns["attention_mask"] = masks
        columns |= others or {}
        kind = options.return_tensors
        if not is_batch and kind is None:
            columns = {name: column[0] for name, column in columns.items()}
        if options.return_length:
            columns["length"] = [len(row) for row in rows]
        return as_tensors(columns, kind)


def _plain(value: Any) -> Any:
    """Return a column of a batch with lists instead of tensors and arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _kind(value: Any) -> str | None:
    """Return the `return_tensors` that keeps the type of a column: "pt", "np" or None."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(first, torch.Tensor):
        return "pt"
    return "np" if hasattr(first, "tolist") else None
