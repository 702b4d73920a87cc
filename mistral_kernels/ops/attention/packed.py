"""Packed batches: sequences one after the other, and `cu_seqlens` to tell where each begins."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mistral_kernels.ops.attention.spec import Sequences


class _Seen(NamedTuple):
    version: int
    sequences: int  # how many, without empty ones at the end
    longest: int
    end: int


_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()


def make_cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return (len(lengths) + 1,) int32 for sequences of these lengths, which nobody may change.

    `check_sequences` takes its values from here and never reads them.
    """
    offsets = [0, *accumulate(lengths)]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    _seen[cu_seqlens] = _describe(cu_seqlens, lengths, offsets[-1])
    return cu_seqlens


def check_sequences(q: Tensor, k: Tensor, sequences: Sequences) -> Sequences:
    """Return `sequences` with both offsets, checked, and tight lengths.

    On a GPU, where reading values waits for the device, each version of a tensor is read once.
    Empty sequences at the end are dropped. While a CUDA graph is captured nothing may wait, and
    tensors not read before are not checked.

    Raises:
        ValueError: sequences overlap, begin before 0, end past the tokens, or are longer than
            max_seqlen says.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_ = sequences
    if cu_seqlens_q is None:
        return sequences
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    seen_q = _check("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    seen_k = _check("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if seen_q is None or seen_k is None:
        return Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, False, False)
    entries = max(seen_q.sequences, seen_k.sequences) + 1
    if entries < cu_seqlens_q.shape[0]:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q[:entries], cu_seqlens_k[:entries]
    covers = seen_q.end == q.shape[0], seen_k.end == k.shape[0]
    return Sequences(cu_seqlens_q, cu_seqlens_k, seen_q.longest, seen_k.longest, *covers)


def _check(name: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> _Seen | None:
    seen = _seen.get(cu_seqlens)
    if seen is None or seen.version != _version(cu_seqlens):
        if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        offsets = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in pairwise(offsets)]
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{name} must begin with 0 and never decrease, got {offsets}"
            )
        seen = _describe(cu_seqlens, lengths, offsets[-1])
        if not cu_seqlens.is_cpu and not cu_seqlens.is_inference():  # which counts no versions
            _seen[cu_seqlens] = seen
    if seen.end > tokens:
        raise ValueError(
            f"cu_seqlens_{name} ends at {seen.end}, past the {tokens} tokens of {name}"
        )
    if seen.longest > max_seqlen:
        raise ValueError(
            f"max_seqlen_{name} is {max_seqlen}, but a sequence of cu_seqlens_{name} has "
            f"{seen.longest} tokens"
        )
    return seen


def _describe(cu_seqlens: Tensor, lengths: Sequence[int], end: int) -> _Seen:
    sequences = len(lengths)
    while sequences and not lengths[sequences - 1]:
        sequences -= 1
    longest = max(lengths, default=0)
    return _Seen(_version(cu_seqlens), sequences, longest, end)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
