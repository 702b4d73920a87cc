"""Moves and conversions, of values and of addresses."""

from __future__ import annotations

from ..ptx import TYPE_BITS
from .operands import SPLAT
from .registers import register_bits
from .registry import instruction


@instruction("mov")
def mov(g, it):
    g.count("mov")
    t = g.ty(it)
    if t == "pred":
        g.set(it, it.args[0], g.val(it.args[1], 1), 1)
        return
    b = register_bits(t)
    g.set(it, it.args[0], g.val(it.args[1], b), b)


@instruction("cvt")
def cvt(g, it):
    ops = it.op
    # The types of destination and source; all other parts are modifiers.
    tys = [x for x in ops[1:] if x in TYPE_BITS]
    mods = [x for x in ops[1:] if x not in TYPE_BITS]
    if len(tys) != 2:
        g.bad(it)
    d, s = tys
    if (d[0] in "sub" and s[0] in "su" and not d.startswith("bf")) or (d == "f32" and s == "bf16"):
        g.count("int_alu")
    elif d in ("f16x2", "bf16x2") or (s == "f16" and d == "f32"):
        g.count("cvt_pack")
    else:
        g.count("cvt")
    if "pack" in mods:
        g.bad(it)
    ftz, sat, relu = "ftz" in mods, "sat" in mods, "relu" in mods
    A = it.args[1]
    if d in ("f16x2", "bf16x2") and s == "f32":
        h = d[:-2]
        a, b = g.val(A, 32), g.val(it.args[2], 32)
        if relu:
            a, b = f"fmax_32({a}, splat32(0))", f"fmax_32({b}, splat32(0))"
        if "rz" in mods:
            e = f"pack16(f32_to_{h}_rz({b}), f32_to_{h}_rz({a}))"
        elif h == "bf16":
            e = f"cvt_pack_bf16x2({a}, {b})"
        else:
            e = f"pack16(f32_to_f16({b}), f32_to_f16({a}))"
        return g.set(it, it.args[0], e, 32)
    if d in ("e4m3x2", "e5m2x2") and s == "f32":
        return g.set(it, it.args[0], f"f32x2_to_{d}({g.val(A, 32)}, {g.val(it.args[2], 32)})", 16)
    if d == "f16x2" and s in ("e4m3x2", "e5m2x2"):
        return g.set(it, it.args[0], f"{s}_to_f16x2({g.val(A, 16)})", 32)
    if d == "tf32":
        return g.set(it, it.args[0], f"f32_to_tf32({g.val(A, 32)})", 32)
    fl = {"f16", "bf16", "f32", "f64"}
    if d in fl and s in fl:
        return _float_to_float(g, it, d, s, mods, ftz, sat, relu)
    if d in fl:
        return _integer_to_float(g, it, d, s, mods, sat)
    if s in fl:
        return _float_to_integer(g, it, d, s, mods, ftz)
    _integer_to_integer(g, it, d, s, sat)
    return None


def _float_to_float(g, it, d, s, mods, ftz, sat, relu):
    x = g.val(it.args[1], TYPE_BITS[s])
    rint = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    # Convert the source to f32 or f64 first.
    if s == "f16":
        x, cb = f"f16_to_f32({x})", 32
    elif s == "bf16":
        x, cb = f"bf16_to_f32({x})", 32
    else:
        cb = TYPE_BITS[s]
        if s == "f32" and ftz:
            x = f"ftz_32({x})"
    if rint:
        x = f"{ {'rni': 'rint', 'rzi': 'trunc', 'rmi': 'floor', 'rpi': 'ceil'}[rint] }_{cb}({x})"
    if d == "f64":
        if cb == 32:
            x = f"f32_to_f64({x})"
        return g.set(it, it.args[0], x, 64)
    if cb == 64:
        if d == "f32":
            x = f"f64_to_f32{'_rz' if 'rz' in mods else ''}({x})"
            if "rm" in mods or "rp" in mods:
                g.bad(it, "unsupported rounding mode")
        else:
            x = f"f64_to_f32({x})"
    if sat:
        x = f"fsat_32({x})"
    if relu:
        x = f"fmax_32({x}, splat32(0))"
    if d == "f32":
        if ftz:
            x = f"ftz_32({x})"
        return g.set(it, it.args[0], x, 32)
    if "rm" in mods or "rp" in mods:
        g.bad(it, "unsupported rounding mode")
    g.set(it, it.args[0], f"f32_to_{d}{'_rz' if 'rz' in mods else ''}({x})", 16)
    return None


def _integer_operand(g, it, s, a, bits):
    """Return an integer operand of type `s`, extended to `bits` (32 or 64)."""
    sb = TYPE_BITS[s]
    sg = s[0] == "s"
    if sb == 8:
        x = g.val(a, 32)
        x = f"sext8({x})" if sg else f"and_32({x}, splat32(255))"
        sb = 32
    elif sb == 16:
        x = g.val(a, 16)
        x = f"widen_{'s' if sg else 'u'}({x})"
        sb = 32
    else:
        x = g.val(a, sb)
    if sb == 32 and bits == 64:
        x = f"widen_{'s' if sg else 'u'}({x})"
    if sb == 64 and bits == 32:
        x = f"narrow({x})"
    return x


