"""Matrix instructions: ldmatrix, stmatrix, mma, wmma, wgmma."""

from __future__ import annotations

import re

from ..ptx import TYPE_BITS
from .operands import elements
from .registers import registers_of
from .registry import instruction

# Numbers of the operand formats in the runtime.
MMA_FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "s8": 3, "u8": 3}
WGMMA_FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4}


def _shape(it):
    """Return (m, n, k) of an instruction."""
    shape = next(x for x in it.op if re.fullmatch(r"m\d+n\d+k\d+", x))
    return tuple(int(x) for x in re.findall(r"\d+", shape))


def _set_all(g, it, dst, t, bits=32):
    """Assign the elements of array `t` to the elements of a destination."""
    for j, d in enumerate(elements(dst)):
        g.set(it, d, f"{t}[{j}]", bits)


def _matrices(it):
    return {"x1": 1, "x2": 2, "x4": 4}[next(x for x in it.op if x in ("x1", "x2", "x4"))]


@instruction("ldmatrix")
def ldmatrix(g, it):
    n, transposed = _matrices(it), int("trans" in it.op)
    if "m8n8" not in it.op or it.op[-1] != "b16":
        g.bad(it)
    g.count("ldmatrix")
    address, t = g.address(it.args[1], 32), g.newtmp()
    load = g.call(it, "rt_ldmatrix", address, n, transposed, t, site="ldmatrix")
    g.o.append(f"  V32 {t}[{n}]; {load};")
    _set_all(g, it, it.args[0], t)


@instruction("stmatrix")
def stmatrix(g, it):
    n, transposed = _matrices(it), int("trans" in it.op)
    if "m8n8" not in it.op:
        g.bad(it)
    g.count("st_shared")
    address, t = g.address(it.args[0], 32), g.newtmp()
    store = g.call(it, "rt_stmatrix", address, n, transposed, t, site="st_shared")
    g.o.append(f"  V32 {t}[{n}] = {{{g.vals(elements(it.args[1]), 32)}}}; {store};")


@instruction("mma")
def mma(g, it):
    op = it.op
    m, n, k = _shape(it)
    types = [x for x in op if x in TYPE_BITS and x != "b1"]
    if "sp" in op or any(x.startswith("sp::") for x in op):
        g.bad(it, "unsupported sparse mma")
    d_type, a_type, b_type, c_type = types[-4:]
    g.count("mma")
    g.flops += 2 * m * n * k
    # The cost of one FLOP relative to f16 and bf16 on sm_80's tensor cores.
    weight = {"tf32": 2.0, "f64": 16.0, "s8": 0.5, "u8": 0.5}.get(a_type, 1.0)
    g.weighted_flops += 2 * m * n * k * weight
    d, a, b, c = map(elements, it.args[:4])
    t = g.newtmp()
    if (m, n, k) == (8, 8, 4) and a_type == "f64":
        g.o.append(
            f"  V64 {t}[2], {t}c[2] = {{{g.vals(c, 64)}}}; "
            f"V64 {t}a = {g.val(a[0], 64)}, {t}b = {g.val(b[0], 64)}; "
            f"{g.call(it, 'rt_mma_f64', t, f'&{t}a', f'&{t}b', f'{t}c')};"
        )
        _set_all(g, it, it.args[0], t, 64)
        return
    per_register = {"f16": 8, "bf16": 8, "tf32": 4, "s8": 16, "u8": 16}.get(a_type)
    if (m, n) != (16, 8) or per_register is None or k not in (per_register, 2 * per_register):
        g.bad(it)
    halves = k // per_register
    flags = (a_type == "u8") | (b_type == "u8") << 1 | ("satfinite" in op) << 2
    in_half = c_type == "f16"
    if (d_type == "f16") != in_half:
        g.bad(it)
    results = 2 if in_half else 4
    if [*map(len, (a, b, c, d))] != [2 * halves, halves, results, results]:
        g.bad(it, "unexpected fragment size")
    arrays = t, f"{t}a", f"{t}b", f"{t}c"
    product = g.call(it, "rt_mma", MMA_FORMATS[a_type], halves, int(in_half), int(flags), *arrays)
    g.o.append(
        f"  V32 {t}[{results}], {t}a[] = {{{g.vals(a, 32)}}}, {t}b[] = {{{g.vals(b, 32)}}}, "
        f"{t}c[] = {{{g.vals(c, 32)}}}; {product};"
    )
    _set_all(g, it, it.args[0], t)


@instruction("wmma")
def wmma(g, it):
    kind = it.op[1]
    if kind == "mma":
        _wmma_product(g, it)
    elif kind in ("load", "store"):
        _wmma_access(g, it, kind)
    else:
        g.bad(it)


