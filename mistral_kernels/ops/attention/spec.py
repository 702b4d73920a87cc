"""Arguments of one attention call, except q, k and v: `AttentionSpec`.

Public functions create an `AttentionSpec`. Operators accept numbers and tensors only: `flatten`
lists the fields in the order of the schemas below, and `unflatten` restores the spec inside the
operator.
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
# Arguments that `flatten` returns: SCHEMA without a cache, CACHE_SCHEMA with one.
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
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32: 0, then the end of each packed sequence.
            cu_seqlens_q is None for a rectangular batch. If only cu_seqlens_k is None, cu_seqlens_q
            is used for k and v too.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths of the sequences.
        covers_q, covers_k: whether every token of q, or of k, belongs to a sequence. False if this
            was not checked.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    covers_q: bool = True
    covers_k: bool = True


class CacheView(NamedTuple):
    """Keys and values of a batch in rings or, with `block_table`, in pages.

    Attributes:
        k_cache, v_cache: (rows, capacity, num_kv_heads, head_dim), or in pages (pages, page_size,
            num_kv_heads, head_dim).
        lengths: (batch,) int32, number of tokens of each sequence before the new ones.
        seqlen_new: number of new tokens per sequence that the cache holds. Unused for packed
            queries, where each query is one new token.
        rows: (batch,) int32, the row of each sequence in the cache; None for its index in the
            batch.
        leftpad: (batch,) int32, the first position of each sequence that is not padding; None for
            0.
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
        """Number of positions per sequence."""
        return capacity_of(self.k_cache, self.block_table)


class AttentionSpec(NamedTuple):
    """Layout, window and scoring of one call. It is a tuple for speed: each call creates three.

    Attributes:
        sequences: layout of q, k and v; with a cache, of q and of the new tokens' k and v.
        window: visible keys as inclusive distances, see `window.py`.
        softmax_scale: factor of the products q k^T; head_dim^-0.5 if None.
        softcap: scores s become softcap * tanh(s / softcap); 0 for no softcap.
        alibi_slopes: (num_heads,) or (batch, num_heads).
        cache: cache of the keys before the new tokens, or of all keys if k and v are None.
    """

    sequences: Sequences
    window: Window
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    cache: CacheView | None = None

    @property
    def needs_formula(self) -> bool:
        """Whether `scaled_dot_product_attention` cannot compute the scores, with any mask."""
        return bool(self.softcap)

    @property
    def is_plain(self) -> bool:
        """Whether the scores are scaled products, masked by the window only."""
        return not self.needs_formula and self.alibi_slopes is None

    def flatten(self) -> tuple[Any, ...]:
        """Return the fields in the order of `SCHEMA`, or of `CACHE_SCHEMA` if there is a cache."""
        sequences = self.sequences
        options = (self.softmax_scale, *self.window, self.softcap, self.alibi_slopes)
        if self.cache is None:
            return (*sequences[:4], *options)
        return (*self.cache, sequences.cu_seqlens_q, sequences.max_seqlen_q, *options)

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> AttentionSpec:
        """Return the spec of the values that `flatten` returned."""
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
        """Return the spec of one sequence as a rectangular batch without a cache."""
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
