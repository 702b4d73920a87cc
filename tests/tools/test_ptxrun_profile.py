"""Counts in ptxrun's profile, compared with known values."""

from pathlib import Path

import ptxrun
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]


@triton.jit
def scale(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def test_elementwise_traffic():
    ptxrun.Options.profile = True
    x, y = torch.randn(4096), torch.zeros(4096)
    scale[(4,)](x, y, 4096, B=1024)
    p = ptxrun.last_profile()
    assert p.name == "scale"
    assert p.ctas == 4
    assert p.mma_flop == 0
    assert p.global_read_bytes == p.global_write_bytes == 16384
    assert p.global_read_sectors == p.global_write_sectors == 512
    assert p.sector_efficiency == 1.0
    assert p.tensors["x"] == {"size": 16384, "read": 16384, "write": 0}
    assert p.tensors["y"] == {
        "size": 16384,
        "read": 0,
        "write": 16384,
    }
    assert abs(p.times("a100")["DRAM"] - 32768 / 2.039e12) < 1e-12
    assert "scale" in ptxrun.report(out=False)
    assert "model" in str(p)


@triton.jit
def mm(A, B, C, N: tl.constexpr):
    i = tl.arange(0, N)
    q = i[:, None] * N + i[None]
    tl.store(C + q, tl.dot(tl.load(A + q), tl.load(B + q)))


@pytest.mark.parametrize("dt", [torch.float16, torch.bfloat16])
def test_mma_flop(dt):
    ptxrun.Options.profile = True
    a = torch.randn(64, 64).to(dt)
    mm[(1,)](a, a, torch.zeros(64, 64), 64)
    assert ptxrun.last_profile().mma_flop == 2 * 64**3


SOURCE = Path(__file__).parent / "cuda" / "counts.cu"


def test_sectors_bank_conflicts_and_divergence(nvcc):
    m = ptxrun.compile_cuda(SOURCE)
    ptxrun.Options.profile = True
    a, o = torch.randn(1024), torch.zeros(32)
    for s, n in ((1, 4), (2, 8), (8, 32), (32, 32)):
        m["strided"].launch(1, 32, [a, o, s])
        assert ptxrun.last_profile().global_read_sectors == n
    m["zigzag"].launch(1, 32, [a, o])
    p = ptxrun.last_profile()
    assert p.global_read_sectors == 4
    assert p.global_read_bytes == 128
    assert p.global_requests == 2
    for s, n in ((1, 1), (2, 2), (4, 4), (32, 32), (31, 1), (0, 1)):
        m["banks"].launch(1, 32, [o, s])
        p = ptxrun.last_profile()
        assert p.shared_wavefronts == 32 + n
        assert p.shared_ideal == 33
    m["divergent"].launch(1, 64, [torch.ones(64)])
    assert ptxrun.last_profile().divergent_branches == 2
