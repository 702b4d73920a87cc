"""Arithmetic instructions: add, multiply, divide, fma, min, max, approximate functions."""

from __future__ import annotations

from ..ptx import TYPE_BITS
from .operands import SPLAT
from .registry import instruction


def integer_binary(g, it, name, cls="int_alu"):
    t = g.ty(it)
    b = TYPE_BITS[t]
    g.count(cls)
    g.set(it, it.args[0], f"{name}_{b}({g.vals(it.args[1:3], b)})", b)


def _f32_result(g, it, e):
    if "sat" in it.op:
        e = f"fsat_32({e})"
    if "ftz" in it.op:
        e = f"ftz_32({e})"
    return e


def _f32_operand(g, it, o):
    e = g.val(o, 32)
    return f"ftz_32({e})" if "ftz" in it.op else e


def _float_binary(g, it, name):
    t = g.ty(it)
    a, b = it.args[1], it.args[2]
    if t == "f32":
        g.count("fp32_add_mul")
        r = g.rounding(it)
        fn = f"f{name}_{r}" if r else f"f{name}_32"
        g.set(
            it,
            it.args[0],
            _f32_result(g, it, f"{fn}({_f32_operand(g, it, a)}, {_f32_operand(g, it, b)})"),
            32,
        )
    elif t == "f64":
        if g.rounding(it):
            g.bad(it)
        g.count("fp64")
        g.set(it, it.args[0], f"f{name}_64({g.val(a, 64)}, {g.val(b, 64)})", 64)
    elif t in ("f16", "bf16"):
        g.count("fp16")
        g.set(
            it,
            it.args[0],
            _half_saturate(g, it, t, f"h{name}_{t}({g.val(a, 16)}, {g.val(b, 16)})"),
            16,
        )
    elif t in ("f16x2", "bf16x2"):
        g.count("fp16")
        _half_pair(g, it, f"h{name}_{t[:-2]}", [a, b], t[:-2])
    else:
        g.bad(it)


def _half_saturate(g, it, t, e):
    if "relu" in it.op:
        e = f"hmax_{t}({e}, splat16(0))"
    if "sat" in it.op:
        one = 0x3C00 if t == "f16" else 0x3F80
        e = f"hmin_{t}(hmax_{t}({e}, splat16(0)), splat16({one}))"
    return e


def _half_pair(g, it, fn, ops, t):
    v = [g.tmpv(g.val(o, 32), 32) for o in ops]
    lo = _half_saturate(g, it, t, f"{fn}({', '.join(f'lo16({x})' for x in v)})")
    hi = _half_saturate(g, it, t, f"{fn}({', '.join(f'hi16({x})' for x in v)})")
    g.set(it, it.args[0], f"pack16({lo}, {hi})", 32)


def _integer_sum(g, it, name):
    """Translate an integer add or sub: plain, saturating or with carry."""
    if "cc" in it.op:
        return carry(g, it)
    if "sat" in it.op:
        g.count("int_alu")
        return g.set(it, it.args[0], f"{name}sat_s32({g.vals(it.args[1:3], 32)})", 32)
    integer_binary(g, it, name)
    return None


@instruction("add")
def add(g, it):
    t = g.ty(it)
    if "f" in t and t[0] in "fb" and t[:2] != "b1" and t not in ("b32", "b64", "b16"):
        return _float_binary(g, it, "add")
    return _integer_sum(g, it, "add")


@instruction("sub")
def sub(g, it):
    t = g.ty(it)
    if t in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        return _float_binary(g, it, "sub")
    return _integer_sum(g, it, "sub")


@instruction("addc", "subc", "madc")
def carry(g, it):
    """Translate add, sub and mad with carry in, carry out, or both."""
    o = it.op[0]
    b = TYPE_BITS[g.ty(it)]
    sub = o.startswith("sub")
    g.count("int_mul" if o.startswith("mad") else "int_alu")
    if o.startswith("mad"):
        fn = f"mulhi_u{b}" if "hi" in it.op else f"mul_{b}"
        if "hi" in it.op and g.ty(it)[0] == "s":
            fn = f"mulhi_s{b}"
        x = g.tmpv(f"{fn}({g.vals(it.args[1:3], b)})", b)
        y = g.tmpv(g.val(it.args[3], b), b)
    else:
        x, y = g.tmpv(g.val(it.args[1], b), b), g.tmpv(g.val(it.args[2], b), b)
    cin = o in ("addc", "subc", "madc")
    cc = g.names["#cc"]
    z = g.tmpv(f"{'sub' if sub else 'add'}_{b}({x}, {y})", b)
    if cin:
        z2 = g.tmpv(
            f"{'sub' if sub else 'add'}_{b}({z}, sel({cc}, {SPLAT[b]}(1), {SPLAT[b]}(0)))", b
        )
    else:
        z2 = z
    if "cc" in it.op:
        c = f"lt_u{b}({x}, {y})" if sub else f"lt_u{b}({z}, {x})"
        if cin:
            c = (
                f"({c} | ({cc} & "
                + (f"eq_u{b}({z}, {SPLAT[b]}(0))" if sub else f"eq_u{b}({z2}, {SPLAT[b]}(0))")
                + "))"
            )
        n = g.tmpv(c, 1)
        g.o.append(f"  {cc} = " + (f"sel({g.pred(it)}, {n}, {cc})" if it.pred else n) + ";")
    g.set(it, it.args[0], z2, b)


