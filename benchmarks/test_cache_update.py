"""Writes of new tokens to the rolling cache, with the rotation of queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.registry import (
    CPU_DTYPES,
    Case,
    Inputs,
    Runs,
    TensorOperator,
    cases,
    helpers,
    normal,
)
from benchmarks.test_rotary import plain as plain_rotary
from mistral_kernels import rolling_cache_update_
from mistral_kernels.ops.rotary import rotary_tables

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 32, 8, 128, 4096
Outputs = tuple[Tensor, Tensor, Tensor]  # rotated queries, both caches


def ours(case: Case, **inputs: Any) -> Outputs:
    rotated = rolling_cache_update_(
        **{name: x for name, x in inputs.items() if name not in ("positions", "slots")},
        max_seqlen=case["new"],
    )
    assert rotated is not None
    return rotated, inputs["k_cache"], inputs["v_cache"]


def write(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Outputs:
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)
    return q, k_cache, v_cache


def eager(case: Case, q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> Outputs:
    """Write to slots computed beforehand, so that only rotation and writing are timed."""
    q, k = plain_rotary(q, k, inputs["cos"], inputs["sin"], inputs["positions"])
    return write(q, k, v, inputs["k_cache"], inputs["v_cache"], inputs["slots"])


class CacheUpdate(TensorOperator):
    name = "cache_update"
    summary = "Rotate new keys and append them to the rolling cache"
    bound = "byte"
    runs: ClassVar[Runs] = {"ours": ours, "eager": eager}
    small = ((("B", 2), ("new", 3)), (("B", 1), ("new", 1)))

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        batch, new = case["B"], case["new"]
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        lengths = torch.randint(2 * CAPACITY - new // 2 - 1, 2 * CAPACITY, (batch,), device=device)
        positions = (lengths[:, None] + torch.arange(new, device=device)).flatten()
        rows = torch.arange(batch, device=device).repeat_interleave(new)
        cos, sin = rotary_tables(3 * CAPACITY, HEAD_DIM, 1e4, device)
        ring = batch, CAPACITY, KV_HEADS, HEAD_DIM
        return {
            **{
                name: normal(batch * new, count, HEAD_DIM, case=case, device=device)
                for name, count in heads.items()
            },
            "k_cache": torch.zeros(ring, dtype=case.dtype, device=device),
            "v_cache": torch.zeros(ring, dtype=case.dtype, device=device),
            "lengths": lengths.int(),
            "cu_seqlens": torch.arange(batch + 1, device=device).int() * new,
            "cos": cos,
            "sin": sin,
            "positions": positions,
            "slots": rows * CAPACITY + positions % CAPACITY,
        }

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        for sizes in self.small:
            small = Case(sizes, case.dtype)
            inputs = self.inputs(small, device)
            results = []
            for run, dtype in ((self.runs[provider], None), (eager, None), (eager, torch.float64)):
                own = {
                    name: x.to(dtype, copy=True) if dtype and x.dtype == case.dtype else x.clone()
                    for name, x in inputs.items()
                }
                results.append(run(small, **own))
            for name, *three in zip(("q", "k_cache", "v_cache"), *results, strict=True):
                helpers.assert_as_accurate(*three, name)

    def flops(self, case: Case) -> float:
        return 3.0 * case["B"] * case["new"] * (HEADS + KV_HEADS) * HEAD_DIM

    def bytes(self, case: Case) -> float:
        """Count q, k and v, read and written, and the float32 tables."""
        heads = 2 * (HEADS + 2 * KV_HEADS) * HEAD_DIM * case.dtype.itemsize
        return case["B"] * case["new"] * (heads + HEAD_DIM * 4)


def sizes(batch: int, new: int) -> dict[str, int]:
    return {"B": batch, "new": new}


OPERATOR = CacheUpdate(
    cpu=cases([sizes(1, 1), sizes(8, 1), sizes(1, 512)], CPU_DTYPES, ("forward",)),
    gpu=cases(
        [sizes(n, 1) for n in (1, 8, 64)] + [sizes(1, n) for n in (512, 4096)],
        (torch.bfloat16,),
        ("forward",),
    ),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
