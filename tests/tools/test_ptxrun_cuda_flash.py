"""CUDA flash attention forward: causal sliding window, grouped heads, cp.async, mma."""

from __future__ import annotations

import math
from pathlib import Path

import ptxrun
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]


SOURCE = Path(__file__).parent / "cuda" / "flash.cu"
SHARED = (64 + 4 * 64) * 72 * 2


def reference(q, k, v, G, W):
    S = q.shape[1]
    i = torch.arange(S)
    ok = (i[None] <= i[:, None]) & (i[None] > i[:, None] - W)
    s = (
        q.double() @ k.double().repeat_interleave(G, 0).transpose(1, 2) * q.shape[2] ** -0.5
    ).masked_fill(~ok, -math.inf)
    return s.softmax(-1) @ v.double().repeat_interleave(G, 0)


def tensors(S, H, G):
    return (
        torch.randn(H, S, 64).bfloat16(),
        torch.randn(H // G, S, 64).bfloat16(),
        torch.randn(H // G, S, 64).bfloat16(),
        torch.zeros(H, S, 64).bfloat16(),
    )


@pytest.mark.parametrize(("S", "W"), [(64, 1000), (200, 1000), (333, 100)])
def test_flash_attention(S, W, nvcc):
    m = ptxrun.compile_cuda(SOURCE)
    q, k, v, o = tensors(S, 4, 2)
    with ptxrun.options(racecheck=True, profile=True):
        m["flash"].launch(
            ((S + 63) // 64, 4),
            128,
            [q, k, v, o, S, 2, W, 64**-0.5 * math.log2(math.e)],
            shared_bytes=SHARED,
        )
    r = reference(q, k, v, 2, W)
    assert (o.double() - r).norm() / r.norm() < 4e-3
    assert (
        ptxrun.last_profile().bank_conflict_factor == 1.0
    )  # the padding of rows to LD avoids conflicts


def test_missing_barrier_raises_race_error(nvcc):
    m = ptxrun.compile_cuda(SOURCE, options=["-DWITHOUT_BARRIER"])
    q, k, v, o = tensors(300, 2, 1)
    with (
        ptxrun.options(racecheck=True),
        pytest.raises(ptxrun.RaceError, match="shared-memory race"),
    ):
        m["flash"].launch((5, 2), 128, [q, k, v, o, 300, 1, 1000, 0.1], shared_bytes=SHARED)


def test_read_beyond_a_tensor_raises_memory_fault(nvcc):
    m = ptxrun.compile_cuda(SOURCE, options=["-DWITHOUT_BOUNDS"])
    q, k, v, o = tensors(200, 2, 1)
    with pytest.raises(ptxrun.MemoryFault, match=r"out-of-range global cp.async read"):
        m["flash"].launch((4, 2), 128, [q, k, v, o, 200, 1, 1000, 0.1], shared_bytes=SHARED)
