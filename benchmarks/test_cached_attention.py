"""One new token per sequence over a rolling cache, at several positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import CPU_DTYPES, Case, Inputs, Runs, TensorOperator, cases, normal
from mistral_kernels import rolling_cache_attention
from mistral_kernels.ops import reference

HEAD_DIM = 128


def capacity(case: Case) -> int:
    """Return the number of slots of the ring, which is full at this position."""
    return case["position"] if case["W"] is None else min(case["position"], case["W"])


def ours(case: Case, q: Tensor, k_cache: Tensor, v_cache: Tensor, **lengths: Tensor) -> Any:
    return rolling_cache_attention(
        *(q, None, None, k_cache, v_cache), **lengths, max_seqlen=1, sliding_window=case["W"]
    )


def plain(case: Case, q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Tensor) -> Tensor:
    """Attend to every slot. The ring is full, and the order of the keys does not matter."""
    groups = q.shape[1] // k_cache.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k_cache, v_cache))
    scores = torch.einsum("bhd,bshd->bhs", q, k) * HEAD_DIM**-0.5
    return torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v)


compiled_plain = torch.compile(plain, dynamic=False)


def sdpa(case: Case, q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Tensor) -> Tensor:
    k, v = (x.transpose(1, 2) for x in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True).squeeze(2)


def flash_attn_2(case: Case, q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        q[:, None], k_cache, v_cache, cache_seqlens=k_cache.shape[1], causal=True
    ).squeeze(1)


class CachedAttention(TensorOperator):
    name = "cached_attention"
    summary = "One new token per sequence over the rolling cache"
    bound = "byte"
    only_reads = True
    runs: ClassVar[Runs] = {
        "ours": ours,
        "eager": plain,
        "compiled eager": lambda case, **inputs: compiled_plain(case, **inputs),
        "SDPA": sdpa,
        "flash-attn 2": flash_attn_2,
    }
    small = tuple((("B", 2), ("position", 100), ("W", window), ("H", 8)) for window in (64, None))

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """Return inputs with the new token in the ring; `lengths` counts the tokens before it."""
        batch, heads = case["B"], case["H"]
        ring = (batch, capacity(case), heads // 4, HEAD_DIM)
        return {
            "q": normal(batch, heads, HEAD_DIM, case=case, device=device),
            "k_cache": normal(*ring, case=case, device=device),
            "v_cache": normal(*ring, case=case, device=device),
            "lengths": torch.full((batch,), case["position"] - 1, device=device).int(),
            "cu_seqlens": torch.arange(batch + 1, device=device).int(),
        }

    def definition(
        self, case: Case, q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Tensor
    ) -> Any:
        out, _ = reference.attention(q[:, None], k_cache, v_cache)
        return out.squeeze(1)

    def flops(self, case: Case) -> float:
        return 4.0 * case["B"] * case["H"] * HEAD_DIM * capacity(case)

    def bytes(self, case: Case) -> float:
        """Count k and v."""
        return case["B"] * case["H"] / 2 * HEAD_DIM * capacity(case) * case.dtype.itemsize


def sizes(batch: int, position: int, window: int | None) -> dict[str, Any]:
    return {"B": batch, "position": position, "W": window, "H": 32}


OPERATOR = CachedAttention(
    cpu=cases(
        [sizes(1, n, 4096) for n in (1024, 2048, 4096, 16384)] + [sizes(8, 1024, 4096)],
        CPU_DTYPES,
        ("forward",),
    ),
    gpu=cases(
        [
            sizes(batch, 1 << n, window)
            for batch in (1, 8, 64)
            for n in range(10, 18)
            for window in (4096, None)
            if window or batch << n <= 1 << 20
        ],
        (torch.bfloat16,),
        ("forward",),
    ),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
