"""Rolling cache of a model, and the division of a packed batch into sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.memory import physical_memory, zeros
from mistral_kernels.ops.attention import attention, rolling_cache_attention
from mistral_kernels.ops.attention.kernels.decode import num_counters
from mistral_kernels.ops.rolling_cache import rolling_cache_update_


@dataclass(frozen=True)
class Packing:
    """Division of a packed batch into sequences.

    `cu_seqlens` (batch + 1,) int32 and `positions` (total_tokens,) are on the model's device.
    `seqlens` are the lengths on the host. All positions are below `end`. A batch of equal lengths
    is `rectangular`.
    """

    seqlens: tuple[int, ...]
    end: int
    cu_seqlens: Tensor
    positions: Tensor

    @classmethod
    def of(cls, seqlens: list[int], starts: list[int], device: torch.device) -> Packing:
        """Pack `seqlens` new tokens, the first of each sequence at the position in `starts`."""
        offsets = torch.tensor([0, *seqlens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        spans = [torch.arange(start, start + n) for n, start in zip(seqlens, starts, strict=True)]
        end = max(start + n for start, n in zip(starts, seqlens, strict=True))
        return cls(tuple(seqlens), end, offsets.to(device), torch.cat(spans).to(device))

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens)

    @property
    def one_each(self) -> bool:
        """True for a decode step: one token per sequence."""
        return set(self.seqlens) == {1}

    @property
    def rectangular(self) -> bool:
        return len(set(self.seqlens)) == 1

    @property
    def last_tokens(self) -> Tensor:
        """(batch,) index of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sliding_window: int | None,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Compute attention of whole packed sequences; equal lengths are a rectangular batch."""
        lengths: dict[str, Any] = {}
        if self.rectangular:
            q, k, v = (x.unflatten(0, (len(self.seqlens), -1)) for x in (q, k, v))
        else:
            lengths["cu_seqlens_q"] = self.cu_seqlens
            lengths["max_seqlen_q"] = lengths["max_seqlen_k"] = self.max_seqlen
        out: Any = attention(
            q, k, v, sliding_window=sliding_window, softmax_scale=softmax_scale, **lengths
        )
        return out.flatten(0, 1) if self.rectangular else out  # type: ignore[no-any-return]


class CacheLayout(NamedTuple):
    """Windows and sizes of a model that determine its cache."""

    layer_windows: tuple[int | None, ...]
    num_key_value_heads: int
    head_dim: int


def cache_layout(config: MistralConfig | CacheLayout) -> CacheLayout:
    return CacheLayout(config.layer_windows, config.num_key_value_heads, config.head_dim)


class RollingCache:
    """Keys and values of every layer, in rings that never grow.

    Layer i holds k and v of (batch, capacity_i, num_kv_heads, head_dim), where capacity_i is the
    smaller of the layer's sliding window and `max_length`. The token at position p is in slot
    p % capacity_i. `lengths` (batch,) int32, on the device, counts the tokens each sequence
    has seen; `host_lengths` is the same on the host.

    With a window in every layer, the length of the text is unlimited. A layer without a window
    needs every key: appending past `max_length` then raises.

    Raises `ValueError` for a batch or a `max_length` that is not positive, and `MemoryError` for
    rings on the CPU that are larger than the machine's memory.
    """

    def __init__(
        self,
        config: MistralConfig | CacheLayout,
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch <= 0 or max_length <= 0:
            raise ValueError(f"batch and max_length must be positive, got {batch} and {max_length}")
        self.config = config
        windows = config.layer_windows
        self.endless = all(window is not None and window <= max_length for window in windows)
        self.max_length = max_length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        capacities = [max_length if w is None else min(w, max_length) for w in windows]
        slot = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
        if torch.device(device).type == "cpu":
            _check_fits(batch * sum(capacities) * slot)
        for capacity in capacities:
            shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
            self.keys.append(zeros(shape, dtype, device, large_pages=True))
            self.values.append(zeros(shape, dtype, device, large_pages=True))
        # True while the layers write, and after one of them failed: the rings are inconsistent.
        self.interrupted = False
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.host_lengths = [0] * batch
        # Tokens that each sequence had when some were dropped: their slots are overwritten.
        self._written = [0] * batch
        self._one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)
        # For `rolling_cache_attention`, whose calls over this cache never overlap.
        counters = num_counters(batch, config.num_key_value_heads)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    @property
    def batch(self) -> int:
        return len(self.host_lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all rings; constant."""
        return sum(ring.nbytes for ring in (*self.keys, *self.values))

    @property
    def empty(self) -> bool:
        """True until a sequence sees its first token."""
        return not any(self.host_lengths)

    def end_of(self, seqlens: list[int]) -> int:
        """Return the length of the longest sequence once each has `seqlens` more tokens.

        Raises `ValueError` if they do not fit: too many sequences, or, without a window, too long.
        """
        if self.interrupted:
            raise ValueError("a pass over this cache was interrupted half-way; make a new one")
        if len(seqlens) != len(self.host_lengths):
            raise ValueError(f"the cache holds {self.batch} sequences, got {len(seqlens)}")
        end = max(length + new for length, new in zip(self.host_lengths, seqlens, strict=True))
        if end > self.max_length and not self.endless:
            raise ValueError(
                f"a sequence of {end} tokens does not fit a cache of max_length "
                f"{self.max_length}; make the cache longer"
            )
        return end

    def packing(self, seqlens: list[int]) -> Packing:
        """Place `seqlens` new tokens behind what each sequence has seen.

        One token each is placed by tensors that stay where they are, as a CUDA graph needs it.

        Raises `ValueError` if they do not fit, as `end_of` does.
        """
        end = self.end_of(seqlens)
        if set(seqlens) == {1}:
            return Packing(tuple(seqlens), end, self._one_each, self.lengths)
        return Packing.of(seqlens, self.host_lengths, self.lengths.device)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing,
        *,
        sliding_window: int | None,
        softmax_scale: float | None = None,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Write the new tokens' keys and values into a layer's rings, and attend to all q sees.

        One new token per sequence overwrites only the key that has just left its window: it is
        written first, and every key is read from the ring. More tokens overwrite keys that the
        first of them still see: the rings are read first.

        Args:
            q, k, v: (total_tokens, heads, head_dim), packed as `packing` describes.
            softmax_scale: head_dim^-0.5 if None.
            tables: cos and sin, with which q and k are rotated in the launch that writes them; for
                one new token per sequence only.

        Returns:
            (total_tokens, num_heads, head_dim).
        """
        options: dict[str, Any] = {"sliding_window": sliding_window, "softmax_scale": softmax_scale}
        options["counters"] = self.counters
        ring = self.ring(layer, packing)
        if packing.one_each:
            if tables is None:
                rolling_cache_update_(**ring, k=k, v=v)
            else:
                cos, sin = tables
                rotated: Any = rolling_cache_update_(**ring, k=k, v=v, q=q, cos=cos, sin=sin)
                q = rotated
            return rolling_cache_attention(q, None, None, **ring, **options)
        if self.empty:
            out = packing.attend(q, k, v, sliding_window, softmax_scale)
        else:
            out = rolling_cache_attention(q, k, v, **ring, **options)
        rolling_cache_update_(**ring, k=k, v=v)
        return out

    def ring(self, layer: int, packing: Packing) -> dict[str, Any]:
        """Return the arguments by which operators find a layer's rings and the new tokens."""
        return {
            "k_cache": self.keys[layer],
            "v_cache": self.values[layer],
            "lengths": self.lengths,
            "cu_seqlens": packing.cu_seqlens,
            "max_seqlen": packing.max_seqlen,
        }

    def reset(self) -> None:
        """Empty the cache; the memory stays."""
        self.lengths.zero_()
        self.host_lengths = [0] * self.batch
        self._written = [0] * self.batch
        self.interrupted = False

    def reorder(self, sequences: Sequence[int]) -> None:
        """Move sequence `sequences[i]` to i, as a beam search does. Copies the rings.

        Raises `ValueError` unless there are `batch` indices, each in [0, batch).
        """
        if len(sequences) != self.batch or not all(0 <= i < self.batch for i in sequences):
            raise ValueError(f"need {self.batch} indices below {self.batch}, got {sequences}")
        index = torch.tensor(sequences, device=self.lengths.device)
        for ring in (*self.keys, *self.values, self.lengths):
            ring.copy_(ring[index])
        self.host_lengths = [self.host_lengths[i] for i in sequences]
        self._written = [self._written[i] for i in sequences]

    def select(self, sequences: Sequence[int]) -> RollingCache:
        """Return another cache, whose sequence i is this one's `sequences[i]`."""
        like = self.keys[0]
        chosen = RollingCache(self.config, len(sequences), self.max_length, like.dtype, like.device)
        index = torch.tensor(sequences, device=like.device)
        for mine, theirs in zip(
            (*chosen.keys, *chosen.values, chosen.lengths),
            (*self.keys, *self.values, self.lengths),
            strict=True,
        ):
            mine.copy_(theirs[index])
        chosen.host_lengths = [self.host_lengths[i] for i in sequences]
        chosen._written = [self._written[i] for i in sequences]
        chosen.interrupted = self.interrupted
        return chosen

    @property
    def smallest(self) -> int:
        """Number of slots of the smallest ring, which is the first to overwrite keys."""
        return min(ring.shape[1] for ring in self.keys)

    def drop(self, count: int = 1) -> None:
        """Drop the newest `count` tokens of every sequence.

        One token can always be dropped: the slot it overwrote held a key outside the window.

        Raises `ValueError` where a ring has overwritten keys that the window would show again.
        """
        kept = [length - count for length in self.host_lengths]
        written = list(map(max, self._written, self.host_lengths))
        lost = any(
            n > max(self.smallest, length + 1) for n, length in zip(written, kept, strict=True)
        )
        if lost or count < 0 or min(kept) < 0:
            raise ValueError(
                f"cannot drop {count} tokens of sequences of {self.host_lengths} tokens in rings "
                f"of {self.smallest} slots"
            )
        self.lengths -= count
        self.host_lengths, self._written = kept, written

    def advance(self, packing: Packing) -> None:
        """Count the tokens that every layer has written."""
        self.lengths += 1 if packing.one_each else packing.cu_seqlens.diff()
        self.advance_host(packing.seqlens)

    def advance_host(self, seqlens: Sequence[int]) -> None:
        """Count, on the host, the tokens that every layer has written and the device counted."""
        self.interrupted = False
        self.host_lengths = [a + b for a, b in zip(self.host_lengths, seqlens, strict=True)]


def _check_fits(nbytes: int) -> None:
    """Raise MemoryError for more bytes than the machine has.

    Linux grants each ring by itself, and ends the process when the sum is used.
    """
    memory = physical_memory()
    if memory is not None and nbytes > memory:
        raise MemoryError(
            f"out of memory: the cache would take {nbytes / 1e9:,.1f} GB, this machine has "
            f"{memory / 1e9:,.1f} GB; ask for fewer tokens or texts, or for a sliding window"
        )
