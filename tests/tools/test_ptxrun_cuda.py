"""CUDA C++ kernels, compiled by nvcc for sm_80 and executed by ptxrun."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ptxrun
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]


SOURCE = Path(__file__).parent / "cuda" / "kernels.cu"


@pytest.fixture(scope="module")
def mod(nvcc):
    return ptxrun.compile_cuda(SOURCE, options=("-std=c++17",))


def test_vector_add(mod):
    a, b, c = torch.randn(1000), torch.randn(1000), torch.full((1010,), 7.0)
    mod["vadd"].launch(9, 128, [a, b, c, 1000])
    assert torch.equal(c[:1000], a + b)
    assert (c[1000:] == 7).all()


def test_two_host_threads(mod):
    ptxrun.Options.threads = 2
    a, b, c = torch.randn(5000), torch.randn(5000), torch.zeros(5000)
    mod["vadd"].launch(50, 100, [a, b, c, 5000])
    assert torch.equal(c, a + b)


def test_divergent_loop(mod):
    a = torch.arange(1, 301, dtype=torch.int32)
    o = torch.zeros(300, dtype=torch.int32)
    mod["collatz"].launch(5, 72, [a, o, 300])

    def f(x):
        s = 0
        while x != 1:
            x = 3 * x + 1 if x & 1 else x >> 1
            s += 1
            if s > 500:
                break
        return s

    assert o.tolist() == [f(int(x)) for x in a]


def test_switch_continue_break(mod):
    o = torch.zeros(64, dtype=torch.int32)
    mod["switch_loop"].launch(1, 64, [o, 40])

    def tr(a, b):
        return int(a / b)

    def pick(k, i):
        return [i, i * i, -i, i % 7, tr(i, 3), i ^ 21, i << 2, 1000][k]

    ref = []
    for i in range(64):
        acc = 0
        for j in range(40):
            if (i + j) % 3 == 0:
                continue
            acc += pick((i * 7 + j) & 7, i)
            if acc > 5000:
                break
        ref.append(acc)
    assert o.tolist() == ref


def test_transpose(mod):
    a = torch.randn(70, 45)
    o = torch.zeros(45, 70)
    ptxrun.Options.racecheck = True
    mod["transpose"].launch((2, 3), (32, 8), [a, o, 45, 70])
    assert torch.equal(o, a.t())


def test_reduction(mod):
    a = torch.randn(6, 333)
    o = torch.zeros(6)
    ptxrun.Options.racecheck = True
    mod["blocksum"].launch(6, 128, [a, o, 333], shared_bytes=512)
    torch.testing.assert_close(o, a.sum(1), rtol=1e-5, atol=1e-5)


def test_shuffles(mod):
    a = torch.randint(0, 100, (64,), dtype=torch.int32)
    o = torch.zeros(704, dtype=torch.int32)
    mod["shuffles"].launch(1, 64, [a, o])
    v, r = a.numpy().reshape(2, 32), o.numpy().reshape(11, 2, 32)
    lane = np.arange(32)
    assert (r[0] == v[:, lane ^ 5]).all()
    assert (r[1] == v[:, np.where(lane >= 3, lane - 3, lane)]).all()
    assert (r[2] == v[:, np.where((lane & 15) + 7 < 16, lane + 7, lane)]).all()
    assert (r[3] == v[:, (lane * 3) & 31]).all()
    assert (r[8] == v[:, np.where((lane & 7) >= 3, lane - 3, lane)]).all()
    # xor with width 8: a lane may read earlier segments of 8 lanes but not later ones
    assert (r[9] == v[:, np.where((lane ^ 9) <= (lane | 7), lane ^ 9, lane)]).all()
    assert (r[10] == v[:, (lane & 24) | ((lane + 5) & 7)]).all()
    for w in range(2):
        assert (r[4, w].view(np.uint32) == sum(1 << i for i in range(32) if v[w, i] & 1)).all()
        assert (r[5, w] == [(v[w] & 3 == x & 3).sum() for x in v[w]]).all()
        assert (r[6, w] == int((v[w] == 3).any()) + 2).all()
        assert (r[7, w] == v[w].sum()).all()


def test_atomics(mod):
    n = 500
    a = torch.randint(-100, 100, (n,)).float()
    fs, i5 = torch.zeros(1), torch.tensor([0, 1000, -1000, 0, 0, 0, 0], dtype=torch.int32)
    us, u64 = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    h2, b2 = torch.zeros(2, dtype=torch.half), torch.zeros(2, dtype=torch.bfloat16)
    ptxrun.Options.racecheck = True
    mod["atomics"].launch(4, 128, [a, fs, i5, us, u64, h2, b2, n])
    x = a.int().numpy()
    assert fs.item() == a.sum().item()
    assert u64.item() == n * (n - 1) // 2
    assert us.item() == n % 10
    assert i5.tolist() == [x.sum(), x.min(), x.max(), -1, np.bitwise_xor.reduce(x), 77, 1]
    assert h2.tolist() == [500.0, 1000.0]
    assert b2.tolist() == [
        256.0,
        128.0,
    ]


def test_shared_atomics(mod):
    a = torch.randint(0, 1000, (777,), dtype=torch.int32)
    h = torch.zeros(16, dtype=torch.int32)
    ptxrun.Options.racecheck = True
    mod["smem_hist"].launch(3, 96, [a, h, 777])
    assert torch.equal(h.long(), torch.bincount(a & 15, minlength=16))


def test_calls_local_and_constant_memory(mod):
    a = torch.rand(64)
    o = torch.zeros(64)
    mod["call_local_const"].launch(1, 64, [a, o, 64])
    c = [1, 2, -3, 0.5]
    ref = [
        sum(c[k] * float(a[i]) ** k for k in range(4))
        + sum(c[(j * 5 + i) & 3] * float(a[(i + ((j * 5 + i) & 7)) % 64]) for j in range(64))
        for i in range(64)
    ]
    torch.testing.assert_close(o, torch.tensor(ref), rtol=1e-4, atol=1e-4)


def test_struct_argument(mod):
    import struct

    o = torch.zeros(40)
    mod["structarg"].launch(1, 40, [struct.pack("<fid", 2.5, 33, 100.0), o])
    assert torch.equal(o[:33], 2.5 * torch.arange(33) + 100)
    assert (o[33:] == 0).all()


@pytest.mark.parametrize("n", [0, 50, 96])
def test_barrier_reductions(mod, n):
    o = torch.zeros(96, dtype=torch.int32)
    mod["counts"].launch(1, 96, [o, n])
    assert (o == n * 4 + (n == 96) * 2 + (n < 96)).all()


def test_bf16_rmsnorm(mod):
    x, w = torch.randn(5, 768).bfloat16(), torch.randn(768).bfloat16()
    y = torch.empty_like(x)
    ptxrun.Options.racecheck = True
    mod["bf16rms"].launch(5, 128, [x, w, y, 384, 1e-5])
    r = x.double() * torch.rsqrt((x.double() ** 2).mean(1, keepdim=True) + 1e-5) * w.double()
    assert ((y.double() - r).abs() <= r.abs() * 2**-8 + 1e-6).all()


def test_half_arithmetic(mod):
    n = 50
    a, b = torch.randn(n).half(), torch.randn(n).half()
    o = torch.zeros(5, n).half()
    mod["half_ops"].launch(1, 64, [a, b, o, n])
    assert torch.equal(o[0], (a.double() * b.double() + a.double()).half())
    torch.testing.assert_close(o[1], a.exp(), rtol=2e-3, atol=1e-4)
    assert torch.equal(o[2], torch.maximum(a, b))
    assert torch.equal(o[3], torch.minimum(a, b))
    torch.testing.assert_close(o[4], a / b, rtol=2e-3, atol=1e-4)


def test_cp_async(mod):
    a = torch.randn(5, 64, 4)
    o = torch.zeros_like(a)
    ptxrun.Options.racecheck = True
    mod["asynccopy"].launch(1, 64, [a, o, 5])
    assert torch.equal(o, a.flip(1))


def test_mma_bf16(mod):
    A, B, C = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.zeros(16, 8)
    mod["mma_bf16"].launch(1, 32, [A, B, C])
    torch.testing.assert_close(C, A.float() @ B.float().t(), rtol=1e-5, atol=1e-5)


def test_mma_shapes(mod):
    """Compare mma with fragments packed element by element, as in PTX ISA 9.7.14."""
    A, B = torch.randn(16, 32).half(), torch.randn(32, 8).half()
    fa, fb = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)

    def frags(M, N, K, x, y, per):
        """Pack raw values x (M x K) and y (K x N) into fragments, `per` values per register."""
        fa[:], fb[:] = 0, 0
        w = 32 // per
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            for r in range(4):
                for u in range(per):
                    row, col = g + (r & 1) * 8, t * per + u + (r >> 1) * 4 * per
                    if col < K:
                        fa[lane, r] |= np.uint32(int(x[row, col]) << (w * u) & 0xFFFFFFFF)
            for r in range(2):
                for u in range(per):
                    k = t * per + u + r * 4 * per
                    if k < K:
                        fb[lane, r] |= np.uint32(int(y[k, g]) << (w * u) & 0xFFFFFFFF)

    def unfrag(c):
        o = np.zeros((16, 8), c.dtype)
        for lane in range(32):
            for q in range(4):
                o[(lane >> 2) + (q >> 1) * 8, 2 * (lane & 3) + (q & 1)] = c[lane, q]
        return o

    def run():
        C, H, T, ints = (
            torch.zeros(32, 4),
            torch.zeros(32, 4, dtype=torch.half),
            torch.zeros(32, 4),
            torch.zeros(32, 4, dtype=torch.int32),
        )
        mod["mma_misc"].launch(1, 32, [fa, fb, C, H, T, ints])
        return (unfrag(z.numpy()) for z in (C, H, T, ints))

    def h(z):
        return z.numpy().view(np.uint16)

    frags(16, 8, 16, h(A), h(B), 2)
    C, H, _, _ = run()
    np.testing.assert_allclose(
        C, (A[:, :8].double() @ B[:8].double()).numpy(), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        H.astype(float), (A[:, :16].double() @ B[:16].double()).numpy(), rtol=5e-3, atol=5e-3
    )
    x, y = torch.randn(16, 8), torch.randn(8, 8)
    frags(16, 8, 8, x.numpy().view(np.uint32), y.numpy().view(np.uint32), 1)
    _, _, T, _ = run()

    def tr(z):
        return torch.from_numpy((z.numpy().view(np.uint32) & 0xFFFFE000).view(np.float32))

    np.testing.assert_allclose(T, (tr(x).double() @ tr(y).double()).numpy(), rtol=1e-5, atol=1e-5)
    x, y = np.random.randint(-128, 128, (16, 32)), np.random.randint(-128, 128, (32, 8))
    frags(16, 8, 32, x & 255, y & 255, 4)
    _, _, _, ints = run()
    assert (x @ y == ints).all()


@pytest.mark.parametrize(("k", "dt"), [("wmma_h", torch.float16), ("wmma_b", torch.bfloat16)])
def test_wmma(mod, k, dt):
    A, B, C = torch.randn(16, 48).to(dt), torch.randn(48, 16).to(dt), torch.zeros(16, 16)
    mod[k].launch(1, 32, [A, B if k == "wmma_h" else B.t().contiguous(), C, 48])
    torch.testing.assert_close(C.double(), 2 * (1 + A.double() @ B.double()), rtol=1e-5, atol=1e-5)


def test_ldmatrix(mod):
    a = torch.arange(256, dtype=torch.int16)
    o = torch.zeros(2, 32, 4, dtype=torch.int32)
    mod["ldm"].launch(1, 32, [a, o])
    m = a.numpy().reshape(4, 8, 8)
    r = o.numpy().view(np.uint16).reshape(2, 32, 4, 2)
    for lane in range(32):
        for i in range(4):
            for u in range(2):
                assert r[0, lane, i, u] == m[i, lane >> 2, 2 * (lane & 3) + u]
                assert r[1, lane, i, u] == m[i, 2 * (lane & 3) + u, lane >> 2]


def test_double_and_int64(mod):
    a = torch.randn(60, dtype=torch.float64) * 3
    o = torch.zeros(3, 60, dtype=torch.float64)
    mod["dbl"].launch(1, 64, [a, o, 60])
    torch.testing.assert_close(
        o, torch.stack([a.exp(), a.abs().sqrt() / (1 + a * a), (a * 3).floor()]), rtol=1e-14, atol=0
    )
    x, y = torch.randint(-(2**62), 2**62, (60,)), torch.randint(-1000, 1000, (60,))
    y[y == 0] = 7
    o = torch.zeros(4, 60, dtype=torch.int64)
    mod["ll"].launch(1, 64, [x, y, o, 60])
    X, Y = [int(v) for v in x], [int(v) for v in y]
    q = [abs(p) // abs(r) * (1 if (p < 0) == (r < 0) else -1) for p, r in zip(X, Y, strict=True)]
    assert o[0].tolist() == q
    assert o[1].tolist() == [p - r * s for p, r, s in zip(X, Y, q, strict=True)]
    assert o[2].tolist() == [p * r >> 64 for p, r in zip(X, Y, strict=True)]
    assert o[3].tolist() == [
        ((p % 2**64) >> (r & 63)) - (2**64 if (r & 63) == 0 and p < 0 else 0)
        for p, r in zip(X, Y, strict=True)
    ]


def test_math_functions(mod):
    n = 64
    a = torch.randn(n) * 2
    o = torch.zeros(10, n)
    mod["fmath"].launch(1, 64, [a, o, n])
    d = a.double()
    ref = torch.stack(
        [
            d.exp(),
            d.sin(),
            d.tanh(),
            torch.erf(d),
            d.abs() ** 1.7,
            torch.log1p(d.abs()),
            d.exp(),
            torch.cos((a * 1e5).double()),
            torch.fmod(a, torch.tensor(0.7)).double(),
            (a / 3.0).double(),
        ]
    )
    torch.testing.assert_close(o.double(), ref, rtol=2e-6, atol=1e-6)
    assert torch.equal(o[9], a / 3.0)


def test_cooperative_groups(mod):
    a = torch.randint(0, 100, (64,), dtype=torch.int32)
    o = torch.zeros(8, dtype=torch.int32)
    mod["coop"].launch(1, 64, [a, o, 64])
    assert o.tolist() == a.view(8, 8).sum(1).tolist()


def test_printf(mod, capfd):
    mod["print"].launch(1, 32, [42])
    assert capfd.readouterr().out == "n=42 x=1.50 s=hi l=1234567890123\n"


def test_device_assert(mod):
    mod["asserts"].launch(1, 32, [32])
    with pytest.raises(ptxrun.Trap, match=r"threadIdx.x < n"):
        mod["asserts"].launch(1, 64, [32])


def test_pointers_loaded_from_memory(mod):
    ts = [torch.zeros(32) for _ in range(3)]
    p = torch.tensor([t.data_ptr() for t in ts])
    with pytest.raises(ptxrun.MemoryFault):
        mod["ptrs"].launch(1, 32, [p, 3])
    for t in ts:
        ptxrun.register(t)
    mod["ptrs"].launch(1, 32, [p, 3])
    for j, t in enumerate(ts):
        assert (t == j + 1).all()
        ptxrun.unregister(t)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_generic_addresses(mod, which):
    g = torch.arange(65, dtype=torch.int32)
    r = g.clone()
    mod["generic"].launch(1, 64, [g, which])
    if which != 1:
        r[64] += 64
    r[:64] += r[:64].clone() if which == 0 else (6 if which == 1 else 3)
    assert torch.equal(g, r)


def test_file_with_header_and_templates(tmp_path):
    (tmp_path / "t.h").write_text(
        "template <typename T, int N> __global__ void fill(T* p) {\n"
        "  p[blockIdx.x * blockDim.x + threadIdx.x] = (T)N;\n"
        "}\n"
    )
    f = tmp_path / "t.cu"
    f.write_text(
        '#include "t.h"\n'
        "template __global__ void fill<float, 3>(float*);\n"
        "template __global__ void fill<int, 4>(int*);\n"
    )
    m = ptxrun.compile_cuda(f)
    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    m.kernel("fill<float, 3>").launch(2, 32, [x])
    m.kernel("fill<int, 4>").launch(2, 32, [y])
    assert (x == 3).all()
    assert (y == 4).all()
    with pytest.raises(ptxrun.LaunchError, match="more than one"):
        m.kernel("fill")


def test_resource_usage(mod):
    r = mod.resource_usage()
    assert r["vadd"]["reg"] >= 8
    assert r["transpose"]["shared"] >= 32 * 33 * 4
