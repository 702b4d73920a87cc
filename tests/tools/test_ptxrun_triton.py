"""Triton kernels, compiled for sm_80 and executed by ptxrun on CPU tensors."""

import math

import ptxrun
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]

DT = [torch.float32, torch.float16, torch.bfloat16]


@triton.jit
def add_kernel(a, b, c, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(c + i, tl.load(a + i, mask=i < n) + tl.load(b + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize("dt", [*DT, torch.int32, torch.int64, torch.int8])
@pytest.mark.parametrize("n", [1, 255, 1000])
def test_add(dt, n):
    def mk():
        return (
            torch.randint(-50, 50, (n,)).to(dt)
            if not dt.is_floating_point
            else torch.randn(n).to(dt)
        )

    a, b, c = mk(), mk(), torch.zeros(n + 8).to(dt)
    add_kernel[lambda m: (triton.cdiv(n, m["B"]),)](a, b, c, n, B=128)
    assert torch.equal(c[:n], a + b)
    assert (c[n:] == 0).all()


@triton.jit
def cast_kernel(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize("src", [*DT, torch.int32, torch.int8, torch.int64, torch.float64])
@pytest.mark.parametrize("dst", [*DT, torch.int32, torch.int8, torch.int64, torch.float64])
def test_cast(src, dst):
    x = (torch.randn(200) * 40).to(src)
    y = torch.zeros(200, dtype=dst)
    cast_kernel[(1,)](x, y, 200, B=256)
    r = x.to(dst) if src != torch.int64 else x.double().to(dst)
    assert torch.equal(y, r)


@triton.jit
def reduce_kernel(x, o, oi, N, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * N + i, mask=i < N, other=float("-inf")).to(tl.float32)
    w = tl.where(i < N, v, 0.0)
    tl.store(o + 4 * r, tl.sum(w, 0))
    tl.store(o + 4 * r + 1, tl.max(v, 0))
    tl.store(o + 4 * r + 2, tl.min(tl.where(i < N, v, float("inf")), 0))
    tl.store(oi + r, tl.argmax(v, 0))


@pytest.mark.parametrize(("N", "nw"), [(100, 1), (1000, 4), (3000, 8)])
def test_reduce(N, nw):
    x = torch.randn(3, N)
    o, oi = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32)
    reduce_kernel[(3,)](x, o, oi, N, B=triton.next_power_of_2(N), num_warps=nw)
    torch.testing.assert_close(o[:, 0], x.sum(1), rtol=1e-5, atol=1e-4)
    assert torch.equal(o[:, 1], x.amax(1))
    assert torch.equal(o[:, 2], x.amin(1))
    assert torch.equal(oi.long(), x.argmax(1))


@triton.jit
def softmax_kernel(x, y, N, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * N + i, mask=i < N, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + r * N + i, (v / tl.sum(v, 0)).to(y.dtype.element_ty), mask=i < N)


@pytest.mark.parametrize("dt", DT)
def test_softmax(dt):
    x = torch.randn(7, 777).to(dt)
    y = torch.empty_like(x)
    softmax_kernel[(7,)](x, y, 777, B=1024)
    r = x.double().softmax(1)
    assert (
        (y.double() - r).abs()
        <= r * {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dt] + 1e-7
    ).all()


@triton.jit
def rms_fwd(x, w, y, rs, N, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * N + i, mask=i < N, other=0.0).to(tl.float32)
    s = tl.rsqrt(tl.sum(v * v, 0) / N + eps)
    tl.store(rs + r, s)
    g = tl.load(w + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(y + r * N + i, (v * s * g).to(y.dtype.element_ty), mask=i < N)


@triton.jit
def rms_bwd(dy, x, w, rs, dx, dw, N, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    m = i < N
    v = tl.load(x + r * N + i, mask=m, other=0.0).to(tl.float32)
    g = tl.load(dy + r * N + i, mask=m, other=0.0).to(tl.float32)
    k = tl.load(w + i, mask=m, other=0.0).to(tl.float32)
    s = tl.load(rs + r)
    h = g * k
    c = tl.sum(h * v, 0) * s * s * s / N
    tl.store(dx + r * N + i, (h * s - v * c).to(dx.dtype.element_ty), mask=m)
    tl.atomic_add(dw + i, g * v * s, mask=m)


@pytest.mark.parametrize("dt", DT)
def test_rmsnorm(dt):
    M, N = 5, 300
    x, w, dy = torch.randn(M, N).to(dt), torch.randn(N).to(dt), torch.randn(M, N).to(dt)
    y, rs, dx, dw = torch.empty_like(x), torch.empty(M), torch.empty_like(x), torch.zeros(N)
    ptxrun.Options.racecheck = True
    rms_fwd[(M,)](x, w, y, rs, N, 1e-6, B=512)
    rms_bwd[(M,)](dy, x, w, rs, dx, dw, N, B=512)
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    r = xd * torch.rsqrt(xd.pow(2).mean(1, keepdim=True) + 1e-6) * wd
    r.backward(dy.double())
    tol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dt]
    torch.testing.assert_close(y.double(), r.detach(), rtol=tol, atol=tol)
    torch.testing.assert_close(dx.double(), xd.grad, rtol=tol, atol=tol)
    torch.testing.assert_close(dw.double(), wd.grad, rtol=1e-4, atol=1e-4)


@triton.jit
def rope_kernel(x, c, s, T, H: tl.constexpr, D: tl.constexpr):
    t = tl.program_id(0)
    h = tl.arange(0, H)[:, None]
    d = tl.arange(0, D // 2)[None, :]
    p = x + t * H * D + h * D + d
    a, b = tl.load(p).to(tl.float32), tl.load(p + D // 2).to(tl.float32)
    co, si = tl.load(c + t * (D // 2) + d), tl.load(s + t * (D // 2) + d)
    tl.store(p, (a * co - b * si).to(x.dtype.element_ty))
    tl.store(p + D // 2, (b * co + a * si).to(x.dtype.element_ty))


@pytest.mark.parametrize("dt", DT)
def test_rotary(dt):
    T, H, D = 9, 4, 64
    x = torch.randn(T, H, D).to(dt)
    ang = torch.arange(T)[:, None] / 10000 ** (torch.arange(D // 2) / (D // 2))
    c, s = ang.cos(), ang.sin()
    x0 = x.double()
    ptxrun.Options.racecheck = True
    rope_kernel[(T,)](x, c, s, T, H, D, num_warps=2)
    a, b = x0[..., : D // 2], x0[..., D // 2 :]
    r = torch.cat([a * c[:, None] - b * s[:, None], b * c[:, None] + a * s[:, None]], -1)
    torch.testing.assert_close(
        x.double(),
        r,
        rtol=0,
        atol={torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dt],
    )


@triton.jit
def mm_kernel(
    A,
    B,
    C,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IP: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        kk = k0 + k
        a = tl.load(
            A + m[:, None] * sam + kk[None] * sak, mask=(m[:, None] < M) & (kk[None] < K), other=0.0
        )
        b = tl.load(
            B + kk[:, None] * sbk + n[None] * sbn, mask=(n[None] < N) & (kk[:, None] < K), other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision=IP)
    tl.store(
        C + m[:, None] * N + n[None],
        acc.to(C.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None] < N),
    )


@pytest.mark.parametrize(
    ("dt", "ip", "tol"),
    [
        (torch.float16, "tf32", 1e-6),
        (torch.bfloat16, "tf32", 1e-6),
        (torch.float32, "tf32", 2e-3),
        (torch.float32, "tf32x3", 1e-6),
        (torch.float32, "ieee", 1e-6),
    ],
)
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("stages", [1, 3])
def test_matmul(dt, ip, tol, tb, stages):
    M, N, K = 100, 72, 144
    A, B, C = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt), torch.empty(M, N)
    Bm = B.t().contiguous().t() if tb else B
    ptxrun.Options.racecheck = True
    mm_kernel[(triton.cdiv(M, 64), triton.cdiv(N, 32))](
        A, Bm, C, M, N, K, *A.stride(), *Bm.stride(), 64, 32, 32, ip, num_stages=stages
    )
    r = A.double() @ B.double()
    assert (C - r).norm() / r.norm() < tol


@triton.jit
def dot_i8(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + m[:, None] * K + k[None]), tl.load(B + k[:, None] * N + n[None])
    tl.store(C + m[:, None] * N + n[None], tl.dot(a, b))


def test_dot_int8():
    A, B = (
        torch.randint(-128, 128, (32, 64), dtype=torch.int8),
        torch.randint(-128, 128, (64, 32), dtype=torch.int8),
    )
    C = torch.zeros(32, 32, dtype=torch.int32)
    dot_i8[(1,)](A, B, C, 32, 32, 64)
    assert torch.equal(C, A.int() @ B.int())


def test_dot_f16_accumulator():
    @triton.jit
    def k(A, B, C, N: tl.constexpr):
        i = tl.arange(0, N)
        p = i[:, None] * N + i[None]
        tl.store(C + p, tl.dot(tl.load(A + p), tl.load(B + p), out_dtype=tl.float16))

    A, B, C = torch.randn(32, 32).half(), torch.randn(32, 32).half(), torch.zeros(32, 32).half()
    k[(1,)](A, B, C, 32)
    torch.testing.assert_close(C.double(), A.double() @ B.double(), rtol=1e-2, atol=3e-2)


@triton.jit
def flash(
    Q,
    K,
    V,
    out,
    L,
    S,
    Hq: tl.constexpr,
    G: tl.constexpr,
    sm,
    W,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    pid, h = tl.program_id(0), tl.program_id(1)
    hk = h // G
    m_i, d = pid * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(Q + h * S * D + m_i[:, None] * D + d[None], mask=m_i[:, None] < S, other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    denominator = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    lo = tl.maximum(0, pid * BM - W + 1) // BN * BN
    for n in tl.range(lo, tl.minimum(S, (pid + 1) * BM), BN):
        j = n + tl.arange(0, BN)
        k = tl.load(K + hk * S * D + j[None] * D + d[:, None], mask=j[None] < S, other=0.0)
        s = tl.dot(q, k) * (sm * 1.4426950408889634)
        ok = (j[None] <= m_i[:, None]) & (j[None] > m_i[:, None] - W)
        s = tl.where(ok, s, -1e30)
        mn = tl.maximum(m, tl.max(s, 1))
        p = tl.where(ok, tl.exp2(s - mn[:, None]), 0.0)
        a = tl.exp2(m - mn)
        denominator = denominator * a + tl.sum(p, 1)
        v = tl.load(V + hk * S * D + j[:, None] * D + d[None], mask=j[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * a[:, None])
        m = mn
    tl.store(
        out + h * S * D + m_i[:, None] * D + d[None],
        (acc / denominator[:, None]).to(out.dtype.element_ty),
        mask=m_i[:, None] < S,
    )
    tl.store(L + h * S + m_i, m + tl.log2(denominator), mask=m_i < S)


@pytest.mark.parametrize("dt", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("S", "W", "D"), [(200, 10**6, 64), (333, 100, 128)])
def test_flash_attention(dt, S, W, D):
    H, G = 4, 2
    q, k, v = (
        torch.randn(H, S, D).to(dt),
        torch.randn(H // G, S, D).to(dt),
        torch.randn(H // G, S, D).to(dt),
    )
    o, L = torch.empty_like(q), torch.empty(H, S)
    ptxrun.Options.racecheck = True
    flash[(triton.cdiv(S, 64), H)](q, k, v, o, L, S, H, G, D**-0.5, W, 64, 32, D, num_stages=2)
    kr, vr = (x.repeat_interleave(G, 0).double() for x in (k, v))
    i = torch.arange(S)
    ok = (i[None] <= i[:, None]) & (i[None] > i[:, None] - W)
    s = (q.double() @ kr.transpose(1, 2) * D**-0.5).masked_fill(~ok, -math.inf)
    r = s.softmax(-1) @ vr
    assert (o - r).norm() / r.norm() < {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dt]
    torch.testing.assert_close(L.double() * math.log(2), s.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_atomics():
    @triton.jit
    def k(x, f, i, h, n, B: tl.constexpr):
        o = tl.program_id(0) * B + tl.arange(0, B)
        m = o < n
        v = tl.load(x + o, mask=m)
        tl.atomic_add(f + o % 4, v, mask=m)
        tl.atomic_max(i + o * 0, v.to(tl.int32), mask=m)
        tl.atomic_min(i + 1 + o * 0, v.to(tl.int32), mask=m)
        tl.atomic_or(i + 2 + o * 0, o & 7, mask=m)
        tl.atomic_add(h + o % 2, v.to(tl.float16) * 0 + 1, mask=m)
        tl.atomic_cas(i + 3, 0, tl.program_id(0) + 1)
        tl.atomic_xchg(i + 4, 9)

    n = 600
    x = torch.randint(-100, 100, (n,)).float()
    f, i, h = torch.zeros(4), torch.zeros(5, dtype=torch.int32), torch.zeros(2).half()
    ptxrun.Options.racecheck = True
    k[(triton.cdiv(n, 128),)](x, f, i, h, n, B=128)
    assert torch.equal(f, x.view(-1, 4).sum(0))
    assert i.tolist() == [int(x.max()), int(x.min()), 7, 1, 9]
    assert h.tolist() == [300, 300]


def test_spin_lock():
    """Order plain accesses by an atomic lock, as in the layer-norm tutorial of Triton."""

    @triton.jit
    def k(x, acc, lock, N: tl.constexpr):
        p, i = tl.program_id(0), tl.arange(0, N)
        v = tl.load(x + p * N + i)
        while tl.atomic_cas(lock, 0, 1) == 1:
            pass
        tl.store(acc + i, tl.load(acc + i) + v)
        tl.debug_barrier()
        tl.atomic_xchg(lock, 0)

    x, acc, lock = torch.randn(6, 64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    ptxrun.Options.racecheck = True
    k[(6,)](x, acc, lock, 64)
    torch.testing.assert_close(acc, x.sum(0))


def test_scan_sort_gather():
    @triton.jit
    def k(x, c, s, g, h, N: tl.constexpr):
        i = tl.arange(0, N)
        v = tl.load(x + i)
        tl.store(c + i, tl.cumsum(v, 0))
        tl.store(s + i, tl.sort(v))
        tl.store(g + i, tl.gather(v, (i * 7) % N, 0))
        tl.store(h + tl.arange(0, 16), tl.histogram(tl.abs(v).to(tl.int32) % 16, 16))

    x = torch.randn(256) * 10
    c, s, g, h = (
        torch.zeros(256),
        torch.zeros(256),
        torch.zeros(256),
        torch.zeros(16, dtype=torch.int32),
    )
    k[(1,)](x, c, s, g, h, 256)
    torch.testing.assert_close(c, x.cumsum(0), rtol=1e-4, atol=1e-3)
    assert torch.equal(s, x.sort()[0])
    assert torch.equal(g, x[(torch.arange(256) * 7) % 256])
    assert torch.equal(h.long(), torch.bincount(x.abs().int() % 16, minlength=16))


def test_math():
    @triton.jit
    def k(x, o, N: tl.constexpr):
        i = tl.arange(0, N)
        v = tl.load(x + i)
        a = tl.abs(v) + 0.1
        tl.store(o + i, tl.exp(v))
        tl.store(o + N + i, tl.log(a))
        tl.store(o + 2 * N + i, tl.sin(v))
        tl.store(o + 3 * N + i, tl.erf(v))
        tl.store(o + 4 * N + i, libdevice.tanh(v))
        tl.store(o + 5 * N + i, tl.sqrt_rn(a))
        tl.store(o + 6 * N + i, tl.div_rn(v, a))
        tl.store(o + 7 * N + i, tl.sigmoid(v))
        tl.store(o + 8 * N + i, tl.floor(v * 3))
        tl.store(o + 9 * N + i, libdevice.pow(a, 1.3))
        tl.store(o + 10 * N + i, tl.fma(v, a, v))
        tl.store(o + 11 * N + i, tl.cos(v * 10000.0))

    x = torch.randn(128)
    o = torch.zeros(12, 128)
    k[(1,)](x, o, 128)
    d = x.double()
    a = (x.abs() + 0.1).double()
    r = torch.stack(
        [
            d.exp(),
            a.log(),
            d.sin(),
            torch.erf(d),
            d.tanh(),
            a.sqrt(),
            d / a,
            d.sigmoid(),
            (x * 3).floor().double(),
            a**1.3,
            d * a + d,
            torch.cos((x * 10000.0).double()),
        ]
    )
    torch.testing.assert_close(o.double(), r, rtol=1e-5, atol=1e-5)


def test_random():
    @triton.jit
    def k(o, seed, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(o + i, tl.rand(seed, i))

    a, b = torch.zeros(1024), torch.zeros(1024)
    k[(1,)](a, 5, 1024)
    k[(1,)](b, 5, 1024, num_warps=8)
    assert torch.equal(a, b)
    assert 0.45 < a.mean() < 0.55
    assert a.min() >= 0
    assert a.max() < 1


@triton.jit
def opts_kernel(x, bias, y, n, one, scale, FLAG: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i * one, mask=i < n, other=0.0)
    if bias is not None:
        v += tl.load(bias + i, mask=i < n, other=0.0)
    if FLAG:
        v = v * scale
    tl.store(y + i, v, mask=i < n)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_specialization(bias, flag):
    x, b, y = torch.randn(100), torch.randn(100) if bias else None, torch.zeros(100)
    opts_kernel[(2,)](x, b, y, 100, 1, 0.37, FLAG=flag, B=64)
    r = x + b if bias else x
    torch.testing.assert_close(y, r * 0.37 if flag else r)
    y2 = torch.zeros(99)
    opts_kernel[(2,)](
        x[1:], b[1:] if bias else None, y2, 99, 1, 0.37, FLAG=flag, B=64
    )  # unaligned pointers
    torch.testing.assert_close(y2, y[1:])


def test_autotune_and_heuristics():
    @triton.autotune(
        [triton.Config({"B": 64}, num_warps=2), triton.Config({"B": 256}, num_warps=4)],
        key=["n"],
        reset_to_zero=["c"],
    )
    @triton.heuristics({"EVEN": lambda a: a["n"] % a["B"] == 0})
    @triton.jit
    def k(a, c, n, B: tl.constexpr, EVEN: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        if EVEN:
            tl.atomic_add(c + i, tl.load(a + i))
        else:
            tl.atomic_add(c + i, tl.load(a + i, mask=i < n), mask=i < n)

    for mode, lengths in (("first", (512, 500)), ("model", (1024, 1000))):
        with ptxrun.running(autotune=mode):
            for n in lengths:
                a, c = torch.randn(n), torch.zeros(n)
                k[lambda m, n=n: (triton.cdiv(n, m["B"]),)](a, c, n)
                assert torch.equal(a, c)


def test_grid_3d_and_while():
    @triton.jit
    def k(o, n):
        x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        s = 0
        j = x
        while j < n:
            s += j
            j += y + 1
        tl.store(o + (z * tl.num_programs(1) + y) * tl.num_programs(0) + x, s + 1000 * z)

    o = torch.zeros(2, 3, 5, dtype=torch.int32)
    k[(5, 3, 2)](o, 20)
    assert o.tolist() == [
        [[sum(range(x, 20, y + 1)) + 1000 * z for x in range(5)] for y in range(3)]
        for z in range(2)
    ]


def test_tensor_descriptor_and_block_pointer():
    @triton.jit
    def k(x, y, z, M, N, BM: tl.constexpr, BN: tl.constexpr):
        d = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
        e = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BM, BN])
        r, c = tl.program_id(0) * BM, tl.program_id(1) * BN
        e.store([r, c], d.load([r, c]) * 2)
        i, j = r + tl.arange(0, BM)[:, None], c + tl.arange(0, BN)[None]
        tl.store(
            z + i * N + j, tl.load(x + i * N + j, mask=(i < M) & (j < N)), mask=(i < M) & (j < N)
        )

    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8))
    x = torch.randn(50, 72)
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    k[(2, 3)](x, y, z, 50, 72, 32, 32)
    assert torch.equal(y, 2 * x)
    assert torch.equal(z, x)


def test_tuple_and_scalar_types():
    @triton.jit
    def k(o, t, u, b, B: tl.constexpr):
        i = tl.arange(0, B)
        tl.store(o + i, tl.load(t[0] + i) + t[1] + u.to(tl.float32) + tl.where(b, 1.0, 0.0))

    x, o = torch.randn(32), torch.zeros(32)
    k[(1,)](o, (x, 5), 2**40, True, 32)
    assert torch.equal(o, x + 5 + float(2**40) + 1.0)


def test_device_assert_and_print(capfd):
    @triton.jit
    def k(x, B: tl.constexpr):
        i = tl.arange(0, B)
        v = tl.load(x + i)
        tl.device_assert(v < 100, "too large")

    k[(1,)](torch.zeros(32), 32, debug=True)
    with pytest.raises(ptxrun.Trap, match="too large"):
        k[(1,)](torch.full((32,), 200.0), 32, debug=True)

    @triton.jit
    def p(x):
        tl.device_print("value", tl.load(x))

    p[(1,)](torch.full((1,), 3.5), num_warps=1)
    assert "value" in capfd.readouterr().out


def test_fp8():
    @triton.jit
    def k(x, y, z, B: tl.constexpr):
        i = tl.arange(0, B)
        v = tl.load(x + i).to(tl.float8e5)
        tl.store(y + i, v)
        tl.store(z + i, v.to(tl.float32))

    x = torch.randn(128) * 5
    y, z = torch.zeros(128, dtype=torch.float8_e5m2), torch.zeros(128)
    k[(1,)](x, y, z, 128)
    r = x.to(torch.float8_e5m2)
    assert torch.equal(y.float(), r.float())
    assert torch.equal(z, r.float())


def test_16_warps_and_inline_asm():
    @triton.jit
    def k(x, y, B: tl.constexpr):
        i = tl.arange(0, B)
        v = tl.load(x + i)
        w = tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, $1; add.f32 $0, t, 0f3F800000; }",
            "=r,r",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        tl.store(y + i, w)

    x = torch.randn(2048)
    y = torch.zeros(2048)
    k[(1,)](x, y, 2048, num_warps=16)
    torch.testing.assert_close(y, x * x + 1)
