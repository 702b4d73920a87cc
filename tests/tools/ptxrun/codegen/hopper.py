"""Instructions of sm_90a: mbarriers, bulk and tensor copies, tensor maps, clusters."""

from __future__ import annotations

import re

from ..ptx import TYPE_BITS
from .registry import instruction

# Fields of a tensor map, numbered as in rt/hopper.h.
TENSOR_MAP_FIELDS = [
    "global_address",
    "rank",
    "box_dim",
    "global_dim",
    "global_stride",
    "element_stride",
    "elemtype",
    "interleave_layout",
    "swizzle_mode",
    "fill_mode",
    "swizzle_atomicity",
]
REDUCTIONS = ("add", "min", "max", "and", "or", "xor", "inc", "dec")


@instruction("mbarrier")
def mbarrier(g, it):
    op, a = it.op, it.args
    kind = op[1]
    g.count("mbarrier")
    if kind in ("try_wait", "test_wait"):
        by_parity = "parity" in op
        bits = 32 if by_parity else 64
        phase = f"&{g.tmpv(g.val(a[2], bits), bits)}"
        phases = (phase, "nullptr") if by_parity else ("nullptr", phase)
        number = (1 if kind == "test_wait" else 0) | (0 if by_parity else 2)
        g.set(it, a[0], g.call(it, "rt_mbar_test", number, g.address(a[1], 32), *phases), 1)
        return
    kinds = {
        "init": 0,
        "inval": 1,
        "arrive": 3 if "expect_tx" in op else 2,
        "expect_tx": 4,
        "complete_tx": 5,
        "arrive_drop": 6,
    }
    if kind not in kinds or (kind == "arrive_drop" and "expect_tx" in op):
        g.bad(it)
    dst = None
    if a[0][0] != "m":
        dst, a = a[0], a[1:]
    address = g.address(a[0], 32)
    value = f"&{g.tmpv(g.val(a[1], 32), 32)}" if len(a) > 1 else "nullptr"
    state = None
    if dst is not None and dst[0] == "r":
        state = g.newtmp()
        g.o.append(f"  V64 {state} = splat64(0);")
    result = "nullptr" if state is None else f"&{state}"
    g.o.append(f"  {g.call(it, 'rt_mbar', kinds[kind], address, value, result)};")
    if state is not None:
        g.set(it, dst, state, 64)


def bulk_copy(g, it):
    """Translate cp.async.bulk, cp.reduce.async.bulk and their tensor forms."""
    op, a = it.op, it.args
    if "commit_group" in op:
        g.o.append(f"  {g.call(it, 'rt_bulkcommit')};")
        return
    if "prefetch" in op:
        return
    if any(
        x.startswith(("im2col", "multicast", "cta_group"))
        or x in ("gather4", "scatter4", "cp_mask")
        or "tile::" in x
        for x in op
    ):
        g.bad(it)
    is_load, is_reduction = "mbarrier::complete_tx::bytes" in op, op[1] == "reduce"
    cls = "tma" if is_load else "tma_store"
    g.count(cls)
    kind = "0" if is_load else "1"
    if is_reduction:
        kind = f"2 + AT_{next(x for x in op if x in REDUCTIONS).upper()}"
    spaces = [x.split("::")[0] for x in op if x.split("::")[0] in ("shared", "global")]
    if len(spaces) != 2 or spaces == ["shared", "shared"]:
        g.bad(it)
    in_global, in_shared = (a[1], a[0]) if is_load else (a[0], a[1])
    shared = g.address(in_shared, 32)
    t = g.newtmp()
    if "tensor" in op:
        rank = int(next(x for x in op if re.fullmatch(r"[1-5]d", x))[0])
        if len(in_global) < 4 or len(in_global[3][1]) != rank:
            g.bad(it)
        bar = _mbarrier_of(g, a[2]) if is_load else "nullptr, 0"
        tensor_map = g.address(in_global, 64)
        copy = g.call(it, "rt_tma", kind, rank, shared, tensor_map, t, bar, site=cls)
        g.o.append(f"  V32 {t}[] = {{{g.vals(in_global[3][1], 32)}}}; {copy};")
        return
    bar = _mbarrier_of(g, a[3]) if is_load else "nullptr, 0"
    kind_of_element = "0"
    if is_reduction:
        element = next(x for x in op if x in TYPE_BITS)
        kind_of_element = f"TY_{ {'b32': 'u32', 'b64': 'u64'}.get(element, element).upper() }"
    address, size = g.address(in_global, 64), g.val(a[2], 32)
    copy = g.call(it, "rt_bulk", kind, kind_of_element, shared, address, size, bar, site=cls)
    g.o.append(f"  {copy};")


def _mbarrier_of(g, operand):
    """Return "address, offset" of the mbarrier on which a copy completes."""
    base = g.tmpv(g.val(operand[1], 32), 32)
    return f"&{base}, {operand[2]}"


@instruction("tensormap")
def tensormap(g, it):
    op, a = it.op, it.args
    if op[1] == "cp_fenceproxy":
        to, source = g.address(a[0], 64), g.address(a[1], 64)
        g.o.append(f"  {g.call(it, 'rt_tensormap_cp', to, source)};")
        return
    field = next((x for x in op if x in TENSOR_MAP_FIELDS), None)
    if op[1] != "replace" or field is None:
        g.bad(it)
    number = TENSOR_MAP_FIELDS.index(field)
    ordinal = a[1][1] if len(a) > 2 else 0
    in_shared = int(any(x.split("::")[0] == "shared" for x in op))
    g.count("other")
    address, value = g.address(a[0], 64), g.val(a[-1], 64)
    g.o.append(f"  {g.call(it, 'rt_tensormap', number, in_shared, address, ordinal, value)};")


@instruction("mapa")
def mapa(g, it):
    bits = TYPE_BITS[g.ty(it)]
    g.set(it, it.args[0], g.val(it.args[1], bits), bits)


@instruction("getctarank")
def getctarank(g, it):
    g.set(it, it.args[0], "splat32(0)", 32)


@instruction("setmaxnreg")
def setmaxnreg(g, it):
    g.bad(it)  # the emitter translates it at the end of a block
