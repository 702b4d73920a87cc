"""Single PTX instructions, compared with NumPy."""

from __future__ import annotations

import struct

import numpy as np
import ptxrun
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]

N = 97  # three full warps and a partial one
TB = {
    "u8": 8,
    "s8": 8,
    "u16": 16,
    "s16": 16,
    "b16": 16,
    "f16": 16,
    "bf16": 16,
    "u32": 32,
    "s32": 32,
    "b32": 32,
    "f32": 32,
    "u64": 64,
    "s64": 64,
    "b64": 64,
    "f64": 64,
}
NP = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "f16": np.float16,
    "bf16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "f32": np.float32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f64": np.float64,
}


def run_many(cases):
    """Execute PTX snippets, one thread per element, and return the output of each snippet.

    A case is (snippet, [(array, type), ...], output type). The snippet reads %a, %b, %c, ... and
    writes %d.
    """
    ins, body, outs = [], [], []
    for i, (snip, args, ot) in enumerate(cases):
        body.append("{")
        for j, (arr, t) in enumerate(args):
            b = max(16, TB[t])
            nm = "abcde"[j]
            st = t if t[0] in "us" else f"b{TB[t]}"
            body.append(
                f".reg .b{b} %{nm}; mul.wide.u32 %off, %tid0, {TB[t] // 8}; "
                f"add.u64 %ad, %base{len(ins)}, %off; ld.global.{st} %{nm}, [%ad];"
            )
            ins.append(np.ascontiguousarray(arr.astype(NP[t]) if arr.dtype != NP[t] else arr))
        b = max(16, TB[ot])
        body.append(
            f".reg .b{b} %d; .reg .pred %q, %q2; .reg .b32 %t0, %t1; "
            ".reg .b16 %h0, %h1; .reg .b64 %l0;"
        )
        body.append(snip)
        ost = f"b{TB[ot]}"
        body.append(
            f"mul.wide.u32 %off, %tid0, {TB[ot] // 8}; add.u64 %ad, %obase{i}, %off; "
            f"st.global.{ost} [%ad], %d;"
        )
        body.append("}")
        outs.append(np.zeros(N, NP[ot]))
    n = len(ins) + len(outs)
    ps = ",\n".join(f".param .u64 p{i}" for i in range(n))
    ld = "".join(f".reg .b64 %base{i}; ld.param.u64 %base{i}, [p{i}];\n" for i in range(len(ins)))
    ld += "".join(
        f".reg .b64 %obase{i}; ld.param.u64 %obase{i}, [p{i + len(ins)}];\n"
        for i in range(len(outs))
    )
    ptx = (
        f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k({ps})\n{{\n"
        ".reg .b32 %tid0; .reg .b64 %ad, %off;\n"
        f"mov.u32 %tid0, %tid.x;\n{ld}" + "\n".join(body) + "\nret;\n}\n"
    )
    ptxrun.load(ptx).kernel("k").launch(1, N, ins + outs)
    return outs


rng = np.random.default_rng(1)


def ints(t, special=True):
    ii = np.iinfo(NP[t])
    x = rng.integers(ii.min, ii.max, N, dtype=NP[t], endpoint=True)
    x[10:40] = rng.integers(max(ii.min, -40), 40, 30).astype(NP[t])
    if special:
        x[:4] = [0, ii.max, ii.min, 1]
    return x


def f32s(scale=10.0, special=True):
    x = (rng.standard_normal(N) * scale).astype(np.float32)
    if special:
        x[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40]
    return x


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    ok = (a == b) | np.isnan(a) & np.isnan(b) if a.dtype.kind == "f" else a == b
    assert ok.all(), (np.nonzero(~ok)[0][:5], a[~ok][:5], b[~ok][:5])


def test_integer_arithmetic():
    cases, refs = [], []
    with np.errstate(all="ignore"):
        for t in ("u32", "s32", "u64", "s64", "u16", "s16"):
            a, b = ints(t), ints(t)
            bz = b.copy()
            bz[bz == 0] = 3
            w = TB[t]
            ai, bi = [int(x) for x in a], [int(x) for x in b]

            def wrap(v, t=t):
                return (
                    np.array([x & ((1 << TB[t]) - 1) for x in v], dtype=np.uint64)
                    .astype(f"u{TB[t] // 8}")
                    .view(NP[t])
                )

            A = [(a, t), (b, t)]
            cases += [
                (f"add.{t} %d, %a, %b;", A, t),
                (f"sub.{t} %d, %a, %b;", A, t),
                (f"mul.lo.{t} %d, %a, %b;", A, t),
                (f"mul.hi.{t} %d, %a, %b;", A, t),
                (f"mad.lo.{t} %d, %a, %b, %a;", A, t),
                (f"min.{t} %d, %a, %b;", A, t),
                (f"max.{t} %d, %a, %b;", A, t),
                (f"div.{t} %d, %a, %b;", [(a, t), (bz, t)], t),
                (f"rem.{t} %d, %a, %b;", [(a, t), (bz, t)], t),
            ]
            q = [
                int(abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)
                for x, y in zip(ai, (int(v) for v in bz), strict=True)
            ]
            refs += [
                wrap([x + y for x, y in zip(ai, bi, strict=True)]),
                wrap([x - y for x, y in zip(ai, bi, strict=True)]),
                wrap([x * y for x, y in zip(ai, bi, strict=True)]),
                wrap([(x * y) >> w for x, y in zip(ai, bi, strict=True)]),
                wrap([x * y + x for x, y in zip(ai, bi, strict=True)]),
                np.minimum(a, b),
                np.maximum(a, b),
                wrap(q),
                wrap([x - int(y) * z for x, y, z in zip(ai, bz, q, strict=True)]),
            ]
    for o, r in zip(run_many(cases), refs, strict=True):
        same(o, r)


def test_wide_multiply_logic_and_shifts():
    cases, refs = [], []
    for t, w in (("u32", "u64"), ("s32", "s64"), ("u16", "u32"), ("s16", "s32")):
        a, b = ints(t), ints(t)
        cases += [(f"mul.wide.{t} %d, %a, %b;", [(a, t), (b, t)], w)]
        refs += [a.astype(NP[w]) * b.astype(NP[w])]
    a, b = ints("u32"), ints("u32")
    c = ints("s64")
    cases.append(
        (
            "mad.wide.s32 %d, %a, %b, %c;",
            [(a.view(np.int32), "s32"), (b.view(np.int32), "s32"), (c, "s64")],
            "s64",
        )
    )
    with np.errstate(all="ignore"):
        refs.append(a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64) + c)
    for t in ("b32", "b64", "b16"):
        x, y = ints("u" + t[1:]), ints("u" + t[1:])
        cases += [(f"{o}.{t} %d, %a, %b;", [(x, t), (y, t)], t) for o in ("and", "or", "xor")] + [
            (f"not.{t} %d, %a;", [(x, t)], t)
        ]
        refs += [x & y, x | y, x ^ y, ~x]
    s = rng.integers(0, 70, N).astype(np.uint32)
    for t in ("b32", "b64", "b16"):
        x = ints("u" + t[1:])
        w = TB[t]
        cases.append((f"shl.{t} %d, %a, %b;", [(x, t), (s, "u32")], t))
        refs.append(
            np.array(
                [
                    (int(v) << int(k)) & ((1 << w) - 1) if k < w else 0
                    for v, k in zip(x, s, strict=True)
                ],
                dtype=x.dtype,
            )
        )
    for t in ("u32", "s32", "u64", "s64", "u16", "s16"):
        x = ints(t)
        cases.append((f"shr.{t} %d, %a, %b;", [(x, t), (s, "u32")], t))
        refs.append(
            np.array(
                [
                    int(v) >> min(int(k), TB[t] if t[0] == "u" else TB[t] - 1)
                    for v, k in zip(x, s, strict=True)
                ]
            ).astype(x.dtype)
        )
        cases.append((f"shr.{t} %d, %a, 5;", [(x, t)], t))
        refs.append(x >> np.array(5, x.dtype))
    for o, r in zip(run_many(cases), refs, strict=True):
        same(o, r)


def test_bit_fields_and_permutations():
    a, b, c = ints("u32"), ints("u32"), ints("u32")
    low = ints("u64")
    cases = [
        ("lop3.b32 %d, %a, %b, %c, 0xEA;", [(a, "b32"), (b, "b32"), (c, "b32")], "b32"),
        ("lop3.b32 %d, %a, %b, %c, 150;", [(a, "b32"), (b, "b32"), (c, "b32")], "b32"),
        ("prmt.b32 %d, %a, %b, 0x5410U;", [(a, "b32"), (b, "b32")], "b32"),
        ("prmt.b32 %d, %a, %b, %c;", [(a, "b32"), (b, "b32"), (c, "b32")], "b32"),
        ("bfe.u32 %d, %a, 4, 7;", [(a, "u32")], "u32"),
        ("bfe.s32 %d, %a, 4, 7;", [(a, "s32")], "s32"),
        ("bfi.b32 %d, %a, %b, 8, 5;", [(a, "b32"), (b, "b32")], "b32"),
        ("shf.l.wrap.b32 %d, %a, %b, 7;", [(a, "b32"), (b, "b32")], "b32"),
        ("shf.r.wrap.b32 %d, %a, %b, %c;", [(a, "b32"), (b, "b32"), (c, "b32")], "b32"),
        ("shf.r.clamp.b32 %d, %a, %b, %c;", [(a, "b32"), (b, "b32"), (c, "b32")], "b32"),
        ("popc.b32 %d, %a;", [(a, "b32")], "u32"),
        ("clz.b32 %d, %a;", [(a, "b32")], "u32"),
        ("brev.b32 %d, %a;", [(a, "b32")], "b32"),
        ("popc.b64 %d, %a;", [(low, "b64")], "u32"),
        ("clz.b64 %d, %a;", [(low, "b64")], "u32"),
        ("bfind.u32 %d, %a;", [(a, "u32")], "u32"),
        ("mov.b64 {%t0, %t1}, %a; mov.b64 %d, {%t1, %t0};", [(low, "b64")], "b64"),
        ("mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};", [(a, "b32")], "b32"),
    ]
    A, B, C = ([int(v) for v in x] for x in (a, b, c))
    M = 0xFFFFFFFF

    def prmt(x, y, s):
        by = [(x >> 8 * i) & 255 for i in range(4)] + [(y >> 8 * i) & 255 for i in range(4)]
        r = 0
        for i in range(4):
            k = s >> 4 * i & 15
            v = by[k & 7]
            r |= ((255 if v & 128 else 0) if k & 8 else v) << 8 * i
        return r

    def sx(v, n):
        return v - (1 << n) if v >> (n - 1) & 1 else v

    refs = [
        [(x & y) | z for x, y, z in zip(A, B, C, strict=True)],
        [x ^ y ^ z for x, y, z in zip(A, B, C, strict=True)],
        [prmt(x, y, 0x5410) for x, y in zip(A, B, strict=True)],
        [prmt(x, y, z) for x, y, z in zip(A, B, C, strict=True)],
        [x >> 4 & 127 for x in A],
        [sx(x >> 4 & 127, 7) & M for x in A],
        [(x & 31) << 8 | (y & ~(31 << 8)) for x, y in zip(A, B, strict=True)],
        [((y << 32 | x) << 7 >> 32) & M for x, y in zip(A, B, strict=True)],
        [((y << 32 | x) >> (z & 31)) & M for x, y, z in zip(A, B, C, strict=True)],
        [((y << 32 | x) >> min(z, 32)) & M for x, y, z in zip(A, B, C, strict=True)],
        [bin(x).count("1") for x in A],
        [32 - x.bit_length() for x in A],
        [int(f"{x:032b}"[::-1], 2) for x in A],
        [bin(int(x)).count("1") for x in low],
        [64 - int(x).bit_length() for x in low],
        [(x.bit_length() - 1) & M for x in A],
        [(int(x) >> 32 | int(x) << 32) & (1 << 64) - 1 for x in low],
        [(x >> 16 | x << 16) & M for x in A],
    ]
    for o, r in zip(run_many(cases), refs, strict=True):
        same(
            o.astype(np.uint64) & np.uint64(M if o.dtype.itemsize == 4 else (1 << 64) - 1),
            np.array(r, dtype=np.uint64),
        )


def test_float_arithmetic():
    a, b, c = f32s(), f32s()[::-1].copy(), f32s(special=False)
    A = [(a, "f32"), (b, "f32")]
    d = a.astype(np.float64)
    cases = [
        (f"{o}.f32 %d, %a, %b;", A, "f32")
        for o in ("add", "sub", "mul.rn", "div.rn", "div.full", "min", "max", "min.NaN", "max.NaN")
    ]
    cases += [
        ("fma.rn.f32 %d, %a, %b, %c;", [*A, (c, "f32")], "f32"),
        ("neg.f32 %d, %a;", A[:1], "f32"),
        ("abs.f32 %d, %a;", A[:1], "f32"),
        ("add.f64 %d, %a, %b;", [(d, "f64"), (c.astype(np.float64), "f64")], "f64"),
        ("fma.rn.f64 %d, %a, %b, %b;", [(d, "f64"), (c.astype(np.float64), "f64")], "f64"),
        ("add.ftz.f32 %d, %a, %a;", A[:1], "f32"),
        ("add.sat.f32 %d, %a, %b;", A, "f32"),
    ]
    with np.errstate(all="ignore"):
        z = np.where(np.abs(a) < 1.17549435e-38, 0 * a, a)
        refs = [
            a + b,
            a - b,
            a * b,
            a / b,
            a / b,
            np.fmin(a, b),
            np.fmax(a, b),
            np.minimum(a, b),
            np.maximum(a, b),
            (a.astype(np.longdouble) * b + c).astype(np.float32),
            -a,
            np.abs(a),
            d + c,
            (d.astype(np.longdouble) * c + c).astype(np.float64),
            z + z,
            np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0),
        ]
    for o, r in zip(run_many(cases), refs, strict=True):
        same(o, r.astype(o.dtype))


