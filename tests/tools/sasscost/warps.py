"""Warps of a CTA that run each block of a kernel, and their registers.

A warp-specialized kernel branches on the number of the warp. Each side of the branch is a
*partition* with its own loops and, after `setmaxnreg` (USETMAXREG in SASS), its own number of
registers.

`run` propagates the values that derive from the thread's index through the kernel, for all warps of
a CTA at once. A value is, per warp, the set of values that its 32 threads may hold, or None if they
are unknown. If the predicate of a branch is known for a warp, only that side is followed; otherwise
both sides are. The result is therefore a superset of the warps that reach a block.

Triton's worker warps do not branch on their number. They read the number of their partition from a
byte table in shared memory, `LDS.U8 [base + warp + offset]`, which the default partition fills with
constants. A first pass rebuilds the table from the stores of constants.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from typing import NamedTuple

from . import classify as C

_REG = re.compile(r"^(!?[-~]?)(U?R\d+|U?P\d+|U?RZ|U?PT)$")
_ADDR = re.compile(r"^\[([^\]]*)\]$")
LIMIT = 40  # values per register and warp
M32 = 0xFFFFFFFF


def operands(args):
    """Return the operands of an instruction, without .reuse and .64."""
    return (
        [x.strip().replace(".reuse", "").replace(".64", "") for x in args.split(",")]
        if args.strip()
        else []
    )


def immediate(x):
    """Return the value of an immediate operand; None for any other operand."""
    try:
        if x.startswith("-"):
            return (-int(x[1:], 16)) & M32 if x[1:].startswith("0x") else None
        return int(x, 16) if x.startswith("0x") else None
    except ValueError:
        return None


def _half(x):
    try:
        v = {"-RZ": "-0", "RZ": "0"}.get(x, x)
        return struct.unpack("<H", struct.pack("<e", float(v)))[0]
    except (ValueError, OverflowError):
        return None


def _lut(vals, lut, bits):
    """Apply the truth table of LOP3 (on 32-bit words) or PLOP3 (on truth values)."""
    a, b, c = vals
    full = M32 if bits == 32 else 1
    r = 0
    for i in range(8):
        if lut >> i & 1:
            r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) & full
    return r


class Machine:
    """Interpreter of single instructions on sets of values.

    `env`, the state at one point of the kernel, maps a register to a list with the set of its
    values in each warp.
    """

    def __init__(self, ins, n, table, linear):
        self.ops = [operands(x.args) for x in ins]
        self.n, self.linear = n, linear
        self.table = table or {}
        self.unknown = [None] * n

    def const(self, v):
        return [frozenset([v])] * self.n

    def get(self, env, x):
        m = _REG.match(x)
        if not m:
            v = immediate(x)
            return self.const(v) if v is not None else self.unknown
        sign, r = m.groups()
        if r in ("RZ", "URZ"):
            v = self.const(0)
        elif r in ("PT", "UPT"):
            v = self.const(1)
        else:
            v = env.get(r, self.unknown)
        if "!" in sign:
            v = [None if s is None else frozenset(1 - y for y in s) for s in v]
        elif "-" in sign:
            v = [None if s is None else frozenset(-y & M32 for y in s) for s in v]
        elif "~" in sign:
            v = [None if s is None else frozenset(~y & M32 for y in s) for s in v]
        return v

    def map(self, f, *vs):
        out = []
        for w in range(self.n):
            ss = [v[w] for v in vs]
            if any(s is None for s in ss):
                out.append(None)
                continue
            combos = [()]
            for s in ss:
                combos = [(*c, y) for c in combos for y in s]
                if len(combos) > 128:
                    break
            r = frozenset(f(*c) for c in combos) if len(combos) <= 128 else None
            out.append(r if r is not None and len(r) <= LIMIT else None)
        return out

    @staticmethod
    def either(v):
        """Replace unknown truth values by {0, 1}: the other operand may decide an AND or OR."""
        return [frozenset((0, 1)) if s is None else s for s in v]

    def result(self, env, x, i):
        """Return {destination: value} of an instruction; None if it is not interpreted."""
        op, b = x.op, C.base(x.op)
        o = self.ops[i]

        def g(k):
            return self.get(env, o[k])

        try:
            if b in ("S2R", "S2UR") and o[1] == "SR_TID.X" and self.linear:
                return {o[0]: [frozenset(range(32 * w, 32 * w + 32)) for w in range(self.n)]}
            if b == "CS2R" and o[1] == "SRZ":
                k = int(o[0][1:])
                return {f"R{k + j}": self.const(0) for j in range(1 if ".32" in op else 2)}
            if b in ("MOV", "UMOV", "R2UR"):
                return {
                    o[-2] if b == "R2UR" else o[0]: self.get(env, o[-1] if b == "R2UR" else o[1])
                }
            if b == "SHFL" and len(o) >= 3:
                return {o[1]: g(2)} if o[2].startswith("R") else None
            if op in ("IMAD.MOV.U32", "IMAD.U32", "IMAD.SHL.U32", "IMAD.IADD", "IMAD.MOV") or (
                b in ("UIMAD",) and len(o) == 4 and "WIDE" not in op and "HI" not in op
            ):
                return {o[0]: self.map(lambda p, q, r: (p * q + r) & M32, g(1), g(2), g(3))}
            if (
                b in ("SHF", "USHF")
                and ".R." in op
                and op.endswith(".HI")
                and o[1] in ("RZ", "URZ")
            ):
                sgn = ".S32" in op
                return {
                    o[0]: self.map(
                        lambda s, v: ((v - (1 << 32) if sgn and v >> 31 else v) >> (s & 31)) & M32,
                        g(2),
                        g(3),
                    )
                }
            if b in ("SHF", "USHF") and op.split(".")[1:] == ["L", "U32"] and o[3] in ("RZ", "URZ"):
                return {o[0]: self.map(lambda v, s: v << (s & 31) & M32, g(1), g(2))}
            if b in ("LOP3", "ULOP3"):
                p = re.match(r"U?P[T\d]", o[0]) is not None
                k = 1 if p else 0
                r = self.map(
                    lambda u, v, w: _lut((u, v, w), int(o[k + 4], 16), 32),
                    g(k + 1),
                    g(k + 2),
                    g(k + 3),
                )
                d = {o[k]: r}
                if p:
                    d[o[0]] = self.map(lambda v: int(v != 0), r)
                return d
            if b in ("PLOP3", "UPLOP3") and len(o) >= 7:
                t = [self.either(g(j)) for j in (2, 3, 4)]
                return {
                    o[0]: self.map(lambda u, v, w: _lut((u, v, w), int(o[5], 16), 1), *t),
                    o[1]: self.map(lambda u, v, w: _lut((u, v, w), int(o[6], 16), 1), *t),
                }
            if b in ("IADD3", "UIADD3") and len(o) == 4 and ".X" not in op:
                return {o[0]: self.map(lambda p, q, r: (p + q + r) & M32, g(1), g(2), g(3))}
            if b in ("VIADD", "IADD", "UIADD") and len(o) == 3 and ".X" not in op:
                return {o[0]: self.map(lambda p, q: (p + q) & M32, g(1), g(2))}
            if op.startswith("HFMA2") and len(o) == 5 and o[1] == "-RZ" and o[2] == "RZ":
                hi, lo = _half(o[3]), _half(o[4])
                return (
                    {o[0]: self.const(hi << 16 | lo)} if hi is not None and lo is not None else None
                )
            if b in ("SEL", "USEL") and len(o) == 4:
                return {o[0]: self.map(lambda p, q, c: p if c else q, g(1), g(2), g(3))}
            if (
                b in ("ISETP", "UISETP")
                and ".EX" not in op
                and len(o) >= 5
                and "64" not in op.split(".")
            ):
                cmp = {
                    "EQ": lambda p, q: p == q,
                    "NE": lambda p, q: p != q,
                    "LT": lambda p, q: p < q,
                    "LE": lambda p, q: p <= q,
                    "GT": lambda p, q: p > q,
                    "GE": lambda p, q: p >= q,
                }[op.split(".")[1]]
                unsigned = ".U32" in op

                def s(v):
                    return v if unsigned or not v >> 31 else v - (1 << 32)

                how = {
                    "AND": lambda p, q: p & q,
                    "OR": lambda p, q: p | q,
                    "XOR": lambda p, q: p ^ q,
                }[op.split(".")[-1]]
                last = self.either(g(4))
                one = self.either(self.map(lambda p, q: int(cmp(s(p), s(q))), g(2), g(3)))
                r = self.map(how, one, last)
                n = self.map(lambda p, q: how(1 - p, q), one, last)
                return {o[0]: r, o[1]: n}
            if b == "LDS" and ".U8" in op:
                t = self.lookup(env, o[1])
                return {o[0]: t} if t else None
        except (IndexError, KeyError, ValueError):
            return None
        return None

    def lookup(self, env, addr):
        m = _ADDR.match(addr)
        if not m or not self.table:
            return None
        off, ids = 0, False
        for t in m.group(1).split("+"):
            v = immediate(t)
            if v is not None:
                off += v
                continue
            v = self.get(env, t)
            if all(s is None or s == frozenset([w]) for w, s in enumerate(v)) and any(v):
                ids = True
        if not ids:
            return None
        return [self.table.get(off + w) for w in range(self.n)]

    @staticmethod
    def width(op, b):
        """Return an upper bound of the number of registers that an instruction writes."""
        k = C.klass(op)
        if b.endswith("GMMA") or b == "LDTM":
            return 256
        if k in ("shared", "global", "local", "const"):
            return max(4 if "128" in op else 2 if "64" in op else 1, C.access_bytes(op) // 4)
        if k in ("fma", "imad", "alu", "half", "mufu", "conv", "shuffle", "uniform"):
            return (
                2 if "WIDE" in op or "64" in op or b in ("CS2R", "FADD2", "FMUL2", "FFMA2") else 1
            )
        return 1 if b in ("S2R", "SYNCS") else 4

    def kills(self, x, i):
        o, b = self.ops[i], C.base(x.op)
        for t in o[:3]:
            if re.match(r"^U?P\d$", t):
                yield t
        m = next((re.match(r"^(U?R)(\d+)$", t) for t in o[:3] if re.match(r"^U?R\d+$", t)), None)
        if b == "R2P":
            for k in range(8):
                yield f"P{k}"
        if m and not b.startswith(("ST", "RED", "BAR")):
            n = self.width(x.op, b)
            for k in range(n):
                yield f"{m.group(1)}{int(m.group(2)) + k}"

    def step(self, env, x, i, mask):
        if x.dead:
            return
        if C.base(x.op) == "CALL":
            env.clear()
            return
        r = self.result(env, x, i)
        guard = None
        if x.pred and x.pred not in ("@PT", "@UPT"):
            guard = self.get(env, x.pred[1:])
        for k in [] if r is not None and guard is None else self.kills(x, i):
            if guard is None:
                env.pop(k, None)
            elif k in env and not (r is not None and k in r):
                old = env[k]
                env[k] = [old[w] if guard[w] == frozenset([0]) else None for w in range(self.n)]
        if r is not None:
            for d, v in r.items():
                if d in ("RZ", "URZ", "PT", "UPT"):
                    continue
                if guard is not None:
                    old = env.get(d, self.unknown)
                    new = []
                    for w in range(self.n):
                        if guard[w] == frozenset([0]):
                            new.append(old[w])
                        elif guard[w] == frozenset([1]):
                            new.append(v[w])
                        else:
                            new.append(None if old[w] is None or v[w] is None else old[w] | v[w])
                    v = new
                if all(s is None for s in v):
                    env.pop(d, None)
                else:
                    env[d] = v


def _branch(m, env, x, i):
    """Return, per warp, the possible truth values of the condition of a block's last branch."""
    if x.pred and x.pred not in ("@PT", "@UPT"):
        v = m.get(env, x.pred[1:])
        lead = (
            m.ops[i][0]
            if C.base(x.op) == "BRA" and m.ops[i] and not m.ops[i][0].startswith("`")
            else None
        )
        if lead:
            u = m.get(env, lead) if _REG.match(lead) else m.unknown
            v = [
                None if p is None or q is None else frozenset(a & b for a in p for b in q)
                for p, q in zip(v, u, strict=True)
            ]
        return v
    lead = m.ops[i][0] if m.ops[i] else ""
    return m.get(env, lead) if re.match(r"^!?U?P\d$", lead) else m.unknown