@instruction("mul")
def mul(g, it):
    t = g.ty(it)
    if t in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        return _float_binary(g, it, "mul")
    b = TYPE_BITS[t]
    g.count("int_mul")
    A, B = it.args[1], it.args[2]
    if "wide" in it.op:
        g.set(it, it.args[0], f"mulw_{t}({g.val(A, b)}, {g.val(B, b)})", 2 * b)
    elif "hi" in it.op:
        g.set(it, it.args[0], f"mulhi_{t}({g.val(A, b)}, {g.val(B, b)})", b)
    else:
        g.set(it, it.args[0], f"mul_{b}({g.val(A, b)}, {g.val(B, b)})", b)
    return None


@instruction("mul24")
def mul24(g, it):
    if "lo" not in it.op:
        g.bad(it)
    g.count("int_mul")
    t = g.ty(it)
    g.set(it, it.args[0], f"mul24_{t}({g.vals(it.args[1:3], 32)})", 32)


@instruction("mad")
def mad(g, it):
    t = g.ty(it)
    if t in ("f32", "f64"):
        return fma(g, it)
    b = TYPE_BITS[t]
    g.count("int_mul")
    A, B, C = it.args[1:4]
    if "cc" in it.op:
        return carry(g, it)
    if "wide" in it.op:
        g.set(
            it,
            it.args[0],
            f"add_{2 * b}(mulw_{t}({g.val(A, b)}, {g.val(B, b)}), {g.val(C, 2 * b)})",
            2 * b,
        )
    elif "hi" in it.op:
        g.set(
            it,
            it.args[0],
            f"add_{b}(mulhi_{t}({g.val(A, b)}, {g.val(B, b)}), {g.val(C, b)})",
            b,
        )
    else:
        g.set(
            it,
            it.args[0],
            f"add_{b}(mul_{b}({g.val(A, b)}, {g.val(B, b)}), {g.val(C, b)})",
            b,
        )
    return None


@instruction("fma")
def fma(g, it):
    t = g.ty(it)
    ops = it.args[1:4]
    if t == "f32":
        g.count("fp32_fma")
        r = g.rounding(it)
        fn = f"ffma_{r}" if r else "ffma_32"
        e = f"{fn}({', '.join(_f32_operand(g, it, o) for o in ops)})"
        g.set(it, it.args[0], _f32_result(g, it, e), 32)
    elif t == "f64":
        g.count("fp64")
        g.set(it, it.args[0], f"ffma_64({g.vals(ops, 64)})", 64)
    elif t in ("f16", "bf16"):
        g.count("fp16")
        g.set(
            it,
            it.args[0],
            _half_saturate(g, it, t, f"hfma_{t}({g.vals(ops, 16)})"),
            16,
        )
    elif t in ("f16x2", "bf16x2"):
        g.count("fp16")
        _half_pair(g, it, f"hfma_{t[:-2]}", ops, t[:-2])
    else:
        g.bad(it)


@instruction("div")
def div(g, it):
    t = g.ty(it)
    if t == "f32":
        g.count("mufu")
        g.count("fp32_add_mul", 2 if "full" in it.op or "approx" in it.op else 8)
        a, b = (_f32_operand(g, it, x) for x in it.args[1:3])
        e = f"fdiv_{g.rounding(it) or '32'}({a}, {b})"
        g.set(it, it.args[0], _f32_result(g, it, e), 32)
    elif t == "f64":
        g.count("fp64", 10)
        g.set(
            it,
            it.args[0],
            f"fdiv_64({g.vals(it.args[1:3], 64)})",
            64,
        )
    else:
        b = TYPE_BITS[t]
        g.count("int_alu", 20)
        g.set(it, it.args[0], f"div_{t}({g.vals(it.args[1:3], b)})", b)