def _wmma_product(g, it):
    m, n, k = _shape(it)
    t = g.newtmp()
    types = [x for x in it.op[2:] if x in TYPE_BITS]
    # f16: wmma.mma.{dtype}.{ctype}; other types: wmma.mma.f32.{atype}.{btype}.f32
    if len(types) == 2:
        d_type, a_type, c_type = types[0], "f16", types[1]
    else:
        d_type, a_type, c_type = types[0], types[1], types[3]
    if a_type not in ("f16", "bf16", "tf32") or d_type not in ("f32", "f16"):
        g.bad(it)
    g.count("mma", m * n * k // 2048)
    g.flops += 2 * m * n * k
    g.weighted_flops += 2 * m * n * k * (2.0 if a_type == "tf32" else 1.0)
    d, a, b, c = map(elements, it.args[:4])
    product = g.call(
        it,
        "rt_wmma",
        *(MMA_FORMATS[a_type], m, n, k, len(a), len(b)),
        *(int(c_type == "f16"), int(d_type == "f16")),
        *(f"{t}a", f"{t}b", f"{t}c", t),
    )
    g.o.append(
        f"  V32 {t}[{len(d)}], {t}a[] = {{{g.vals(a, 32)}}}, {t}b[] = {{{g.vals(b, 32)}}}, "
        f"{t}c[] = {{{g.vals(c, 32)}}}; {product};"
    )
    _set_all(g, it, it.args[0], t)


def _wmma_access(g, it, kind):
    m, n, k = _shape(it)
    t = g.newtmp()
    if it.op[-1] not in ("f16", "bf16", "tf32", "f32"):
        g.bad(it)
    spaces = [x.split("::")[0] for x in it.op]
    space = next((x for x in spaces if x in ("global", "shared")), "generic")
    rows, columns = {"a": (m, k), "b": (k, n), "c": (m, n), "d": (m, n)}[it.op[2]]
    row_major = int(next(x for x in it.op if x in ("row", "col")) == "row")
    counted = "shared" if space == "shared" else "global"
    cls = f"{'ld' if kind == 'load' else 'st'}_{counted}"
    g.count(cls)
    is_load = kind == "load"
    memory, fragment = (it.args[1], it.args[0]) if is_load else (it.args[0], it.args[1])
    registers = elements(fragment)
    stride = f"splat32({columns if row_major else rows})"
    if len(it.args) > 2:
        stride = g.val(it.args[2], 32)
    access = g.call(
        it,
        "rt_wmma_ld" if is_load else "rt_wmma_st",
        *(f"SP_{space.upper()}", g.address(memory, 64), stride, rows, columns, row_major),
        *(TYPE_BITS[it.op[-1]] // 8, len(registers), t),
        site=cls,
    )
    if is_load:
        g.o.append(f"  V32 {t}[{len(registers)}]; {access};")
        _set_all(g, it, fragment, t)
    else:
        g.o.append(f"  V32 {t}[] = {{{g.vals(registers, 32)}}}; {access};")


@instruction("wgmma")
def wgmma(g, it):
    op, a = it.op, it.args
    if op[1] == "fence":
        g.count("fence")
        return
    if op[1] == "commit_group":
        g.o.append(f"  {g.call(it, 'rt_wgcommit')};")
        return
    if op[1] != "mma_async" or "sp" in op:
        g.bad(it)
    m, n, k = _shape(it)
    shape = f"m{m}n{n}k{k}"
    d_type, a_type, b_type = op[op.index(shape) + 1 :][:3]
    fmt = WGMMA_FORMATS.get(a_type)
    if (
        fmt is None
        or d_type not in ("f32", "f16")
        or m != 64
        or n % 8
        or not 8 <= n <= 256
        or k * (2 if fmt < 2 else 4 if fmt == 2 else 1) != 32
    ):
        g.bad(it)
    if a_type != b_type:
        g.bad(it, "unsupported wgmma with different operand types")
    accumulator = registers_of(a[0])
    if len(accumulator) != n // (2 if d_type == "f32" else 4):
        g.bad(it, "unexpected number of accumulator registers")
    a_in_registers = a[1][0] == "v"
    immediates = [x[1] for x in a[4:]]
    signs = immediates[:2] if len(immediates) > 1 else [1, 1]
    transposed = [0, 0]
    if fmt < 2 and len(immediates) > 2:
        transposed = [0, immediates[2]] if a_in_registers else immediates[2:4]
    g.count("wgmma")
    flops = 2 * 16 * n * k  # of one warp: a quarter of the warpgroup's FLOPs
    g.flops += flops
    # The model uses the rate of mma.sync, which is 62 % of the wgmma rate.
    g.weighted_flops += flops * (2.0 if fmt == 2 else 0.5 if fmt > 2 else 1.0) * 0.62
    t = g.newtmp()
    offsets = ", ".join(f"__builtin_offsetof(W, {g.names[r]})" for r in accumulator)
    fields = [
        *(fmt, n, len(accumulator), int(a_in_registers), *transposed, *signs),
        *(int(d_type == "f16"), it.line, int(it in g.unfenced)),
    ]
    g.o.append(
        f"  static const u32 {t}d[] = {{{offsets}}}; "
        f"static const Wg {t}g = {{{', '.join(map(str, fields))}}};"
    )
    if a_in_registers:
        g.o.append(f"  V32 {t}a[4] = {{{g.vals(a[1][1], 32)}}};")
    else:
        g.o.append(f"  V64 {t}x = {g.val(a[1], 64)};")
    sources = (f"{t}a", "nullptr") if a_in_registers else ("nullptr", f"&{t}x")
    args = [f"{t}g", f"{t}d", *sources, g.val(a[2], 64), g.val(a[3], 1)]
    g.o.append(f"  rt_wgmma(c, wb, {g.mask(it)}, {', '.join(args)});")
