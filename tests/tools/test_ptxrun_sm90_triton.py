"""Triton kernels for sm_90a: wgmma, tensor descriptors, warp specialization."""

import ptxrun
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("sm_90a"),
    pytest.mark.skipif(
        tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 8),
        reason="requires Triton 3.8 or newer",
    ),
]


def close(x, expected, tol):
    assert ((x.double() - expected).abs().max() / expected.abs().max()).item() < tol


@triton.jit
def multiply(a, c, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(a + i[:, None] * N + i)
    tl.store(c + i[:, None] * N + i, tl.dot(x, x))


def test_kernel_for_two_capabilities():
    a = torch.randn(64, 64).bfloat16()
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma"), (80, "mma.sync")):
        c = torch.empty(64, 64)
        with ptxrun.running(capability):
            kernel = multiply[(1,)](a, c, 64)
        assert instruction in kernel.asm["ptx"]
        close(c, a.double() @ a.double(), 1e-5)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm, rn, rk = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.program_id(1) * BN + tl.arange(0, BN),
        tl.arange(0, BK),
    )
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(
            tl.load(a + rm[:, None] * K + (k + rk)[None, :]),
            tl.load(b + (k + rk)[:, None] * N + rn[None, :]),
            acc,
        )
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


@pytest.mark.parametrize(
    ("dtype", "warps", "tol"),
    [(torch.bfloat16, 4, 1e-5), (torch.float16, 8, 1e-5), (torch.float32, 4, 2e-3)],
    ids=str,
)
@pytest.mark.parametrize("race", [False, True])
def test_matmul(dtype, warps, tol, race):
    M, N, K = 128, 128, 128
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N)
    with ptxrun.options(racecheck=race):
        k = matmul[(M // 64 // (warps // 4), N // 64)](
            a, b, c, M, N, K, 64 * warps // 4, 64, 32, num_warps=warps, num_stages=3
        )
    assert "wgmma.mma_async" in k.asm["ptx"]
    close(c, a.double() @ b.double(), tol)


@triton.jit
def matmul_device(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    ad = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    bd = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, BN])
    cd = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(ad.load([m, k]), bd.load([k, n]), acc)
    cd.store([m, n], acc.to(c.dtype.element_ty))


@triton.jit
def matmul_host(ad, bd, cd, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(ad.load([m, k]), bd.load([n, k]).T, acc)
    cd.store([m, n], acc.to(tl.bfloat16))


@pytest.mark.parametrize(
    "kw", [{}, {"racecheck": True}, {"seed": 1}, {"seed": 2, "racecheck": True}], ids=str
)
def test_descriptors(kw):
    M, N, K = 200, 136, 264  # no size is a multiple of its block
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    expected = a.double() @ b.double()
    c = torch.full((M, N), float("nan")).bfloat16()
    with ptxrun.options(**kw):
        matmul_device[(triton.cdiv(M, 64), triton.cdiv(N, 64))](a, b, c, M, N, K, 64, 64, 64)
        close(c, expected, 4e-3)
        c.fill_(float("nan"))
        t = TensorDescriptor.from_tensor
        matmul_host[(triton.cdiv(M, 128), triton.cdiv(N, 64))](
            t(a, [128, 64]),
            t(b.t().contiguous(), [64, 64]),
            t(c, [128, 64]),
            K,
            128,
            64,
            64,
            num_warps=8,
        )
        close(c, expected, 4e-3)


def test_scratch_needs_an_allocator():
    from triton.runtime._allocation import NullAllocator

    triton.set_allocator(NullAllocator())
    x = torch.zeros(64, 64).bfloat16()
    with pytest.raises(RuntimeError, match="allocator"):
        matmul_device[(1, 1)](x, x, x, 64, 64, 64, 64, 64, 64)


@triton.jit
def attention(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    n,
    left,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    WS: tl.constexpr,
):
    kd = tl.make_tensor_descriptor(k_ptr, [n, D], [D, 1], [BN, D])
    vd = tl.make_tensor_descriptor(v_ptr, [n, D], [D, 1], [BN, D])
    qd = tl.make_tensor_descriptor(q_ptr, [n, G, D], [D * G, D, 1], [BM // G, G, D])
    od = tl.make_tensor_descriptor(o_ptr, [n, G, D], [D * G, D, 1], [BM // G, G, D])
    t = tl.program_id(0)
    row = t * BM + tl.arange(0, BM)
    q = qd.load([t * BM // G, 0, 0]).reshape([BM, D])
    position = (row // G)[:, None]
    lo = tl.maximum(t * BM // G - left, 0) // BN * BN
    hi = tl.minimum((t * BM + BM - 1) // G + 1, n)
    m, denominator, acc = (
        tl.full([BM], -1e38, tl.float32),
        tl.zeros([BM], tl.float32),
        tl.zeros([BM, D], tl.float32),
    )
    for i in tl.range(lo, hi, BN, warp_specialize=WS):
        s = tl.dot(q, kd.load([i, 0]).T)
        key = i + tl.arange(0, BN)[None, :]
        s = tl.where((key <= position) & (key >= position - left), s, -1e30)
        new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        r = tl.exp2(m - new)
        denominator = denominator * r + tl.sum(p, 1)
        m = new
        acc = tl.dot(p.to(q.dtype), vd.load([i, 0]), acc * r[:, None])
    acc = acc / denominator[:, None]
    od.store([t * BM // G, 0, 0], acc.to(q.dtype).reshape([BM // G, G, D]))
    tl.store(lse_ptr + row, (m + tl.log2(denominator)) * 0.6931471805599453, mask=row < n * G)


@pytest.mark.parametrize(
    ("ws", "kw"),
    [
        (False, {}),
        (True, {}),
        (True, {"racecheck": True}),
        (True, {"seed": 7}),
        (True, {"seed": 8, "racecheck": True}),
    ],
    ids=str,
)
def test_attention(ws, kw):
    n, G, D, left = 300, 4, 128, 170
    q, k, v = (
        torch.randn(n, G, D).bfloat16(),
        torch.randn(n, D).bfloat16(),
        torch.randn(n, D).bfloat16(),
    )
    o, lse = torch.full_like(q, float("nan")), torch.full((n, G), float("nan"))
    with ptxrun.options(**kw):
        c = attention[(triton.cdiv(n * G, 128),)](
            q,
            k,
            v,
            o,
            lse,
            n,
            left,
            D**-0.5 * 1.4426950408889634,
            128,
            128 if ws else 64,
            D,
            G,
            ws,
            num_warps=4 if ws else 8,
            num_stages=2,
        )
    assert c.metadata.num_warps == (12 if ws else 8)
    s = torch.einsum("qgd,kd->gqk", q.double(), k.double()) * D**-0.5
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    s = s.masked_fill((j > i) | (j < i - left), float("-inf"))
    ref = s.logsumexp(-1)
    close(o, torch.einsum("gqk,kd->qgd", (s - ref[..., None]).exp(), v.double()), 5e-3)
    assert (lse.t().double() - ref).abs().max() < 1e-5


@triton.jit
def accumulate(x, y, n, B: tl.constexpr):
    yd = tl.make_tensor_descriptor(y, [n, B], [B, 1], [16, B])
    xd = tl.make_tensor_descriptor(x, [n, B], [B, 1], [16, B])
    i = tl.program_id(0) * 16
    yd.atomic_add([i, 0], xd.load([i, 0]))


def test_descriptor_reduction():
    x, y = torch.randn(40, 32), torch.randn(40, 32)
    expected = x + y
    accumulate[(3,)](x, y, 40, 32)
    assert torch.equal(y, expected)
