"""Instructions of sm_90a: wgmma, tensor copies and mbarriers against NumPy, and planted bugs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ptxrun
import pytest
from ptxrun.triton_driver import tensor_map

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_90a")]

rng = np.random.default_rng(5)


def bf16(x):
    """Round a float32 array to bf16 and return the bits as uint16."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def unbf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


ENC = {
    "bf16": (bf16, unbf16, 2),
    "f16": (
        lambda x: x.astype(np.float16).view(np.uint16),
        lambda u: u.view(np.float16).astype(np.float32),
        2,
    ),
    "tf32": (
        lambda x: np.ascontiguousarray(x, np.float32).view(np.uint32) & 0xFFFFE000,
        lambda u: u.view(np.float32),
        4,
    ),
}
SPAN = {0: 1, 1: 8, 2: 4, 3: 2}  # 16-byte chunks per row, by swizzle mode of the descriptor
MASK = {0: 0, 1: 7, 2: 3, 3: 1}


def swz(a, mode):
    return a ^ (((a >> 7) & MASK[mode]) << 4)


def write_operand(image, m, start, mode, trans, k0=0):
    """Write operand `m` (rows, k) to the image of shared memory and return its descriptor.

    `k0` is the offset of the operand along k.
    """
    R, K = m.shape
    es = m.itemsize
    per = 16 // es
    sp = SPAN[mode]
    if not trans:
        lbo, sbo = (128 * 3, 128 * 8) if mode == 0 else (16, sp * 16 * 8)
        for r in range(R):
            for k in range(K):
                c, b = divmod((k + k0) * es, 16)
                o = (r % 8) * sp * 16 + (r // 8) * sbo + (c * lbo if mode == 0 else c * 16)
                a = swz(start + o, mode) + b
                image[a : a + es] = np.frombuffer(m[r, k].tobytes(), np.uint8)
        first = start + k0 * es
    else:
        nat = -(-R // (sp * per))
        lbo, sbo = (128 * 40, 128) if mode == 0 else (sp * 128 * 2, sp * 128)
        if mode and nat == 1:
            lbo = 16
        for r in range(R):
            for k in range(K):
                c, b = divmod(r * es, 16)
                o = (
                    c * sbo + (k % 8) * 16 + (k // 8) * lbo
                    if mode == 0
                    else (c % sp) * 16 + (c // sp) * lbo + (k % 8) * sp * 16 + (k // 8) * sbo
                )
                a = swz(start + o, mode) + b
                image[a : a + es] = np.frombuffer(m[r, k].tobytes(), np.uint8)
        first = start
    return (first >> 4) | (lbo >> 4) << 16 | (sbo >> 4) << 32 | mode << 62


def wgmma_ptx(
    N,
    K,
    ty,
    rs,
    ta,
    tb,
    scale,
    sa=1,
    sb=1,
    acc="f32",
    body="",
    wait="wgmma.wait_group.sync.aligned 0;",
    fence="fence.proxy.async;",
    wfence="wgmma.fence.sync.aligned;",
):
    nd = N // 2 if acc == "f32" else N // 4
    d = ", ".join(f"%d{i}" for i in range(nd))
    imm = f"{sa}, {sb}" + ("" if ty == "tf32" else (f", {tb}" if rs else f", {ta}, {tb}"))
    a = "{%a0, %a1, %a2, %a3}" if rs else "%da"
    lda = "".join(f"ld.global.b32 %a{i}, [%pa + {4 * i}];\n" for i in range(4)) if rs else ""
    ldc = "".join(f"ld.global.b32 %d{i}, [%pc + {4 * i}];\n" for i in range(nd))
    st = "".join(f"st.global.b32 [%pc + {4 * i}], %d{i};\n" for i in range(nd))
    return f""".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 sm[];
.visible .entry k(.param .u64 img, .param .u32 bytes, .param .u64 areg, .param .u64 c,
                  .param .u64 da, .param .u64 db)
{{
.reg .b32 %t, %n, %o, %a<4>, %d<{nd}>, %x<4>, %s;
.reg .b64 %p, %pa, %pc, %da, %db, %w; .reg .pred %q, %sc;
mov.u32 %t, %tid.x; ld.param.u64 %p, [img]; ld.param.u32 %n, [bytes];
ld.param.u64 %da, [da]; ld.param.u64 %db, [db];
shl.b32 %o, %t, 4;
L: setp.ge.u32 %q, %o, %n; @%q bra M;
cvt.u64.u32 %w, %o; add.u64 %w, %w, %p; ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%w];
mov.u32 %s, sm; add.u32 %s, %s, %o; st.shared.v4.b32 [%s], {{%x0, %x1, %x2, %x3}};
add.u32 %o, %o, 2048; bra L;
M: {fence} bar.sync 0;
ld.param.u64 %pa, [areg]; mad.wide.u32 %pa, %t, 16, %pa;
ld.param.u64 %pc, [c]; mad.wide.u32 %pc, %t, {4 * nd}, %pc;
{lda}{ldc}
setp.eq.u32 %sc, 1, {scale};
{wfence}
wgmma.mma_async.sync.aligned.m64n{N}k{K}.{acc}.{ty}.{ty} {{{d}}}, {a}, %db, %sc, {imm};
wgmma.commit_group.sync.aligned;
{body}
{wait}
{st}
ret;
}}
"""


def frag(tid, N):
    """Yield the (row, column) of each f32 accumulator register of a thread."""
    w, lane = divmod(tid, 32)
    g, t = lane >> 2, lane & 3
    for j in range(N // 8):
        for q in range(4):
            yield 16 * w + g + 8 * (q >> 1), 8 * j + 2 * t + (q & 1)


def wgmma_case(N, ty="bf16", rs=False, ma=1, mb=1, ta=0, tb=0, scale=1, sa=1, sb=1, k0=0, **kw):
    enc, dec, es = ENC[ty]
    K = 32 // es
    A, B, C = (rng.standard_normal(s).astype(np.float32) for s in ((64, K), (N, K), (64, N)))
    ea, eb = enc(A), enc(B)
    image = np.zeros(96 * 1024, np.uint8)
    da = 0 if rs else write_operand(image, ea, 1024 * 2, ma, ta, k0)
    db = write_operand(image, eb, 1024 * 40, mb, tb, k0)
    areg = np.zeros((128, 4 * 4 // es), ea.dtype)
    u = 4 // es
    for t in range(128):
        g, q = (t & 31) >> 2, t & 3
        for i in range(4):
            row, kk = 16 * (t >> 5) + g + 8 * (i & 1), (i >> 1) * (K // 2) + q * u
            areg[t, i * u : (i + 1) * u] = ea[row, kk : kk + u]
    c = np.zeros((128, N // 2), np.float32)
    for t in range(128):
        c[t] = [C[r, n] for r, n in frag(t, N)]
    m = ptxrun.load(wgmma_ptx(N, K, ty, rs, ta, tb, scale, sa, sb, **kw))
    m.kernel("k").launch(1, 128, [image, image.nbytes, areg, c, da, db], image.nbytes)
    expected = sa * sb * dec(ea).astype(np.float64) @ dec(eb).astype(np.float64).T + scale * C
    out = np.zeros((64, N), np.float32)
    for t in range(128):
        for x, (r, n) in zip(c[t], frag(t, N), strict=True):
            out[r, n] = x
    return out, expected


@pytest.mark.parametrize(
    "kw",
    [
        {"N": 128},
        {"N": 8, "ty": "f16"},
        {"N": 256, "rs": True},
        {"N": 24, "sa": -1, "scale": 0},
        {"N": 64, "sb": -1},
        {"N": 32, "k0": 16},
        {"N": 64, "rs": True, "tb": 1, "scale": 0},
        {"N": 40, "ma": 0, "mb": 0},
        {"N": 64, "ma": 2, "mb": 3},
        {"N": 64, "ma": 3, "mb": 2, "k0": 0},
        {"N": 64, "ta": 1, "tb": 1},
        {"N": 128, "ta": 1, "tb": 1, "ty": "f16"},
        {"N": 32, "ta": 1, "tb": 1, "ma": 2, "mb": 2},
        {"N": 32, "ta": 1, "tb": 1, "ma": 3, "mb": 3},
        {"N": 16, "ta": 1, "tb": 1, "ma": 0, "mb": 0},
        {"N": 64, "ty": "tf32"},
        {"N": 64, "ty": "tf32", "rs": True},
    ],
    ids=lambda kw: "-".join(f"{k}{v}" for k, v in kw.items()),
)
def test_wgmma(kw):
    out, expected = wgmma_case(**kw)
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()


def test_wgmma_without_wait():
    with pytest.raises(ptxrun.ExecutionError, match="exits before this wgmma was waited for"):
        wgmma_case(16, wait="")


def test_wgmma_result_used_early():
    # d0 is read before the wait and becomes NaN; the other results are correct
    out, expected = wgmma_case(16, body="add.f32 %d0, %d0, 0f00000000;")
    bad = np.isnan(out)
    assert bad.sum() == 128
    assert np.abs((out - expected)[~bad]).max() < 1e-4
    # a move keeps the value in flight, as the register allocation of the assembler may do
    out, expected = wgmma_case(16, body="mov.b32 %x0, %d0; mov.b32 %d0, %x0;")
    assert np.abs(out - expected).max() < 1e-4


def test_wgmma_operand_overwritten():
    body = (
        "mov.u32 %s, sm; add.u32 %s, %s, 40960; mad.lo.u32 %s, %t, 16, %s; "
        "mov.u32 %x0, 0; st.shared.b32 [%s], %x0;"
    )
    with pytest.raises(
        ptxrun.ExecutionError, match=r"operand B of the wgmma of line \d+, was overwritten before"
    ):
        wgmma_case(16, body=body)
    with (
        ptxrun.options(racecheck=True),
        pytest.raises(
            ptxrun.RaceError,
            match=r"write after a read .operand of a wgmma that was not waited for",
        ),
    ):
        wgmma_case(16, body=body)


def test_wgmma_fences():
    with ptxrun.options(racecheck=True):
        wgmma_case(16)
        with pytest.raises(ptxrun.RaceError, match=r"no fence.proxy.async in between"):
            wgmma_case(16, fence="")
    with pytest.raises(
        ptxrun.ExecutionError, match=r"registers written after the last wgmma.fence"
    ):
        wgmma_case(16, wfence="")


# ---------------------------------------------------------------- tensor copies
def tma_ptx(rank, body):
    coordinates = ", ".join(f".param .u32 c{i}" for i in range(rank))
    return f""".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 sm[];
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 out, .param .u32 n, {coordinates})
{{
.reg .b32 %t, %o, %n, %c<5>, %s, %x<4>, %bar, %ok;
.reg .b64 %m, %p, %w, %st; .reg .pred %q, %lead, %done;
mov.u32 %t, %tid.x; mov.b64 %m, map; cvta.param.u64 %m, %m;
ld.param.u64 %p, [out]; ld.param.u32 %n, [n];
{" ".join(f"ld.param.u32 %c{i}, [c{i}];" for i in range(rank))}
mov.u32 %bar, sm; setp.eq.u32 %lead, %t, 0; mov.u32 %s, sm; add.u32 %s, %s, 1024;
@%lead mbarrier.init.shared::cta.b64 [%bar], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
{body}
ret;
}}
"""


LOAD = """@%lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], %n;
@%lead cp.async.bulk.tensor.{r}d.shared::cluster.global.mbarrier::complete_tx::bytes
  [%s], [%m, {{{c}}}], [%bar];
W: mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0; @!%done bra W;
shl.b32 %o, %t, 4;
L: setp.ge.u32 %q, %o, %n; @%q bra E;
add.u32 %x0, %s, %o; ld.shared.v4.b32 {{%x0, %x1, %x2, %x3}}, [%x0];
cvt.u64.u32 %w, %o; add.u64 %w, %w, %p; st.global.v4.b32 [%w], {{%x0, %x1, %x2, %x3}};
add.u32 %o, %o, 1024; bra L; E:
"""
STORE = """shl.b32 %o, %t, 4;
L: setp.ge.u32 %q, %o, %n; @%q bra E;
cvt.u64.u32 %w, %o; add.u64 %w, %w, %p; ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%w];
add.u32 %ok, %s, %o; st.shared.v4.b32 [%ok], {{%x0, %x1, %x2, %x3}};
add.u32 %o, %o, 1024; bra L; E:
fence.proxy.async.shared::cta; bar.sync 0;
@%lead cp.{k}async.bulk.tensor.{r}d.global.shared::cta{op}.bulk_group [%m, {{{c}}}], [%s];
cp.async.bulk.commit_group; {wait}
"""
TYPES = {
    np.dtype(np.uint16): 10,
    np.dtype(np.float32): 7,
    np.dtype(np.float16): 6,
    np.dtype(np.int32): 3,
}


def tma(x, box, co, mode, body, data=None, **kw):
    """Load a box and return the bytes in shared memory, or store `data` to it."""
    n = int(np.prod(box)) * x.itemsize
    r = len(box)
    out = np.zeros(n, np.uint8) if data is None else data
    mp = tensor_map(
        x.ctypes.data,
        TYPES[x.dtype],
        x.itemsize,
        box,
        x.shape,
        [s // x.itemsize for s in x.strides],
        mode,
        **kw,
    )
    body = (
        body.format(
            r=r,
            c=", ".join(f"%c{i}" for i in range(r)),
            k="",
            op="",
            wait="cp.async.bulk.wait_group 0;",
        )
        if "{r}" in body
        else body
    )
    ptxrun.register(x)
    try:
        ptxrun.load(tma_ptx(r, body)).kernel("k").launch(
            1, 64, [mp, out, n, *[c & 0xFFFFFFFF for c in reversed(co)]], 1024 + n
        )
    finally:
        ptxrun.unregister(x)
    return out


def boxed(x, box, co, fill=0):
    w = np.full(box, fill, x.dtype)
    for i in np.ndindex(*box):
        p = tuple(a + b for a, b in zip(i, co, strict=True))
        if all(0 <= a < s for a, s in zip(p, x.shape, strict=True)):
            w[i] = x[p]
    return w


def swizzled(lin, mode):
    """Return the bytes of a box in swizzled order, for an address aligned to 1024 bytes."""
    o = np.arange(0, lin.size, 16)
    to = o ^ (((o >> 7) & {0: 0, 1: 1, 2: 3, 3: 7}[mode]) << 4)
    w = np.empty_like(lin)
    for a, b in zip(o, to, strict=True):
        w[b : b + 16] = lin[a : a + 16]
    return w


@pytest.mark.parametrize(
    ("dtype", "shape", "box", "co", "mode"),
    [
        (np.uint16, (40, 72), (16, 64), (8, 0), 3),
        (np.uint16, (40, 72), (16, 64), (32, 24), 3),
        (np.uint16, (40, 72), (16, 32), (-3, 48), 2),
        (np.uint16, (40, 72), (8, 16), (35, -8), 1),
        (np.uint16, (40, 72), (24, 72), (20, 8), 0),
        (np.float32, (5, 20, 36), (2, 8, 32), (4, 15, 12), 3),
        (np.int32, (3, 5, 6, 8), (2, 2, 3, 8), (2, 4, 4, 0), 0),
        (np.float16, (64, 264), (64, 64), (0, 201), 3),
        (np.float16, (1000,), (256,), (900,), 0),
    ],
    ids=str,
)
def test_tensor_load(dtype, shape, box, co, mode):
    x = (
        (rng.standard_normal(shape) * 100).astype(dtype)
        if dtype != np.uint16
        else rng.integers(0, 65536, shape).astype(dtype)
    )
    got = tma(x, box, co, mode, LOAD)
    assert np.array_equal(got, swizzled(boxed(x, box, co).reshape(-1).view(np.uint8), mode))


def test_tensor_load_nan_fill():
    x = rng.standard_normal((10, 32)).astype(np.float32)
    got = tma(x, (8, 32), (6, 0), 3, LOAD, nan_fill=True)
    assert np.isnan(got.view(np.float32)).sum() == 4 * 32


@pytest.mark.parametrize(("mode", "co"), [(3, (3, 0)), (2, (-2, 8)), (1, (35, 70)), (0, (0, 40))])
def test_tensor_store(mode, co):
    x = np.zeros((40, 72), np.uint16)
    inner = {0: 64, 1: 16, 2: 32, 3: 64}[mode]
    d = rng.integers(1, 65536, (16, inner)).astype(np.uint16)
    tma(x, (16, inner), co, mode, STORE, data=swizzled(d.reshape(-1).view(np.uint8), mode))
    expected = np.zeros_like(x)
    for i in np.ndindex(16, inner):
        p = (i[0] + co[0], i[1] + co[1])
        if 0 <= p[0] < 40 and 0 <= p[1] < 72:
            expected[p] = d[i]
    assert np.array_equal(x, expected)


def test_tensor_reduction():
    x = rng.standard_normal((20, 32)).astype(np.float32)
    y, d = x.copy(), rng.standard_normal((8, 32)).astype(np.float32)
    tma(
        x,
        (8, 32),
        (15, 0),
        3,
        STORE.format(r=2, c="%c0, %c1", k="reduce.", op=".add", wait="cp.async.bulk.wait_group 0;"),
        data=swizzled(d.reshape(-1).view(np.uint8), 3),
    )
    y[15:20] += d[:5]
    assert np.array_equal(x, y)


def test_store_bugs():
    x, d = np.zeros((16, 64), np.uint16), np.ones(16 * 64, np.uint16).view(np.uint8)
    with pytest.raises(ptxrun.ExecutionError, match="before this bulk store has read its source"):
        tma(x, (16, 64), (0, 0), 3, STORE.format(r=2, c="%c0, %c1", k="", op="", wait=""), data=d)
    over = "mov.u32 %x0, 7; st.shared.b32 [%s+32], %x0; cp.async.bulk.wait_group.read 0;"
    with pytest.raises(
        ptxrun.ExecutionError, match="was overwritten before the store was waited for"
    ):
        tma(x, (16, 64), (0, 0), 3, STORE.format(r=2, c="%c0, %c1", k="", op="", wait=over), data=d)
    with ptxrun.options(racecheck=True):
        tma(x, (16, 64), (0, 0), 3, STORE, data=d)
        with pytest.raises(ptxrun.RaceError, match=r"no fence.proxy.async"):
            tma(
                x,
                (16, 64),
                (0, 0),
                3,
                STORE.format(r=2, c="%c0, %c1", k="", op="", wait="").replace(
                    "fence.proxy.async.shared::cta;", ""
                ),
                data=d,
            )


def test_bugs_in_tensor_loads_raise():
    x = rng.integers(0, 65536, (40, 72)).astype(np.uint16)
    body = LOAD.format(r=2, c="%c0, %c1")
    with pytest.raises(ptxrun.ExecutionError, match="expect_tx is missing or too small"):
        tma(
            x,
            (16, 64),
            (0, 0),
            3,
            body.replace(
                "arrive.expect_tx.shared::cta.b64 _, [%bar], %n", "arrive.shared::cta.b64 _, [%bar]"
            ),
        )
    with pytest.raises(
        ptxrun.ExecutionError,
        match="deadlock: no warp can continue; warp 0 at the mbarrier at shared offset 0, parity 0 "
        r".*16 bytes outstanding",
    ):
        tma(
            x,
            (16, 64),
            (0, 0),
            3,
            body.replace(
                "mbarrier.arrive.expect_tx", "add.u32 %n, %n, 16; @%lead mbarrier.arrive.expect_tx"
            ),
        )
    with pytest.raises(
        ptxrun.ExecutionError, match="in flight"
    ):  # the wait for the parity of the previous phase returns at once
        tma(x, (16, 64), (0, 0), 3, body.replace("[%bar], 0;", "[%bar], 1;"))
    with ptxrun.options(racecheck=True):
        tma(x, (16, 64), (0, 0), 3, LOAD)
        with pytest.raises(ptxrun.RaceError, match="TMA data whose mbarrier was not waited for"):
            tma(x, (16, 64), (0, 0), 3, body.replace("[%bar], 0;", "[%bar], 1;"))
    with pytest.raises(ptxrun.MemoryFault, match="misaligned shared address of a tensor copy"):
        tma(x, (16, 64), (0, 0), 3, "add.u32 %s, %s, 64;" + body)
    with pytest.raises(ptxrun.ExecutionError, match="exceeds the swizzle span"):
        tma(x, (16, 64), (0, 0), 2, body)
    with pytest.raises(
        ptxrun.ExecutionError, match="more arrivals than the barrier was initialized for"
    ):
        tma(x, (16, 64), (0, 0), 3, "@%lead mbarrier.arrive.shared::cta.b64 _, [%bar], 2;")


# ---------------------------------------------- a pipeline: producer warp, consumer warpgroup
SOURCE = Path(__file__).parent / "cuda" / "hopper.cu"


def tiles(steps):
    A, B = (
        rng.standard_normal((steps, 64, 16)).astype(np.float32),
        rng.standard_normal((steps, 16, 16)).astype(np.float32),
    )
    ea, eb = bf16(A), bf16(B)  # B as (n, k)

    def core(m):
        return np.ascontiguousarray(m.reshape(steps, -1, 8, 2, 8).transpose(0, 1, 3, 2, 4))

    return (
        core(ea),
        core(eb),
        np.einsum("smk,snk->mn", unbf16(ea).astype(np.float64), unbf16(eb).astype(np.float64))
        + 1.0,
    )


@pytest.fixture(scope="module")
def mod(nvcc):
    return ptxrun.compile_cuda(SOURCE, arch="sm_90a")


def pipe(mod, steps, bug, **kw):
    a, b, expected = tiles(steps)
    c = np.zeros((128, 8), np.float32)
    with ptxrun.options(**kw):
        mod["pipe"].launch(1, 160, [a, b, c, steps, bug], 5120)
    out = np.zeros((64, 16))
    for t in range(128):
        for x, (r, n) in zip(c[t], frag(t, 16), strict=True):
            out[r, n] = x
    return out, expected


@pytest.mark.parametrize(
    "kw",
    [{}, {"racecheck": True}, *[{"seed": s, "racecheck": s % 2 == 0} for s in range(1, 9)]],
    ids=str,
)
def test_pipeline(mod, kw):
    out, expected = pipe(mod, 7, 0, **kw)
    assert np.abs(out - expected).max() < 1e-4


def test_pipeline_bugs(mod):
    out, _ = pipe(mod, 1, 1)  # wait_group 1 instead of 0
    assert np.isnan(out).all()
    with pytest.raises(
        ptxrun.ExecutionError,
        match="deadlock: no warp can continue; warp 0 at the mbarrier .*; "
        r"warp 4 at the mbarrier at shared offset \d+, parity",
    ):
        pipe(mod, 5, 2)
    with pytest.raises(ptxrun.ExecutionError, match="expect_tx is missing or too small"):
        pipe(mod, 5, 3)
    with pytest.raises(
        ptxrun.ExecutionError, match=r"operand [AB] of the wgmma of line \d+, was overwritten"
    ):
        pipe(mod, 5, 4)
    with pytest.raises(
        ptxrun.RaceError,
        match=r"asynchronous write after a read .operand of a wgmma that was not waited for",
    ):
        pipe(mod, 5, 4, racecheck=True)
    with pytest.raises(ptxrun.RaceError, match=r"no fence.proxy.async in between"):
        pipe(mod, 5, 5, racecheck=True)
    with pytest.raises(ptxrun.ExecutionError, match=r"deadlock.* 32 of 128 arrivals"):
        pipe(mod, 5, 6)


def test_named_barriers(mod):
    x = np.zeros(4, np.float32)
    for kw in ({}, {"racecheck": True}, {"seed": 3}, {"seed": 4, "racecheck": True}):
        with ptxrun.options(**kw):
            x[:] = -1
            mod["named"].launch(1, 128, [x, 0])
            assert x.tolist() == [0, 1, 2, 3]
    with pytest.raises(
        ptxrun.DivergenceError,
        match=r"barrier 2 can never complete: warp 0 waits.*; "
        r"warp 0 at barrier 2 \(64 of 128 threads\), line \d+.*warp 2 at barrier 3",
    ):
        mod["named"].launch(1, 128, [x, 1])
    with pytest.raises(ptxrun.DivergenceError, match="a warp arrived twice"):
        mod["named"].launch(1, 128, [x, 2])


def test_setmaxnreg(mod):
    x = np.zeros(256, np.int32)
    mod["regs"].launch(1, 256, [x, 0])
    assert x.sum() == 128 * 3
    text = mod.text
    for old, new, message in (
        ("inc.sync.aligned.u32 224", "inc.sync.aligned.u32 226", "multiple of 8"),
        (
            "dec.sync.aligned.u32 32",
            "dec.sync.aligned.u32 160",
            "setmaxnreg.dec to 160 registers from 128",
        ),
        (
            "dec.sync.aligned.u32 32",
            "dec.sync.aligned.u32 40",
            "deadlock.*setmaxnreg.inc 224 .* registers in use",
        ),
    ):
        assert "setmaxnreg." + old in text
        with pytest.raises(ptxrun.ExecutionError, match=message):
            ptxrun.load(text.replace("setmaxnreg." + old, "setmaxnreg." + new))["regs"].launch(
                1, 256, [x, 0]
            )


def test_profile_counts(mod):
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        pipe(mod, 6, 0, profile=True)
        p = ptxrun.last_profile()
    assert p.mma_flop == 6 * 2 * 64 * 16 * 16
    assert p.tma_load_bytes == 6 * 2560
    assert p.counts["wgmma"] == 24
    assert p.tma_requests == 12
