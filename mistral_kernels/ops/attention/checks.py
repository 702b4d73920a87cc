"""Checks of the arguments of attention, for its functions and operators."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mistral_kernels.ops.attention.kernels.decode import num_counters
from mistral_kernels.ops.attention.spec import AttentionSpec, Sequences
from mistral_kernels.ops.cache_arguments import (
    check_cache,
    check_cache_indices,
    check_cu_seqlens_values,
    check_new_tokens,
)
from mistral_kernels.ops.checks import (
    FLOAT32,
    INT32_MAX,
    check_float,
    check_int32,
    check_range,
    check_same_dtype,
    check_shape,
    check_softcap,
    is_flag,
    is_number,
)

MAX_HEAD_DIM = 256


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ndim: int,
    names: tuple[str, ...] = ("q", "k", "v"),
) -> None:
    """Raise unless the shapes and dtypes of q, k and v fit one another, as `attention` requires.

    `names` are the names of q, k and v in messages.
    """
    q_name, k_name, v_name = names
    check_ndim(q_name, q, ndim)
    check_ndim(k_name, k, ndim)
    check_heads(q_name, q, k_name, k)
    check_shape(v_name, v, k.shape)
    check_float(q_name, q)
    check_same_dtype(k_name, k, q_name, q)
    check_same_dtype(v_name, v, q_name, q)


def check_heads(q_name: str, q: Tensor, k_name: str, k: Tensor) -> None:
    """Raise ValueError unless the number and size of the heads of q and k fit one another."""
    (heads, head_dim), (kv_heads, kv_head_dim) = q.shape[-2:], k.shape[-2:]
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{q_name}'s head_dim must be in [1, {MAX_HEAD_DIM}], got {head_dim}")
    if kv_head_dim != head_dim:
        raise ValueError(f"{k_name} must have {q_name}'s head_dim {head_dim}, got {kv_head_dim}")
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{q_name}'s number of heads must be a positive multiple of {k_name}'s, "
            f"got {heads} and {kv_heads}"
        )


def check_ndim(name: str, x: Tensor, ndim: int) -> None:
    """Raise ValueError unless `x` has `ndim` dimensions: 4, or 3 for a packed batch."""
    if x.ndim != ndim:
        layout = "batch, seqlen" if ndim == 4 else "tokens"
        raise ValueError(f"{name} must be ({layout}, heads, head_dim), got {tuple(x.shape)}")


def check_slopes(alibi_slopes: Tensor | None, num_heads: int, batch: int) -> None:
    """Raise unless `alibi_slopes` is None, or fits the number of heads and the batch size."""
    if alibi_slopes is None:
        return
    check_float("alibi_slopes", alibi_slopes)
    if alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(
            f"alibi_slopes must be ({num_heads},) or ({batch}, {num_heads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )


def check_options(causal: Any, softmax_scale: Any, softcap: Any) -> None:
    """Raise TypeError unless `causal` is a flag, and `softmax_scale` and `softcap` are numbers.

    `softmax_scale` may also be None.
    """
    if not is_flag(causal):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if not is_number(value) and not (value is None and name == "softmax_scale"):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_scoring(softmax_scale: float | None, softcap: float) -> None:
    """Raise ValueError for values that give NaN, or results that depend on the backend."""
    if softmax_scale is not None and not 0 < softmax_scale <= FLOAT32.max:
        raise ValueError(f"softmax_scale must be in (0, {FLOAT32.max:.2g}], got {softmax_scale}")
    check_softcap(softcap)


def check_num_splits(num_splits: Any) -> None:
    """Raise unless `num_splits` is an integer in [0, 2^31 - 1]."""
    if type(num_splits) is int and 0 <= num_splits <= INT32_MAX:
        return
    if torch.compiler.is_compiling():  # a symbolic integer
        return
    try:
        number = operator.index(num_splits)
    except TypeError:
        raise TypeError(f"num_splits must be an integer, got {num_splits!r}") from None
    if not 0 <= number <= INT32_MAX:
        raise ValueError(f"num_splits must be in [0, {INT32_MAX}], got {number}")


def check_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
    """Raise unless q, k, v and `spec` fit one another, as `attention` requires."""
    cu_seqlens_q, cu_seqlens_k = spec.sequences.cu_seqlens_q, spec.sequences.cu_seqlens_k
    if cu_seqlens_q is None:
        check_qkv(q, k, v, ndim=4)
        if cu_seqlens_k is not None:
            raise ValueError(
                "cu_seqlens_k must be None without cu_seqlens_q, got a tensor; packed batches need "
                "cu_seqlens_q"
            )
        batch = q.shape[0]
        if k.shape[0] != batch:
            raise ValueError(f"k must have q's batch size {batch}, got {k.shape[0]}")
    else:
        check_qkv(q, k, v, ndim=3)
        batch = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
        if cu_seqlens_k is not None:
            batch_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
            if batch_k != batch:
                raise ValueError(
                    f"cu_seqlens_k must have {batch} sequences like cu_seqlens_q, got {batch_k}"
                )
    check_slopes(spec.alibi_slopes, q.shape[-2], batch)
    check_scoring(spec.softmax_scale, spec.softcap)


def check_cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    spec: AttentionSpec,
    num_splits: int,
    counters: Tensor | None,
) -> None:
    """Raise unless q, the new k and v, and the cache in `spec` fit one another."""
    assert spec.cache is not None
    k_cache, v_cache, lengths, seqlen_new, rows, leftpad, block_table = spec.cache
    cu_seqlens, max_seqlen_q = spec.sequences.cu_seqlens_q, spec.sequences.max_seqlen_q
    batch = check_cache(k_cache, v_cache, lengths, rows, block_table)
    check_ndim("q", q, 4 if cu_seqlens is None else 3)
    check_same_dtype("k_cache", k_cache, "q", q)
    check_heads("q", q, "k_cache", k_cache)
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given, or both be None")
    if cu_seqlens is not None:
        check_int32("cu_seqlens", cu_seqlens, (batch + 1,))
    elif k is not None:
        raise ValueError("k and v must be None without cu_seqlens; new keys must be packed")
    else:
        if q.shape[0] != batch or q.shape[1] > max_seqlen_q:
            raise ValueError(
                f"q must hold {batch} sequences of at most {max_seqlen_q} tokens (max_seqlen_q), "
                f"got {tuple(q.shape)}"
            )
        if not 0 <= seqlen_new <= INT32_MAX:
            raise ValueError(f"seqlen_new must be in [0, {INT32_MAX}], got {seqlen_new}")
    if k is not None and v is not None:
        check_new_tokens("k", k, k_cache, q.shape[0])
        check_new_tokens("v", v, k_cache, q.shape[0])
    check_int32("leftpad", leftpad, (batch,))
    check_slopes(spec.alibi_slopes, q.shape[-2], batch)
    check_scoring(spec.softmax_scale, spec.softcap)
    check_num_splits(num_splits)
    if counters is not None:
        needed = num_counters(batch, k_cache.shape[2])
        if counters.numel() < needed or counters.dtype != torch.int32:
            raise ValueError(
                f"counters must hold at least {needed} zeros of torch.int32, "
                f"got {counters.numel()} of {counters.dtype}"
            )


def check_cached_values(q: Tensor, spec: AttentionSpec) -> None:
    """Raise ValueError if an index tensor holds a value out of range.

    Values that cannot be read without waiting for the device are not checked.
    """
    cache, cu_seqlens = spec.cache, spec.sequences.cu_seqlens_q
    assert cache is not None
    check_cache_indices(cache.k_cache, cache.lengths, cache.rows, cache.block_table)
    check_range("leftpad", cache.leftpad, INT32_MAX)
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, spec.sequences.max_seqlen_q, q.shape[0])
    else:
        check_range("lengths", cache.lengths, INT32_MAX - cache.seqlen_new)


def _check_cu_seqlens(name: str, cu_seqlens: Tensor) -> int:
    """Return the number of sequences. Values are checked later, by `check_sequences`."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must be (batch + 1,), got {tuple(cu_seqlens.shape)}")
    return cu_seqlens.shape[0] - 1


