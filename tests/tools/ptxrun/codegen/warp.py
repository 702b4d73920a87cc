"""Warp-level instructions, barriers, fences and traps."""

from __future__ import annotations

from ..ptx import TYPE_BITS
from .registry import instruction


@instruction("shfl")
def shfl(g, it):
    if it.op[1] != "sync":
        g.bad(it)
    g.count("shfl")
    mode = {"up": 0, "down": 1, "bfly": 2, "idx": 3}[it.op[2]]
    t, values = g.newtmp(), g.vals(it.args[1:5], 32)
    _set_with_predicate(g, it, t, g.call(it, "rt_shfl", mode, values, f"&{t}"))


def _set_with_predicate(g, it, t, call):
    """Assign the result of a call, and the predicate that the call writes to `t`."""
    g.o.append(f"  u32 {t} = 0; V32 {t}r = {call};")
    dst = it.args[0]
    if dst[0] != "pp":
        g.set(it, dst, f"{t}r", 32)
        return
    g.set(it, dst[1], f"{t}r", 32)
    if dst[2][0] != "_":
        g.set(it, dst[2], t, 1)


@instruction("vote")
def vote(g, it):
    g.count("vote")
    mode = {"all": 0, "any": 1, "uni": 2, "ballot": 3}[it.op[2]]
    call = g.call(it, "rt_vote", mode, g.val(it.args[1], 1), g.val(it.args[2], 32))
    if mode == 3:
        g.set(it, it.args[0], f"splat32({call})", 32)
    else:
        g.set(it, it.args[0], call, 1)


@instruction("activemask")
def activemask(g, it):
    g.count("vote")
    g.set(it, it.args[0], f"splat32({g.mask(it)})", 32)


@instruction("match")
def match(g, it):
    g.count("vote")
    bits = TYPE_BITS[g.ty(it)]
    value, members = g.val(it.args[1], bits), g.val(it.args[2], 32)
    value = f"widen_u({value})" if bits == 32 else value
    if it.op[1] == "any":
        g.set(it, it.args[0], g.call(it, "rt_match_any", value, members), 32)
    else:
        t = g.newtmp()
        _set_with_predicate(g, it, t, g.call(it, "rt_match_all", value, members, f"&{t}"))


@instruction("redux")
def redux(g, it):
    g.count("vote")
    signed = g.ty(it) == "s32"
    operation = {
        "add": 0,
        "min": 3 if signed else 1,
        "max": 4 if signed else 2,
        "and": 5,
        "or": 6,
        "xor": 7,
    }[it.op[2]]
    g.set(it, it.args[0], g.call(it, "rt_redux", operation, g.vals(it.args[1:3], 32)), 32)


@instruction("elect")
def elect(g, it):
    g.count("vote")
    dst = it.args[0]
    if dst[0] == "pp":
        if dst[1][0] != "_":
            g.set(it, dst[1], "splat32(__builtin_ctz(m))", 32)
        g.set(it, dst[2], "(m & -m)", 1)
    else:
        g.set(it, dst, "(m & -m)", 1)


@instruction("bar", "barrier")
def barrier(g, it):
    """Translate bar.warp.sync and bar.arrive; other barriers end a block."""
    g.count("barrier")
    if it.op[1] == "warp":
        g.o.append(f"  {g.call(it, 'rt_synccheck', g.val(it.args[0], 32))};")
    elif "cluster" in it.op:
        pass  # barrier.cluster.arrive: only its wait is translated, as a barrier of the block
    elif "arrive" in it.op:
        number, threads = (g.uniform(x) for x in it.args[:2])
        g.o.append(f"  {g.call(it, 'rt_bar_arrive', number, threads)};")
    else:
        g.bad(it)


@instruction("$barredres")
def barrier_result(g, it):
    kind = it.op[1]
    bid = it.args[1][1]
    if kind == "popc":
        g.set(it, it.args[0], f"splat32(c.barredres[{bid}][0])", 32)
    elif kind == "and":
        g.set(
            it,
            it.args[0],
            f"(c.barredres[{bid}][0] == c.barredres[{bid}][1] ? 0xffffffffu : 0u)",
            1,
        )
    else:
        g.set(it, it.args[0], f"(c.barredres[{bid}][0] ? 0xffffffffu : 0u)", 1)


@instruction("membar", "fence")
def fence(g, it):
    g.count("fence")
    if "proxy" in it.op:
        if "async" in it.op:
            g.o.append(f"  rt_proxy_fence(c, wb, {g.mask(it)});")
        elif "tensormap::generic" in it.op and "acquire" in it.op:
            address = g.address(it.args[0], 64)
            g.o.append(f"  {g.call(it, 'rt_tensormap_acquire', address)};")
        return
    if "mbarrier_init" in it.op:
        return
    if "cta" not in it.op:
        g.o.append(f"  rt_fence(c, wb, {g.mask(it)});")


@instruction(
    "prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "griddepcontrol", "pmevent"
)
def ignore(g, it):
    pass


@instruction("trap", "brkpt")
def trap(g, it):
    g.o.append(f'  rt_fail(c, wb, {g.mask(it)}, 7, {it.line}, "trap");')


@instruction("$__assertfail")
def assertfail(g, it):
    # Widths of message, file, line and function.
    widths = (64, 64, 32, 64)
    values = [
        g.val(("r", f"#{name}@0"), bits)
        for (_, name), bits in zip(it.args[:4], widths, strict=True)
    ]
    g.o.append(f"  {g.call(it, 'rt_assert', *values)};")


@instruction("$vprintf")
def vprintf(g, it):
    values = [g.val(("r", f"#{name}@0"), 64) for _, name in it.args[:2]]
    call = g.call(it, "rt_vprintf", *values)
    result = f"#{it.args[2][1]}@0" if len(it.args) > 2 else None
    if result in g.regs:
        g.set(it, ("r", result), call, 32)
    else:
        g.o.append(f"  {call};")
