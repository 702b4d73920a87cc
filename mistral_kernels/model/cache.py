"""Rolling cache of keys and values, and the division of a packed batch into sequences."""

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
    """Division of a packed batch of new tokens into sequences.

    Attributes:
        seqlens: number of new tokens of each sequence.
        end: exclusive upper bound of `positions`.
        cu_seqlens: (batch + 1,) int32 on the model's device, the cumulative sequence lengths.
        positions: (total_tokens,) integers on the model's device, the position of each token.
    """

    seqlens: tuple[int, ...]
    end: int
    cu_seqlens: Tensor
    positions: Tensor

    @classmethod
    def of(cls, seqlens: list[int], starts: list[int], device: torch.device) -> Packing:
        """Pack new tokens: `seqlens[i]` tokens of sequence i, from position `starts[i]` on."""
        offsets = torch.tensor([0, *seqlens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        spans = [torch.arange(start, start + n) for n, start in zip(seqlens, starts, strict=True)]
        end = max(start + n for start, n in zip(starts, seqlens, strict=True))
        return cls(tuple(seqlens), end, offsets.to(device), torch.cat(spans).to(device))

    @property
    def max_seqlen(self) -> int:
        """Largest number of new tokens of a sequence."""
        return max(self.seqlens)

    @property
    def one_each(self) -> bool:
        """Whether each sequence has exactly one new token, as in a decode step."""
        return set(self.seqlens) == {1}

    @property
    def rectangular(self) -> bool:
        """Whether all sequences have the same number of new tokens."""
        return len(set(self.seqlens)) == 1

    @property
    def last_tokens(self) -> Tensor:
        """Index of the last token of each sequence in the packed batch: (batch,) int64."""
        return self.cu_seqlens[1:].long() - 1

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sliding_window: int | None,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Compute causal attention within each packed sequence, without a cache.

        Sequences of equal lengths are passed as a rectangular batch, which is faster.

        Args:
            q: queries, (total_tokens, num_heads, head_dim).
            k: keys, (total_tokens, num_kv_heads, head_dim).
            v: values, of the shape of `k`.
            sliding_window: number of visible keys, including the query's own; None: all.
            softmax_scale: factor of the scores; None: head_dim^-0.5.

        Returns:
            (total_tokens, num_heads, head_dim).
        """
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
    """Sizes of a model that determine the shapes of its cache."""

    layer_windows: tuple[int | None, ...]
    num_key_value_heads: int
    head_dim: int


def cache_layout(config: MistralConfig | CacheLayout) -> CacheLayout:
    """Return the fields of `config` that determine the shapes of its cache."""
    return CacheLayout(config.layer_windows, config.num_key_value_heads, config.head_dim)


class RollingCache:
    """Keys and values of every layer, in ring buffers ("rings") of constant size.

    The rings of layer i have the shape (batch, capacity_i, num_kv_heads, head_dim), where
    capacity_i is the smaller of the layer's sliding window and `max_length`. The token at position
    p is in slot p % capacity_i.

    If every layer has a sliding window of at most `max_length` tokens, the length of a text is
    unlimited. Otherwise a sequence may have at most `max_length` tokens, and appending more raises
    a ValueError.

    Args:
        config: configuration of the model, or only the sizes that determine the cache.
        batch: number of sequences.
        max_length: maximum number of tokens per sequence, unless every layer has a sliding window
            of at most this size; also the largest capacity of a ring.
        dtype: data type of the keys and values, which must be the model's.
        device: device of the rings.

    Attributes:
        keys: one ring of keys per layer.
        values: one ring of values per layer.
        lengths: (batch,) int32 on the device, the number of tokens that each sequence has seen.
        host_lengths: the same numbers as a list of ints.
        endless: whether the length of a text is unlimited.
        interrupted: whether a forward pass has failed while it wrote to the rings. The cache is
            then unusable until `reset`.

    Raises:
        ValueError: `batch` or `max_length` is not positive.
        MemoryError: the rings are on the CPU and larger than the machine's memory.

    Example:
        >>> import torch
        >>> from mistral_kernels import MistralForCausalLM, RollingCache
        >>> model = MistralForCausalLM.from_pretrained("tiny")  # its sliding window: 128 tokens
        >>> cache = RollingCache(model.config, batch=1, max_length=1000, dtype=model.dtype)
        >>> cache.keys[0].shape
        torch.Size([1, 128, 2, 32])
        >>> with torch.inference_mode():
        ...     logits = model.prefill([list(range(200))], cache)
        ...     logits = model.decode(logits.argmax(dim=-1), cache)
        >>> cache.lengths
        tensor([201], dtype=torch.int32)
        >>> cache.drop(1)
        >>> cache.host_lengths
        [200]
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
        # True while the layers write, and after a layer failed: the rings are then inconsistent.
        self.interrupted = False
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.host_lengths = [0] * batch
        # The largest length that each sequence had before a `drop`. The dropped tokens have
        # overwritten the slots of older keys, which `drop` must not make visible again.
        self._written = [0] * batch
        self._one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)
        # Workspace of `rolling_cache_attention`, shared by all calls: calls for one cache never
        # overlap.
        counters = num_counters(batch, config.num_key_value_heads)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.host_lengths)

    @property
    def nbytes(self) -> int:
        """Size of all rings in bytes, which is constant."""
        return sum(ring.nbytes for ring in (*self.keys, *self.values))

    @property
    def empty(self) -> bool:
        """Whether no sequence has seen a token."""
        return not any(self.host_lengths)

    def end_of(self, seqlens: list[int]) -> int:
        """Return the length of the longest sequence once sequence i has `seqlens[i]` more tokens.

        Raises:
            ValueError: the cache is interrupted, `seqlens` does not have one number per sequence,
                or a sequence becomes longer than `max_length` and the cache is not `endless`.
        """
        if self.interrupted:
            raise ValueError(
                "the cache is incomplete because a forward pass was interrupted; reset it, or make "
                "a new one"
            )
        if len(seqlens) != len(self.host_lengths):
            raise ValueError(f"number of sequences must be {self.batch}, got {len(seqlens)}")
        end = max(length + new for length, new in zip(self.host_lengths, seqlens, strict=True))
        if end > self.max_length and not self.endless:
            raise ValueError(
                f"sequence length must be <= {self.max_length}, the max_length of the cache, got "
                f"{end}; make a cache with a larger max_length"
            )
        return end

    def packing(self, seqlens: list[int]) -> Packing:
        """Return the packing of new tokens: `seqlens[i]` tokens that continue sequence i.

        For one token per sequence, the tensors of the packing are the same in every call, as a CUDA
        graph requires.

        Raises:
            ValueError: the tokens do not fit; see `end_of`.
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
        """Write new keys and values into a layer's rings, and compute causal attention of `q`.

        One new token per sequence overwrites only the key that has just left the window. Therefore
        the new key is written first, and attention reads every key from the ring. Several new
        tokens overwrite keys that the first of the new tokens still see. Therefore attention reads
        the ring before the new keys are written.

        Args:
            layer: index of the layer.
            q: queries, (total_tokens, num_heads, head_dim), packed as `packing` describes.
            k: keys, (total_tokens, num_kv_heads, head_dim).
            v: values, of the shape of `k`.
            packing: division of the new tokens into sequences.
            sliding_window: number of visible keys, including the query's own; None: all.
            softmax_scale: factor of the scores; None: head_dim^-0.5.
            tables: cos and sin of the rotary embedding, to rotate q and k in the same kernel launch
                that writes k. Only for one new token per sequence. None: q, k are rotated already.

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
        """Return a layer's rings and the new tokens' offsets as keyword arguments of operators."""
        return {
            "k_cache": self.keys[layer],
            "v_cache": self.values[layer],
            "lengths": self.lengths,
            "cu_seqlens": packing.cu_seqlens,
            "max_seqlen": packing.max_seqlen,
        }

    def reset(self) -> None:
        """Make the cache empty, and keep its memory."""
        self.lengths.zero_()
        self.host_lengths = [0] * self.batch
        self._written = [0] * self.batch
        self.interrupted = False

    def reorder(self, sequences: Sequence[int]) -> None:
        """Replace sequence i by a copy of sequence `sequences[i]`, as a beam search does.

        Raises:
            ValueError: `sequences` does not have `batch` indices, each in [0, batch).
        """
        if len(sequences) != self.batch or not all(0 <= i < self.batch for i in sequences):
            raise ValueError(
                f"sequences must be {self.batch} indices in [0, {self.batch}), got {sequences}"
            )
        index = torch.tensor(sequences, device=self.lengths.device)
        for ring in (*self.keys, *self.values, self.lengths):
            ring.copy_(ring[index])
        self.host_lengths = [self.host_lengths[i] for i in sequences]
        self._written = [self._written[i] for i in sequences]

    def select(self, sequences: Sequence[int]) -> RollingCache:
        """Return a new cache whose sequence i is a copy of this cache's sequence `sequences[i]`."""
        like = self.keys[0]
        chosen = RollingCache(self.config, len(sequences), self.max_length, like.dtype, like.device)
        index = torch.tensor(sequences, device=like.device)
        for target, source in zip(
            (*chosen.keys, *chosen.values, chosen.lengths),
            (*self.keys, *self.values, self.lengths),
            strict=True,
        ):
            target.copy_(source[index])
        chosen.host_lengths = [self.host_lengths[i] for i in sequences]
        chosen._written = [self._written[i] for i in sequences]
        chosen.interrupted = self.interrupted
        return chosen

    @property
    def smallest(self) -> int:
        """Number of slots of the smallest ring, which is the first ring to overwrite keys."""
        return min(ring.shape[1] for ring in self.keys)

    def drop(self, count: int = 1) -> None:
        """Drop the newest `count` tokens of every sequence.

        Immediately after an append, the newest token can always be dropped: the key that this token
        overwrote is outside the window. More tokens can be dropped only while no ring has
        overwritten a key.

        Raises:
            ValueError: a ring has already overwritten keys that would be in the window again, or
                `count` is negative or larger than the length of a sequence.
        """
        kept = [length - count for length in self.host_lengths]
        written = list(map(max, self._written, self.host_lengths))
        lost = any(
            n > max(self.smallest, length + 1) for n, length in zip(written, kept, strict=True)
        )
        if lost or count < 0 or min(kept) < 0:
            raise ValueError(
                "count must be at least 0, at most the length of the shortest sequence, and small "
                f"enough that the ring still holds the whole window, got {count} for sequences of "
                f"{self.host_lengths} tokens in rings of {self.smallest} slots"
            )
        self.lengths -= count
        self.host_lengths, self._written = kept, written

    def advance(self, packing: Packing) -> None:
        """Add the tokens of `packing` to the lengths, after every layer has written them."""
        self.lengths += 1 if packing.one_each else packing.cu_seqlens.diff()
        self.advance_host(packing.seqlens)

    def advance_host(self, seqlens: Sequence[int]) -> None:
        """Add `seqlens` to the host's lengths only: the device has added them already."""
        self.interrupted = False
        self.host_lengths = [a + b for a, b in zip(self.host_lengths, seqlens, strict=True)]


def _check_fits(nbytes: int) -> None:
    """Raise a MemoryError if `nbytes` is more than the machine's memory.

    Linux grants each allocation separately and kills the process when the total is too much.
    """
    memory = physical_memory()
    if memory is not None and nbytes > memory:
        raise MemoryError(
            f"out of memory: the cache must be smaller than the {memory / 1e9:,.1f} GB of this "
            f"machine, got {nbytes / 1e9:,.1f} GB; generate fewer tokens or texts, or set a "
            "sliding window"
        )