def test_rounding_modes():
    a, b = f32s(special=False), f32s(special=False)
    cases = [
        (f"{o}.{r}.f32 %d, %a, %b;", [(a, "f32"), (b, "f32")], "f32")
        for o in ("add", "mul")
        for r in ("rz", "rm", "rp")
    ]
    outs = run_many(cases)
    for i, o in enumerate(("add", "mul")):
        ex = (a.astype(np.float64) + b) if o == "add" else a.astype(np.float64) * b
        rn = ex.astype(np.float32)
        dn = np.where(rn.astype(np.float64) > ex, np.nextafter(rn, np.float32(-np.inf)), rn)
        up = np.where(rn.astype(np.float64) < ex, np.nextafter(rn, np.float32(np.inf)), rn)
        same(outs[3 * i], np.where(ex > 0, dn, up))
        same(outs[3 * i + 1], dn)
        same(outs[3 * i + 2], up)


def test_approximate_functions():
    a = np.abs(f32s(5.0, special=False)) + 0.01
    s = f32s(3.0, special=False)
    e = f32s(30.0)
    ops = [
        ("ex2.approx.ftz", e, np.exp2),
        ("lg2.approx", a, np.log2),
        ("rcp.approx.ftz", a, lambda x: 1 / x),
        ("rcp.rn", a, lambda x: 1 / x),
        ("rsqrt.approx", a, lambda x: 1 / np.sqrt(x)),
        ("sqrt.rn", a, np.sqrt),
        ("sqrt.approx", a, np.sqrt),
        ("sin.approx", s, np.sin),
        ("cos.approx", s, np.cos),
        ("tanh.approx", s, np.tanh),
    ]
    outs = run_many([(f"{o}.f32 %d, %a;", [(x, "f32")], "f32") for o, x, _ in ops])
    with np.errstate(all="ignore"):
        for (o, x, f), y in zip(ops, outs, strict=True):
            np.testing.assert_allclose(y, f(x.astype(np.float64)), rtol=3e-7, atol=1e-37, err_msg=o)


