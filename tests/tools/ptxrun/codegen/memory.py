"""Loads, stores, asynchronous copies and atomics."""

from __future__ import annotations

from ..ptx import TYPE_BITS
from .hopper import bulk_copy
from .operands import CXX, SPLAT, elements
from .registry import instruction

ORDERED = {"acquire", "release", "relaxed", "volatile", "mmio"}
ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _space_vector_type(it):
    """Return (state space, elements of a vector, type) of an access."""
    space, vector, kind = "generic", 1, None
    for x in it.op[1:]:
        head = x.split("::")[0]
        if head in ("global", "shared", "local", "param", "const"):
            space = head  # also of shared::cluster: a cluster has one block
        elif x in ("v2", "v4", "v8"):
            vector = int(x[1:])
        elif x in TYPE_BITS:
            kind = x
    return space, vector, kind


def _space_and_address(g, space, m):
    """Return (state space, "base, offset") of a memory operand."""
    if space in ("global", "const"):
        return "global", g.address(m, 64)
    if space in ("shared", "local"):
        return space, g.address(m, 32)
    if m[1][0] == "s" and m[1][1] in g.shared:
        return "shared", g.address(m, 32)
    return "generic", g.address(m, 64)


def _loaded(x, kind):
    """Return the register value of a loaded value: s8 is sign-extended to 16 bits."""
    return f"shr_s16i(shl_16i({x}, 8), 8)" if kind == "s8" else x


def _ordered(it):
    """Return the flag VOL for a volatile or synchronizing access."""
    return "" if ORDERED.isdisjoint(it.op) else " | VOL"


def _class(prefix, space):
    return f"{prefix}_{'global' if space == 'generic' else space}"


@instruction("ld", "ldu")
def load(g, it):
    space, vector, kind = _space_vector_type(it)
    if kind is None or TYPE_BITS[kind] == 128:
        g.bad(it)
    if space == "param":
        _load_param(g, it, kind)
        return
    bits = max(16, TYPE_BITS[kind])
    space, address = _space_and_address(g, space, it.args[1])
    cls = _class("ld", space)
    g.count(cls)
    t = g.newtmp()
    function = f"ld_{space}<{TYPE_BITS[kind] // 8}, {vector}>"
    access = g.call(it, function, address, t, line=_ordered(it), site=cls)
    g.o.append(f"  {CXX[bits]} {t}[{vector}]; {access};")
    for j, d in enumerate(elements(it.args[0])):
        if d[0] != "_":
            g.set(it, d, _loaded(f"{t}[{j}]", kind), bits, signed=kind[0] == "s")


def _load_param(g, it, kind):
    """Translate a load from the parameters of the kernel."""
    m, size = it.args[1], TYPE_BITS[kind] // 8
    bits = max(16, TYPE_BITS[kind])
    g.count("mov")
    for j, d in enumerate(elements(it.args[0])):
        if d[0] == "_":
            continue
        if m[1][0] == "s":
            offset = g.params[m[1][1]][0] + m[2] + j * size
            value = f"{SPLAT[bits]}(*(const u{8 * size}*)(c.params + {offset}))"
        else:
            value, base = g.newtmp(), g.val(m[1], 64)
            function, offset = f"ld_global<{size}, 1>", m[2] + j * size
            access = g.call(it, function, base, offset, f"&{value}", site="other")
            g.o.append(f"  {CXX[bits]} {value}; {access};")
        g.set(it, d, _loaded(value, kind), bits, signed=kind[0] == "s")


def _call_param(m, kind, j):
    """Return the pseudo register of element `j` of a call parameter."""
    return ("r", f"#{m[1][1]}@{m[2] + j * TYPE_BITS[kind] // 8}")


@instruction("$ldp")
def load_call_param(g, it):
    g.count("mov")
    kind = it.op[-1]
    bits = max(16, TYPE_BITS[kind])
    for j, d in enumerate(elements(it.args[0])):
        value = g.val(_call_param(it.args[1], kind, j), bits)
        g.set(it, d, _loaded(value, kind), bits, signed=kind[0] == "s")


@instruction("$stp")
def store_call_param(g, it):
    g.count("mov")
    kind = it.op[-1]
    bits = max(16, TYPE_BITS[kind])
    for j, x in enumerate(elements(it.args[1])):
        g.set(it, _call_param(it.args[0], kind, j), g.val(x, bits), bits)


