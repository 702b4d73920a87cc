"""Liger-Kernel's kernels, executed on CPU tensors."""

from __future__ import annotations

import ptxrun
import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("liger_kernel")
rms = pytest.importorskip("liger_kernel.ops.rms_norm")
rope = pytest.importorskip("liger_kernel.ops.rope")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]


@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16])
def test_rms_norm(dt):
    M, N = 6, 320
    x, w = torch.randn(M, N).to(dt), torch.randn(N).to(dt)
    y, rs = torch.empty_like(x), torch.empty(M)
    B = triton.next_power_of_2(N)
    ptxrun.Options.racecheck = True
    rms._rms_norm_forward_kernel[(M,)](
        y, N, x, N, w, 1, rs, 1, N, 1e-6, 0.0, 0, elementwise_affine=True, BLOCK_SIZE=B, num_warps=4
    )
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    r = xd * torch.rsqrt(xd.pow(2).mean(1, keepdim=True) + 1e-6) * wd
    tol = 1e-5 if dt == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), r.detach(), rtol=tol, atol=tol)


@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16])
def test_rope(dt):
    Bz, S, Hq, Hk, D = 2, 7, 4, 2, 32
    q, k = torch.randn(Bz, S, Hq, D).to(dt), torch.randn(Bz, S, Hk, D).to(dt)
    ang = torch.cat([torch.arange(S)[:, None] / 10000 ** (torch.arange(D // 2) / (D // 2))] * 2, -1)
    cos, sin = ang.cos()[None].to(dt).contiguous(), ang.sin()[None].to(dt).contiguous()
    q0, k0 = q.double(), k.double()
    ptxrun.Options.racecheck = True
    rope._triton_rope[(Bz * S,)](
        q,
        q.stride(1),
        k,
        k.stride(1),
        cos,
        cos.stride(-2),
        sin,
        sin.stride(-2),
        S,
        Bz,
        1,
        Hq,
        Hk,
        D,
        triton.next_power_of_2(Hq),
        triton.next_power_of_2(Hk),
        triton.next_power_of_2(D),
        triton.next_power_of_2(D),
        D,
        BLOCK_SIZE=4,
        BACKWARD_PASS=False,
    )

    def rot(z):
        return torch.cat([-z[..., D // 2 :], z[..., : D // 2]], -1)

    c, s = cos.double()[:, :, None], sin.double()[:, :, None]
    for z, z0 in ((q, q0), (k, k0)):
        torch.testing.assert_close(
            z.double(), z0 * c + rot(z0) * s, rtol=0, atol=1e-6 if dt == torch.float32 else 5e-2
        )
