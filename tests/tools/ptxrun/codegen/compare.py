"""Comparisons and selections."""

from __future__ import annotations

from ..ptx import TYPE_BITS
from .operands import SPLAT
from .registers import register_bits
from .registry import instruction

# Comparisons that are true for unordered operands, and their ordered forms.
CMPU = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def _compare(g, it, op, t, a, b):
    if t in ("f16", "bf16"):
        cv = "f16_to_f32" if t == "f16" else "bf16_to_f32"
        x, y, ty = f"{cv}({g.val(a, 16)})", f"{cv}({g.val(b, 16)})", "f32"
    elif t == "pred":
        g.bad(it)
    else:
        bb = TYPE_BITS[t]
        x, y = g.val(a, bb), g.val(b, bb)
        ty = t if t[0] != "b" else f"u{bb}"
        if t == "f32" and "ftz" in it.op:
            x, y = f"ftz_32({x})", f"ftz_32({y})"
    if ty[0] == "f":
        if op == "num":
            return f"(~nan_{ty}({x}, {y}))"
        if op == "nan":
            return f"nan_{ty}({x}, {y})"
        if op in CMPU:
            base = CMPU[op]
            fb = 64 if ty == "f64" else 32
            X, Y = g.tmpv(x, fb), g.tmpv(y, fb)
            return f"({base}_{ty}({X}, {Y}) | nan_{ty}({X}, {Y}))"
        if op == "ne":
            fb = 64 if ty == "f64" else 32
            X, Y = g.tmpv(x, fb), g.tmpv(y, fb)
            return f"(ne_{ty}({X}, {Y}) & ~nan_{ty}({X}, {Y}))"
    else:
        op = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(op, op)
    return f"{op}_{ty}({x}, {y})"


@instruction("setp")
def setp(g, it):
    g.count("setp_sel")
    t = g.ty(it)
    op = it.op[1]
    bop = next((x for x in it.op[2:-1] if x in ("and", "or", "xor")), None)
    e = _compare(g, it, op, t, it.args[1], it.args[2])
    dst = it.args[0]
    third = g.val(it.args[3], 1) if bop else None
    c = {"and": "&", "or": "|", "xor": "^", None: None}[bop]
    if t in ("f16x2", "bf16x2"):
        g.bad(it)
    if dst[0] == "pp":
        x = g.tmpv(e, 1)
        if dst[1][0] != "_":
            g.set(it, dst[1], f"({x} {c} {third})" if c else x, 1)
        if dst[2][0] != "_":
            g.set(it, dst[2], f"(~{x} {c} {third})" if c else f"(~{x})", 1)
    else:
        g.set(it, dst, f"({e} {c} {third})" if c else e, 1)


@instruction("set")
def set_predicate(g, it):
    g.count("setp_sel")
    # set.CmpOp{.BoolOp}{.ftz}.dtype.stype
    t, dt = it.op[-1], it.op[-2]
    bop = next((x for x in it.op[2:-2] if x in ("and", "or", "xor")), None)
    if t in ("f16x2", "bf16x2") and dt in ("f16x2", "bf16x2", "u32", "s32"):
        h = t[:-2]
        a, b = g.tmpv(g.val(it.args[1], 32), 32), g.tmpv(g.val(it.args[2], 32), 32)
        cv = f"{h}_to_f32"
        parts = []
        for half in ("lo16", "hi16"):
            x, y = g.tmpv(f"{cv}({half}({a}))", 32), g.tmpv(f"{cv}({half}({b}))", 32)
            op = it.op[1]
            base = CMPU.get(op)
            if base:
                e = f"({base}_f32({x}, {y}) | nan_f32({x}, {y}))"
            elif op == "ne":
                e = f"(ne_f32({x}, {y}) & ~nan_f32({x}, {y}))"
            elif op == "nan":
                e = f"nan_f32({x}, {y})"
            elif op == "num":
                e = f"(~nan_f32({x}, {y}))"
            else:
                e = f"{op}_f32({x}, {y})"
            one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)
            parts.append(f"sel({e}, splat16({one}), splat16(0))")
        return g.set(it, it.args[0], f"pack16({parts[0]}, {parts[1]})", 32)
    e = _compare(g, it, it.op[1], t, it.args[1], it.args[2])
    if bop:
        e = f"({e} { {'and': '&', 'or': '|', 'xor': '^'}[bop] } {g.val(it.args[3], 1)})"
    b = TYPE_BITS[dt]
    one = {"f32": "0x3f800000u", "f16": "0x3c00", "bf16": "0x3f80"}.get(
        dt, "0xffffffffu" if b == 32 else "0xffff"
    )
    g.set(it, it.args[0], f"sel({e}, {SPLAT[b]}({one}), {SPLAT[b]}(0))", b)
    return None


@instruction("selp")
def selp(g, it):
    g.count("setp_sel")
    t = g.ty(it)
    b = register_bits(t)
    g.set(
        it,
        it.args[0],
        f"sel({g.val(it.args[3], 1)}, {g.val(it.args[1], b)}, {g.val(it.args[2], b)})",
        b,
    )


@instruction("slct")
def slct(g, it):
    g.count("setp_sel")
    b = TYPE_BITS[it.op[-2]]
    c = (
        f"ge_s32({g.val(it.args[3], 32)}, splat32(0))"
        if it.op[-1] == "s32"
        else f"ge_f32({g.val(it.args[3], 32)}, splat32(0))"
    )
    g.set(it, it.args[0], f"sel({c}, {g.val(it.args[1], b)}, {g.val(it.args[2], b)})", b)


@instruction("testp")
def testp(g, it):
    g.count("setp_sel")
    x = g.tmpv(g.val(it.args[1], 32), 32)
    if g.ty(it) != "f32":
        g.bad(it)
    a = f"and_32({x}, splat32(0x7fffffffu))"
    e = {
        "finite": f"lt_u32({a}, splat32(0x7f800000u))",
        "infinite": f"eq_u32({a}, splat32(0x7f800000u))",
        "notanumber": f"gt_u32({a}, splat32(0x7f800000u))",
        "number": f"le_u32({a}, splat32(0x7f800000u))",
    }.get(it.op[1])
    if e is None:
        g.bad(it)
    g.set(it, it.args[0], e, 1)
