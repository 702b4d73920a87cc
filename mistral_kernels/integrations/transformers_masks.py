"""Mask interface of transformers, for versions 4.56 to 5.24: create a `Mask` from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from mistral_kernels.integrations.mask import Mask, cu_seqlens_of, is_tracing


def create_mask(
    *,
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Mask | Tensor | None:
    """Create a mask with the signature of transformers' mask interface.

    The docstring of transformers' `sdpa_mask` describes the arguments. Older versions pass
    `cache_position`, (q_length,), instead of q_length, q_offset and device.

    Returns:
        A `Mask` for causal and sliding-window patterns, packed or not. For other patterns, and for
        callers that modify the mask, the additive tensor of transformers' `eager_mask`, which every
        implementation can read; None if every query sees every key.
    """
    older = cache_position is not None
    if cache_position is not None:
        device, q_length, q_offset = cache_position.device, len(cache_position), cache_position[0]
    assert q_length is not None
    shape = batch_size, 1, q_length, kv_length
    pattern: dict[str, Any] = {"mask_function": mask_function, "use_vmap": use_vmap, **kwargs}
    pattern |= {"batch_size": batch_size, "kv_length": kv_length, "attention_mask": attention_mask}

    def in_full(make: Callable[..., Tensor | None], queries: int = q_length) -> Tensor | None:
        """Return the full mask of the last `queries` queries from a function of transformers."""
        skipped = q_length - queries
        if cache_position is not None:
            sizes: dict[str, Any] = {"cache_position": cache_position[skipped:]}
        else:
            sizes = {"q_length": queries, "q_offset": q_offset + skipped, "device": device}
        return make(**sizes, **pattern, kv_offset=kv_offset, allow_is_causal_skip=False)

    tracing = is_tracing(torch.empty(0, device=device))
    if tracing:
        causal, segments = _is_causal_while_tracing(mask_function, kwargs), None
    else:
        causal, segments = _parse_pattern(mask_function)
    model_type = getattr(kwargs.get("config"), "model_type", "")
    if use_vmap or not causal or model_type in _MODELS_THAT_MODIFY_MASKS:
        return in_full(masking_utils.eager_mask)
    if segments is not None:
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        return Mask(shape, cu_seqlens=cu_seqlens_of(begins))
    unmasked = attention_mask is None and not allow_is_causal_skip
    at_start = isinstance(q_offset, int) and q_length == kv_length
    if tracing and not older and unmasked and at_start:
        cu_seqlens = _cu_seqlens_while_tracing(mask_function, batch_size, q_length, device)
        return Mask(shape, cu_seqlens=cu_seqlens)
    # allow_is_causal_skip=False means that the caller will modify the mask, with two exceptions:
    # single tokens over a static cache, and prompts in versions where callers cannot pass it.
    if _CALLERS_CAN_FORBID_SKIP and not allow_is_causal_skip and q_length > 1:
        return in_full(masking_utils.eager_mask)
    if tracing and (older or attention_mask is not None):
        return Mask(shape, in_full(masking_utils.sdpa_mask))

    starts: list[int] | None = None  # None: no padding on the left
    last: Tensor | None = None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            return Mask(shape, in_full(masking_utils.sdpa_mask))
        starts, ends, holes, q_offset, kv_offset = _read_mask(attention_mask, q_offset, kv_offset)
        end = q_offset + q_length
        padded_right = any(0 < x < end for x in ends)
        if holes or attention_mask.shape[1] < end or (padded_right and q_length == 1):
            return Mask(shape, in_full(masking_utils.sdpa_mask))
        if padded_right:
            last = in_full(masking_utils.sdpa_mask, queries=1)
    elif older and allow_is_causal_skip:
        return Mask(shape)  # no cache, or a cache that returns exactly the keys it stores
    elif not (isinstance(q_offset, int) and isinstance(kv_offset, int)):
        if tracing or q_length == 1:
            descriptor = make_descriptor(0, q_offset, kv_offset, batch_size, device)
            return Mask(shape, descriptor=descriptor)
        q_offset, kv_offset = int(q_offset), int(kv_offset)

    unseen = kv_offset + kv_length - q_offset - q_length  # keys after the last query
    if unseen < 0:
        return Mask(shape, in_full(masking_utils.sdpa_mask))
    if starts is None or max(starts) <= kv_offset:
        starts = [0] * batch_size
        if unseen == 0 and (allow_is_causal_skip or q_length > 1):
            return Mask(shape, last=last)
    descriptor = make_descriptor(starts, q_offset, kv_offset, batch_size, device)
    if tracing:
        return Mask(shape, descriptor=descriptor)
    return Mask(shape, None, descriptor, None, last, starts, q_offset, kv_offset)


_CALLERS_CAN_FORBID_SKIP = (
    "allow_is_causal_skip" in signature(masking_utils.create_causal_mask).parameters
)
# Model types that add biases to their mask, for single tokens as well.
_MODELS_THAT_MODIFY_MASKS = ("doge", "falcon")


def make_descriptor(
    starts: Any, q_offset: Any, kv_offset: Any, batch: int, device: torch.device | str
) -> Tensor:
    """Return `Mask.descriptor`, (batch, 3) int32.

    Each value is a number, or a list or tensor with one element or one element per row.
    """
    columns = []
    for x in (starts, q_offset, kv_offset):
        if isinstance(x, int):  # fill on the device instead of copying from the host
            column = torch.full((batch,), x, dtype=torch.int32, device=device)
        else:
            column = torch.as_tensor(x, dtype=torch.int32, device=device).expand(batch)
        columns.append(column)
    return torch.stack(columns, dim=-1)


def _read_mask(mask: Tensor, *offsets: int | Tensor) -> tuple[list[int], list[int], bool, int, int]:
    """Read a (batch, keys) mask and the offsets from the device in a single copy.

    Return the first valid key of each row, the end of its valid keys, whether a key between them is
    hidden, and the two offsets.
    """
    mask = mask.bool()
    batch, keys = mask.shape
    indices = torch.arange(keys, device=mask.device)
    first = torch.where(mask, indices, keys).amin(1)
    end = torch.where(mask, indices + 1, 0).amax(1)
    hidden = (end - first).clamp(min=0) - mask.sum(1)
    on_device = [x.reshape(1) for x in offsets if isinstance(x, Tensor)]
    numbers = torch.cat([first, end, hidden, *on_device]).tolist()
    rest = iter(numbers[3 * batch :])
    q_offset, kv_offset = (next(rest) if isinstance(x, Tensor) else x for x in offsets)
    holes = any(numbers[2 * batch : 3 * batch])
    return numbers[:batch], numbers[batch : 2 * batch], holes, q_offset, kv_offset


def _parse_pattern(mask_function: Callable[..., Any]) -> tuple[bool, Tensor | None]:
    """Return whether a pattern is causal, and the sequence index of each token.

    A causal pattern may have a sliding window. The indices are (batch, seqlen), or None if the
    pattern does not separate packed sequences.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    parts = _closure_of(masking_utils.and_masks, mask_function).get("mask_functions", ())
    if len(parts) != 2:
        return False, None
    first, second = parts
    if second is masking_utils.causal_mask_function:
        return bool(_closure_of(masking_utils.sliding_window_overlay, first)), None
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    within = _closure_of(remap, first).get("mask_function", first) if remap is not None else first
    causal, nested = _parse_pattern(within)
    segments = _closure_of(masking_utils.packed_sequence_mask_function, second)
    if not causal or nested is not None or not segments:
        return False, None
    return True, segments["packed_sequence_mask"]