class _Summary(NamedTuple):
    """Summary of the values of a cu_seqlens tensor, valid while its version is unchanged."""

    version: int
    sequences: int  # the number of sequences, without empty sequences at the end
    longest: int
    end: int


_summaries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cu_seqlens -> _Summary


def make_cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the (len(lengths) + 1,) int32 cu_seqlens of sequences with these lengths.

    A summary of the values is stored, so that `check_sequences` does not read them from the device.
    The tensor must not be changed in place.
    """
    offsets = [0, *accumulate(lengths)]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    _summaries[cu_seqlens] = _summarize(cu_seqlens, lengths, offsets[-1])
    return cu_seqlens


def check_sequences(q: Tensor, k: Tensor, sequences: Sequences) -> Sequences:
    """Check the values of both cu_seqlens; return the sequences with tight maximum lengths.

    Empty sequences at the end are dropped. Reading values from a GPU waits for the device, so each
    version of a tensor is read once. During CUDA graph capture waiting is not allowed: tensors that
    were not read before are not checked.

    Raises:
        ValueError: cu_seqlens decreases, does not start at 0 or ends after the last token, or a
            sequence is longer than max_seqlen.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_ = sequences
    assert cu_seqlens_q is not None
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    summary_q = _check_offsets("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    summary_k = _check_offsets("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if summary_q is None or summary_k is None:
        return Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, False, False)
    entries = max(summary_q.sequences, summary_k.sequences) + 1
    if entries < cu_seqlens_q.shape[0]:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q[:entries], cu_seqlens_k[:entries]
    covers = summary_q.end == q.shape[0], summary_k.end == k.shape[0]
    return Sequences(cu_seqlens_q, cu_seqlens_k, summary_q.longest, summary_k.longest, *covers)


def _check_offsets(name: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> _Summary | None:
    """Check the values of `cu_seqlens` and return their summary; None during graph capture."""
    summary = _summaries.get(cu_seqlens)
    if summary is None or summary.version != _version(cu_seqlens):
        if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        offsets = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in pairwise(offsets)]
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{name} must begin with 0 and never decrease, got {offsets}"
            )
        summary = _summarize(cu_seqlens, lengths, offsets[-1])
        # Inference tensors have no version counter: a later change would not be detected.
        if not cu_seqlens.is_cpu and not cu_seqlens.is_inference():
            _summaries[cu_seqlens] = summary
    if summary.end > tokens:
        raise ValueError(
            f"cu_seqlens_{name} must end within the {tokens} tokens of {name}, got {summary.end}"
        )
    if summary.longest > max_seqlen:
        raise ValueError(
            f"max_seqlen_{name} must be at least {summary.longest}, the longest sequence of "
            f"cu_seqlens_{name}, got {max_seqlen}"
        )
    return summary  # type: ignore[no-any-return]


def _summarize(cu_seqlens: Tensor, lengths: Sequence[int], end: int) -> _Summary:
    sequences = len(lengths)
    while sequences and not lengths[sequences - 1]:
        sequences -= 1
    longest = max(lengths, default=0)
    return _Summary(_version(cu_seqlens), sequences, longest, end)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
