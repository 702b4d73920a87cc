"""One attention problem: everything except q, k and v, from the public functions to the kernels.

A public function makes an `AttentionSpec`. Operators take numbers and tensors only, so `flatten`
lists them in the order of the schemas below and `unflatten` restores the spec behind the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.rolling_cache import capacity_of

_OPTIONS = (
    "float? softmax_scale, SymInt window_left, SymInt window_right, float softcap, "
    "Tensor? alibi_slopes"
)
# What `flatten` returns for whole sequences, and for sequences with a cache.
SCHEMA = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    f"{_OPTIONS}"
)
TENSORS = [i for i, argument in enumerate(SCHEMA.split(",")) if "Tensor" in argument]
CACHE_SCHEMA = (
    "Tensor k_cache, Tensor v_cache, Tensor lengths, SymInt seqlen_new, Tensor? rows, "
    "Tensor? leftpad, Tensor? block_table, Tensor? cu_seqlens, SymInt max_seqlen_q, "
    f"{_OPTIONS}"
)


class Sequences(NamedTuple):
    """Layout of q, k and v: one batch dimension, or packed sequences.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, where each packed sequence starts and the
            last one ends; None: a rectangular batch. cu_seqlens_k of None is cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: an upper bound of the sequences' lengths.
        covers_q, covers_k: every token of q, or of k, is known to belong to a sequence.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    covers_q: bool = True
    covers_k: bool = True


class CacheView(NamedTuple):
    """Keys and values of a batch, in rings or, with `block_table`, in pages.

    Attributes:
        k_cache, v_cache: (rows, capacity, num_kv_heads, head_dim), or (pages, page_size, ...).
        lengths: (batch,) int32, tokens of each sequence before the new ones.
        seqlen_new: new tokens of each sequence that the cache holds; unused if the queries are
            packed: then each query is one new token.
        rows: (batch,) int32, each sequence's row of the cache; None: its index in the batch.
        leftpad: (batch,) int32, the first position that is not padding; None: 0.
        block_table: (batch, max_pages) int32, the pages of each sequence.
    """

    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    seqlen_new: int = 0
    rows: Tensor | None = None
    leftpad: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Positions per sequence."""
        return capacity_of(self.k_cache, self.block_table)


class AttentionSpec(NamedTuple):
    """Layout, window and scoring of one call; a named tuple, made three times per call.

    Attributes:
        sequences: layout of q, k and v. With a cache: of q and of the new tokens' k and v.
        window: inclusive distances, see `window.py`.
        softmax_scale: head_dim^-0.5 if None.
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        alibi_slopes: (num_heads,) or (batch, num_heads).
        cache: where the keys before the new tokens lie, or, without k and v, all keys.
    """

    sequences: Sequences
    window: Window
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    cache: CacheView | None = None

    @property
    def needs_formula(self) -> bool:
        """Whether the scores are none that PyTorch's attention can compute, whatever its mask."""
        return bool(self.softcap)

    @property
    def is_plain(self) -> bool:
        """Whether the scores are scaled products, of which the window alone hides some."""
        return not self.needs_formula and self.alibi_slopes is None

    def flatten(self) -> tuple[Any, ...]:
        """Return the values that `SCHEMA` names, or `CACHE_SCHEMA` if there is a cache."""
        sequences = self.sequences
        options = (self.softmax_scale, *self.window, self.softcap, self.alibi_slopes)
        if self.cache is None:
            return (*sequences[:4], *options)
        return (*self.cache, sequences.cu_seqlens_q, sequences.max_seqlen_q, *options)

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> AttentionSpec:
        """Return the spec from which `flatten` made the values."""
        softmax_scale, left, right, softcap, alibi_slopes = values[-5:]
        cache = None
        if len(values) == 9:
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = values[:4]
        else:
            cache = CacheView(*values[:7])
            cu_seqlens_q, max_seqlen_q = cu_seqlens_k, max_seqlen_k = values[7:9]
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return cls(sequences, Window(left, right), softmax_scale, softcap, alibi_slopes, cache)

    def of_sequence(self, index: int, seqlen_q: int, seqlen_k: int) -> AttentionSpec:
        """Return the spec of one sequence, as a rectangular batch of its own without a cache."""
        slopes = self.alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[index]
        return self._replace(
            sequences=Sequences(None, None, seqlen_q, seqlen_k),
            alibi_slopes=slopes,
            cache=None,
        )

    def scale(self, head_dim: int) -> float:
        """Return the factor of the products of queries and keys."""
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
