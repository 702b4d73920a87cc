"""Causal grouped-query attention as others compute it and as we do, under one signature.

`run(q, k, v, window)` takes q (b, s, h, d), k and v (b, s, g, d), and how many keys a query sees,
its own included (None: all before it). What depends on the shape alone (masks, offsets) is made
once and kept, as a model makes it once for all its layers.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mistral_kernels import attention
from mistral_kernels.ops import reference

Run = Callable[[Tensor, Tensor, Tensor, "int | None"], Tensor]


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


class Provider(NamedTuple):
    name: str
    run: Run
    # Why it cannot run there, None if nothing is known against it.
    available: Callable[[torch.device, torch.dtype], str | None] = _anywhere


def _ours(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return attention(q, k, v, sliding_window=window)


def flash_window(window: int | None) -> tuple[int, int]:
    """flash-attn's inclusive distances to the left and right."""
    return (-1 if window is None else window - 1, 0)


# One shape is timed at a time, and at 32768 tokens a mask fills a gigabyte.
@functools.lru_cache(maxsize=1)
def _mask(seqlen: int, window: int | None, device: torch.device) -> Tensor:
    return reference.visible(seqlen, seqlen, True, flash_window(window), device)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What models have inline: the reference's formula, less the log-sum-exp nobody asks for.

    That would be half of the time: `reference.attention` itself is no fair peer.
    """
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


# Shapes are few: each may have code of its own, which is the fastest.
_compiled_plain = torch.compile(_plain, dynamic=False)
_compiled_flex = torch.compile(flex_attention, dynamic=False)


def _eager(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return _plain(q, k, v, _mask(q.shape[1], window, q.device))


def _compiled(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return _compiled_plain(q, k, v, _mask(q.shape[1], window, q.device))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    seqlen = q.shape[1]
    cut = window is not None and window < seqlen
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=_mask(seqlen, window, q.device) if cut else None,
        is_causal=not cut,
        enable_gqa=True,
    ).transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _block_mask(seqlen: int, window: int | None, device: torch.device) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        return seen if window is None else seen & (key > query - window)

    return create_block_mask(sees, None, None, seqlen, seqlen, device=device)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return _compiled_flex(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=_block_mask(q.shape[1], window, q.device),
        enable_gqa=True,
    ).transpose(1, 2)


def _flash_kernels_lack(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"knows no {dtype}"
    return None


def _varlen_lacks(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _flash_kernels_lack(device, dtype):
        return reason
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return str(error)
    missing = {"window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    return f"has no {sorted(missing)[0]} in torch {torch.__version__}" if missing else None


@functools.lru_cache(maxsize=1)
def _offsets(batch: int, seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, seqlen = q.shape[:2]
    offsets = _offsets(batch, seqlen, q.device)
    out = varlen_attn(
        *(x.flatten(0, 1) for x in (q, k, v)),
        offsets,
        offsets,
        seqlen,
        seqlen,
        window_size=flash_window(window),
        enable_gqa=True,
    )
    return out.unflatten(0, (batch, seqlen))


def _flash_attn_lacks(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed"
    return _flash_kernels_lack(device, dtype)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True, window_size=flash_window(window))


OURS = Provider("ours", _ours)
PROVIDERS = (
    OURS,
    Provider("eager", _eager),
    Provider("compiled eager", _compiled),
    Provider("SDPA", _sdpa),
    Provider("flex_attention", _flex),
    Provider("varlen_attn", _varlen, _varlen_lacks),
    Provider("flash-attn 2", _flash_attn, _flash_attn_lacks),
)