def bf(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    r = ((u + 0x7FFF + (u >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, r).astype(np.uint16)


def unbf(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def test_half_and_bf16():
    with np.errstate(all="ignore"):
        a, b, c = (f32s(3.0).astype(np.float16) for _ in range(3))
        A = [(a, "f16"), (b, "f16"), (c, "f16")]
        x, y, z = (bf(f32s(3.0)) for _ in range(3))
        X = [(x, "bf16"), (y, "bf16"), (z, "bf16")]
        cases = [
            (f"{o}.f16 %d, %a, %b;", A[:2], "f16") for o in ("add", "sub", "mul", "min", "max")
        ] + [("fma.rn.f16 %d, %a, %b, %c;", A, "f16")]
        refs = [
            a + b,
            a - b,
            a * b,
            np.fmin(a, b),
            np.fmax(a, b),
            (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16),
        ]
        outs = run_many(cases)
        for o, r in zip(outs, refs, strict=True):
            same(o, r)
        X32, Y32, Z32 = unbf(x), unbf(y), unbf(z)
        o = run_many(
            [
                ("fma.rn.bf16 %d, %a, %b, %c;", X, "bf16"),
                ("max.bf16 %d, %a, %b;", X[:2], "bf16"),
                ("neg.bf16 %d, %a;", X[:1], "bf16"),
                (
                    "mov.b32 %t0, {%a, %b}; mov.b32 %t1, {%b, %a}; "
                    "fma.rn.bf16x2 %t0, %t0, %t1, %t0; mov.b32 {%d, %h1}, %t0;",
                    X[:2],
                    "bf16",
                ),
                (
                    "mov.b32 %t0, {%a, %b}; add.f16x2 %t0, %t0, %t0; mov.b32 {%h0, %d}, %t0;",
                    A[:2],
                    "f16",
                ),
            ]
        )
        same(unbf(o[0]), unbf(bf((X32.astype(np.float64) * Y32 + Z32).astype(np.float32))))
        same(unbf(o[1]), np.fmax(X32, Y32))
        same(unbf(o[2]), -X32)
        same(unbf(o[3]), unbf(bf((X32.astype(np.float64) * Y32 + X32).astype(np.float32))))
        same(o[4], b + b)


def test_conversions():
    f = f32s(1000.0)
    with np.errstate(all="ignore"):
        h = f32s(5.0).astype(np.float16)
        d = f32s(1e5).astype(np.float64) * 1.0000001
        cases, refs = [], []

        def add(ins, args, ot, ref):
            cases.append((ins, args, ot))
            refs.append(ref)

        def sat(x, t):
            return np.array(
                [
                    0 if np.isnan(v) else int(min(max(v, np.iinfo(NP[t]).min), np.iinfo(NP[t]).max))
                    for v in x.astype(np.float64)
                ]
            ).astype(NP[t])

        for t in ("s32", "u32", "s16", "u16", "s8", "u8"):
            r = {"s8": "s32", "u8": "u32"}.get(t, t)
            add(f"cvt.rzi.{t}.f32 %d, %a;", [(f, "f32")], r, sat(np.trunc(f), t).astype(NP[r]))
        for m, fn in (("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc)):
            add(f"cvt.{m}.s32.f32 %d, %a;", [(f, "f32")], "s32", sat(fn(f), "s32"))
            add(f"cvt.{m}.f32.f32 %d, %a;", [(f, "f32")], "f32", fn(f))
        for t in ("s32", "u32", "s64", "u64", "s16", "u16", "s8", "u8"):
            x = ints(t)
            add(f"cvt.rn.f32.{t} %d, %a;", [(x, t)], "f32", x.astype(np.float32))
        x = ints("s64")
        add("cvt.rn.f64.s64 %d, %a;", [(x, "s64")], "f64", x.astype(np.float64))
        add("cvt.rn.f16.f32 %d, %a;", [(f, "f32")], "f16", f.astype(np.float16))
        add("cvt.f32.f16 %d, %a;", [(h, "f16")], "f32", h.astype(np.float32))
        add("cvt.rn.f32.f64 %d, %a;", [(d, "f64")], "f32", d.astype(np.float32))
        add("cvt.f64.f32 %d, %a;", [(f, "f32")], "f64", f.astype(np.float64))
        add(
            "cvt.sat.f32.f32 %d, %a;", [(f, "f32")], "f32", np.nan_to_num(np.clip(f, 0, 1), nan=0.0)
        )
        for s, t in (
            ("s32", "s64"),
            ("u32", "u64"),
            ("s16", "s32"),
            ("u16", "u32"),
            ("s64", "s32"),
            ("u64", "u32"),
            ("u32", "u16"),
            ("s8", "s32"),
            ("u8", "u64"),
        ):
            x = ints(s)
            add(f"cvt.{t}.{s} %d, %a;", [(x, s)], t, x.astype(NP[t]))
        x = ints("s32")
        add("cvt.u32.u8 %d, %a;", [(x, "s32")], "u32", (x & 255).astype(np.uint32))
        add("cvt.s32.s8 %d, %a;", [(x, "s32")], "s32", x.astype(np.int8).astype(np.int32))
        add("cvt.s64.s8 %d, %a;", [(x, "s32")], "s64", x.astype(np.int8).astype(np.int64))
        add("cvt.sat.s8.s32 %d, %a;", [(x, "s32")], "s32", np.clip(x, -128, 127))
        add("cvt.sat.u8.s32 %d, %a;", [(x, "s32")], "s32", np.clip(x, 0, 255))
        for o, r in zip(run_many(cases), refs, strict=True):
            same(o, r)
        g = f32s(7.0)
        for z in (f, g):  # exact ties of the rounding
            z[20:50].view(np.uint32)[:] = z[20:50].view(np.uint32) & 0xFFFF0000 | 0x8000
            z[50:70] = (z[50:70].astype(np.float16).view(np.uint16).astype(np.uint16)).view(
                np.float16
            ).astype(np.float32) * np.float32(1 + 2**-11)
        o = run_many(
            [
                ("cvt.rn.bf16.f32 %d, %a;", [(f, "f32")], "bf16"),
                ("cvt.rn.bf16x2.f32 %d, %a, %b;", [(f, "f32"), (g, "f32")], "b32"),
                ("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", [(f, "f32"), (g, "f32")], "b32"),
                ("cvt.rn.f16x2.f32 %d, %a, %b;", [(f, "f32"), (g, "f32")], "b32"),
                ("cvt.rna.tf32.f32 %d, %a;", [(g, "f32")], "b32"),
                ("cvt.rz.f16.f32 %d, %a;", [(g, "f32")], "f16"),
            ]
        )
        same(unbf(o[0]), unbf(bf(f)))
        same(unbf((o[1] >> 16).astype(np.uint16)), unbf(bf(f)))
        same(unbf((o[1] & 0xFFFF).astype(np.uint16)), unbf(bf(g)))

        def relu(v):
            return np.where(np.isnan(v), 0, np.maximum(v, 0))

        got = unbf((o[2] >> 16).astype(np.uint16))
        ok = ~np.isnan(f)
        same(got[ok], unbf(bf(relu(f)))[ok])
        same((o[3] & 0xFFFF).astype(np.uint16).view(np.float16), g.astype(np.float16))
        rz = o[5].astype(np.float32)
        fin = np.isfinite(g)
        assert (np.abs(rz[fin]) <= np.abs(g[fin])).all()
        assert np.allclose(rz[fin], g[fin], rtol=2e-3, atol=1e-6)


def test_comparisons_and_selections():
    a, b = f32s(1.0), np.round(f32s(1.0))[::-1].copy()
    a[20:40] = b[20:40]
    i, j = ints("s32"), ints("s32")
    i[50:60] = j[50:60]
    cases, refs = [], []
    with np.errstate(all="ignore"):
        un = np.isnan(a) | np.isnan(b)
        fl = {
            "eq": a == b,
            "ne": (a != b) & ~un,
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
            "equ": (a == b) | un,
            "neu": a != b,
            "ltu": (a < b) | un,
            "geu": (a >= b) | un,
            "num": ~un,
            "nan": un,
        }
        for k, r in fl.items():
            cases.append(
                (
                    f"setp.{k}.f32 %q, %a, %b; selp.b32 %d, 1, 0, %q;",
                    [(a, "f32"), (b, "f32")],
                    "u32",
                )
            )
            refs.append(r.astype(np.uint32))
        for t in ("s32", "u32"):
            x, y = i.view(NP[t]), j.view(NP[t])
            for k, r in {
                "eq": x == y,
                "ne": x != y,
                "lt": x < y,
                "le": x <= y,
                "gt": x > y,
                "ge": x >= y,
            }.items():
                cases.append(
                    (
                        f"setp.{k}.{t} %q|%q2, %a, %b; selp.b32 %d, 5, 7, %q2;",
                        [(x, t), (y, t)],
                        "u32",
                    )
                )
                refs.append(np.where(r, 7, 5).astype(np.uint32))
        cases.append(
            (
                "setp.lt.s32 %q, %a, %b; setp.gt.and.s32 %q2, %a, 0, %q; selp.s32 %d, %a, %b, %q2;",
                [(i, "s32"), (j, "s32")],
                "s32",
            )
        )
        refs.append(np.where((i < j) & (i > 0), i, j))
        cases.append(
            (
                "setp.lt.s32 %q, %a, %b; not.pred %q2, %q; mov.b32 %d, 3; "
                "@%q add.s32 %d, %d, 1; @!%q add.s32 %d, %d, 10;",
                [(i, "s32"), (j, "s32")],
                "s32",
            )
        )
        refs.append(np.where(i < j, 4, 13).astype(np.int32))
        cases.append(("set.lt.f32.s32 %d, %a, %b;", [(i, "s32"), (j, "s32")], "f32"))
        refs.append((i < j).astype(np.float32))
    for o, r in zip(run_many(cases), refs, strict=True):
        same(o, r)


def test_unknown_instruction_is_named():
    ptx = (
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n"
        ".reg .b32 %r<3>;\nfrobnicate.b32 %r1, %r2;\nret;\n}\n"
    )
    with pytest.raises(ptxrun.UnsupportedPtx, match=r"line 7.*frobnicate"):
        ptxrun.load(ptx).kernel("k")


def test_immediates():
    def f(v):
        (bits,) = struct.unpack("<I", struct.pack("<f", v))
        return f"0f{bits:08X}"

    o = run_many(
        [
            (f"mov.f32 %d, {f(1.5)};", [(np.zeros(N, np.float32), "f32")], "f32"),
            (f"mul.f32 %d, %a, {f(-2.0)};", [(np.arange(N, dtype=np.float32), "f32")], "f32"),
            ("mov.f64 %d, 0d3FF8000000000000;", [(np.zeros(N), "f64")], "f64"),
            ("add.s32 %d, %a, -5;", [(np.arange(N, dtype=np.int32), "s32")], "s32"),
            ("mov.b16 %d, 0x3C00;", [(np.zeros(N, np.float16), "f16")], "f16"),
            ("mov.u64 %d, -1;", [(np.zeros(N, np.uint64), "u64")], "u64"),
        ]
    )
    assert (o[0] == 1.5).all()
    assert (o[2] == 1.5).all()
    assert (o[4] == 1).all()
    assert (o[5] == 2**64 - 1).all()
    same(o[1], -2 * np.arange(N, dtype=np.float32))
    same(o[3], np.arange(N, dtype=np.int32) - 5)