def _integer_to_float(g, it, d, s, mods, sat):
    sb = 64 if TYPE_BITS[s] == 64 else 32
    x = _integer_operand(g, it, s, it.args[1], sb)
    st = s[0] + str(sb)
    if d == "f64":
        return g.set(it, it.args[0], f"cvt_f64_{st}({x})", 64)
    r = g.rounding(it)
    if d == "f32":
        return g.set(it, it.args[0], f"cvt_f32_{st}{'_' + r if r else ''}({x})", 32)
    # Convert to f32 first, which is exact for |x| < 2^24; larger values are rounded twice.
    g.set(it, it.args[0], f"f32_to_{d}(cvt_f32_{st}({x}))", 16)
    return None


def _float_to_integer(g, it, d, s, mods, ftz):
    x = g.val(it.args[1], TYPE_BITS[s])
    cb = 64 if s == "f64" else 32
    if s in ("f16", "bf16"):
        x = f"{s}_to_f32({x})"
    elif s == "f32" and ftz:
        x = f"ftz_32({x})"
    r = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), "rzi")
    x = f"{ {'rni': 'rint', 'rzi': 'trunc', 'rmi': 'floor', 'rpi': 'ceil'}[r] }_{cb}({x})"
    db = TYPE_BITS[d]
    dd = d if d[0] != "b" else "u" + d[1:]
    if cb == 64 and db < 32:
        x, cb = f"f64_to_f32({x})", 32
    g.set(it, it.args[0], f"f{cb}_{dd}({x})", max(16, db), signed=d[0] == "s")


def _integer_to_integer(g, it, d, s, sat):
    db, sb = TYPE_BITS[d], TYPE_BITS[s]
    wb = 64 if max(db, sb) == 64 else 32
    x = _integer_operand(g, it, s, it.args[1], wb)
    if sat:
        lo = {"s": -(1 << (db - 1)), "u": 0}[d[0]]
        hi = {"s": (1 << (db - 1)) - 1, "u": (1 << db) - 1}[d[0]]
        sg = s[0]
        slo = -(1 << (sb - 1)) if sg == "s" else 0
        shi = (1 << (sb - 1)) - 1 if sg == "s" else (1 << sb) - 1
        u = "ull" if wb == 64 else "u"
        if lo > slo:
            x = f"max_{sg}{wb}({x}, {SPLAT[wb]}({hex(lo & ((1 << wb) - 1))}{u}))"
        if hi < shi:
            x = f"min_{sg}{wb}({x}, {SPLAT[wb]}({hex(hi)}{u}))"
    # The destination register may be wider than the type: sign- or zero-extend.
    if db == 8:
        x = f"narrow({x})" if wb == 64 else x
        x = f"sext8({x})" if d[0] == "s" else f"and_32({x}, splat32(255))"
        return g.set(it, it.args[0], x, 32, signed=d[0] == "s")
    if db == 16:
        x = f"narrow(narrow({x}))" if wb == 64 else f"narrow({x})"
        return g.set(it, it.args[0], x, 16, signed=d[0] == "s")
    if db == 32 and wb == 64:
        x = f"narrow({x})"
    g.set(it, it.args[0], x, db, signed=d[0] == "s")
    return None


@instruction("cvta")
def cvta(g, it):
    g.count("mov")
    b = TYPE_BITS[g.ty(it)]
    x = g.val(it.args[1], b)
    sp = next(
        (
            o.split("::")[0]
            for o in it.op[1:]
            if o.split("::")[0] in ("shared", "local", "global", "const", "param")
        ),
        None,
    )
    if sp == "shared":
        x = (
            f"and_64({x}, splat64(0xffffffffull))"
            if "to" in it.op
            else f"or_64({x}, splat64(SHWIN))"
        )
    elif sp == "local":
        x = (
            f"and_64({x}, splat64(0xffffffffull))"
            if "to" in it.op
            else f"or_64({x}, splat64(LOWIN))"
        )
    elif sp == "param" and "to" not in it.op:
        t = g.tmpv(x, 64)
        x = f"add_64({t}, sel(lt_u64({t}, splat64(65536)), splat64((u64)c.params), splat64(0)))"
    g.set(it, it.args[0], x, b)


@instruction("isspacep")
def isspacep(g, it):
    x = g.tmpv(g.val(it.args[1], 64), 64)
    sp = it.op[1].split("::")[0]
    hi = f"shr_u64i({x}, 36)"
    e = {
        "shared": f"eq_u64({hi}, splat64(SHWIN >> 36))",
        "local": f"eq_u64({hi}, splat64(LOWIN >> 36))",
        "global": f"(ne_u64({hi}, splat64(SHWIN >> 36)) & ne_u64({hi}, splat64(LOWIN >> 36)))",
    }.get(sp, "0u")
    g.set(it, it.args[0], e, 1)