@instruction("rem")
def rem(g, it):
    t = g.ty(it)
    b = TYPE_BITS[t]
    g.count("int_alu", 20)
    g.set(it, it.args[0], f"rem_{t}({g.vals(it.args[1:3], b)})", b)


@instruction("min", "max")
def min_max(g, it):
    n = it.op[0]
    t = g.ty(it)
    A = it.args[1:]
    nan = "nan" if "NaN" in it.op else ""
    if "xorsign" in it.op:
        g.bad(it)
    if t == "f32":
        g.count("fp32_other")
        e = f"f{n}{nan}_32({_f32_operand(g, it, A[0])}, {_f32_operand(g, it, A[1])})"
        for x in A[2:]:
            e = f"f{n}{nan}_32({e}, {_f32_operand(g, it, x)})"
        g.set(it, it.args[0], e, 32)
    elif t == "f64":
        g.count("fp64")
        g.set(it, it.args[0], f"f{n}_64({g.val(A[0], 64)}, {g.val(A[1], 64)})", 64)
    elif t in ("f16", "bf16"):
        g.count("fp16")
        g.set(it, it.args[0], f"h{n}{nan}_{t}({g.val(A[0], 16)}, {g.val(A[1], 16)})", 16)
    elif t in ("f16x2", "bf16x2"):
        g.count("fp16")
        _half_pair(g, it, f"h{n}{nan}_{t[:-2]}", A, t[:-2])
    else:
        b = TYPE_BITS[t]
        g.count("int_alu")
        e = f"{n}_{t}({g.val(A[0], b)}, {g.val(A[1], b)})"
        if "relu" in it.op:
            e = f"max_s32({e}, splat32(0))"
        g.set(it, it.args[0], e, b)


@instruction("neg", "abs")
def negate_or_abs(g, it):
    n = it.op[0]
    t = g.ty(it)
    if t in ("f32", "f64"):
        g.count("fp32_add_mul")
        b = TYPE_BITS[t]
        e = f"f{n}_{b}({_f32_operand(g, it, it.args[1]) if b == 32 else g.val(it.args[1], b)})"
        g.set(it, it.args[0], e, b)
    elif t in ("f16", "bf16"):
        g.count("fp16")
        g.set(it, it.args[0], f"f{n}_16({g.val(it.args[1], 16)})", 16)
    elif t in ("f16x2", "bf16x2"):
        g.count("fp16")
        g.set(it, it.args[0], f"f{n}_16x2({g.val(it.args[1], 32)})", 32)
    else:
        b = TYPE_BITS[t]
        g.count("int_alu")
        g.set(it, it.args[0], f"{n}_{b}({g.val(it.args[1], b)})", b)


@instruction("copysign")
def copysign(g, it):
    b = TYPE_BITS[g.ty(it)]
    g.count("fp32_other")
    g.set(it, it.args[0], f"copysign_{b}({g.vals(it.args[1:3], b)})", b)


@instruction("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
def approximate(g, it):
    n = it.op[0]
    t = g.ty(it)
    if t == "f32":
        g.count("mufu")
        if "rn" in it.op:
            g.count("fp32_add_mul", 6)
        g.set(it, it.args[0], _f32_result(g, it, f"{n}_32({_f32_operand(g, it, it.args[1])})"), 32)
    elif t == "f64":
        g.count("fp64", 8)
        g.set(it, it.args[0], f"{n}_64({g.val(it.args[1], 64)})", 64)
    elif t in ("f16", "bf16"):
        g.count("mufu")
        a, z = ("f16_to_f32", "f32_to_f16") if t == "f16" else ("bf16_to_f32", "f32_to_bf16")
        g.set(it, it.args[0], f"{z}({n}_32({a}({g.val(it.args[1], 16)})))", 16)
    elif t in ("f16x2", "bf16x2"):
        g.count("mufu", 2)
        a, z = ("f16_to_f32", "f32_to_f16") if t == "f16x2" else ("bf16_to_f32", "f32_to_bf16")
        x = g.tmpv(g.val(it.args[1], 32), 32)
        g.set(
            it,
            it.args[0],
            f"pack16({z}({n}_32({a}(lo16({x})))), {z}({n}_32({a}(hi16({x})))))",
            32,
        )
    else:
        g.bad(it)


@instruction("sad")
def sad(g, it):
    g.count("int_alu")
    g.set(
        it,
        it.args[0],
        f"sad_{g.ty(it)}({g.vals(it.args[1:4], 32)})",
        32,
    )


@instruction("dp4a")
def dp4a(g, it):
    g.count("int_mul")
    g.set(
        it,
        it.args[0],
        f"dp4a_{it.op[1][0]}{it.op[2][0]}({g.vals(it.args[1:4], 32)})",
        32,
    )