def _closure_of(factory: Callable[..., Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Return the closure variables of a function that `factory` created; otherwise {}."""
    code = getattr(function, "__code__", None)
    if code is None or code not in factory.__code__.co_consts:
        return {}
    return dict(
        zip(
            code.co_freevars,
            (cell.cell_contents for cell in function.__closure__ or ()),
            strict=True,
        )
    )


_AND_MASK = masking_utils.and_masks(masking_utils.causal_mask_function).__code__


def _is_causal_while_tracing(mask_function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a mask function is causal, with or without a sliding window.

    `_parse_pattern` reads the closure of the function, which is not possible in a trace.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True
    config = kwargs.get("config")
    return (
        mask_function.__code__ is _AND_MASK
        and "allow_is_bidirectional_skip" not in kwargs
        and getattr(config, "attention_chunk_size", None) is None
        and kwargs.get("local_size") in (None, getattr(config, "sliding_window", None))
    )


def _cu_seqlens_while_tracing(
    mask_function: Callable[..., Any], batch: int, seqlen: int, device: torch.device | str
) -> Tensor:
    """Return cu_seqlens of fixed size, (batch * seqlen + 1,) int32; the last sequences are empty.

    While tracing, transformers treats every batch as packed. A sequence begins at each token that
    does not see the previous token.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(seqlen, device=device)[None]
    before, after = tokens[:, :-1], tokens[:, 1:]
    head = torch.zeros_like(rows)
    ahead = mask_function(rows, head, before, after).any()
    torch._assert_async(~ahead, "attention_mask must be causal under torch.compile")
    begins = torch.ones((batch, seqlen), dtype=torch.bool, device=device)
    begins[:, 1:] = ~mask_function(rows, head, after, before)
    total = batch * seqlen
    indices = torch.arange(total, device=device)
    offsets = torch.where(begins.flatten(), indices, total).sort().values
    return torch.nn.functional.pad(offsets, (0, 1), value=total).to(torch.int32)
