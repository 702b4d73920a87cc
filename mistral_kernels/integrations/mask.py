"""The mask that transformers hands to every layer, made once a forward pass: small, or none.

    None                      causal, or sliding, attention; the last query stands on the last key
    (batch, 1, 1, 3) int32    a descriptor: [first valid key, q_offset, kv_offset] of each sequence
    (sequences + 1,) int32    cu_seqlens of a packed batch
    (batch, 1, sq, sk) bool   what the others cannot say, from transformers' own `sdpa_mask`

Query i of a descriptor stands at q_offset + i and key j at kv_offset + j; a query sees a key if
first valid key <= key <= query and key > query - window. Where values must be looked at, they are
looked at here, once a forward pass, and what was seen is kept beside the descriptor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from mistral_kernels.ops.attention.packed import make_cu_seqlens


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
) -> Tensor | None:
    """transformers' mask interface, whose arguments its `sdpa_mask` describes.

    `cache_position`, (q_length,), is how older versions say q_length, q_offset and device.
    """
    older = cache_position is not None
    sizes: dict[str, Any] = {"batch_size": batch_size, "kv_length": kv_length}
    if cache_position is None:
        sizes |= {"q_length": q_length, "q_offset": q_offset, "device": device}
    else:
        sizes |= {"cache_position": cache_position}
        device, q_length, q_offset = cache_position.device, len(cache_position), cache_position[0]
    assert q_length is not None

    def whole() -> Tensor | None:
        # Without the skip, by which `sdpa_mask` would mean a mask that begins at the first key.
        how: dict[str, Any] = {
            "mask_function": mask_function,
            "use_vmap": use_vmap,
            "allow_is_causal_skip": False,
        }
        how |= {"attention_mask": attention_mask, "kv_offset": kv_offset}
        return masking_utils.sdpa_mask(**sizes, **how, **kwargs)

    tracing = is_tracing()
    if use_vmap or (tracing and older):
        return whole()
    if tracing:
        causal = _is_causal_while_tracing(mask_function, kwargs)
        alone = attention_mask is None and isinstance(q_offset, int) and q_length == kv_length
        if causal and alone and not allow_is_causal_skip:
            return _cu_seqlens_while_tracing(mask_function, batch_size, q_length, device)
    else:
        causal, segments = _pattern(mask_function)
        if causal and segments is not None:
            return _cu_seqlens(segments)
    # A static cache forbids the skip, in newer versions only to decode. So does a caller who is
    # going to change the mask.
    static = not allow_is_causal_skip and (older or q_length == 1)
    if not causal or not (allow_is_causal_skip or static):
        return whole()

    starts: list[int] | None = None  # None: no padding
    if attention_mask is not None:
        if tracing or attention_mask.ndim != 2:
            return whole()
        starts, holes, q_offset, kv_offset = _look(attention_mask, q_offset, kv_offset)
        # Zeros at the end hide keys that only padding could see, if every query is in the mask.
        if holes or attention_mask.shape[1] < q_offset + q_length:
            return whole()
    elif older and allow_is_causal_skip:
        return None  # no cache, or one that hands over exactly the keys it holds
    elif not (isinstance(q_offset, int) and isinstance(kv_offset, int)):
        if tracing or q_length == 1:
            return make(0, q_offset, kv_offset, batch_size, device)
        q_offset, kv_offset = int(q_offset), int(kv_offset)

    unseen = kv_offset + kv_length - q_offset - q_length  # keys past the last query
    if unseen < 0:
        return whole()
    padded = starts is not None and max(starts) > kv_offset
    if unseen == 0 and not padded and not (static and q_length == 1):
        return None
    descriptor = make(starts if padded else 0, q_offset, kv_offset, batch_size, device)
    if not tracing:
        known = starts if starts is not None and padded else [0] * batch_size
        _places[descriptor] = Places(known, q_offset, kv_offset, descriptor.device)
    return descriptor


def make(
    starts: Any, q_offset: Any, kv_offset: Any, batch: int, device: torch.device | str
) -> Tensor:
    """(batch, 1, 1, 3) int32. Each argument is a number, a list or a tensor, of one or of batch."""
    columns = []
    for x in (starts, q_offset, kv_offset):
        if isinstance(x, int):  # filled on the device: nothing to copy there
            column = torch.full((batch,), x, dtype=torch.int32, device=device)
        else:
            column = torch.as_tensor(x, dtype=torch.int32, device=device).expand(batch)
        columns.append(column)
    return torch.stack(columns, dim=-1)[:, None, None]


def unpack(descriptor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`starts, q_offset, kv_offset`, each (batch,) int32."""
    starts, q_offset, kv_offset = descriptor[:, 0, 0].unbind(-1)
    return starts, q_offset, kv_offset


