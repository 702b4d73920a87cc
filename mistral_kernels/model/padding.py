"""Checks of a padded batch, and its division into packed sequences."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.model.cache import Packing
from mistral_kernels.utils.unsupported import TRANSFORMERS


def check_input_ids(input_ids: Any) -> None:
    """Raise an error unless `input_ids` is a tensor, (batch, seqlen), of integers."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids must be (batch, seqlen) and not empty, got {tuple(input_ids.shape)}"
        )


def kept_tokens(attention_mask: Any, input_ids: Tensor) -> Tensor:
    """Check an attention mask, and return it as booleans on the CPU, (batch, seqlen).

    Raises:
        TypeError: the mask is not a tensor.
        ValueError: the mask is on the meta device, has another shape than `input_ids`, other values
            than 0 and 1, or no 1.
    """
    if not isinstance(attention_mask, Tensor):
        got = type(attention_mask).__name__
        # The second argument of transformers' generate.
        remedy = "; give generation_config by its name" if got == "GenerationConfig" else ""
        raise TypeError(f"attention_mask must be a tensor, got {got}{remedy}")
    if attention_mask.is_meta:
        raise ValueError("attention_mask must have values, got a tensor on meta")
    if attention_mask.shape != input_ids.shape:
        remedy = f"; {TRANSFORMERS}" if attention_mask.ndim > 2 else ""
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} like input_ids, got "
            f"{tuple(attention_mask.shape)}{remedy}"
        )
    mask = attention_mask.cpu()
    kept = mask.bool()
    if not torch.equal(mask, kept.to(mask.dtype)):
        other = mask[mask != kept][0].item()
        raise ValueError(f"attention_mask must be 0 for padding and 1 for tokens, got {other}")
    if not kept.any():
        raise ValueError("attention_mask must be 1 for at least one token, got only zeros")
    return kept


def check_position_ids(position_ids: Any, input_ids: Tensor, kept: Tensor | None) -> None:
    """Raise an error unless each row's positions count up by one from column to column.

    The model then does not need the positions: rotary embeddings depend only on their differences.

    Args:
        position_ids: (batch, seqlen) or (1, seqlen).
        input_ids: (batch, seqlen).
        kept: (batch, seqlen) booleans on the CPU, False for padding, whose positions are not
            checked; None: no padding.

    Raises:
        TypeError: `position_ids` is not a tensor.
        ValueError: `position_ids` has another shape.
        NotImplementedError: the positions of a row skip or repeat a number.
    """
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids must be a tensor, got {type(position_ids).__name__}")
    batch, seqlen = input_ids.shape
    if position_ids.shape not in ((batch, seqlen), (1, seqlen)):
        raise ValueError(
            f"position_ids must be {(batch, seqlen)} or {(1, seqlen)}, got "
            f"{tuple(position_ids.shape)}"
        )
    starts = (position_ids.cpu() - torch.arange(seqlen)).expand(batch, seqlen)
    for row, row_starts in enumerate(starts):
        found = row_starts if kept is None else row_starts[kept[row]]
        if len(found) and (found != found[0]).any():
            got = reprlib.repr(position_ids[row % len(position_ids)].tolist())
            raise NotImplementedError(
                f"position_ids must count up by one from column to column, got {got}; leave out "
                f"position_ids, or {TRANSFORMERS}"
            )


def unpadded_packing(
    kept: Tensor, layer_windows: Sequence[int | None], device: torch.device
) -> tuple[Packing, Tensor]:
    """Return the packing of the tokens that a mask keeps, and their indices in the flat batch.

    The positions of a row count from its first token, as if the row had no padding before it.

    Args:
        kept: (batch, seqlen) booleans on the CPU, at least one True.
        layer_windows: sliding window of each layer; None: none.
        device: device of the results.

    Returns:
        The packing, and (total_tokens,) int64.

    Raises:
        NotImplementedError: a row has padding between its tokens, and spans more columns than a
            window. In a packed sequence, the window would count the tokens instead of the columns.
    """
    kept_rows = kept[kept.any(1)]
    rows, columns = kept_rows.nonzero(as_tuple=True)
    seqlens = kept_rows.sum(1)
    # argmax returns the index of the first of equal values: in a row, that of the first token; in a
    # flipped row, that of the last.
    first = kept_rows.int().argmax(1)
    spans = kept.shape[1] - kept_rows.flip(1).int().argmax(1) - first
    packing = Packing.of(seqlens.tolist(), [0] * len(seqlens), device)
    longest = int(spans[spans != seqlens].amax()) if (spans != seqlens).any() else 0
    if longest:
        window = min((w for w in layer_windows if w is not None), default=longest)
        if window < longest:
            raise NotImplementedError(
                "attention_mask must have no zeros between the tokens of a row that spans more "
                f"columns than the sliding window, {window}, got {longest} columns; pad before or "
                f"after the tokens, or {TRANSFORMERS}"
            )
        positions = (columns - first[rows]).to(device)
        packing = replace(packing, end=int(spans.amax()), positions=positions)
    return packing, kept.flatten().nonzero().flatten().to(device)
