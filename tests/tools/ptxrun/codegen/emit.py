"""Generation of a kernel's C++: warp state, global variables and one function per block."""

from __future__ import annotations

import re

from ..errors import UnsupportedPtx
from ..ptx import f32_bits, f64_bits
from .blocks import is_barrier, may_wait
from .liveness import find_live_registers, find_wgmma_registers
from .operands import CXX, Operands
from .program import symbols_of
from .registers import accumulators
from .registry import INSTRUCTIONS

ENDS_BLOCK = ("bra", "brx", "ret", "exit")


class Emitter(Operands):
    """Emitter of the C++ of a `Program`."""

    def emit(self):
        """Return the C++ text, and set `tables`, `sites` and `gvars`, which describe it."""
        program = self.program
        self.bit_of = find_live_registers(program)
        own, in_flight, self.unfenced = set(), set(), set()
        if program.has_wgmma:
            own, in_flight, self.unfenced = find_wgmma_registers(program, self.bit_of)
        self._name_registers()
        kept = 0
        for b in program.blocks:
            kept |= b.live_in | (b.live_out & b.writes)
        state = [r for r in self.regs if kept & self.bit_of[r] or r in own]
        state.sort(key=lambda r: -self.bits(r))
        out = ['#include "prelude.h"', "struct W : WBase {"]
        out += [f"  {CXX[self.bits(r)]} {self.names[r]};" for r in state]
        out.append("};")
        out += self._global_variables()
        self.tables = []
        for b in program.blocks:
            out += self._block(b)
        count = len(program.blocks)
        out.append(f"static const BBFn bbs[] = {{{', '.join(f'bb{i}' for i in range(count))}}};")
        tags = [
            f"__builtin_offsetof(W, {self.names[r]})"
            for r in state
            if r in in_flight and self.bits(r) == 32
        ]
        if tags:
            out.append(f"static const u32 wtags[] = {{{', '.join(tags)}}};")
        out.append(
            f'extern "C" const KDesc ptxrun_desc = {{bbs, {count}, '
            f"(i32)((sizeof(W) + 63) / 64 * 64), {program.shared_bytes}, {program.local_bytes}, "
            f"{len(self.sites)}, {'wtags' if tags else 'nullptr'}, {len(tags)}, "
            f"{program.function.maxnreg}}};"
        )
        return "\n".join(out) + "\n"

    def _name_registers(self):
        used = set()
        for r in self.regs:
            name = "r_" + (re.sub(r"[^A-Za-z0-9]", "_", r.lstrip("%")) or "r")
            while name in used:
                name += "_"
            used.add(name)
            self.names[r] = name

    def _global_variables(self):
        """Return the definitions of the .global and .const variables that are used."""
        program = self.program
        used = {
            name for b in program.blocks for it in b.ins for a in it.args for name in symbols_of(a)
        }
        candidates = [
            v
            for v in (*program.mod.vars.values(), *program.vars.values())
            if v.space in ("global", "const")
        ]
        by_name = {v.name: v for v in candidates}
        work = list(used)
        while work:  # initializers may refer to further variables
            v = by_name.get(work.pop())
            for x in _initializers(v) if v is not None else ():
                if isinstance(x, tuple) and x[0] == "sym" and x[1] not in used:
                    used.add(x[1])
                    work.append(x[1])
        kept = [v for v in candidates if v.name in used]
        self.gname = {
            v.name: f"G{i}_" + re.sub(r"[^A-Za-z0-9]", "_", v.name) for i, v in enumerate(kept)
        }
        self.gvars = [(v.name, v.space, max(1, v.size)) for v in kept]
        addresses = " ".join(f"p[{i}] = (u64){self.gname[v.name]};" for i, v in enumerate(kept))
        return [
            *(self._definition(v) for v in kept),
            f'extern "C" void ptxrun_globals(u64* p) {{ {addresses} }}',
        ]

    def _definition(self, v):
        kind = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[v.elt_bytes]
        count = max(1, v.size // v.elt_bytes)
        values = []
        for x in _initializers(v):
            if not isinstance(x, tuple):
                values.append(f"({kind}){x}")
            elif x[0] == "sym":
                values.append(f"(u64){self.gname[x[1]]} + {x[2]}")
            elif x[1][:2].lower() in ("0f", "0d"):
                values.append(hex(int(x[1][2:], 16)))
            else:
                bits = f32_bits if v.elt_bytes == 4 else f64_bits
                values.append(hex(bits(float(x[1]))))
        initial = "" if v.init is None else f" = {{{', '.join(values)}}}"
        alignment = max(v.align, 16)
        return f"alignas({alignment}) static {kind} {self.gname[v.name]}[{count}]{initial};"

    def _block(self, b):
        """Return the function of a block."""
        self.begin_block()
        names = self.names
        own = set()
        if self.program.has_wgmma:
            own = {r for it in b.ins for r in accumulators(it)}
        local = [r for r in b.registers if r not in own]
        for r in local:
            initial = f" = w.{names[r]}" if b.reads & self.bit_of[r] else ""
            self.o.append(f"  {CXX[self.bits(r)]} {names[r]}{initial};")
        end = None
        for i, it in enumerate(b.ins):
            if i == len(b.ins) - 1 and b.is_last and _ends_block(it):
                if it.op[0] == "mbarrier":
                    self.instruction(it)
                end = it
                break
            self.instruction(it)
        stores = [r for r in local if b.writes & b.live_out & self.bit_of[r]]
        ending = self._end(b, end)
        if stores:  # lanes that are not in mask m keep their values
            self.o.append("  if (m == 0xffffffffu) {")
            self.o += [f"    w.{names[r]} = {names[r]};" for r in stores]
            self.o.append("  } else {")
            self.o += [f"    w.{names[r]} = sel(m, {names[r]}, w.{names[r]});" for r in stores]
            self.o.append("  }")
        self.tables.append(
            {
                "c": self.counts,
                "f": self.flops,
                "w": self.weighted_flops,
                "n": len(b.ins),
                "line": b.ins[0].line if b.ins else 0,
            }
        )
        return [
            f"static int bb{b.id}(Cta& c, WBase& wb, u32 m) {{ W& w = (W&)wb; (void)w; (void)c;",
            *self.o,
            *ending,
            "}",
        ]

    def instruction(self, it):
        """Append the C++ of an instruction."""
        translate = INSTRUCTIONS.get(it.op[0])
        if translate is None:
            self.bad(it)
        try:
            translate(self, it)
        except UnsupportedPtx:
            raise
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            line = self.program.source_line(it.line)
            raise UnsupportedPtx(
                f"line {it.line}: cannot translate `{line}` ({type(error).__name__}: {error})"
            ) from error

    def _end(self, b, it):
        """Return the statements that end a block; `it` is its last instruction or None."""
        if it is None:
            return ["  return R_EXIT;" if b.next is None else f"  return {b.next.id};"]
        op = it.op[0]
        if op in ("bra", "brx"):
            self.count("branch")
        if op == "bra":
            return self._branch(b, it, b.target.id, str(b.target.id))
        if op in ("ret", "exit"):
            return self._branch(b, it, "R_EXIT", "EXITBLK")
        if op == "brx":
            index, count = self.val(it.args[0], 32), len(b.targets)
            table = ", ".join(str(x.id) for x in b.targets)
            skip = f"!(pm >> l & 1) ? {b.next.id} : " if it.pred else ""
            return [
                f"  {{ static const int T[] = {{{table}}}; V32 ix = {index}; "
                f"u32 pm = m & {self.pred(it)};",
                "    for (int l = 0; l < 32; l++) { u32 k = ((u32*)&ix)[l]; w.wnext[l] = "
                f"{skip}T[k < {count} ? k : 0]; }} return R_IDX; }}",
            ]
        if op == "mbarrier":
            return [
                f"  if (w.wkind) {{ w.fblk = {b.next.id}; return R_SLEEP; }} return {b.next.id};"
            ]
        if op in ("bar", "barrier"):
            return self._barrier(b, it)
        value = it.args[0][1]
        wait = {
            "wgmma": lambda mask: f"rt_wgwait(c, wb, {mask}, {value}",
            "cp": lambda mask: f"rt_bulkwait(c, wb, {mask}, {value}, {int('read' in it.op)}",
            "setmaxnreg": lambda mask: (
                f"rt_setmaxnreg(c, wb, {mask}, {int('inc' in it.op)}, {value}"
            ),
        }[op](self.mask(it))
        return [f"  return {wait}, {b.next.id}, {it.line});"]

    def _branch(self, b, it, result, block):
        """Return the statements of a branch to `block`; a uniform branch returns `result`."""
        if it.pred is None:
            return [f"  return {result};"]
        return [
            f"  {{ u32 t = ({self.pred(it)}) & m; if (t == m) return {result}; "
            f"if (!t) return {b.next.id}; "
            f"w.tmask = t; w.tblk = {block}; w.fblk = {b.next.id}; return R_DIV; }}"
        ]

    def _barrier(self, b, it):
        self.count("barrier")
        if it.pred:
            raise UnsupportedPtx(f"line {it.line}: unsupported predicated barrier")
        args = list(it.args)
        if "cluster" in it.op:  # a cluster has one block
            args = [("i", 16)]
        value = args.pop() if "redarrive" in it.op else None
        out = []
        number = self.uniform(args[0], out) if args else "0"
        threads = self.uniform(args[1], out) if len(args) > 1 else "0"
        out.append(
            f"  w.bar_id = {number}; w.bar_cnt = {threads}; w.bar_line = {it.line}; "
            f"w.fblk = {b.next.id};"
        )
        if value is not None:
            out.append(f"  rt_barred(c, m, w.bar_id, {self.val(value, 1)});")
        return [*out, "  return R_BAR;"]


def _ends_block(it):
    return it.op[0] in ENDS_BLOCK or is_barrier(it) or may_wait(it)


def _initializers(v):
    """Return the initial values of a variable as a list."""
    if v.init is None:
        return []
    return v.init if isinstance(v.init, list) else [v.init]
