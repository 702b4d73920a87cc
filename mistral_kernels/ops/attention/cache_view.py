"""A cache as attention is handed it: where each sequence's keys and values lie, and how many."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mistral_kernels.ops.rolling_cache import capacity_of


class CacheView(NamedTuple):
    """Keys and values of a batch, in rings or, with `block_table`, in pages.

    Attributes:
        k_cache, v_cache: (rows, capacity, num_kv_heads, head_dim), or (pages, page_size, ...).
        lengths: (batch,) int32; tokens before the new ones.
        cu_seqlens: (batch + 1,) int32, where each sequence begins among packed queries; None: the
            queries are not packed, and `seqlen_new` new tokens of each sequence are in the cache.
        seqlen_new: see there.
        rows: (batch,) int32, which row of the cache is each sequence's; None: its own.
        leftpad: (batch,) int32, the first position that counts; None: 0.
        block_table: (batch, max_pages) int32, the pages of each sequence.
    """

    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    cu_seqlens: Tensor | None = None
    seqlen_new: int = 0
    rows: Tensor | None = None
    leftpad: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Positions of a sequence that there is room for."""
        return capacity_of(self.k_cache, self.block_table)