def is_descriptor(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1:] == (1, 1, 3)


def is_packed(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.ndim == 1


class Places:
    """A descriptor as the host knows it, and what attention makes of it, once for all layers."""

    def __init__(
        self, starts: list[int], q_offset: int, kv_offset: int, device: torch.device
    ) -> None:
        self.starts, self.q_offset, self.kv_offset = starts, q_offset, kv_offset
        self.device = device
        self.held: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.packings: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def padded(self) -> bool:
        return max(self.starts) > self.kv_offset

    def num_keys(self, seqlen_q: int) -> int:
        """Keys up to the last query's place; a static cache hands over more, not yet written."""
        return self.q_offset + seqlen_q - self.kv_offset

    def packing(self, seqlen_q: int) -> tuple[Tensor, Tensor]:
        """cu_seqlens of all rows' queries, and of the first `num_keys` keys of each row.

        Three parts a row: padding among the queries, which sees nothing; padding among the keys,
        which nothing sees; what is real.
        """
        if seqlen_q not in self.packings:
            keys = self.num_keys(seqlen_q)
            lengths_q: list[int] = []
            lengths_k: list[int] = []
            for start in self.starts:
                pad_q = min(max(start - self.q_offset, 0), seqlen_q)
                pad_k = min(max(start - self.kv_offset, 0), keys)
                lengths_q += (pad_q, 0, seqlen_q - pad_q)
                lengths_k += (0, pad_k, keys - pad_k)
            self.packings[seqlen_q] = (
                make_cu_seqlens(lengths_q, self.device),
                make_cu_seqlens(lengths_k, self.device),
            )
        return self.packings[seqlen_q]


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()


def places_of(descriptor: Tensor) -> Places:
    """What the host knows of a descriptor; read from the device if it is a copy of the one made."""
    places = _places.get(descriptor)
    if places is None:
        rows = descriptor[:, 0, 0].tolist()
        _, q_offset, kv_offset = rows[0]
        places = Places([row[0] for row in rows], q_offset, kv_offset, descriptor.device)
        _places[descriptor] = places
    return places


def held_keys(descriptor: Tensor, seqlen_q: int) -> tuple[Tensor, Tensor | None]:
    """(batch,) int32: keys up to the last query's place, and how many of these are padding.

    Read on the device alone. None: no padding, as the host happens to know.
    """
    places = None if is_tracing() else _places.get(descriptor)
    if places is not None and seqlen_q in places.held:
        return places.held[seqlen_q]
    starts, q_offset, kv_offset = unpack(descriptor)
    held = q_offset + seqlen_q - kv_offset
    leftpad = None
    if places is None or places.padded:
        leftpad = torch.minimum((starts - kv_offset).clamp(min=0), held)
    if places is not None:
        places.held[seqlen_q] = held, leftpad
    return held, leftpad


def first_keys(mask: Tensor | None, batch: int) -> list[int]:
    """The first valid key of each sequence: 0 where there is no padding.

    Raises `ValueError` for a mask that is neither a descriptor nor None.
    """
    if mask is None:
        return [0] * batch
    if not is_descriptor(mask):
        raise ValueError(
            "the attention mask must be causal, with each sequence's padding on its left, got a "
            f"mask of {tuple(mask.shape)}"
        )
    return places_of(mask).starts


def is_tracing() -> bool:
    """Is a look at values forbidden: under torch.compile, in a trace or a CUDA graph's capture?"""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _look(mask: Tensor, *offsets: int | Tensor) -> tuple[list[int], bool, int, int]:
    """The first valid key of each row of a (batch, keys) mask; is a key between valid ones hidden?

    And the offsets as numbers: all in one look.
    """
    mask = mask.bool()
    batch, keys = mask.shape
    places = torch.arange(keys, device=mask.device)
    first = torch.where(mask, places, keys).amin(1)
    end = torch.where(mask, places + 1, 0).amax(1)
    hidden = (end - first).clamp(min=0) - mask.sum(1)
    on_device = [x.reshape(1) for x in offsets if isinstance(x, Tensor)]
    numbers = torch.cat([first, hidden, *on_device]).tolist()
    rest = iter(numbers[2 * batch :])
    q_offset, kv_offset = (next(rest) if isinstance(x, Tensor) else x for x in offsets)
    return numbers[:batch], any(numbers[batch : 2 * batch]), q_offset, kv_offset


def _cu_seqlens(segments: Tensor) -> Tensor | None:
    """Of (batch, seqlen) indices of packed sequences; None if each row is one."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    offsets = begins.flatten().nonzero().flatten().tolist()
    if len(offsets) == len(segments):
        return None
    ends = [*offsets[1:], segments.numel()]
    return make_cu_seqlens([end - begin for begin, end in zip(offsets, ends)], segments.device)


def _pattern(mask_function: Callable[..., Any]) -> tuple[bool, Tensor | None]:
    """Is it causal, or sliding? And the indices of packed sequences it keeps apart, if it does."""
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    parts = _made_by(masking_utils.and_masks, mask_function).get("mask_functions", ())
    if len(parts) != 2:
        return False, None
    first, second = parts
    if second is masking_utils.causal_mask_function:
        return bool(_made_by(masking_utils.sliding_window_overlay, first)), None
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    within = _made_by(remap, first).get("mask_function", first) if remap is not None else first
    causal, nested = _pattern(within)
    segments = _made_by(masking_utils.packed_sequence_mask_function, second)
    if not causal or nested is not None or not segments:
        return False, None
    return True, segments["packed_sequence_mask"]


def _made_by(factory: Callable[..., Any], function: Callable[..., Any]) -> dict[str, Any]:
    """What a function that `factory` made holds on to, by name; nothing if another made it."""
    code = getattr(function, "__code__", None)
    if code is None or code not in factory.__code__.co_consts:
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


_AND_MASK = masking_utils.and_masks(masking_utils.causal_mask_function).__code__


def _is_causal_while_tracing(mask_function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """`_pattern` where one can see who made a function and for whom, but not what it holds."""
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
    """(batch * seqlen + 1,) int32: as many sequences as there may be, those at the end empty.

    While tracing transformers takes every batch for a packed one. A sequence begins where a token
    does not see the one before it.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(seqlen, device=device)[None]
    before, after = tokens[:, :-1], tokens[:, 1:]
    head = torch.zeros_like(rows)
    ahead = mask_function(rows, head, before, after).any()
    torch._assert_async(~ahead, "a batch whose tokens see later ones cannot be compiled")
    begins = torch.ones((batch, seqlen), dtype=torch.bool, device=device)
    begins[:, 1:] = ~mask_function(rows, head, after, before)
    total = batch * seqlen
    places = torch.arange(total, device=device)
    offsets = torch.where(begins.flatten(), places, total).sort().values
    return torch.nn.functional.pad(offsets, (0, 1), value=total).to(torch.int32)
