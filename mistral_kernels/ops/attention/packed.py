"""Packed batches: sequences one after the other, and `cu_seqlens` to tell where each begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Offsets(NamedTuple):
    """Where each sequence begins, and the last ends, among the queries and among the keys."""

    q: Tensor
    k: Tensor
    covers_q: bool  # every query is known to be in some sequence
    covers_k: bool  # and every key


class _Seen(NamedTuple):
    version: int
    longest: int
    end: int


_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Offsets | None:
    """The offsets of a packed batch, checked; None for a rectangular one.

    Values are read once per tensor, not at every call: on a GPU that waits for the device. While a
    CUDA graph is captured nothing may wait, and tensors not seen before are taken on trust.

    Raises:
        ValueError: sequences overlap, begin before 0, end past the tokens, or are longer than
            max_seqlen says.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return None
    covers_q = _check("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    covers_k = _check("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    return Offsets(cu_seqlens_q, cu_seqlens_k, covers_q, covers_k)


def _check(name: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> bool:
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    seen = _seen.get(cu_seqlens)
    if seen is None or seen.version != version:
        if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        offsets = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in zip(offsets, offsets[1:])]
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{name} must begin with 0 and never decrease, got {offsets}"
            )
        seen = _seen[cu_seqlens] = _Seen(version, max(lengths, default=0), offsets[-1])
    if seen.end > tokens:
        raise ValueError(
            f"cu_seqlens_{name} ends at {seen.end}, past the {tokens} tokens of {name}"
        )
    if seen.longest > max_seqlen:
        raise ValueError(
            f"max_seqlen_{name} is {max_seqlen}, but a sequence of cu_seqlens_{name} has "
            f"{seen.longest} tokens"
        )
    return seen.end == tokens
