"""Output of a tokenizer, and the lengths to which texts are truncated and padded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from mistral_kernels.tokenizer.arguments import check_choice, check_count
from mistral_kernels.tokenizer.errors import TokenizerError

_LARGE = 10**20  # a larger model_max_length means that there is no maximum, as in transformers
_PADDING = (True, "longest", "max_length", False, "do_not_pad")
_TRUNCATION = (None, False, "do_not_truncate", True, "longest_first", "only_first")
SIDES = ("left", "right")


class TokenizerOutput(dict[str, Any]):
    """Dict of `input_ids` and `attention_mask`, whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def shape(self) -> torch.Size:
        """Shape of `input_ids`.

        In transformers 4, `apply_chat_template` returns a tensor. Code for it reads the shape.
        """
        shape: torch.Size = self.input_ids.shape
        return shape

    def to(self, device: torch.device | str | int, **options: Any) -> TokenizerOutput:
        """Move the tensors to `device` and return this object, as transformers does.

        Args:
            device: The device.
            options: Keyword arguments of `torch.Tensor.to`, such as `non_blocking`.
        """
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, **options)
        return self


class BatchOptions(NamedTuple):
    """Options of a call, after the defaults are applied.

    Attributes:
        limit: Number of tokens to truncate a text to, with its special tokens; None: no limit.
        padding: "longest", the number of tokens to pad to, or None.
        multiple: The padded length is rounded up to a multiple of this number.
        padding_side: "left" or "right".
        return_tensors: "pt", "np" or None.
        return_attention_mask: Whether the output has an attention mask.
        return_length: Whether the output has the number of tokens of each text, with padding.
    """

    limit: int | None
    padding: Literal["longest"] | int | None
    multiple: int
    padding_side: str
    return_tensors: str | None
    return_attention_mask: bool
    return_length: bool


def batch_options(
    model_max_length: int,
    default_padding_side: str,
    *,
    padding: bool | str = False,
    truncation: bool | str | None = None,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_tensors: str | None = None,
    return_attention_mask: bool | None = None,
    return_length: bool = False,
) -> BatchOptions:
    """Check the options of a call and apply their defaults, as transformers does.

    Args:
        model_max_length: Default of `max_length`.
        default_padding_side: Default of `padding_side`.
        padding: See `MistralTokenizer.__call__`, also for the other arguments.
        truncation: Whether to truncate. None truncates only if `max_length` alone is given.
        max_length: Number of tokens.
        pad_to_multiple_of: The padded length is rounded up to a multiple of this number.
        padding_side: "left" or "right".
        return_tensors: "pt", "np" or None.
        return_attention_mask: None means True.
        return_length: Whether to return the lengths.

    Raises:
        TokenizerError: A value is invalid.
    """
    check_choice("padding", padding, _PADDING)
    check_choice("truncation", truncation, _TRUNCATION)
    check_choice("padding_side", padding_side, (None, *SIDES))
    check_choice("return_tensors", return_tensors, (None, "pt", "np"))
    check_choice("return_attention_mask", return_attention_mask, (None, True, False))
    check_choice("return_length", return_length, (True, False))
    for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is not None:
            check_count(name, value)
    only_max_length = max_length is not None and padding is False and truncation is None
    truncates = only_max_length or truncation not in (None, False, "do_not_truncate")
    if padding is True and max_length is not None and not truncates:
        warnings.warn(
            'max_length is ignored with padding=True and without truncation; padding="max_length" '
            "pads to max_length",
            stacklevel=4,
        )
    length = model_max_length if max_length is None else max_length
    bounded = max_length is not None or model_max_length <= _LARGE
    pad_to: Literal["longest"] | int | None = None
    if padding in (True, "longest"):
        pad_to = "longest"
    elif padding == "max_length" and bounded:
        pad_to = length
    limit = length if truncates and bounded else None
    multiple = pad_to_multiple_of or 1
    if limit is not None and pad_to is not None and limit % multiple:
        raise TokenizerError(
            f"max_length must be a multiple of pad_to_multiple_of ({multiple}) with truncation and "
            f"padding, got {limit}"
        )
    return BatchOptions(
        limit,
        pad_to,
        multiple,
        padding_side or default_padding_side,
        return_tensors,
        return_attention_mask is not False,
        return_length,
    )


def truncate(
    ids: list[int], prefix: list[int], suffix: list[int], limit: int | None, side: str
) -> list[int]:
    """Return `prefix + ids + suffix`; if it is longer than `limit`, `ids` is shortened on `side`.

    Raises:
        TokenizerError: `limit` is less than the number of tokens in `prefix` and `suffix`.
    """
    if limit is not None:
        room = limit - len(prefix) - len(suffix)
        if room < 0:
            raise TokenizerError(
                f"max_length must be at least {limit - room}, the number of special tokens of a "
                f"text, got {limit}; add_special_tokens=False omits them"
            )
        ids = ids[:room] if side == "right" else ids[max(0, len(ids) - room) :]
    return prefix + ids + suffix


def pad_rows(
    rows: list[list[int]], masks: list[list[int]], pad_id: int | None, options: BatchOptions
) -> tuple[list[list[int]], list[list[int]]]:
    """Pad token ids with `pad_id`, and masks with 0, to the length that `options` requires.

    Raises:
        TokenizerError: Padding is requested and `pad_id` is None.
    """
    if options.padding is None or not rows:
        return rows, masks
    if pad_id is None:
        raise TokenizerError(
            "padding must be False: the tokenizer has neither a padding token nor EOS; "
            "set pad_token"
        )
    length = max(map(len, rows)) if options.padding == "longest" else options.padding
    length += -length % options.multiple

    def padded(row: list[int], value: int) -> list[int]:
        gap = [value] * (length - len(row))
        return gap + row if options.padding_side == "left" else row + gap

    return [padded(row, pad_id) for row in rows], [padded(mask, 0) for mask in masks]


def as_tensors(columns: Mapping[str, Sequence[Any]], kind: str | None) -> TokenizerOutput:
    """Return the columns of a batch as tensors ("pt"), as arrays ("np") or as they are (None).

    Raises:
        TokenizerError: The rows of a column have unequal lengths, or are not numbers.
    """
    if kind is None:
        return TokenizerOutput(columns)
    rows = columns["input_ids"]
    if len({len(row) for row in rows}) != 1:
        raise TokenizerError(
            f'return_tensors="{kind}" requires texts of equal length, got {len(rows)} texts of '
            f"{sorted(map(len, rows))} tokens: pass padding=True, or omit return_tensors and pass "
            "the lists to the model"
        )
    out = TokenizerOutput()
    for name, column in columns.items():
        try:
            # Other columns, such as labels, may hold floats. input_ids must be int64 even if all
            # rows are empty, for which torch.tensor returns float32.
            tensor = torch.tensor(column, dtype=torch.int64 if name == "input_ids" else None)
        except (ValueError, TypeError, RuntimeError):
            raise TokenizerError(
                f'return_tensors="{kind}" requires numbers and rows of equal length in {name!r}; '
                "only input_ids and attention_mask are padded"
            ) from None
        is_mask = name == "attention_mask"
        tensor = tensor.to(torch.int64) if is_mask else tensor
        out[name] = tensor if kind == "pt" else tensor.numpy()
    return out
