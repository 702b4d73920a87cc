"""Bitwise logic, shifts, bit fields and byte permutations."""

from __future__ import annotations

from ..ptx import TYPE_BITS
from .arithmetic import integer_binary
from .operands import SPLAT
from .registry import instruction


@instruction("and", "or", "xor")
def logic(g, it):
    n = it.op[0]
    t = g.ty(it)
    if t == "pred":
        g.count("setp_sel")
        c = {"and": "&", "or": "|", "xor": "^"}[n]
        g.set(it, it.args[0], f"({g.val(it.args[1], 1)} {c} {g.val(it.args[2], 1)})", 1)
    else:
        integer_binary(g, it, n)


@instruction("not")
def bitwise_not(g, it):
    t = g.ty(it)
    g.count("int_alu")
    if t == "pred":
        g.set(it, it.args[0], f"(~{g.val(it.args[1], 1)})", 1)
    else:
        b = TYPE_BITS[t]
        g.set(it, it.args[0], f"not_{b}({g.val(it.args[1], b)})", b)


@instruction("cnot")
def cnot(g, it):
    b = TYPE_BITS[g.ty(it)]
    g.count("int_alu")
    g.set(
        it,
        it.args[0],
        f"sel(eq_u{b}({g.val(it.args[1], b)}, {SPLAT[b]}(0)), {SPLAT[b]}(1), {SPLAT[b]}(0))",
        b,
    )


@instruction("shl", "shr")
def shift(g, it):
    n = it.op[0]
    t = g.ty(it)
    b = TYPE_BITS[t]
    g.count("int_alu", 2 if b == 64 else 1)
    sg = "s" if t[0] == "s" else "u"
    nm = "shl" if n == "shl" else f"shr_{sg}"
    sep = "_" if n == "shl" else ""
    a = g.val(it.args[1], b)
    s = it.args[2]
    if s[0] == "i":
        k = s[1] & 0xFFFFFFFF
        if k >= b:
            if n == "shr" and sg == "s":
                k = b - 1
            else:
                return g.set(it, it.args[0], f"{SPLAT[b]}(0)", b)
        g.set(it, it.args[0], f"{nm}{sep}{b}i({a}, {k})", b)
    else:
        g.set(it, it.args[0], f"{nm}{sep}{b}({a}, {g.val(s, 32)})", b)
    return None


@instruction("shf")
def shf(g, it):
    g.count("int_alu")
    g.set(
        it,
        it.args[0],
        f"shf_{it.op[1]}_{it.op[2]}({g.vals(it.args[1:4], 32)})",
        32,
    )


@instruction("prmt")
def prmt(g, it):
    g.count("int_alu")
    mode = it.op[2] if len(it.op) > 2 else "g"
    g.set(it, it.args[0], f"prmt_{mode}({g.vals(it.args[1:4], 32)})", 32)


@instruction("lop3")
def lop3(g, it):
    g.count("int_alu")
    if "and" in it.op or "or" in it.op:
        g.bad(it)
    lut = it.args[4][1]
    a, b, c = (g.tmpv(g.val(x, 32), 32) for x in it.args[1:4])
    g.set(it, it.args[0], f"lut3({a}, {b}, {c}, {lut})", 32)


@instruction("bfe")
def bfe(g, it):
    t = g.ty(it)
    b = TYPE_BITS[t]
    g.count("int_alu")
    p, n = it.args[2], it.args[3]
    a = g.val(it.args[1], b)
    if p[0] == "i" and n[0] == "i" and p[1] + n[1] <= b and n[1] > 0:
        e = f"shl_{b}i({a}, {b - p[1] - n[1]})"
        g.set(it, it.args[0], f"shr_{t[0]}{b}i({e}, {b - n[1]})", b)
    else:
        g.set(it, it.args[0], f"bfe_{t}({a}, {g.val(p, 32)}, {g.val(n, 32)})", b)


@instruction("bfi")
def bfi(g, it):
    b = TYPE_BITS[g.ty(it)]
    g.count("int_alu")
    a, bb, p, n = it.args[1:5]
    if p[0] == "i" and n[0] == "i":
        mk = (((1 << min(n[1], 64)) - 1) << p[1]) & ((1 << b) - 1)
        o = {32: "u", 64: "ull"}[b]
        g.set(
            it,
            it.args[0],
            f"or_{b}(and_{b}(shl_{b}i({g.val(a, b)}, {min(p[1], b - 1)}), {SPLAT[b]}({mk}{o})), "
            f"and_{b}({g.val(bb, b)}, {SPLAT[b]}({((1 << b) - 1) ^ mk}{o})))",
            b,
        )
    else:
        one = f"{SPLAT[b]}(1)"
        pv = g.tmpv(f"and_32({g.val(p, 32)}, splat32(255))", 32)
        nv = g.tmpv(f"and_32({g.val(n, 32)}, splat32(255))", 32)
        mk = g.tmpv(f"shl_{b}(sub_{b}(shl_{b}({one}, {nv}), {one}), {pv})", b)
        g.set(
            it,
            it.args[0],
            f"or_{b}(and_{b}(shl_{b}({g.val(a, b)}, {pv}), {mk}), "
            f"and_{b}({g.val(bb, b)}, not_{b}({mk})))",
            b,
        )


@instruction("popc", "clz", "brev")
def count_or_reverse_bits(g, it):
    n = it.op[0]
    t = g.ty(it)
    b = TYPE_BITS[t]
    g.count("int_alu")
    rb = 64 if (n == "brev" and b == 64) else 32
    g.set(it, it.args[0], f"{n}_{b}({g.val(it.args[1], b)})", rb)


@instruction("bfind")
def bfind(g, it):
    t = g.ty(it)
    b = TYPE_BITS[t]
    g.count("int_alu")
    e = f"bfind_{t}({g.val(it.args[1], b)})"
    if "shiftamt" in it.op:
        x = g.tmpv(e, 32)
        e = f"sel(eq_u32({x}, splat32(0xffffffffu)), {x}, sub_32(splat32({b - 1}), {x}))"
    g.set(it, it.args[0], e, 32)