class Flow(NamedTuple):
    """Warps and registers of a kernel's blocks."""

    masks: dict  # block: bit mask of the warps that may reach it
    barriers: dict  # index of a BAR: [set of ids or None, set of thread counts or None]
    sites: list  # (index, registers) of the USETMAXREG instructions
    in_force: dict  # block: indices of the sites in force at its start; -1: none
    set_in: dict  # block: index of the last site in it


class _Pass:
    """One pass through a kernel, until the state at the start of each block is stable."""

    def __init__(self, ins, blocks, n, table, linear):
        self.ins, self.blocks, self.n = ins, blocks, n
        self.machine = Machine(ins, n, table, linear)
        self.states = {0: ((1 << n) - 1, {})}  # block: (mask of warps, registers)
        self.visits = Counter()
        self.stores, self.barriers = {}, {}
        self.work = [0]
        while self.work:
            self.work.sort(reverse=True)
            self._visit(self.work.pop())

    def _warps(self, mask):
        return [w for w in range(self.n) if mask >> w & 1]

    def _visit(self, number):
        mask, env = self.states[number]
        env = dict(env)
        self.visits[number] += 1
        block = self.blocks[number]
        for i in range(block.start, block.end):
            x = self.ins[i]
            if C.base(x.op) == "STS" and not x.dead:
                self._note_store(env, i, mask)
            elif C.base(x.op) == "BAR":
                both = [*self.machine.ops[i], "", ""][:2]
                self.barriers[i] = [self._values(env, operand, mask) for operand in both]
            self.machine.step(env, x, i, mask)
        for successor, reached in self._successors(block, env, mask).items():
            if reached:
                self._join(successor, reached, env)

    def _values(self, env, operand, mask):
        """Return all values of an operand over the warps of `mask`; None if one is unknown."""
        values = self.machine.get(env, operand)
        sets = [values[w] for w in self._warps(mask)]
        return None if None in sets else set().union(*sets)

    def _note_store(self, env, i, mask):
        """Record the constant words that an STS writes, and their offset from a register."""
        ops = self.machine.ops[i]
        address = _ADDR.match(ops[0]) if ops else None
        parts = address[1].split("+") if address else []
        if len(parts) != 2 or immediate(parts[1]) is None:
            return
        register = re.match(r"^R(\d+)$", ops[1])
        words = []
        for k in range(C.access_bytes(self.ins[i].op) // 4):
            operand = f"R{int(register[1]) + k}" if register else ops[1]
            values = self._values(env, operand, mask)
            words.append(next(iter(values)) if values and len(values) == 1 else None)
        self.stores[i] = immediate(parts[1]), words

    def _successors(self, block, env, mask):
        """Return the mask of the warps that reach each successor of a block."""
        last = block.end - 1
        x, op = self.ins[last], C.base(self.ins[last].op)
        if len(block.succ) == 2 and op in ("BRA", "JMP"):
            truth = _branch(self.machine, env, x, last)
            taken, fall = (
                sum(1 << w for w in self._warps(mask) if truth[w] is None or side in truth[w])
                for side in (1, 0)
            )
            return dict(zip(block.succ, (taken, fall), strict=True))
        if op in ("EXIT", "RET", "KILL") and len(block.succ) == 1 and x.pred:
            truth = _branch(self.machine, env, x, last)
            stay = [w for w in self._warps(mask) if truth[w] is None or 0 in truth[w]]
            return {block.succ[0]: sum(1 << w for w in stay)}
        return dict.fromkeys(block.succ, mask)

    def _join(self, number, mask, env):
        """Merge a state into the state of a block, and visit the block again if it changed."""
        if number not in self.states:
            self.states[number] = mask, dict(env)
            self.work.append(number)
            return
        old_mask, old = self.states[number]
        unknown, final = self.machine.unknown, self.visits[number] >= 3
        merged, changed = {}, (old_mask | mask) != old_mask
        for register in old.keys() | env.keys():
            before, now = old.get(register, unknown), env.get(register, unknown)
            values = []
            for w in range(self.n):
                if old_mask >> w & 1 and mask >> w & 1:
                    known = before[w] is not None and now[w] is not None
                    both = before[w] | now[w] if known else None
                    if both is not None and both != before[w] and (final or len(both) > LIMIT):
                        both = None
                    values.append(both)
                else:
                    values.append(
                        before[w] if old_mask >> w & 1 else now[w] if mask >> w & 1 else None
                    )
            if any(x is not None for x in values):
                merged[register] = values
            changed |= any(values[w] != before[w] for w in self._warps(old_mask))
        if changed:
            self.states[number] = old_mask | mask, merged
            if number not in self.work:
                self.work.append(number)


def run(ins, blocks, n, linear=True):
    """Return the `Flow` of a kernel with `n` warps; `linear`: its CTA has one dimension."""
    done = _Pass(ins, blocks, n, None, linear)
    if any(C.base(x.op) == "LDS" and ".U8" in x.op for x in ins) and any(
        C.base(x.op) == "USETMAXREG" for x in ins
    ):
        done = _Pass(ins, blocks, n, _byte_table(done.stores), linear)
    sites = setmaxnreg(ins)
    masks = {number: mask for number, (mask, _) in done.states.items()}
    return Flow(masks, done.barriers, sites, *reaching(blocks, sites))


def _byte_table(stores):
    """Return a dict from offset to the constant bytes stored there in shared memory."""
    table, unknown = {}, set()
    for offset, words in stores.values():
        for k, word in enumerate(words):
            for j in range(4):
                address = offset + 4 * k + j
                if word is None:
                    unknown.add(address)
                else:
                    table.setdefault(address, set()).add(word >> 8 * j & 255)
    return {a: frozenset(values) for a, values in table.items() if a not in unknown}


def setmaxnreg(ins):
    """Return the (index, registers) of the USETMAXREG instructions."""
    return [
        (i, immediate(operands(x.args)[-1]) if operands(x.args) else None)
        for i, x in enumerate(ins)
        if C.base(x.op) == "USETMAXREG" and not x.dead
    ]


def reaching(blocks, sites):
    """Return the sites in force at the start of each block, and the last site in each block."""
    set_in = {}
    for i, _ in sites:
        for b in blocks:
            if b.start <= i < b.end:
                set_in[b.i] = max(set_in.get(b.i, -1), i)
    in_force = {0: {-1}}
    work = [0]
    while work:
        b = work.pop()
        out = {set_in[b]} if b in set_in else in_force[b]
        for s in blocks[b].succ:
            old = in_force.setdefault(s, set())
            if not out <= old:
                old |= out
                work.append(s)
    return in_force, set_in