@instruction("st")
def store(g, it):
    space, vector, kind = _space_vector_type(it)
    if kind is None or TYPE_BITS[kind] == 128 or space == "param":
        g.bad(it)
    bits = max(16, TYPE_BITS[kind])
    space, address = _space_and_address(g, space, it.args[0])
    values = elements(it.args[1]) if vector > 1 else [it.args[1]]
    t, cls = g.newtmp(), _class("st", space)
    g.count(cls)
    function = f"st_{space}<{TYPE_BITS[kind] // 8}, {vector}>"
    access = g.call(it, function, address, t, line=_ordered(it), site=cls)
    g.o.append(f"  {CXX[bits]} {t}[{vector}] = {{{g.vals(values, bits)}}}; {access};")


@instruction("cp")
def copy_async(g, it):
    op = it.op
    if "bulk" in op:
        bulk_copy(g, it)
        return
    if op[1] != "async":
        g.bad(it)
    if op[2] == "mbarrier":  # complete the thread's copies now, then arrive
        g.o.append(f"  {g.call(it, 'rt_cpwait', -1)};")
        if "noinc" in op:
            address = g.address(it.args[0], 32)
            g.o.append(f"  {g.call(it, 'rt_mbar', 2, address, 'nullptr', 'nullptr')};")
    elif "commit_group" in op:
        g.o.append(f"  rt_cpcommit(c, wb, {g.mask(it)});")
    elif "wait_group" in op:
        g.o.append(f"  {g.call(it, 'rt_cpwait', it.args[0][1])};")
    elif "wait_all" in op:
        g.o.append(f"  {g.call(it, 'rt_cpwait', -1)};")
    elif op[2] in ("ca", "cg"):
        _copy(g, it)
    else:
        g.bad(it)


def _copy(g, it):
    """Translate the copy of 4, 8 or 16 bytes per lane from global to shared memory."""
    g.count("cp_async")
    to, source = g.address(it.args[0], 32), g.address(it.args[1], 64)
    count = it.args[2][1]
    extra = it.args[3:]
    if extra and any(x.startswith("L2::cache_hint") for x in it.op):
        extra = extra[:-1]
    size = "nullptr"
    if extra:  # number of bytes, or a predicate to copy none; the rest is zero
        x = extra[0]
        if (x[0] == "r" and g.bits(x[1]) == 1) or x[0] == "n":
            value = f"sel({g.val(x, 1)}, splat32(0), splat32({count}))"
        else:
            value = g.val(x, 32)
        size = f"&{g.tmpv(value, 32)}"
    g.o.append(f"  {g.call(it, 'rt_cpasync', to, source, count, size, site='cp_async')};")


def _atomic(g, it, has_result):
    op = it.op
    if any(x in ("v2", "v4", "v8") for x in op):
        g.bad(it, "unsupported vector atomic")
    kind, operation = g.ty(it), next((x for x in op[1:] if x in ATOMICS), None)
    if operation is None or kind == "b128":
        g.bad(it)
    bits = TYPE_BITS[kind]
    g.count("atomic")
    m, *values = it.args[1:] if has_result else it.args
    spaces = [x.split("::")[0] for x in op[1:] if x.split("::")[0] in ("global", "shared")]
    space = spaces[-1] if spaces else "generic"
    if m[1][0] == "s" and m[1][1] in g.shared:
        space = "shared"
    address, t = g.address(m, 64), g.newtmp()
    acquires = "acquire" in op or "acq_rel" in op
    releases = "release" in op or "acq_rel" in op
    order = f" | {(acquires | releases << 1) << 8}" if acquires or releases else ""
    if any(x.startswith("L2::cache_hint") for x in op):
        values = values[:-1]
    values = [x[1][0] if x[0] == "v" and len(x[1]) == 1 else x for x in values]
    has_two = len(values) > 1
    variables = [f"{t}b = {g.val(values[0], bits)}"]
    if has_two:
        variables.append(f"{t}c = {g.val(values[1], bits)}")
    if has_result:
        variables.append(t)
    g.o.append(f"  {CXX[bits]} {', '.join(variables)};")
    call = g.call(
        it,
        "rt_atom",
        f"SP_{space.upper()}",
        address,
        f"AT_{operation.upper()}{order}",
        f"TY_{ {'b32': 'u32', 'b64': 'u64'}.get(kind, kind).upper() }",
        f"&{t}b",
        f"&{t}c" if has_two else "nullptr",
        f"&{t}" if has_result else "nullptr",
        site="atomic",
    )
    g.o.append(f"  {call};")
    if has_result:
        g.set(it, it.args[0], t, bits)


@instruction("atom")
def atom(g, it):
    _atomic(g, it, True)


@instruction("red")
def red(g, it):
    if "async" in it.op:
        g.bad(it)
    _atomic(g, it, False)


@instruction("createpolicy")
def createpolicy(g, it):
    g.set(it, it.args[0], "splat64(0)", 64)
