"""Causal grouped-query attention in a sliding window, forward and backward.

On a CPU that runs other programs, set OMP_NUM_THREADS to the number of idle cores. If there is one
thread more than idle cores, every parallel region waits for the scheduler. Our implementation has
the most parallel regions and was 30 times slower.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.registry import CPU_DTYPES, Case, Inputs, Runs, TensorOperator, cases, normal
from mistral_kernels import attention
from mistral_kernels.ops import reference

LENGTHS = 512, 1024, 2048, 4096  # tokens


def window_size(window: int | None) -> tuple[int, int]:
    """Return flash-attn's inclusive distances to the left and right."""
    return (-1 if window is None else window - 1, 0)


@functools.cache
def mask(seqlen: int, window: int | None, device: torch.device) -> Tensor:
    return reference.visible(seqlen, seqlen, True, window_size(window), device)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Compute attention as models do, without the log-sum-exp.

    `reference.attention` would not be a fair comparison: half of its time is the log-sum-exp.
    """
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


# There are few shapes. Code compiled for one shape is the fastest.
compiled_plain = torch.compile(plain, dynamic=False)
compiled_flex = torch.compile(flex_attention, dynamic=False)


def ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attention(q, k, v, sliding_window=case["W"])


def eager(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v, mask(case["S"], case["W"], q.device))


def compiled(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_plain(q, k, v, mask(case["S"], case["W"], q.device))


def heads_first(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.transpose(1, 2) for x in tensors)


def cut(case: Case) -> bool:
    """Return whether the window is shorter than the sequence."""
    return case["W"] is not None and case["W"] < case["S"]


def sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        *heads_first(q, k, v),
        attn_mask=mask(case["S"], case["W"], q.device) if cut(case) else None,
        is_causal=not cut(case),
        enable_gqa=True,
    ).transpose(1, 2)


def sdpa_flash(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run FlashAttention-2 as built into PyTorch; `sdpa` may choose cuDNN instead."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(case, q, k, v)


@functools.cache
def block_mask(seqlen: int, window: int | None, device: torch.device) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        return seen if window is None else seen & (key > query - window)

    return create_block_mask(sees, None, None, seqlen, seqlen, device=device)


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.requires_grad and q.is_cpu:  # its failing compilation would also break the forward pass
        raise NotImplementedError("has no backward on a CPU")
    blocks = block_mask(case["S"], case["W"], q.device)
    out = compiled_flex(*heads_first(q, k, v), block_mask=blocks, enable_gqa=True)
    return out.transpose(1, 2)


@functools.cache
def offsets(batch: int, seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device)


def varlen(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    missing = {"window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        raise NotImplementedError(f"torch {torch.__version__} has no {sorted(missing)[0]}")
    batch, seqlen = q.shape[:2]
    starts = offsets(batch, seqlen, q.device)
    out = varlen_attn(
        *(x.flatten(0, 1) for x in (q, k, v)),
        *(starts, starts, seqlen, seqlen),
        window_size=window_size(case["W"]),
        enable_gqa=True,
    )
    return out.unflatten(0, (batch, seqlen))


def flash_attn_2(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True, window_size=window_size(case["W"]))


def flash_attn_3(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True, window_size=window_size(case["W"]))
    return out[0] if isinstance(out, tuple) else out


def flash_attn_4(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    window = None if case["W"] is None else case["W"] - 1
    out = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    return out[0] if isinstance(out, tuple) else out


def xformers(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    bias = attn_bias.LowerTriangularFromBottomRightMask()
    if case["W"] is not None:
        bias = bias.make_local_attention(case["W"])
    groups, size = k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (groups, size))
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, size, -1) for x in (k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)


class Attention(TensorOperator):
    name = "attention"
    summary = "Attention: causal, grouped heads, with and without a sliding window"
    bound = "FLOP"
    runs: ClassVar[Runs] = {
        "ours": ours,
        "eager": eager,
        "compiled eager": compiled,
        "SDPA": sdpa,
        "SDPA flash": sdpa_flash,
        "flex_attention": flex,
        "varlen_attn": varlen,
        "flash-attn 2": flash_attn_2,
        "flash-attn 3": flash_attn_3,
        "flash-attn 4": flash_attn_4,
        "xformers": xformers,
    }
    small = tuple((("B", 1), ("S", 257), ("W", window), ("H", 4)) for window in (64, None))

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        heads = case["H"]
        return {
            name: normal(case["B"], case["S"], count, 128, case=case, device=device)
            for name, count in (("q", heads), ("k", heads // 4), ("v", heads // 4))
        }

    def beyond(self, provider: str, case: Case) -> str | None:
        return "has no sliding window" if provider == "SDPA flash" and cut(case) else None

    def definition(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = reference.attention(q, k, v, causal=True, window_size=window_size(case["W"]))
        return out

    def flops(self, case: Case) -> float:
        """Count the products of visible pairs: 2 in the forward pass, 5 in the backward pass."""
        seqlen, window = case["S"], case["W"]
        seen = seqlen if window is None else min(window, seqlen)
        pairs = case["B"] * (seen * (seen + 1) // 2 + (seqlen - seen) * seen)
        return 4 * 128 * case["H"] * pairs * (2.5 if case.direction == "backward" else 1)

    def bytes(self, case: Case) -> float:
        """Count q, k, v and out, and in the backward pass their gradients."""
        elements = case["B"] * case["S"] * 128 * case["H"] * 2.5
        return elements * case.dtype.itemsize * (2 if case.direction == "backward" else 1)

    def release(self) -> None:
        super().release()
        for cached in (mask, block_mask, offsets):  # a mask of 32768 tokens takes 1 GB
            cached.cache_clear()


def sizes(batch: int, seqlen: int, window: int | None, heads: int) -> dict[str, Any]:
    return {"B": batch, "S": seqlen, "W": window, "H": heads}


OPERATOR = Attention(
    cpu=cases([sizes(1, n, window, 8) for window in (256, None) for n in LENGTHS], CPU_DTYPES),
    gpu=cases(
        [
            *(sizes(1, 1 << n, 4096, 32) for n in range(9, 18)),
            *(sizes(1, 1 << n, None, 32) for n in range(9, 16)),
            *(sizes(n, 4096, 4096, 32) for n in (4, 16, 64)),
        ],
        (torch.bfloat16,),
    ),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
