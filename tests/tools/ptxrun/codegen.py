"""Translate one PTX kernel to C++ (one function per basic block, working on whole-warp registers)."""

import re

from .errors import UnsupportedPtx
from .parser import TYPE_BITS, Instr, Label, f32_bits, f64_bits

MAX_BLOCK = 160  # instructions per generated function
CXX = {1: "u32", 16: "V16", 32: "V32", 64: "V64"}
SPLAT = {16: "splat16", 32: "splat32", 64: "splat64"}

# profile classes
CLASSES = [
    "mma",
    "ldmatrix",
    "fp32_fma",
    "fp32_add_mul",
    "fp32_other",
    "fp16",
    "fp64",
    "int_alu",
    "int_mul",
    "mufu",
    "cvt_pack",
    "cvt",
    "shfl",
    "vote",
    "ld_shared",
    "st_shared",
    "ld_global",
    "st_global",
    "ld_local",
    "st_local",
    "cp_async",
    "atomic",
    "barrier",
    "fence",
    "branch",
    "mov",
    "setp_sel",
    "other",
    "wgmma",
    "tma",
    "tma_store",
    "mbarrier",
]
CLS = {c: i for i, c in enumerate(CLASSES)}


def align_up(x, a):
    return (x + a - 1) // a * a


class Block:
    def __init__(self, label=None):
        self.label = label
        self.ins = []
        self.succ = []  # block objects (fallthrough last)
        self.term = None
        self.id = None
        self.acc, self.plain = set(), set()


class KernelGen:
    def __init__(self, mod, fn, racecheck=False):
        self.mod, self.fn = mod, fn
        self.regs = dict(fn.regs)
        self.pregs = {}  # call-parameter pseudo registers -> bits
        self.vars = {}
        self.brt = dict(fn.branchtargets)
        self.inl = 0
        self.sites = []  # (line, class)
        self.calls = []

    # ------------------------------------------------------------------ inlining of .func calls
    def _flatten(self, fn, depth, rn, pmap, endlabel, out):
        """Copy the body of fn with registers renamed by rn() and .param variables mapped by pmap."""
        if depth > 24:
            raise UnsupportedPtx(
                f"call depth of {self.fn.name} too large (recursion is not supported)"
            )
        labels = {}

        def op(o):
            k = o[0]
            if k == "r":
                return ("r", rn(o[1]))
            if k in ("v", "l"):
                return (k, [op(x) for x in o[1]])
            if k == "m":
                return ("m", op(o[1]), o[2], *tuple(op(x) for x in o[3:]))
            if k == "n":
                return ("n", op(o[1]))
            if k == "pp":
                return ("pp", op(o[1]), op(o[2]))
            if k == "s":
                nm = o[1]
                nm = pmap.get(nm, labels.get(nm, nm))
                return ("s", nm, *tuple(o[2:]))
            return o

        if depth:
            for it in fn.body:
                if isinstance(it, Label):
                    labels[it.name] = f"{it.name}$i{self.inl}"
            for k, tg in fn.branchtargets.items():
                labels[k] = f"{k}$i{self.inl}"
                self.brt[labels[k]] = [labels.get(x, x) for x in tg]
        for v in fn.vars:
            nm = v.name if not depth else f"{v.name}$i{self.inl}"
            if depth and v.space != "shared":
                pmap.setdefault(v.name, nm)
            elif depth:
                nm = v.name
            self.vars[nm] = v
        for it in fn.body:
            if isinstance(it, Label):
                out.append(Label(labels.get(it.name, it.name), it.line))
                continue
            pred = (rn(it.pred[0]), it.pred[1]) if it.pred else None
            if it.op[0] in ("ret",) and depth:
                out.append(Instr(["bra"], pred, [("s", endlabel)], it.line))
                continue
            ins = Instr(list(it.op), pred, [op(a) for a in it.args], it.line)
            if it.op[0] == "call":
                self._call(ins, depth, out)
            else:
                out.append(ins)

    def _call(self, ins, depth, out):
        rets, args, name = [], [], None
        for a in ins.args:
            if a[0] == "l":
                if name is None:
                    rets = [x[1] for x in a[1]]
                else:
                    args = [x[1] for x in a[1]]
            elif a[0] == "s" and name is None:
                name = a[1]
            elif a[0] == "r":
                raise UnsupportedPtx(f"line {ins.line}: indirect calls are not supported")
        if name in ("vprintf", "__assertfail"):
            out.append(
                Instr(
                    ["$" + name],
                    ins.pred,
                    [("p", x) for x in args] + [("p", x) for x in rets],
                    ins.line,
                )
            )
            return
        f = self.mod.funcs.get(name)
        if f is None or f.body is None:
            raise UnsupportedPtx(f"line {ins.line}: call of external function {name}")
        if ins.pred:
            skip = f"$skip{self.inl}_{ins.line}"
            out.append(Instr(["bra"], (ins.pred[0], not ins.pred[1]), [("s", skip)], ins.line))
        self.inl += 1
        n = self.inl
        end = f"$end$i{n}"
        pmap = {}
        for v, a in zip(f.params, args):
            pmap[v.name] = a
        for v, a in zip(f.rets, rets):
            pmap[v.name] = a
        for r, t in f.regs.items():
            self.regs[f"{r}$i{n}"] = t
        self._flatten(f, depth + 1, lambda r: f"{r}$i{n}", pmap, end, out)
        out.append(Label(end, ins.line))
        if ins.pred:
            out.append(Label(skip, ins.line))
        self.calls.append(name)

    # ------------------------------------------------------------------ analysis
    def build(self):
        fn = self.fn
        body = []
        self._flatten(fn, 0, lambda r: r, {}, None, body)
        # layouts
        off = 0
        self.params = {}
        for v in fn.params:
            off = align_up(off, v.align)
            self.params[v.name] = (off, v.size, v.elt, v.count, v.align)
            off += v.size
        self.param_bytes = off
        used = set()

        def collect(o):
            if o[0] == "s":
                used.add(o[1])
            elif o[0] in ("v", "l"):
                for x in o[1]:
                    collect(x)
            elif o[0] in ("m", "n"):
                collect(o[1])
                if len(o) > 3:
                    collect(o[3])

        for it in body:
            if isinstance(it, Instr):
                for a in it.args:
                    collect(a)
        self.shared = {}
        sh = 0
        dyn = []
        allv = list(self.mod.vars.values()) + [
            v for k, v in self.vars.items() if v.space == "shared"
        ]
        names = {id(v): k for k, v in self.vars.items()}
        for v in allv:
            if v.space != "shared":
                continue
            nm = names.get(id(v), v.name)
            if nm not in used:
                continue
            if v.extern or v.count == 0:
                dyn.append((nm, v))
                continue
            sh = align_up(sh, v.align)
            self.shared[nm] = sh
            sh += v.size
        if dyn:
            sh = align_up(sh, max([v.align for _, v in dyn] + [16]))
            for nm, v in dyn:
                self.shared[nm] = sh
        self.shstatic = sh
        self.locals = {}
        lo = 0
        for nm, v in self.vars.items():
            if v.space == "local":
                lo = align_up(lo, v.align)
                self.locals[nm] = lo
                lo += v.size
        self.localsize = align_up(lo, 16)
        self._resolve_params(body)
        self._blocks(body)
        return self

    def _resolve_params(self, body):
        """Local .param variables (call sequences) become pseudo registers."""
        for it in body:
            if not isinstance(it, Instr):
                continue
            if it.op[0] in ("ld", "st") and len(it.op) > 1 and it.op[1].split("::")[0] == "param":
                k = 1 if it.op[0] == "ld" else 0
                m = it.args[k]
                if m[0] == "m" and m[1][0] == "s" and m[1][1] not in self.params:
                    it.op[0] = "$ldp" if k else "$stp"

    def preg(self, name, off, bits):
        r = f"#{name}@{off}"
        b = max(16, bits)
        if r in self.regs:
            if TYPE_BITS[self.regs[r]] < b:
                self.regs[r] = f"b{b}"
        else:
            self.regs[r] = f"b{b}"
        return r

    def _blocks(self, body):
        # pseudo registers first, so that their widths are known
        for it in body:
            if isinstance(it, Instr) and it.op[0] in ("$ldp", "$stp"):
                ty = it.op[-1]
                vec = next((int(x[1:]) for x in it.op if x in ("v2", "v4")), 1)
                m = it.args[1 if it.op[0] == "$ldp" else 0]
                for j in range(vec):
                    self.preg(m[1][1], m[2] + j * TYPE_BITS[ty] // 8, TYPE_BITS[ty])
        blocks = []
        cur = Block()
        blocks.append(cur)
        labels = {}
        self.has_wgmma = any(isinstance(it, Instr) and it.op[0] == "wgmma" for it in body)
        for it in body:
            if isinstance(it, Label):
                if cur.ins or cur.label is not None:
                    nb = Block(it.name)
                    blocks.append(nb)
                    cur = nb
                cur.label = it.name
                labels[it.name] = cur
                continue
            o = it.op[0]
            res = None
            if self.is_bar(it) and "red" in it.op:
                kind = it.op[it.op.index("red") + 1]
                if it.args[1][0] != "i":
                    self.bad(it, "barrier reduction with a barrier number in a register")
                res = Instr(["$barredres", kind], None, [it.args[0], it.args[1]], it.line)
                it = Instr(["bar", "redarrive"], it.pred, it.args[1:], it.line)
            if self.has_wgmma:
                # a block uses a register either as accumulator (in memory) or otherwise (a local variable)
                u, d = self.uses_defs(it)
                acc = self.wg_acc(it)
                other = {r for a in it.args[1:] for r in self._regs_of(a)} if acc else set(u + d)
                if acc & cur.plain or other & (cur.acc | acc):
                    cur = Block()
                    blocks.append(cur)
                cur.acc |= acc
                cur.plain |= other
            cur.ins.append(it)
            if o in ("bra", "brx", "ret", "exit", "trap") or self.is_bar(it) or self.is_yield(it):
                cur = Block()
                blocks.append(cur)
                if res is not None:
                    cur.ins.append(res)
        # several labels on one place
        for i, b in enumerate(blocks):
            b.seq = i
        end = Block()
        end.ins = [Instr(["exit"], None, [], body[-1].line if body else 0)]
        end.seq = len(blocks)
        blocks.append(end)
        for i, b in enumerate(blocks):
            nxt = blocks[i + 1] if i + 1 < len(blocks) else None
            t = b.ins[-1] if b.ins else None
            b.nxt = nxt
            if t is not None and t.op[0] == "bra":
                tg = labels.get(t.args[0][1])
                if tg is None:
                    raise UnsupportedPtx(f"line {t.line}: unknown label {t.args[0][1]}")
                b.target = tg
                b.succ = [tg] if t.pred is None else [tg, nxt]
            elif t is not None and t.op[0] == "brx":
                b.targets = [labels[x] for x in self.brt[t.args[1][1]]]
                b.succ = list(b.targets) + ([nxt] if t.pred else [])
            elif t is not None and t.op[0] in ("ret", "exit"):
                b.succ = [] if t.pred is None else [nxt]
            elif t is not None and t.op[0] == "trap":
                b.succ = [nxt] if nxt else []
            else:
                b.succ = [nxt] if nxt else []
        # reverse post order; successors that leave loops are visited first so that they come later
        order, state = [], {}
        depth = self._loop_depth(blocks)
        stack = [(blocks[0], None)]
        state[blocks[0]] = 1

        def succs(b):
            return iter(sorted(set(b.succ), key=lambda x: (depth.get(x, 0), -x.seq)))

        stack = [(blocks[0], succs(blocks[0]))]
        while stack:
            b, itr = stack[-1]
            for s in itr:
                if s not in state:
                    state[s] = 1
                    stack.append((s, succs(s)))
                    break
            else:
                order.append(b)
                stack.pop()
        order.reverse()
        # split long blocks
        final = []
        for b in order:
            chunks = [b.ins[i : i + MAX_BLOCK] for i in range(0, len(b.ins), MAX_BLOCK)] or [[]]
            if len(chunks) > 1 and len(chunks[-1]) < 8:
                last = chunks.pop()
                chunks[-1] = chunks[-1] + last
            prev = None
            for j, ch in enumerate(chunks):
                p = Block(b.label if j == 0 else None)
                p.ins = ch
                p.src = b
                p.last = j == len(chunks) - 1
                p.first = j == 0
                if prev is not None:
                    prev.succ = [p]
                    prev.nxt = p
                else:
                    b.head = p
                final.append(p)
                prev = p
        for p in final:
            if p.last:
                b = p.src
                p.succ = [s.head for s in b.succ]
                p.nxt = b.nxt.head if b.nxt is not None and hasattr(b.nxt, "head") else None
                if hasattr(b, "target"):
                    p.target = b.target.head
                if hasattr(b, "targets"):
                    p.targets = [x.head for x in b.targets]
        for i, p in enumerate(final):
            p.id = i
        self.blocks = final

    @staticmethod
    def _loop_depth(blocks):
        """Loop depth from text-order back edges (block layout keeps loops contiguous)."""
        d = dict.fromkeys(blocks, 0)
        for b in blocks:
            for s in b.succ:
                if s.seq <= b.seq:
                    for x in blocks[s.seq : b.seq + 1]:
                        d[x] += 1
        return d

    # ------------------------------------------------------------------ registers used / defined
    _NODEF = {
        "st",
        "$stp",
        "red",
        "bra",
        "ret",
        "exit",
        "trap",
        "membar",
        "fence",
        "cp",
        "prefetch",
        "stmatrix",
        "brkpt",
        "nanosleep",
        "prefetchu",
        "discard",
        "applypriority",
        "griddepcontrol",
        "pmevent",
        "$__assertfail",
        "$vprintf",
        "brx",
        "isspacep_",
        "tensormap",
        "setmaxnreg",
    }

    def uses_defs(self, it):
        uses, defs = [], []
        op = it.op[0]

        def walk(o, acc):
            k = o[0]
            if k == "r":
                acc.append(o[1])
            elif k in ("v", "l"):
                for x in o[1]:
                    walk(x, acc)
            elif k in ("m", "n"):
                walk(o[1], uses)
                if len(o) > 3:
                    walk(o[3], uses)
            elif k == "pp":
                walk(o[1], acc)
                walk(o[2], acc)

        if op in ("$ldp", "$stp"):
            ty = it.op[-1]
            vec = next((int(x[1:]) for x in it.op if x in ("v2", "v4")), 1)
            m = it.args[1 if op == "$ldp" else 0]
            rs = [
                self.preg(m[1][1], m[2] + j * TYPE_BITS[ty] // 8, TYPE_BITS[ty]) for j in range(vec)
            ]
            if op == "$ldp":
                uses += rs
                walk(it.args[0], defs)
            else:
                defs += rs
                walk(it.args[1], uses)
        elif op in ("$vprintf", "$__assertfail"):
            for a in it.args:
                r = f"#{a[1]}@0"
                if r in self.regs:
                    (uses if not a[1].startswith("retval") else defs).append(r)
        elif op == "wmma" and it.op[1] == "store":
            for a in it.args:
                walk(a, uses)
        elif op == "wgmma":
            if it.op[1] == "mma_async":
                walk(it.args[0], defs)
                if it.args[3] != ("i", 0):
                    walk(it.args[0], uses)
                for a in it.args[1:]:
                    walk(a, uses)
        elif op == "mbarrier":
            out = it.op[1] in ("test_wait", "try_wait", "pending_count") or it.args[0][0] == "r"
            for j, a in enumerate(it.args):
                walk(a, defs if out and j == 0 else uses)
        elif op in self._NODEF or op in ("bar", "barrier"):
            for a in it.args:
                walk(a, uses)
        else:
            if it.args:
                walk(it.args[0], defs)
                for a in it.args[1:]:
                    walk(a, uses)
        if op in ("addc", "subc", "madc"):
            uses.append("#cc")
        if "cc" in it.op and op in ("add", "sub", "mad", "addc", "subc", "madc"):
            defs.append("#cc")
        if it.pred:
            uses.append(it.pred[0])
            uses += defs  # kept where the predicate is false
        return uses, defs

    def liveness(self):
        self.regs["#cc"] = "pred"
        idx = {r: i for i, r in enumerate(self.regs)}
        self.ridx = idx
        for b in self.blocks:
            up, df = 0, 0
            b.ref = []
            seen = set()
            for it in b.ins:
                u, d = self.uses_defs(it)
                for r in u:
                    if r not in idx:
                        raise UnsupportedPtx(
                            f"line {it.line}: undeclared register {r} in {it.text}"
                        )
                    bit = 1 << idx[r]
                    if not df & bit:
                        up |= bit
                    if r not in seen:
                        seen.add(r)
                        b.ref.append(r)
                for r in d:
                    if r not in idx:
                        raise UnsupportedPtx(
                            f"line {it.line}: undeclared register {r} in {it.text}"
                        )
                    df |= 1 << idx[r]
                    if r not in seen:
                        seen.add(r)
                        b.ref.append(r)
            b.up, b.df = up, df
            b.live_in = up
            b.live_out = 0
        ch = True
        while ch:
            ch = False
            for b in reversed(self.blocks):
                o = 0
                for s in b.succ:
                    o |= s.live_in
                if o != b.live_out:
                    b.live_out = o
                    ch = True
                # a definition under a partial mask keeps the old value of the other lanes
                n = b.up | (o & ~b.df)
                if n != b.live_in:
                    b.live_in = n
                    ch = True

    @staticmethod
    def _regs_of(o):
        if o[0] == "r":
            return [o[1]]
        if o[0] in ("v", "l"):
            return [r for x in o[1] for r in KernelGen._regs_of(x)]
        if o[0] in ("m", "n"):
            return KernelGen._regs_of(o[1])
        return []

    @staticmethod
    def wg_acc(it):
        """Accumulator registers of a wgmma."""
        return (
            set(KernelGen._regs_of(it.args[0]))
            if it.op[0] == "wgmma" and it.op[1] == "mma_async"
            else set()
        )

    def _wgmma_analysis(self):
        """Registers that may hold the result of a wgmma in flight; wgmmas that lack a fence."""
        acc = set()
        for b in self.blocks:
            for it in b.ins:
                acc |= self.wg_acc(it)
        tags = set(acc)
        moves = [
            (it.args[0][1], it.args[1][1])
            for b in self.blocks
            for it in b.ins
            if it.op[0] == "mov" and it.args[0][0] == "r" and it.args[1][0] == "r"
        ]
        n = -1
        while n != len(tags):
            n = len(tags)
            tags |= {d for d, s in moves if s in tags}
        # registers written since the last wgmma.fence, on any path; moves hand on the state of their source
        idx, din = self.ridx, dict.fromkeys(self.blocks)
        din[self.blocks[0]] = 0
        work = [self.blocks[0]]
        missing = set()
        while work:
            b = work.pop()
            d = din[b]
            for it in b.ins:
                o = it.op[0]
                if o == "wgmma":
                    if it.op[1] == "fence":
                        d = 0
                    elif it.op[1] == "mma_async":
                        u = set(self._regs_of(it.args[1])) if it.args[1][0] == "v" else set()
                        if it.args[3] != ("i", 0):
                            u |= self.wg_acc(it)
                        if any(d >> idx[r] & 1 for r in u):
                            missing.add(it)
                        for r in self.wg_acc(it):
                            d &= ~(1 << idx[r])
                elif (
                    o == "mov" and it.args[0][0] == "r" and it.args[1][0] in ("r", "i", "f", "x32")
                ):
                    bit = 1 << idx[it.args[0][1]]
                    d = (
                        d | bit
                        if it.args[1][0] == "r" and d >> idx[it.args[1][1]] & 1
                        else d & ~bit
                    )
                else:
                    for r in self.uses_defs(it)[1]:
                        d |= 1 << idx[r]
            for s in b.succ:
                if s is None:
                    continue
                n = d if din[s] is None else din[s] | d
                if n != din[s]:
                    din[s] = n
                    work.append(s)
        self.nofence = missing
        return acc, tags

    # ------------------------------------------------------------------ emission
    def emit(self):
        self.liveness()
        acc, tags = self._wgmma_analysis() if self.has_wgmma else (set(), set())
        names = {}
        used = set()
        for r in self.regs:
            n = re.sub(r"[^A-Za-z0-9]", "_", r.lstrip("%")) or "r"
            n = "r_" + n
            while n in used:
                n += "_"
            used.add(n)
            names[r] = n
        self.cn = names
        glob = 0
        for b in self.blocks:
            glob |= b.live_in | (b.live_out & b.df)
        gl = [r for r in self.regs if glob >> self.ridx[r] & 1 or r in acc]
        order = {64: 0, 32: 1, 16: 2, 1: 3}
        gl.sort(key=lambda r: order[self.bits(r)])
        out = ['#include "prelude.h"']
        out.append("struct W : WBase {")
        for r in gl:
            out.append(f"  {CXX[self.bits(r)]} {names[r]};")
        out.append("};")
        out += self._globals()
        self.tables = []
        body = []
        for b in self.blocks:
            body += self._block(b)
        out += body
        n = len(self.blocks)
        out.append("static const BBFn bbs[] = {" + ", ".join(f"bb{i}" for i in range(n)) + "};")
        tg = [f"__builtin_offsetof(W, {names[r]})" for r in gl if r in tags and self.bits(r) == 32]
        if tg:
            out.append("static const u32 wtags[] = {" + ", ".join(tg) + "};")
        out.append(
            f'extern "C" const KDesc ptxrun_desc = {{bbs, {n}, (i32)((sizeof(W) + 63) / 64 * 64), {self.shstatic}, '
            f"{self.localsize}, {len(self.sites)}, {'wtags' if tg else 'nullptr'}, {len(tg)}, {self.fn.maxnreg}}};"
        )
        return "\n".join(out) + "\n"

    def bits(self, r):
        return self._tb(self.regs[r])

    @staticmethod
    def _tb(t):
        b = TYPE_BITS[t]
        if b == 8:
            return 16
        if b == 128:
            raise UnsupportedPtx("128-bit registers are not supported")
        return b

    def _globals(self):
        out = []
        self.gvars = []
        used = set()
        for b in self.blocks:
            for it in b.ins:
                for a in it.args:
                    self._syms(a, used)
        todo = [v for v in self.mod.vars.values() if v.space in ("global", "const")]
        todo += [v for v in self.vars.values() if v.space in ("global", "const")]
        byname = {v.name: v for v in todo}
        # initialisers may name further variables
        work = list(used)
        while work:
            v = byname.get(work.pop())
            if v is not None and v.init:
                for x in v.init if isinstance(v.init, list) else [v.init]:
                    if isinstance(x, tuple) and x[0] == "sym" and x[1] not in used:
                        used.add(x[1])
                        work.append(x[1])
        keep = [v for v in todo if v.name in used]
        self.gname = {
            v.name: f"G{i}_" + re.sub(r"[^A-Za-z0-9]", "_", v.name) for i, v in enumerate(keep)
        }
        for v in keep:
            ct = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[v.elt_bytes]
            n = max(1, v.size // v.elt_bytes)
            init = ""
            if v.init is not None:
                vals = v.init if isinstance(v.init, list) else [v.init]
                vs = []
                for x in vals:
                    if isinstance(x, tuple) and x[0] == "sym":
                        vs.append(f"(u64){self.gname[x[1]]} + {x[2]}")
                    elif isinstance(x, tuple):
                        t = x[1]
                        if t[:2].lower() == "0f" or t[:2].lower() == "0d":
                            vs.append(hex(int(t[2:], 16)))
                        else:
                            vs.append(
                                hex(f32_bits(float(t)) if v.elt_bytes == 4 else f64_bits(float(t)))
                            )
                    else:
                        vs.append(f"({ct}){x}")
                init = " = {" + ", ".join(vs) + "}"
            out.append(f"alignas({max(v.align, 16)}) static {ct} {self.gname[v.name]}[{n}]{init};")
            self.gvars.append((v.name, v.space, max(1, v.size)))
        out.append(
            'extern "C" void ptxrun_globals(u64* p) { '
            + " ".join(f"p[{i}] = (u64){self.gname[v.name]};" for i, v in enumerate(keep))
            + " }"
        )
        return out

    def _syms(self, a, used):
        if a[0] == "s":
            used.add(a[1])
        elif a[0] in ("v", "l"):
            for x in a[1]:
                self._syms(x, used)
        elif a[0] in ("m", "n"):
            self._syms(a[1], used)
            if len(a) > 3:
                self._syms(a[3], used)

    def _block(self, b):
        self.o = o = []
        self.tmp = 0
        self.cls = {}
        self.flops = 0
        self.wflops = 0.0
        self.defined = set()
        names = self.cn
        acc = set()
        if self.has_wgmma:
            for it in b.ins:
                acc |= self.wg_acc(it)
        for r in b.ref:
            if r in acc:
                continue
            bit = 1 << self.ridx[r]
            c = CXX[self.bits(r)]
            if b.up & bit:
                o.append(f"  {c} {names[r]} = w.{names[r]};")
            else:
                o.append(f"  {c} {names[r]};")
        self.cur = b
        term = None
        nb = len(b.ins)
        for i, it in enumerate(b.ins):
            is_term = (
                i == nb - 1
                and b.last
                and (
                    it.op[0] in ("bra", "brx", "ret", "exit")
                    or self.is_bar(it)
                    or self.is_yield(it)
                )
            )
            if is_term:
                if it.op[0] == "mbarrier":
                    self.instr(it)
                term = it
                break
            try:
                self.instr(it)
            except UnsupportedPtx:
                raise
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as e:
                raise UnsupportedPtx(
                    f"line {it.line}: cannot translate `{self.srcline(it.line)}` ({type(e).__name__}: {e})"
                )
        sts = [r for r in b.ref if (b.df & b.live_out) >> self.ridx[r] & 1 and r not in acc]
        tcode = self._term(b, term)
        # lanes outside m keep their values
        if sts:
            o.append("  if (m == 0xffffffffu) {")
            for r in sts:
                o.append(f"    w.{names[r]} = {names[r]};")
            o.append("  } else {")
            for r in sts:
                o.append(f"    w.{names[r]} = sel(m, {names[r]}, w.{names[r]});")
            o.append("  }")
        o += tcode
        self.tables.append(
            {
                "c": self.cls,
                "f": self.flops,
                "w": self.wflops,
                "n": sum(1 for i in b.ins),
                "line": b.ins[0].line if b.ins else 0,
            }
        )
        return [
            f"static int bb{b.id}(Cta& c, WBase& wb, u32 m) {{ W& w = (W&)wb; (void)w; (void)c;",
            *o,
            "}",
        ]

    def _term(self, b, t):
        if t is None:
            if b.nxt is None:
                return ["  return R_EXIT;"]
            return [f"  return {b.nxt.id};"]
        o = t.op[0]
        if o in ("bra", "brx"):
            self.count("branch")
        if o == "bra":
            if t.pred is None:
                return [f"  return {b.target.id};"]
            p = self.pred(t)
            f = b.nxt.id
            return [
                f"  {{ u32 t = ({p}) & m; if (t == m) return {b.target.id}; if (!t) return {f}; "
                f"w.tmask = t; w.tblk = {b.target.id}; w.fblk = {f}; return R_DIV; }}"
            ]
        if o in ("ret", "exit"):
            if t.pred is None:
                return ["  return R_EXIT;"]
            p = self.pred(t)
            return [
                f"  {{ u32 t = ({p}) & m; if (t == m) return R_EXIT; if (!t) return {b.nxt.id}; "
                f"w.tmask = t; w.tblk = EXITBLK; w.fblk = {b.nxt.id}; return R_DIV; }}"
            ]
        if o == "brx":
            x = self.val(t.args[0], 32)
            tb = ", ".join(str(x.id) for x in b.targets)
            r = [
                f"  {{ static const int T[] = {{{tb}}}; V32 ix = {x}; u32 pm = m & {self.pred(t)};",
                "    for (int l = 0; l < 32; l++) { u32 k = ((u32*)&ix)[l]; w.wnext[l] = "
                + (f"!(pm >> l & 1) ? {b.nxt.id} : " if t.pred else "")
                + f"T[k < {len(b.targets)} ? k : 0]; }} return R_IDX; }}",
            ]
            return r
        if o == "mbarrier":
            return [f"  if (w.wkind) {{ w.fblk = {b.nxt.id}; return R_SLEEP; }} return {b.nxt.id};"]
        if o == "wgmma":
            return [
                f"  return rt_wgwait(c, wb, {self.mask(t)}, {t.args[0][1]}, {b.nxt.id}, {t.line});"
            ]
        if o == "cp":
            return [
                f"  return rt_bulkwait(c, wb, {self.mask(t)}, {t.args[0][1]}, {int('read' in t.op)}, {b.nxt.id}, {t.line});"
            ]
        if o == "setmaxnreg":
            return [
                f"  return rt_setmaxnreg(c, wb, {self.mask(t)}, {int('inc' in t.op)}, {t.args[0][1]}, {b.nxt.id}, {t.line});"
            ]
        if o in ("bar", "barrier"):
            self.count("barrier")
            if t.pred:
                raise UnsupportedPtx(f"line {t.line}: predicated barrier")
            red = "redarrive" in t.op
            args = list(t.args)
            if "cluster" in t.op:  # clusters of one block
                args = [("i", 16)]
            if red:
                pr = args.pop()
            bid = args[0] if args else ("i", 0)
            cnt = args[1] if len(args) > 1 else None
            r = []
            bide = (
                str(bid[1])
                if bid[0] == "i"
                else f"(i32)((u32*)&{self.tmpv(self.val(bid, 32), 32, r)})[__builtin_ctz(m)]"
            )
            cnte = (
                "0"
                if cnt is None
                else (
                    str(cnt[1])
                    if cnt[0] == "i"
                    else f"(i32)((u32*)&{self.tmpv(self.val(cnt, 32), 32, r)})[__builtin_ctz(m)]"
                )
            )
            r.append(
                f"  w.bar_id = {bide}; w.bar_cnt = {cnte}; w.bar_line = {t.line}; w.fblk = {b.nxt.id};"
            )
            if red:
                r.append(f"  rt_barred(c, m, w.bar_id, {self.val(pr, 1)});")
            r.append("  return R_BAR;")
            return r
        raise UnsupportedPtx(f"line {t.line}: {t.text}")

    @staticmethod
    def is_bar(it):
        return it.op[0] in ("bar", "barrier") and "warp" not in it.op and "arrive" not in it.op

    @staticmethod
    def is_yield(it):
        """Instructions at which a warp may have to wait for asynchronous work."""
        o = it.op
        return (
            (o[0] == "mbarrier" and o[1] in ("try_wait", "test_wait"))
            or (o[0] == "wgmma" and o[1] == "wait_group")
            or (o[0] == "cp" and "bulk" in o and "wait_group" in o)
            or o[0] == "setmaxnreg"
        )

    # -- helpers
    def srcline(self, n):
        try:
            return self.mod.lines[n - 1].strip()
        except IndexError:
            return "?"

    def bad(self, it, why="unsupported instruction"):
        raise UnsupportedPtx(f"{self.fn.name}: line {it.line}: {why}: `{self.srcline(it.line)}`")

    def count(self, cls, n=1):
        k = CLS[cls]
        self.cls[k] = self.cls.get(k, 0) + n

    def newtmp(self):
        self.tmp += 1
        return f"t{self.tmp}"

    def tmpv(self, expr, bits, out=None):
        t = self.newtmp()
        (self.o if out is None else out).append(f"  {CXX[bits]} {t} = {expr};")
        return t

    def pred(self, it):
        if not it.pred:
            return "0xffffffffu"
        r, neg = it.pred
        return ("~" if neg else "") + self.cn[r]

    def mask(self, it):
        return "m" if not it.pred else f"(m & {self.pred(it)})"

    def val(self, o, bits, signed=False):
        """C++ expression of operand o as a lane vector of the given width."""
        k = o[0]
        if k == "r":
            r = o[1]
            rb = self.bits(r)
            n = self.cn[r]
            if rb == bits:
                return n
            if bits == 1 or rb == 1:
                raise UnsupportedPtx(f"predicate {r} used as a {bits}-bit value")
            if rb > bits:
                if rb == 64 and bits == 32:
                    return f"narrow({n})"
                if rb == 32 and bits == 16:
                    return f"narrow({n})"
                return f"narrow(narrow({n}))"
            w = "widen_s" if signed else "widen_u"
            if rb == 16 and bits == 64:
                return f"{w}({w}({n}))"
            return f"{w}({n})"
        if k == "i":
            if bits == 1:
                return "0xffffffffu" if o[1] else "0u"
            return f"{SPLAT[bits]}({hex(o[1] & ((1 << bits) - 1))}{'ull' if bits == 64 else 'u'})"
        if k == "x32":
            if bits == 64:
                return f"splat64({hex(o[1])}ull)"
            return f"splat32({hex(o[1])}u)"
        if k == "x64":
            return f"splat64({hex(o[1])}ull)"
        if k == "f":
            if bits == 64:
                return f"splat64({hex(f64_bits(o[1]))}ull)"
            return f"splat32({hex(f32_bits(o[1]))}u)"
        if k == "n":
            return f"(~{self.val(o[1], 1)})"
        if k == "s":
            return self.sym(o[1], bits, o[2] if len(o) > 2 else 0)
        if k == "sr":
            return self.special(o[1], bits)
        if k == "v":
            els = o[1]
            if len(els) == 1:
                return self.val(els[0], bits, signed)
            eb = bits // len(els)
            if len(els) == 2 and eb == 16:
                return f"pack16({self.val(els[0], 16)}, {self.val(els[1], 16)})"
            if len(els) == 2 and eb == 32:
                return f"pack32({self.val(els[0], 32)}, {self.val(els[1], 32)})"
            if len(els) == 2 and eb == 8:
                return f"vec8({self.val(els[0], 16)}, {self.val(els[1], 16)})"
            if len(els) == 4 and eb == 16:
                return (
                    f"pack32(pack16({self.val(els[0], 16)}, {self.val(els[1], 16)}), "
                    f"pack16({self.val(els[2], 16)}, {self.val(els[3], 16)}))"
                )
            if len(els) == 4 and eb == 8:
                return (
                    f"pack16(vec8({self.val(els[0], 16)}, {self.val(els[1], 16)}), "
                    f"vec8({self.val(els[2], 16)}, {self.val(els[3], 16)}))"
                )
        raise UnsupportedPtx(f"operand {o} as a {bits}-bit value")

    def sym(self, name, bits, off=0):
        if name in self.shared:
            return f"{SPLAT[bits]}({self.shared[name] + off})"
        if name in self.locals:
            return f"{SPLAT[bits]}({self.locals[name] + off})"
        if name in self.gname:
            return f"splat64((u64){self.gname[name]} + {off})"
        if name in self.params:
            if bits == 32:  # an address of the .param space: cvta.param adds the base
                return f"splat32({self.params[name][0] + off})"
            return f"splat64((u64)c.params + {self.params[name][0] + off})"
        raise UnsupportedPtx(f"unknown symbol {name}")

    def special(self, n, bits):
        t = {
            "%tid.x": "w.tidx",
            "%tid.y": "w.tidy",
            "%tid.z": "w.tidz",
            "%laneid": "w.laneid",
            "%ntid.x": "splat32(c.ntid[0])",
            "%ntid.y": "splat32(c.ntid[1])",
            "%ntid.z": "splat32(c.ntid[2])",
            "%ctaid.x": "splat32(c.ctaid[0])",
            "%ctaid.y": "splat32(c.ctaid[1])",
            "%ctaid.z": "splat32(c.ctaid[2])",
            "%nctaid.x": "splat32(c.nctaid[0])",
            "%nctaid.y": "splat32(c.nctaid[1])",
            "%nctaid.z": "splat32(c.nctaid[2])",
            "%warpid": "splat32(w.warpid)",
            "%nwarpid": "splat32(c.nwarps)",
            "%smid": "splat32(c.ctalin % 108)",
            "%nsmid": "splat32(108)",
            "%gridid": "splat32(1)",
            "%clock": "splat32((u32)rt_clock())",
            "%clock_hi": "splat32(0)",
            "%globaltimer_lo": "splat32((u32)rt_clock())",
            "%globaltimer_hi": "splat32(0)",
            "%dynamic_smem_size": "splat32(c.dynshared)",
            "%total_smem_size": "splat32(c.shsize)",
            "%aggr_smem_size": "splat32(c.shsize)",
            "%lanemask_eq": "shl_32(splat32(1), w.laneid)",
            "%lanemask_lt": "sub_32(shl_32(splat32(1), w.laneid), splat32(1))",
            "%lanemask_le": "sub_32(shl_32(splat32(2), w.laneid), splat32(1))",
            "%lanemask_gt": "not_32(sub_32(shl_32(splat32(2), w.laneid), splat32(1)))",
            "%lanemask_ge": "not_32(sub_32(shl_32(splat32(1), w.laneid), splat32(1)))",
            "%clusterid.x": "splat32(c.ctaid[0])",
            "%cluster_ctarank": "splat32(0)",
            "%cluster_nctarank": "splat32(1)",
            "%clusterid.y": "splat32(c.ctaid[1])",
            "%clusterid.z": "splat32(c.ctaid[2])",
            "%nclusterid.x": "splat32(c.nctaid[0])",
            "%nclusterid.y": "splat32(c.nctaid[1])",
            "%nclusterid.z": "splat32(c.nctaid[2])",
            **{f"%cluster_ctaid.{x}": "splat32(0)" for x in "xyz"},
            **{f"%cluster_nctaid.{x}": "splat32(1)" for x in "xyz"},
        }
        if n in ("%clock64", "%globaltimer"):
            return "splat64(rt_clock())"
        if n not in t:
            raise UnsupportedPtx(f"special register {n}")
        e = t[n]
        if bits == 64:
            return f"widen_u({e})"
        if bits == 16:
            return f"narrow({e})"
        return e

    def set(self, it, dst, expr, bits, signed=False):
        """Assign a bits-wide value to register operand dst (widening when the register is larger)."""
        k = dst[0]
        if k == "_":
            self.o.append(f"  (void)({expr});")
            return None
        if k == "v":
            els = dst[1]
            if len(els) == 1:
                return self.set(it, els[0], expr, bits, signed)
            eb = bits // len(els)
            t = self.tmpv(expr, bits)
            if len(els) == 2 and eb == 32:
                parts = [f"lo32({t})", f"hi32({t})"]
            elif len(els) == 2 and eb == 16:
                parts = [f"lo16({t})", f"hi16({t})"]
            elif len(els) == 2 and eb == 8:
                parts = [f"and_16({t}, splat16(255))", f"shr_u16i({t}, 8)"]
            elif len(els) == 4 and eb == 16:
                parts = [
                    f"lo16(lo32({t}))",
                    f"hi16(lo32({t}))",
                    f"lo16(hi32({t}))",
                    f"hi16(hi32({t}))",
                ]
            elif len(els) == 4 and eb == 8:
                parts = [f"narrow(and_32(shr_u32i({t}, {8 * j}), splat32(255)))" for j in range(4)]
            else:
                raise UnsupportedPtx(f"line {it.line}: vector destination")
            for d, e in zip(els, parts):
                if d[0] != "_":
                    self.set(it, d, e, max(eb, 16))
            return None
        if k != "r":
            raise UnsupportedPtx(f"line {it.line}: destination {dst}")
        rb = self.bits(dst[1])
        if rb != bits:
            if rb < bits:
                expr = f"narrow({expr})" if (rb, bits) != (16, 64) else f"narrow(narrow({expr}))"
            else:
                w = "widen_s" if signed else "widen_u"
                expr = f"{w}({expr})" if (bits, rb) != (16, 64) else f"{w}({w}({expr}))"
        n = self.cn[dst[1]]
        if it.pred:
            self.o.append(f"  {n} = sel({self.pred(it)}, {expr}, {n});")
        else:
            self.o.append(f"  {n} = {expr};")
        return None

    def site(self, it, cls):
        self.sites.append((it.line, CLS[cls]))
        return len(self.sites) - 1

    # ------------------------------------------------------------------ instructions
    def instr(self, it):
        f = getattr(self, "i_" + it.op[0].replace("$", "x_"), None)
        if f is None:
            self.bad(it)
        f(it)

    def ty(self, it):
        t = it.op[-1]
        if t not in TYPE_BITS:
            self.bad(it, "unknown type")
        return t

    def i_mov(self, it):
        self.count("mov")
        t = self.ty(it)
        if t == "pred":
            self.set(it, it.args[0], self.val(it.args[1], 1), 1)
            return
        b = self._tb(t)
        self.set(it, it.args[0], self.val(it.args[1], b), b)

    def _ibin(self, it, name, cls="int_alu"):
        t = self.ty(it)
        b = TYPE_BITS[t]
        self.count(cls)
        self.set(
            it, it.args[0], f"{name}_{b}({self.val(it.args[1], b)}, {self.val(it.args[2], b)})", b
        )

    def _f32wrap(self, it, e):
        if "sat" in it.op:
            e = f"fsat_32({e})"
        if "ftz" in it.op:
            e = f"ftz_32({e})"
        return e

    def _f32in(self, it, o):
        e = self.val(o, 32)
        return f"ftz_32({e})" if "ftz" in it.op else e

    def _rnd(self, it):
        for r in ("rz", "rm", "rp"):
            if r in it.op:
                return r
        return None

    def _fbin(self, it, name):
        t = self.ty(it)
        a, b = it.args[1], it.args[2]
        if t == "f32":
            self.count("fp32_add_mul")
            r = self._rnd(it)
            fn = f"f{name}_{r}" if r else f"f{name}_32"
            self.set(
                it,
                it.args[0],
                self._f32wrap(it, f"{fn}({self._f32in(it, a)}, {self._f32in(it, b)})"),
                32,
            )
        elif t == "f64":
            if self._rnd(it):
                self.bad(it)
            self.count("fp64")
            self.set(it, it.args[0], f"f{name}_64({self.val(a, 64)}, {self.val(b, 64)})", 64)
        elif t in ("f16", "bf16"):
            self.count("fp16")
            self.set(
                it,
                it.args[0],
                self._hsat(it, t, f"h{name}_{t}({self.val(a, 16)}, {self.val(b, 16)})"),
                16,
            )
        elif t in ("f16x2", "bf16x2"):
            self.count("fp16")
            self._h2(it, f"h{name}_{t[:-2]}", [a, b], t[:-2])
        else:
            self.bad(it)

    def _hsat(self, it, t, e):
        if "relu" in it.op:
            e = f"hmax_{t}({e}, splat16(0))"
        if "sat" in it.op:
            one = 0x3C00 if t == "f16" else 0x3F80
            e = f"hmin_{t}(hmax_{t}({e}, splat16(0)), splat16({one}))"
        return e

    def _h2(self, it, fn, ops, t):
        v = [self.tmpv(self.val(o, 32), 32) for o in ops]
        lo = self._hsat(it, t, f"{fn}({', '.join(f'lo16({x})' for x in v)})")
        hi = self._hsat(it, t, f"{fn}({', '.join(f'hi16({x})' for x in v)})")
        self.set(it, it.args[0], f"pack16({lo}, {hi})", 32)

    def i_add(self, it):
        t = self.ty(it)
        if "f" in t and t[0] in "fb" and t[:2] != "b1" and t not in ("b32", "b64", "b16"):
            return self._fbin(it, "add")
        if "cc" in it.op:
            return self._carry(it)
        if "sat" in it.op:
            self.count("int_alu")
            return self.set(
                it,
                it.args[0],
                f"addsat_s32({self.val(it.args[1], 32)}, {self.val(it.args[2], 32)})",
                32,
            )
        self._ibin(it, "add")
        return None

    def i_sub(self, it):
        t = self.ty(it)
        if t in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
            return self._fbin(it, "sub")
        if "cc" in it.op:
            return self._carry(it)
        if "sat" in it.op:
            self.count("int_alu")
            return self.set(
                it,
                it.args[0],
                f"subsat_s32({self.val(it.args[1], 32)}, {self.val(it.args[2], 32)})",
                32,
            )
        self._ibin(it, "sub")
        return None

    def _carry(self, it):
        """add / sub / mad with carry in and / or out."""
        o = it.op[0]
        b = TYPE_BITS[self.ty(it)]
        sub = o.startswith("sub")
        self.count("int_mul" if o.startswith("mad") else "int_alu")
        if o.startswith("mad"):
            fn = f"mulhi_u{b}" if "hi" in it.op else f"mul_{b}"
            if "hi" in it.op and self.ty(it)[0] == "s":
                fn = f"mulhi_s{b}"
            x = self.tmpv(f"{fn}({self.val(it.args[1], b)}, {self.val(it.args[2], b)})", b)
            y = self.tmpv(self.val(it.args[3], b), b)
        else:
            x, y = self.tmpv(self.val(it.args[1], b), b), self.tmpv(self.val(it.args[2], b), b)
        cin = o in ("addc", "subc", "madc")
        cc = self.cn["#cc"]
        z = self.tmpv(f"{'sub' if sub else 'add'}_{b}({x}, {y})", b)
        if cin:
            z2 = self.tmpv(
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
            n = self.tmpv(c, 1)
            self.o.append(
                f"  {cc} = " + (f"sel({self.pred(it)}, {n}, {cc})" if it.pred else n) + ";"
            )
        self.set(it, it.args[0], z2, b)

    i_addc = i_subc = i_madc = _carry

    def i_mul(self, it):
        t = self.ty(it)
        if t in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
            return self._fbin(it, "mul")
        b = TYPE_BITS[t]
        self.count("int_mul")
        A, B = it.args[1], it.args[2]
        if "wide" in it.op:
            self.set(it, it.args[0], f"mulw_{t}({self.val(A, b)}, {self.val(B, b)})", 2 * b)
        elif "hi" in it.op:
            self.set(it, it.args[0], f"mulhi_{t}({self.val(A, b)}, {self.val(B, b)})", b)
        else:
            self.set(it, it.args[0], f"mul_{b}({self.val(A, b)}, {self.val(B, b)})", b)
        return None

    def i_mul24(self, it):
        if "lo" not in it.op:
            self.bad(it)
        self.count("int_mul")
        t = self.ty(it)
        self.set(
            it, it.args[0], f"mul24_{t}({self.val(it.args[1], 32)}, {self.val(it.args[2], 32)})", 32
        )

    def i_mad(self, it):
        t = self.ty(it)
        if t in ("f32", "f64"):
            return self.i_fma(it)
        b = TYPE_BITS[t]
        self.count("int_mul")
        A, B, C = it.args[1:4]
        if "cc" in it.op:
            return self._carry(it)
        if "wide" in it.op:
            self.set(
                it,
                it.args[0],
                f"add_{2 * b}(mulw_{t}({self.val(A, b)}, {self.val(B, b)}), {self.val(C, 2 * b)})",
                2 * b,
            )
        elif "hi" in it.op:
            self.set(
                it,
                it.args[0],
                f"add_{b}(mulhi_{t}({self.val(A, b)}, {self.val(B, b)}), {self.val(C, b)})",
                b,
            )
        else:
            self.set(
                it,
                it.args[0],
                f"add_{b}(mul_{b}({self.val(A, b)}, {self.val(B, b)}), {self.val(C, b)})",
                b,
            )
        return None

    def i_fma(self, it):
        t = self.ty(it)
        ops = it.args[1:4]
        if t == "f32":
            self.count("fp32_fma")
            r = self._rnd(it)
            fn = f"ffma_{r}" if r else "ffma_32"
            e = f"{fn}({', '.join(self._f32in(it, o) for o in ops)})"
            self.set(it, it.args[0], self._f32wrap(it, e), 32)
        elif t == "f64":
            self.count("fp64")
            self.set(it, it.args[0], f"ffma_64({', '.join(self.val(o, 64) for o in ops)})", 64)
        elif t in ("f16", "bf16"):
            self.count("fp16")
            self.set(
                it,
                it.args[0],
                self._hsat(it, t, f"hfma_{t}({', '.join(self.val(o, 16) for o in ops)})"),
                16,
            )
        elif t in ("f16x2", "bf16x2"):
            self.count("fp16")
            self._h2(it, f"hfma_{t[:-2]}", ops, t[:-2])
        else:
            self.bad(it)

    def i_div(self, it):
        t = self.ty(it)
        if t == "f32":
            self.count("mufu")
            self.count("fp32_add_mul", 2 if "full" in it.op or "approx" in it.op else 8)
            r = self._rnd(it)
            e = f"{'fdiv_' + r if r else 'fdiv_32'}({self._f32in(it, it.args[1])}, {self._f32in(it, it.args[2])})"
            self.set(it, it.args[0], self._f32wrap(it, e), 32)
        elif t == "f64":
            self.count("fp64", 10)
            self.set(
                it,
                it.args[0],
                f"fdiv_64({self.val(it.args[1], 64)}, {self.val(it.args[2], 64)})",
                64,
            )
        else:
            b = TYPE_BITS[t]
            self.count("int_alu", 20)
            self.set(
                it, it.args[0], f"div_{t}({self.val(it.args[1], b)}, {self.val(it.args[2], b)})", b
            )

    def i_rem(self, it):
        t = self.ty(it)
        b = TYPE_BITS[t]
        self.count("int_alu", 20)
        self.set(
            it, it.args[0], f"rem_{t}({self.val(it.args[1], b)}, {self.val(it.args[2], b)})", b
        )

    def _minmax(self, it, n):
        t = self.ty(it)
        A = it.args[1:]
        nan = "nan" if "NaN" in it.op else ""
        if "xorsign" in it.op:
            self.bad(it)
        if t == "f32":
            self.count("fp32_other")
            e = f"f{n}{nan}_32({self._f32in(it, A[0])}, {self._f32in(it, A[1])})"
            for x in A[2:]:
                e = f"f{n}{nan}_32({e}, {self._f32in(it, x)})"
            self.set(it, it.args[0], e, 32)
        elif t == "f64":
            self.count("fp64")
            self.set(it, it.args[0], f"f{n}_64({self.val(A[0], 64)}, {self.val(A[1], 64)})", 64)
        elif t in ("f16", "bf16"):
            self.count("fp16")
            self.set(
                it, it.args[0], f"h{n}{nan}_{t}({self.val(A[0], 16)}, {self.val(A[1], 16)})", 16
            )
        elif t in ("f16x2", "bf16x2"):
            self.count("fp16")
            self._h2(it, f"h{n}{nan}_{t[:-2]}", A, t[:-2])
        else:
            b = TYPE_BITS[t]
            self.count("int_alu")
            e = f"{n}_{t}({self.val(A[0], b)}, {self.val(A[1], b)})"
            if "relu" in it.op:
                e = f"max_s32({e}, splat32(0))"
            self.set(it, it.args[0], e, b)

    def i_min(self, it):
        self._minmax(it, "min")

    def i_max(self, it):
        self._minmax(it, "max")

    def _logic(self, it, n):
        t = self.ty(it)
        if t == "pred":
            self.count("setp_sel")
            c = {"and": "&", "or": "|", "xor": "^"}[n]
            self.set(
                it, it.args[0], f"({self.val(it.args[1], 1)} {c} {self.val(it.args[2], 1)})", 1
            )
        else:
            self._ibin(it, n)

    def i_and(self, it):
        self._logic(it, "and")

    def i_or(self, it):
        self._logic(it, "or")

    def i_xor(self, it):
        self._logic(it, "xor")

    def i_not(self, it):
        t = self.ty(it)
        self.count("int_alu")
        if t == "pred":
            self.set(it, it.args[0], f"(~{self.val(it.args[1], 1)})", 1)
        else:
            b = TYPE_BITS[t]
            self.set(it, it.args[0], f"not_{b}({self.val(it.args[1], b)})", b)

    def i_cnot(self, it):
        b = TYPE_BITS[self.ty(it)]
        self.count("int_alu")
        self.set(
            it,
            it.args[0],
            f"sel(eq_u{b}({self.val(it.args[1], b)}, {SPLAT[b]}(0)), {SPLAT[b]}(1), {SPLAT[b]}(0))",
            b,
        )

    def _unary_f(self, it, n):
        t = self.ty(it)
        if t in ("f32", "f64"):
            self.count("fp32_add_mul")
            b = TYPE_BITS[t]
            e = f"f{n}_{b}({self._f32in(it, it.args[1]) if b == 32 else self.val(it.args[1], b)})"
            self.set(it, it.args[0], e, b)
        elif t in ("f16", "bf16"):
            self.count("fp16")
            self.set(it, it.args[0], f"f{n}_16({self.val(it.args[1], 16)})", 16)
        elif t in ("f16x2", "bf16x2"):
            self.count("fp16")
            self.set(it, it.args[0], f"f{n}_16x2({self.val(it.args[1], 32)})", 32)
        else:
            b = TYPE_BITS[t]
            self.count("int_alu")
            self.set(it, it.args[0], f"{n}_{b}({self.val(it.args[1], b)})", b)

    def i_neg(self, it):
        self._unary_f(it, "neg")

    def i_abs(self, it):
        self._unary_f(it, "abs")

    def i_copysign(self, it):
        b = TYPE_BITS[self.ty(it)]
        self.count("fp32_other")
        self.set(
            it, it.args[0], f"copysign_{b}({self.val(it.args[1], b)}, {self.val(it.args[2], b)})", b
        )

    def _shift(self, it, n):
        t = self.ty(it)
        b = TYPE_BITS[t]
        self.count("int_alu", 2 if b == 64 else 1)
        sg = "s" if t[0] == "s" else "u"
        nm = "shl" if n == "shl" else f"shr_{sg}"
        sep = "_" if n == "shl" else ""
        a = self.val(it.args[1], b)
        s = it.args[2]
        if s[0] == "i":
            k = s[1] & 0xFFFFFFFF
            if k >= b:
                if n == "shr" and sg == "s":
                    k = b - 1
                else:
                    return self.set(it, it.args[0], f"{SPLAT[b]}(0)", b)
            self.set(it, it.args[0], f"{nm}{sep}{b}i({a}, {k})", b)
        else:
            self.set(it, it.args[0], f"{nm}{sep}{b}({a}, {self.val(s, 32)})", b)
        return None

    def i_shl(self, it):
        self._shift(it, "shl")

    def i_shr(self, it):
        self._shift(it, "shr")

    def i_shf(self, it):
        self.count("int_alu")
        self.set(
            it,
            it.args[0],
            f"shf_{it.op[1]}_{it.op[2]}({', '.join(self.val(a, 32) for a in it.args[1:4])})",
            32,
        )

    def i_prmt(self, it):
        self.count("int_alu")
        mode = it.op[2] if len(it.op) > 2 else "g"
        self.set(
            it, it.args[0], f"prmt_{mode}({', '.join(self.val(a, 32) for a in it.args[1:4])})", 32
        )

    def i_lop3(self, it):
        self.count("int_alu")
        if "and" in it.op or "or" in it.op:
            self.bad(it)
        lut = it.args[4][1]
        a, b, c = (self.tmpv(self.val(x, 32), 32) for x in it.args[1:4])
        self.set(it, it.args[0], f"lut3({a}, {b}, {c}, {lut})", 32)

    def i_bfe(self, it):
        t = self.ty(it)
        b = TYPE_BITS[t]
        self.count("int_alu")
        p, n = it.args[2], it.args[3]
        a = self.val(it.args[1], b)
        if p[0] == "i" and n[0] == "i" and p[1] + n[1] <= b and n[1] > 0:
            e = f"shl_{b}i({a}, {b - p[1] - n[1]})"
            self.set(it, it.args[0], f"shr_{t[0]}{b}i({e}, {b - n[1]})", b)
        else:
            self.set(it, it.args[0], f"bfe_{t}({a}, {self.val(p, 32)}, {self.val(n, 32)})", b)

    def i_bfi(self, it):
        b = TYPE_BITS[self.ty(it)]
        self.count("int_alu")
        a, bb, p, n = it.args[1:5]
        if p[0] == "i" and n[0] == "i":
            mk = (((1 << min(n[1], 64)) - 1) << p[1]) & ((1 << b) - 1)
            o = {32: "u", 64: "ull"}[b]
            self.set(
                it,
                it.args[0],
                f"or_{b}(and_{b}(shl_{b}i({self.val(a, b)}, {min(p[1], b - 1)}), {SPLAT[b]}({mk}{o})), "
                f"and_{b}({self.val(bb, b)}, {SPLAT[b]}({((1 << b) - 1) ^ mk}{o})))",
                b,
            )
        else:
            one = f"{SPLAT[b]}(1)"
            pv = self.tmpv(f"and_32({self.val(p, 32)}, splat32(255))", 32)
            nv = self.tmpv(f"and_32({self.val(n, 32)}, splat32(255))", 32)
            mk = self.tmpv(f"shl_{b}(sub_{b}(shl_{b}({one}, {nv}), {one}), {pv})", b)
            self.set(
                it,
                it.args[0],
                f"or_{b}(and_{b}(shl_{b}({self.val(a, b)}, {pv}), {mk}), and_{b}({self.val(bb, b)}, not_{b}({mk})))",
                b,
            )

    def _un32(self, it, n):
        t = self.ty(it)
        b = TYPE_BITS[t]
        self.count("int_alu")
        rb = 64 if (n == "brev" and b == 64) else 32
        self.set(it, it.args[0], f"{n}_{b}({self.val(it.args[1], b)})", rb)

    def i_popc(self, it):
        self._un32(it, "popc")

    def i_clz(self, it):
        self._un32(it, "clz")

    def i_brev(self, it):
        self._un32(it, "brev")

    def i_bfind(self, it):
        t = self.ty(it)
        b = TYPE_BITS[t]
        self.count("int_alu")
        e = f"bfind_{t}({self.val(it.args[1], b)})"
        if "shiftamt" in it.op:
            x = self.tmpv(e, 32)
            e = f"sel(eq_u32({x}, splat32(0xffffffffu)), {x}, sub_32(splat32({b - 1}), {x}))"
        self.set(it, it.args[0], e, 32)

    def i_sad(self, it):
        self.count("int_alu")
        self.set(
            it,
            it.args[0],
            f"sad_{self.ty(it)}({', '.join(self.val(a, 32) for a in it.args[1:4])})",
            32,
        )

    def i_dp4a(self, it):
        self.count("int_mul")
        self.set(
            it,
            it.args[0],
            f"dp4a_{it.op[1][0]}{it.op[2][0]}({', '.join(self.val(a, 32) for a in it.args[1:4])})",
            32,
        )

    def _mufu(self, it, n):
        t = self.ty(it)
        if t == "f32":
            self.count("mufu")
            if "rn" in it.op:
                self.count("fp32_add_mul", 6)
            self.set(
                it, it.args[0], self._f32wrap(it, f"{n}_32({self._f32in(it, it.args[1])})"), 32
            )
        elif t == "f64":
            self.count("fp64", 8)
            self.set(it, it.args[0], f"{n}_64({self.val(it.args[1], 64)})", 64)
        elif t in ("f16", "bf16"):
            self.count("mufu")
            a, z = ("f16_to_f32", "f32_to_f16") if t == "f16" else ("bf16_to_f32", "f32_to_bf16")
            self.set(it, it.args[0], f"{z}({n}_32({a}({self.val(it.args[1], 16)})))", 16)
        elif t in ("f16x2", "bf16x2"):
            self.count("mufu", 2)
            a, z = ("f16_to_f32", "f32_to_f16") if t == "f16x2" else ("bf16_to_f32", "f32_to_bf16")
            x = self.tmpv(self.val(it.args[1], 32), 32)
            self.set(
                it,
                it.args[0],
                f"pack16({z}({n}_32({a}(lo16({x})))), {z}({n}_32({a}(hi16({x})))))",
                32,
            )
        else:
            self.bad(it)

    def i_ex2(self, it):
        self._mufu(it, "ex2")

    def i_lg2(self, it):
        self._mufu(it, "lg2")

    def i_rcp(self, it):
        self._mufu(it, "rcp")

    def i_rsqrt(self, it):
        self._mufu(it, "rsqrt")

    def i_sqrt(self, it):
        self._mufu(it, "sqrt")

    def i_sin(self, it):
        self._mufu(it, "sin")

    def i_cos(self, it):
        self._mufu(it, "cos")

    def i_tanh(self, it):
        self._mufu(it, "tanh")

    # -- setp / selp / set
    _CMPU = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}

    def _cmp(self, it, op, t, a, b):
        if t in ("f16", "bf16"):
            cv = "f16_to_f32" if t == "f16" else "bf16_to_f32"
            x, y, ty = f"{cv}({self.val(a, 16)})", f"{cv}({self.val(b, 16)})", "f32"
        elif t == "pred":
            self.bad(it)
        else:
            bb = TYPE_BITS[t]
            x, y = self.val(a, bb), self.val(b, bb)
            ty = t if t[0] != "b" else f"u{bb}"
            if t == "f32" and "ftz" in it.op:
                x, y = f"ftz_32({x})", f"ftz_32({y})"
        if ty[0] == "f":
            if op == "num":
                return f"(~nan_{ty}({x}, {y}))"
            if op == "nan":
                return f"nan_{ty}({x}, {y})"
            if op in self._CMPU:
                base = self._CMPU[op]
                fb = 64 if ty == "f64" else 32
                X, Y = self.tmpv(x, fb), self.tmpv(y, fb)
                return f"({base}_{ty}({X}, {Y}) | nan_{ty}({X}, {Y}))"
            if op == "ne":
                fb = 64 if ty == "f64" else 32
                X, Y = self.tmpv(x, fb), self.tmpv(y, fb)
                return f"(ne_{ty}({X}, {Y}) & ~nan_{ty}({X}, {Y}))"
        else:
            op = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(op, op)
        return f"{op}_{ty}({x}, {y})"

    def i_setp(self, it):
        self.count("setp_sel")
        t = self.ty(it)
        op = it.op[1]
        bop = next((x for x in it.op[2:-1] if x in ("and", "or", "xor")), None)
        e = self._cmp(it, op, t, it.args[1], it.args[2])
        dst = it.args[0]
        third = self.val(it.args[3], 1) if bop else None
        c = {"and": "&", "or": "|", "xor": "^", None: None}[bop]
        if t in ("f16x2", "bf16x2"):
            self.bad(it)
        if dst[0] == "pp":
            x = self.tmpv(e, 1)
            if dst[1][0] != "_":
                self.set(it, dst[1], f"({x} {c} {third})" if c else x, 1)
            if dst[2][0] != "_":
                self.set(it, dst[2], f"(~{x} {c} {third})" if c else f"(~{x})", 1)
        else:
            self.set(it, dst, f"({e} {c} {third})" if c else e, 1)

    def i_set(self, it):
        self.count("setp_sel")
        # set.CmpOp{.BoolOp}{.ftz}.dtype.stype
        t, dt = it.op[-1], it.op[-2]
        bop = next((x for x in it.op[2:-2] if x in ("and", "or", "xor")), None)
        if t in ("f16x2", "bf16x2") and dt in ("f16x2", "bf16x2", "u32", "s32"):
            h = t[:-2]
            a, b = self.tmpv(self.val(it.args[1], 32), 32), self.tmpv(self.val(it.args[2], 32), 32)
            cv = f"{h}_to_f32"
            parts = []
            for half in ("lo16", "hi16"):
                x, y = self.tmpv(f"{cv}({half}({a}))", 32), self.tmpv(f"{cv}({half}({b}))", 32)
                op = it.op[1]
                base = self._CMPU.get(op)
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
            return self.set(it, it.args[0], f"pack16({parts[0]}, {parts[1]})", 32)
        e = self._cmp(it, it.op[1], t, it.args[1], it.args[2])
        if bop:
            e = f"({e} { {'and': '&', 'or': '|', 'xor': '^'}[bop] } {self.val(it.args[3], 1)})"
        b = TYPE_BITS[dt]
        one = {"f32": "0x3f800000u", "f16": "0x3c00", "bf16": "0x3f80"}.get(
            dt, "0xffffffffu" if b == 32 else "0xffff"
        )
        self.set(it, it.args[0], f"sel({e}, {SPLAT[b]}({one}), {SPLAT[b]}(0))", b)
        return None

    def i_selp(self, it):
        self.count("setp_sel")
        t = self.ty(it)
        b = self._tb(t)
        self.set(
            it,
            it.args[0],
            f"sel({self.val(it.args[3], 1)}, {self.val(it.args[1], b)}, {self.val(it.args[2], b)})",
            b,
        )

    def i_slct(self, it):
        self.count("setp_sel")
        b = TYPE_BITS[it.op[-2]]
        c = (
            f"ge_s32({self.val(it.args[3], 32)}, splat32(0))"
            if it.op[-1] == "s32"
            else f"ge_f32({self.val(it.args[3], 32)}, splat32(0))"
        )
        self.set(
            it, it.args[0], f"sel({c}, {self.val(it.args[1], b)}, {self.val(it.args[2], b)})", b
        )

    def i_testp(self, it):
        self.count("setp_sel")
        x = self.tmpv(self.val(it.args[1], 32), 32)
        if self.ty(it) != "f32":
            self.bad(it)
        a = f"and_32({x}, splat32(0x7fffffffu))"
        e = {
            "finite": f"lt_u32({a}, splat32(0x7f800000u))",
            "infinite": f"eq_u32({a}, splat32(0x7f800000u))",
            "notanumber": f"gt_u32({a}, splat32(0x7f800000u))",
            "number": f"le_u32({a}, splat32(0x7f800000u))",
        }.get(it.op[1])
        if e is None:
            self.bad(it)
        self.set(it, it.args[0], e, 1)

    # -- conversions
    def i_cvt(self, it):
        ops = it.op
        # positions of the types: the last type tokens
        tys = [x for x in ops[1:] if x in TYPE_BITS]
        mods = [x for x in ops[1:] if x not in TYPE_BITS]
        if len(tys) != 2:
            self.bad(it)
        d, s = tys
        if (d[0] in "sub" and s[0] in "su" and not d.startswith("bf")) or (
            d == "f32" and s == "bf16"
        ):
            self.count("int_alu")
        elif d in ("f16x2", "bf16x2") or (s == "f16" and d == "f32"):
            self.count("cvt_pack")
        else:
            self.count("cvt")
        if "pack" in mods:
            self.bad(it)
        ftz, sat, relu = "ftz" in mods, "sat" in mods, "relu" in mods
        A = it.args[1]
        if d in ("f16x2", "bf16x2") and s == "f32":
            h = d[:-2]
            a, b = self.val(A, 32), self.val(it.args[2], 32)
            if relu:
                a, b = f"fmax_32({a}, splat32(0))", f"fmax_32({b}, splat32(0))"
            if "rz" in mods:
                e = f"pack16(f32_to_{h}_rz({b}), f32_to_{h}_rz({a}))"
            elif h == "bf16":
                e = f"cvt_pack_bf16x2({a}, {b})"
            else:
                e = f"pack16(f32_to_f16({b}), f32_to_f16({a}))"
            return self.set(it, it.args[0], e, 32)
        if d in ("e4m3x2", "e5m2x2") and s == "f32":
            return self.set(
                it, it.args[0], f"f32x2_to_{d}({self.val(A, 32)}, {self.val(it.args[2], 32)})", 16
            )
        if d == "f16x2" and s in ("e4m3x2", "e5m2x2"):
            return self.set(it, it.args[0], f"{s}_to_f16x2({self.val(A, 16)})", 32)
        if d == "tf32":
            return self.set(it, it.args[0], f"f32_to_tf32({self.val(A, 32)})", 32)
        fl = {"f16", "bf16", "f32", "f64"}
        if d in fl and s in fl:
            return self._cvt_ff(it, d, s, mods, ftz, sat, relu)
        if d in fl:
            return self._cvt_fi(it, d, s, mods, sat)
        if s in fl:
            return self._cvt_if(it, d, s, mods, ftz)
        self._cvt_ii(it, d, s, sat)
        return None

    def _cvt_ff(self, it, d, s, mods, ftz, sat, relu):
        x = self.val(it.args[1], TYPE_BITS[s])
        rint = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
        # to f32 or f64 first
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
            return self.set(it, it.args[0], x, 64)
        if cb == 64:
            if d == "f32":
                x = f"f64_to_f32{'_rz' if 'rz' in mods else ''}({x})"
                if "rm" in mods or "rp" in mods:
                    self.bad(it, "unsupported rounding mode")
            else:
                x = f"f64_to_f32({x})"
        if sat:
            x = f"fsat_32({x})"
        if relu:
            x = f"fmax_32({x}, splat32(0))"
        if d == "f32":
            if ftz:
                x = f"ftz_32({x})"
            return self.set(it, it.args[0], x, 32)
        if "rm" in mods or "rp" in mods:
            self.bad(it, "unsupported rounding mode")
        self.set(it, it.args[0], f"f32_to_{d}{'_rz' if 'rz' in mods else ''}({x})", 16)
        return None

    def _src_int(self, it, s, a, bits):
        """Integer operand of type s, extended to `bits` (32 or 64)."""
        sb = TYPE_BITS[s]
        sg = s[0] == "s"
        if sb == 8:
            x = self.val(a, 32)
            x = f"sext8({x})" if sg else f"and_32({x}, splat32(255))"
            sb = 32
        elif sb == 16:
            x = self.val(a, 16)
            x = f"widen_{'s' if sg else 'u'}({x})"
            sb = 32
        else:
            x = self.val(a, sb)
        if sb == 32 and bits == 64:
            x = f"widen_{'s' if sg else 'u'}({x})"
        if sb == 64 and bits == 32:
            x = f"narrow({x})"
        return x

    def _cvt_fi(self, it, d, s, mods, sat):
        sb = 64 if TYPE_BITS[s] == 64 else 32
        x = self._src_int(it, s, it.args[1], sb)
        st = s[0] + str(sb)
        if d == "f64":
            return self.set(it, it.args[0], f"cvt_f64_{st}({x})", 64)
        r = self._rnd(it)
        if d == "f32":
            return self.set(it, it.args[0], f"cvt_f32_{st}{'_' + r if r else ''}({x})", 32)
        # f16 / bf16 through f64, rounded once more through f32 (exact for |x| < 2^24)
        self.set(it, it.args[0], f"f32_to_{d}(cvt_f32_{st}({x}))", 16)
        return None

    def _cvt_if(self, it, d, s, mods, ftz):
        x = self.val(it.args[1], TYPE_BITS[s])
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
        self.set(it, it.args[0], f"f{cb}_{dd}({x})", max(16, db), signed=d[0] == "s")

    def _cvt_ii(self, it, d, s, sat):
        db, sb = TYPE_BITS[d], TYPE_BITS[s]
        wb = 64 if max(db, sb) == 64 else 32
        x = self._src_int(it, s, it.args[1], wb)
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
        # the destination register may be wider than the type: sign- or zero-extend
        if db == 8:
            x = f"narrow({x})" if wb == 64 else x
            x = f"sext8({x})" if d[0] == "s" else f"and_32({x}, splat32(255))"
            return self.set(it, it.args[0], x, 32, signed=d[0] == "s")
        if db == 16:
            x = f"narrow(narrow({x}))" if wb == 64 else f"narrow({x})"
            return self.set(it, it.args[0], x, 16, signed=d[0] == "s")
        if db == 32 and wb == 64:
            x = f"narrow({x})"
        self.set(it, it.args[0], x, db, signed=d[0] == "s")
        return None

    def i_cvta(self, it):
        self.count("mov")
        b = TYPE_BITS[self.ty(it)]
        x = self.val(it.args[1], b)
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
            t = self.tmpv(x, 64)
            x = f"add_64({t}, sel(lt_u64({t}, splat64(65536)), splat64((u64)c.params), splat64(0)))"
        self.set(it, it.args[0], x, b)

    def i_isspacep(self, it):
        x = self.tmpv(self.val(it.args[1], 64), 64)
        sp = it.op[1].split("::")[0]
        hi = f"shr_u64i({x}, 36)"
        e = {
            "shared": f"eq_u64({hi}, splat64(SHWIN >> 36))",
            "local": f"eq_u64({hi}, splat64(LOWIN >> 36))",
            "global": f"(ne_u64({hi}, splat64(SHWIN >> 36)) & ne_u64({hi}, splat64(LOWIN >> 36)))",
        }.get(sp, "0u")
        self.set(it, it.args[0], e, 1)

    # -- memory
    def _memop(self, it):
        """(space, vec, type)"""
        sp, vec, ty = "generic", 1, None
        for x in it.op[1:]:
            h = x.split("::")[0]
            if h in ("global", "shared", "local", "param", "const"):
                sp = h  # shared::cluster: clusters have one block
            elif x in ("v2", "v4", "v8"):
                vec = int(x[1:])
            elif x in TYPE_BITS:
                ty = x
        return sp, vec, ty

    def _addr(self, it, m, bits):
        base, off = m[1], m[2]
        if base[0] == "i":
            return self.val(base, bits), off
        return self.val(base, bits), off

    def _ldst_mem(self, it, sp, m):
        if sp in ("global", "const"):
            a, off = self._addr(it, m, 64)
            return "global", a, off
        if sp in ("shared", "local"):
            a, off = self._addr(it, m, 32)
            return sp, a, off
        base = m[1]
        if base[0] == "s" and base[1] in self.shared:
            return "shared", self.val(base, 32), m[2]
        a, off = self._addr(it, m, 64)
        return "generic", a, off

    def _raw(self, x, rawbits, ty):
        """Raw loaded value (zero-extended) of a type, sign-extended inside 16 bits for s8."""
        if ty == "s8":
            return f"shr_s16i(shl_16i({x}, 8), 8)"
        return x

    @staticmethod
    def _vol(it):
        return (
            " | VOL"
            if any(x in ("acquire", "release", "relaxed", "volatile", "mmio") for x in it.op)
            else ""
        )

    def i_ld(self, it):
        sp, vec, ty = self._memop(it)
        if ty is None:
            self.bad(it)
        m = it.args[1]
        if sp == "param":
            return self._ldparam(it, vec, ty, m)
        nb = TYPE_BITS[ty]
        if nb == 128:
            self.bad(it)
        rb = max(16, nb)
        vol = self._vol(it)
        space, a, off = self._ldst_mem(it, sp, m)
        cls = {
            "global": "ld_global",
            "generic": "ld_global",
            "shared": "ld_shared",
            "local": "ld_local",
        }[space]
        self.count(cls)
        t = self.newtmp()
        self.o.append(
            f"  {CXX[rb]} {t}[{vec}]; ld_{space}<{nb // 8}, {vec}>(c, wb, {self.mask(it)}, {a}, {off}, {t}, {it.line}{vol}, {self.site(it, cls)});"
        )
        dst = it.args[0]
        dsts = dst[1] if dst[0] == "v" else [dst]
        for j, d in enumerate(dsts):
            if d[0] == "_":
                continue
            self.set(it, d, self._raw(f"{t}[{j}]", rb, ty), rb, signed=ty[0] == "s")
        return None

    i_ldu = i_ld

    def _ldparam(self, it, vec, ty, m):
        base = m[1]
        nb = TYPE_BITS[ty]
        rb = max(16, nb)
        self.count("mov")
        dst = it.args[0]
        dsts = dst[1] if dst[0] == "v" else [dst]
        ct = {8: "u8", 16: "u16", 32: "u32", 64: "u64"}[nb]
        for j, d in enumerate(dsts):
            if d[0] == "_":
                continue
            if base[0] == "s":
                off = self.params[base[1]][0] + m[2] + j * nb // 8
                e = f"{SPLAT[rb]}(*(const {ct}*)(c.params + {off}))"
            else:
                t = self.newtmp()
                self.o.append(
                    f"  {CXX[rb]} {t}; ld_global<{nb // 8}, 1>(c, wb, {self.mask(it)}, {self.val(base, 64)}, {m[2] + j * nb // 8}, &{t}, {it.line}, {self.site(it, 'other')});"
                )
                e = t
            self.set(it, d, self._raw(e, rb, ty), rb, signed=ty[0] == "s")

    def i_x_ldp(self, it):
        self.count("mov")
        ty = it.op[-1]
        m, dst = it.args[1], it.args[0]
        dsts = dst[1] if dst[0] == "v" else [dst]
        nb = max(16, TYPE_BITS[ty])
        for j, d in enumerate(dsts):
            r = f"#{m[1][1]}@{m[2] + j * TYPE_BITS[ty] // 8}"
            self.set(it, d, self._raw(self.val(("r", r), nb), nb, ty), nb, signed=ty[0] == "s")

    def i_x_stp(self, it):
        self.count("mov")
        ty = it.op[-1]
        m, src = it.args[0], it.args[1]
        srcs = src[1] if src[0] == "v" else [src]
        nb = max(16, TYPE_BITS[ty])
        for j, s in enumerate(srcs):
            r = f"#{m[1][1]}@{m[2] + j * TYPE_BITS[ty] // 8}"
            self.set(it, ("r", r), self.val(s, nb), nb)

    def i_st(self, it):
        sp, vec, ty = self._memop(it)
        if ty is None or TYPE_BITS[ty] == 128:
            self.bad(it)
        nb = TYPE_BITS[ty]
        rb = max(16, nb)
        if sp == "param":
            self.bad(it)
        space, a, off = self._ldst_mem(it, sp, it.args[0])
        src = it.args[1]
        srcs = src[1] if src[0] == "v" and vec > 1 else [src]
        t = self.newtmp()
        cls = {
            "global": "st_global",
            "generic": "st_global",
            "shared": "st_shared",
            "local": "st_local",
        }[space]
        self.count(cls)
        self.o.append(
            f"  {CXX[rb]} {t}[{vec}] = {{{', '.join(self.val(s, rb) for s in srcs)}}}; "
            f"st_{space}<{nb // 8}, {vec}>(c, wb, {self.mask(it)}, {a}, {off}, {t}, {it.line}{self._vol(it)}, {self.site(it, cls)});"
        )

    def i_ldmatrix(self, it):
        n = {"x1": 1, "x2": 2, "x4": 4}[next(x for x in it.op if x in ("x1", "x2", "x4"))]
        if "m8n8" not in it.op or it.op[-1] != "b16":
            self.bad(it)
        self.count("ldmatrix")
        a, off = self._addr(it, it.args[1], 32)
        t = self.newtmp()
        self.o.append(
            f"  V32 {t}[{n}]; rt_ldmatrix(c, wb, {self.mask(it)}, {a}, {off}, {n}, {int('trans' in it.op)}, {t}, {it.line}, {self.site(it, 'ldmatrix')});"
        )
        dst = it.args[0]
        for j, d in enumerate(dst[1] if dst[0] == "v" else [dst]):
            self.set(it, d, f"{t}[{j}]", 32)

    def i_stmatrix(self, it):
        n = {"x1": 1, "x2": 2, "x4": 4}[next(x for x in it.op if x in ("x1", "x2", "x4"))]
        if "m8n8" not in it.op:
            self.bad(it)
        self.count("st_shared")
        a, off = self._addr(it, it.args[0], 32)
        t = self.newtmp()
        src = it.args[1]
        srcs = src[1] if src[0] == "v" else [src]
        self.o.append(
            f"  V32 {t}[{n}] = {{{', '.join(self.val(s, 32) for s in srcs)}}}; rt_stmatrix(c, wb, {self.mask(it)}, {a}, {off}, {n}, {int('trans' in it.op)}, {t}, {it.line}, {self.site(it, 'st_shared')});"
        )

    # -- sm_90a
    def i_mbarrier(self, it):
        op, a = it.op, it.args
        k = op[1]
        self.count("mbarrier")
        if k in ("try_wait", "test_wait"):
            ad, off = self._addr(it, a[1], 32)
            par = "parity" in op
            t = self.tmpv(self.val(a[2], 32 if par else 64), 32 if par else 64)
            kind = (1 if k == "test_wait" else 0) | (0 if par else 2)
            e = f"rt_mbar_test(c, wb, {self.mask(it)}, {kind}, {ad}, {off}, {'&' + t if par else 'nullptr'}, {'nullptr' if par else '&' + t}, {it.line})"
            return self.set(it, a[0], e, 1)
        if k == "pending_count":
            self.bad(it)
        kinds = {
            "init": 0,
            "inval": 1,
            "arrive": 3 if "expect_tx" in op else 2,
            "expect_tx": 4,
            "complete_tx": 5,
            "arrive_drop": 6,
        }
        if k not in kinds or (k == "arrive_drop" and "expect_tx" in op):
            self.bad(it)
        dst = None
        if a[0][0] != "m":
            dst, a = a[0], a[1:]
        ad, off = self._addr(it, a[0], 32)
        v = f"&{self.tmpv(self.val(a[1], 32), 32)}" if len(a) > 1 else "nullptr"
        st = "nullptr"
        if dst is not None and dst[0] == "r":
            st = self.newtmp()
            self.o.append(f"  V64 {st} = splat64(0);")
        self.o.append(
            f"  rt_mbar(c, wb, {self.mask(it)}, {kinds[k]}, {ad}, {off}, {v}, {'&' + st if st != 'nullptr' else st}, {it.line});"
        )
        if st != "nullptr":
            self.set(it, dst, st, 64)
        return None

    WG_FMT = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4}

    def i_wgmma(self, it):
        op, a = it.op, it.args
        if op[1] == "fence":
            self.count("fence")
            return
        if op[1] == "commit_group":
            self.o.append(f"  rt_wgcommit(c, wb, {self.mask(it)}, {it.line});")
            return
        if op[1] != "mma_async" or "sp" in op:
            self.bad(it)
        shape = next(x for x in op if re.fullmatch(r"m64n\d+k\d+", x))
        N, K = (int(x) for x in re.findall(r"\d+", shape)[1:])
        dt, at, bt = op[op.index(shape) + 1 :][:3]
        fmt = self.WG_FMT.get(at)
        if (
            fmt is None
            or dt not in ("f32", "f16")
            or N % 8
            or not 8 <= N <= 256
            or K * (2 if fmt < 2 else 4 if fmt == 2 else 1) != 32
        ):
            self.bad(it)
        if at != bt:
            self.bad(it, "wgmma of different operand types")
        d = self._regs_of(a[0])
        if len(d) != N // (2 if dt == "f32" else 4):
            self.bad(it, "unexpected number of accumulator registers")
        rs = a[1][0] == "v"
        imm = [x[1] for x in a[4:]]
        sa, sb = (imm[0], imm[1]) if len(imm) > 1 else (1, 1)
        ta, tb = 0, 0
        if fmt < 2 and len(imm) > 2:
            ta, tb = (0, imm[2]) if rs else (imm[2], imm[3])
        self.count("wgmma")
        self.flops += 2 * 16 * N * K  # a quarter of the warpgroup's
        self.wflops += (
            2 * 16 * N * K * (2.0 if fmt == 2 else 0.5 if fmt > 2 else 1.0) * 0.62
        )  # the model's rate is that of mma.sync
        t = self.newtmp()
        offs = ", ".join(f"__builtin_offsetof(W, {self.cn[r]})" for r in d)
        self.o.append(
            f"  static const u32 {t}d[] = {{{offs}}}; static const Wg {t}g = {{{fmt}, {N}, {len(d)}, {int(rs)}, {ta}, {tb}, {sa}, {sb}, "
            f"{int(dt == 'f16')}, {it.line}, {int(it in self.nofence)}}};"
        )
        if rs:
            self.o.append(f"  V32 {t}a[4] = {{{', '.join(self.val(x, 32) for x in a[1][1])}}};")
        else:
            self.o.append(f"  V64 {t}x = {self.val(a[1], 64)};")
        self.o.append(
            f"  rt_wgmma(c, wb, {self.mask(it)}, {t}g, {t}d, {t + 'a' if rs else 'nullptr'}, {'nullptr' if rs else '&' + t + 'x'}, "
            f"{self.val(a[2], 64)}, {self.val(a[3], 1)});"
        )

    TM_FIELDS = [
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

    def i_tensormap(self, it):
        op, a = it.op, it.args
        if op[1] == "cp_fenceproxy":
            d, s = a[0], a[1]
            self.o.append(
                f"  rt_tensormap_cp(c, wb, {self.mask(it)}, {self.val(d[1], 64)}, {d[2]}, {self.val(s[1], 64)}, {s[2]}, {it.line});"
            )
            return
        f = next((x for x in op if x in self.TM_FIELDS), None)
        if op[1] != "replace" or f is None:
            self.bad(it)
        n = self.TM_FIELDS.index(f)
        ordv = a[1][1] if len(a) > 2 else 0
        sh = any(x.split("::")[0] == "shared" for x in op)
        self.count("other")
        self.o.append(
            f"  rt_tensormap(c, wb, {self.mask(it)}, {n}, {int(sh)}, {self.val(a[0][1], 64)}, {a[0][2]}, {ordv}, {self.val(a[-1], 64)}, {it.line});"
        )

    def i_mapa(self, it):
        b = TYPE_BITS[self.ty(it)]
        self.set(it, it.args[0], self.val(it.args[1], b), b)

    def i_getctarank(self, it):
        self.set(it, it.args[0], "splat32(0)", 32)

    def i_setmaxnreg(self, it):
        self.bad(it)  # ends a block

    RED = {
        "add": "AT_ADD",
        "min": "AT_MIN",
        "max": "AT_MAX",
        "and": "AT_AND",
        "or": "AT_OR",
        "xor": "AT_XOR",
        "inc": "AT_INC",
        "dec": "AT_DEC",
    }

    def _bulk(self, it):
        op, a = it.op, it.args
        if "commit_group" in op:
            self.o.append(f"  rt_bulkcommit(c, wb, {self.mask(it)}, {it.line});")
            return
        if "prefetch" in op:
            return
        if any(
            x.startswith(("im2col", "multicast", "cta_group"))
            or x in ("gather4", "scatter4", "cp_mask")
            or "tile::" in x
            for x in op
        ):
            self.bad(it)
        load = "mbarrier::complete_tx::bytes" in op
        cls = "tma" if load else "tma_store"
        self.count(cls)
        red = op[1] == "reduce"
        kind = "0" if load else "1"
        if red:
            kind = f"2 + {self.RED[next(x for x in op if x in self.RED)]}"
        sp = [x for x in op if x.split("::")[0] in ("shared", "global")]
        if len(sp) != 2 or (sp[0].startswith("shared") and sp[1].startswith("shared")):
            self.bad(it)
        gm, sm = (a[1], a[0]) if load else (a[0], a[1])
        s, soff = self._addr(it, sm, 32)
        mb, moff = "nullptr", 0
        t = self.newtmp()
        if "tensor" in op:
            rank = int(next(x for x in op if re.fullmatch(r"[1-5]d", x))[0])
            if len(gm) < 4 or len(gm[3][1]) != rank:
                self.bad(it)
            if load:
                e, moff = self._addr(it, a[2], 32)
                mb = f"&{self.tmpv(e, 32)}"
            self.o.append(
                f"  V32 {t}[] = {{{', '.join(self.val(x, 32) for x in gm[3][1])}}}; rt_tma(c, wb, {self.mask(it)}, {kind}, {rank}, {s}, {soff}, "
                f"{self.val(gm[1], 64)}, {gm[2]}, {t}, {mb}, {moff}, {it.line}, {self.site(it, cls)});"
            )
            return
        if load:
            e, moff = self._addr(it, a[3], 32)
            mb = f"&{self.tmpv(e, 32)}"
        ty = "0"
        if red:
            y = next(x for x in op if x in TYPE_BITS)
            ty = "TY_" + {"b32": "u32", "b64": "u64"}.get(y, y).upper()
        g, goff = self._addr(it, gm, 64)
        self.o.append(
            f"  rt_bulk(c, wb, {self.mask(it)}, {kind}, {ty}, {s}, {soff}, {g}, {goff}, {self.val(a[2], 32)}, {mb}, {moff}, {it.line}, {self.site(it, cls)});"
        )

    def i_cp(self, it):
        if "bulk" in it.op:
            return self._bulk(it)
        if it.op[1] != "async":
            self.bad(it)
        if it.op[2] == "mbarrier":  # arrive when the thread's earlier copies have landed: now
            self.o.append(f"  rt_cpwait(c, wb, {self.mask(it)}, -1, {it.line});")
            if "noinc" in it.op:
                ad, off = self._addr(it, it.args[0], 32)
                self.o.append(
                    f"  rt_mbar(c, wb, {self.mask(it)}, 2, {ad}, {off}, nullptr, nullptr, {it.line});"
                )
            return None
        if "commit_group" in it.op:
            self.o.append(f"  rt_cpcommit(c, wb, {self.mask(it)});")
            return None
        if "wait_group" in it.op:
            self.o.append(f"  rt_cpwait(c, wb, {self.mask(it)}, {it.args[0][1]}, {it.line});")
            return None
        if "wait_all" in it.op:
            self.o.append(f"  rt_cpwait(c, wb, {self.mask(it)}, -1, {it.line});")
            return None
        if it.op[2] not in ("ca", "cg"):
            self.bad(it)
        self.count("cp_async")
        d, doff = self._addr(it, it.args[0], 32)
        s, soff = self._addr(it, it.args[1], 64)
        n = it.args[2][1]
        hint = any(x.startswith("L2::cache_hint") for x in it.op)
        extra = it.args[3:]
        if hint and extra:
            extra = extra[:-1]
        sz = "nullptr"
        if extra:
            e = extra[0]
            if (e[0] == "r" and self.bits(e[1]) == 1) or e[0] == "n":
                t = self.tmpv(f"sel({self.val(e, 1)}, splat32(0), splat32({n}))", 32)
            else:
                t = self.tmpv(self.val(e, 32), 32)
            sz = f"&{t}"
        self.o.append(
            f"  rt_cpasync(c, wb, {self.mask(it)}, {d}, {doff}, {s}, {soff}, {n}, {sz}, {it.line}, {self.site(it, 'cp_async')});"
        )
        return None

    def i_mma(self, it):
        op = it.op
        shape = next(x for x in op if re.fullmatch(r"m\d+n\d+k\d+", x))
        M, N, K = (int(x) for x in re.findall(r"\d+", shape))
        tys = [x for x in op if x in TYPE_BITS and x != "b1"]
        if "sp" in op or any(x.startswith("sp::") for x in op):
            self.bad(it, "sparse mma")
        dt, at, bt, ct = tys[-4:]
        self.count("mma")
        self.flops += 2 * M * N * K
        # relative cost of one FLOP with respect to f16 / bf16 on sm_80 tensor cores
        self.wflops += 2 * M * N * K * {"tf32": 2.0, "f64": 16.0, "s8": 0.5, "u8": 0.5}.get(at, 1.0)
        D, A, B, C = it.args[:4]

        def lst(o):
            return o[1] if o[0] == "v" else [o]

        if shape == "m8n8k4" and at == "f64":
            t = self.newtmp()
            self.o.append(
                f"  V64 {t}[2], {t}c[2] = {{{', '.join(self.val(x, 64) for x in lst(C))}}}; V64 {t}a = {self.val(lst(A)[0], 64)}, {t}b = {self.val(lst(B)[0], 64)};"
                f" rt_mma_f64(c, wb, {self.mask(it)}, {t}, &{t}a, &{t}b, {t}c, {it.line});"
            )
            for j, d in enumerate(lst(D)):
                self.set(it, d, f"{t}[{j}]", 64)
            return
        if (M, N) != (16, 8):
            self.bad(it)
        kb = {"f16": 8, "bf16": 8, "tf32": 4, "s8": 16, "u8": 16}.get(at)
        if kb is None or K % kb or K // kb not in (1, 2):
            self.bad(it)
        kr = K // kb
        fm = {"f16": 0, "bf16": 1, "tf32": 2, "s8": 3, "u8": 3}[at]
        fl = (1 if at == "u8" else 0) | (2 if bt == "u8" else 0) | (4 if "satfinite" in op else 0)
        cf16 = ct == "f16"
        if (dt == "f16") != cf16:
            self.bad(it)
        nc = 2 if cf16 else 4
        a, b, cc, dd = lst(A), lst(B), lst(C), lst(D)
        if len(a) != 2 * kr or len(b) != kr or len(cc) != nc or len(dd) != nc:
            self.bad(it, "unexpected fragment size")
        t = self.newtmp()
        self.o.append(
            f"  V32 {t}[{nc}], {t}a[] = {{{', '.join(self.val(x, 32) for x in a)}}}, {t}b[] = {{{', '.join(self.val(x, 32) for x in b)}}}, "
            f"{t}c[] = {{{', '.join(self.val(x, 32) for x in cc)}}}; rt_mma(c, wb, {self.mask(it)}, {fm}, {kr}, {int(cf16)}, {fl}, {t}, {t}a, {t}b, {t}c, {it.line});"
        )
        for j, d in enumerate(dd):
            self.set(it, d, f"{t}[{j}]", 32)

    def i_wmma(self, it):
        op = it.op
        kind = op[1]
        M, N, K = (
            int(x)
            for x in re.findall(r"\d+", next(x for x in op if re.fullmatch(r"m\d+n\d+k\d+", x)))
        )

        def lst(o):
            return o[1] if o[0] == "v" else [o]

        majors = [x for x in op if x in ("row", "col")]
        t = self.newtmp()
        if kind == "mma":
            tys = [x for x in op[2:] if x in TYPE_BITS]
            # f16: wmma.mma...{.dtype}.{ctype}; others: .f32.atype.btype.f32
            if len(tys) == 2:
                dt, at, ct = tys[0], "f16", tys[1]
            else:
                dt, at, ct = tys[0], tys[1], tys[3]
            if at not in ("f16", "bf16", "tf32") or dt not in ("f32", "f16"):
                self.bad(it)
            self.count("mma", M * N * K // 2048)
            self.flops += 2 * M * N * K
            self.wflops += 2 * M * N * K * (2.0 if at == "tf32" else 1.0)
            d, a, b, c = (lst(x) for x in it.args[:4])
            fm = {"f16": 0, "bf16": 1, "tf32": 2}[at]

            def ini(x):
                return ", ".join(self.val(y, 32) for y in x)

            self.o.append(
                f"  V32 {t}[{len(d)}], {t}a[] = {{{ini(a)}}}, {t}b[] = {{{ini(b)}}}, {t}c[] = {{{ini(c)}}}; rt_wmma(c, wb, {self.mask(it)}, {fm}, {M}, {N}, {K}, "
                f"{len(a)}, {len(b)}, {int(ct == 'f16')}, {int(dt == 'f16')}, {t}a, {t}b, {t}c, {t}, {it.line});"
            )
            for j, x in enumerate(d):
                self.set(it, x, f"{t}[{j}]", 32)
            return
        ty = op[-1]
        if ty not in ("f16", "bf16", "tf32", "f32"):
            self.bad(it)
        es = TYPE_BITS[ty] // 8
        sp = next(
            (x.split("::")[0] for x in op if x.split("::")[0] in ("global", "shared")), "generic"
        )
        spc = {"global": "SP_GLOBAL", "shared": "SP_SHARED", "generic": "SP_GENERIC"}[sp]
        which = op[2]
        R, C = {"a": (M, K), "b": (K, N), "c": (M, N), "d": (M, N)}[which]
        row = int(majors[0] == "row")
        cls = ("ld_" if kind == "load" else "st_") + ("shared" if sp == "shared" else "global")
        self.count(cls)
        mo, rg = (it.args[1], lst(it.args[0])) if kind == "load" else (it.args[0], lst(it.args[1]))
        ld = self.val(it.args[2], 32) if len(it.args) > 2 else f"splat32({C if row else R})"
        base, off = self.val(mo[1], 64), mo[2]
        common = (
            f"c, wb, {self.mask(it)}, {spc}, {base}, {off}, {ld}, {R}, {C}, {row}, {es}, {len(rg)}"
        )
        if kind == "load":
            self.o.append(
                f"  V32 {t}[{len(rg)}]; rt_wmma_ld({common}, {t}, {it.line}, {self.site(it, cls)});"
            )
            for j, x in enumerate(rg):
                self.set(it, x, f"{t}[{j}]", 32)
        elif kind == "store":
            self.o.append(
                f"  V32 {t}[] = {{{', '.join(self.val(x, 32) for x in rg)}}}; rt_wmma_st({common}, {t}, {it.line}, {self.site(it, cls)});"
            )
        else:
            self.bad(it)

    # -- warp
    def i_shfl(self, it):
        if it.op[1] != "sync":
            self.bad(it)
        self.count("shfl")
        mode = {"up": 0, "down": 1, "bfly": 2, "idx": 3}[it.op[2]]
        dst = it.args[0]
        pp = dst[0] == "pp"
        p = self.newtmp()
        a, b, c, mm = (self.val(x, 32) for x in it.args[1:5])
        self.o.append(
            f"  u32 {p} = 0; V32 {p}r = rt_shfl(c, wb, {self.mask(it)}, {mode}, {a}, {b}, {c}, {mm}, &{p}, {it.line});"
        )
        self.set(it, dst[1] if pp else dst, f"{p}r", 32)
        if pp and dst[2][0] != "_":
            self.set(it, dst[2], p, 1)

    def i_vote(self, it):
        self.count("vote")
        k = it.op[2]
        mode = {"all": 0, "any": 1, "uni": 2, "ballot": 3}[k]
        e = f"rt_vote(c, wb, {self.mask(it)}, {mode}, {self.val(it.args[1], 1)}, {self.val(it.args[2], 32)}, {it.line})"
        if mode == 3:
            self.set(it, it.args[0], f"splat32({e})", 32)
        else:
            self.set(it, it.args[0], e, 1)

    def i_activemask(self, it):
        self.count("vote")
        self.set(it, it.args[0], f"splat32({self.mask(it)})", 32)

    def i_match(self, it):
        self.count("vote")
        b = TYPE_BITS[self.ty(it)]
        v = self.val(it.args[1], b)
        v = f"widen_u({v})" if b == 32 else v
        if it.op[1] == "any":
            self.set(
                it,
                it.args[0],
                f"rt_match_any(c, wb, {self.mask(it)}, {v}, {self.val(it.args[2], 32)}, {it.line})",
                32,
            )
        else:
            p = self.newtmp()
            dst = it.args[0]
            self.o.append(
                f"  u32 {p} = 0; V32 {p}r = rt_match_all(c, wb, {self.mask(it)}, {v}, {self.val(it.args[2], 32)}, &{p}, {it.line});"
            )
            self.set(it, dst[1] if dst[0] == "pp" else dst, f"{p}r", 32)
            if dst[0] == "pp" and dst[2][0] != "_":
                self.set(it, dst[2], p, 1)

    def i_redux(self, it):
        self.count("vote")
        t = self.ty(it)
        k = it.op[2]
        op = {
            "add": 0,
            "min": 3 if t == "s32" else 1,
            "max": 4 if t == "s32" else 2,
            "and": 5,
            "or": 6,
            "xor": 7,
        }[k]
        self.set(
            it,
            it.args[0],
            f"rt_redux(c, wb, {self.mask(it)}, {op}, {self.val(it.args[1], 32)}, {self.val(it.args[2], 32)}, {it.line})",
            32,
        )

    def i_elect(self, it):
        self.count("vote")
        dst = it.args[0]
        if dst[0] == "pp":
            if dst[1][0] != "_":
                self.set(it, dst[1], "splat32(__builtin_ctz(m))", 32)
            self.set(it, dst[2], "(m & -m)", 1)
        else:
            self.set(it, dst, "(m & -m)", 1)

    def i_bar(self, it):
        # bar.warp.sync / bar.arrive (the others end a block)
        self.count("barrier")
        if it.op[1] == "warp":
            self.o.append(
                f"  rt_synccheck(c, wb, {self.mask(it)}, {self.val(it.args[0], 32)}, {it.line});"
            )
        elif "cluster" in it.op:
            pass  # barrier.cluster.arrive: the wait is a barrier of the block
        elif "arrive" in it.op:
            e = [
                str(x[1])
                if x[0] == "i"
                else f"(i32)((u32*)&{self.tmpv(self.val(x, 32), 32)})[__builtin_ctz(m)]"
                for x in it.args[:2]
            ]
            self.o.append(f"  rt_bar_arrive(c, wb, {self.mask(it)}, {e[0]}, {e[1]}, {it.line});")
        else:
            self.bad(it)

    i_barrier = i_bar

    def i_x_barredres(self, it):
        kind = it.op[1]
        bid = it.args[1][1]
        if kind == "popc":
            self.set(it, it.args[0], f"splat32(c.barredres[{bid}][0])", 32)
        elif kind == "and":
            self.set(
                it,
                it.args[0],
                f"(c.barredres[{bid}][0] == c.barredres[{bid}][1] ? 0xffffffffu : 0u)",
                1,
            )
        else:
            self.set(it, it.args[0], f"(c.barredres[{bid}][0] ? 0xffffffffu : 0u)", 1)

    def i_membar(self, it):
        self.count("fence")
        if "proxy" in it.op:
            if "async" in it.op:
                self.o.append(f"  rt_proxy_fence(c, wb, {self.mask(it)});")
            elif "tensormap::generic" in it.op and "acquire" in it.op:
                m = it.args[0]
                self.o.append(
                    f"  rt_tensormap_acquire(c, wb, {self.mask(it)}, {self.val(m[1], 64)}, {m[2]}, {it.line});"
                )
            return
        if "mbarrier_init" in it.op:
            return
        if "cta" not in it.op:
            self.o.append(f"  rt_fence(c, wb, {self.mask(it)});")

    i_fence = i_membar

    def _atom(self, it, has_dst):
        ops = it.op
        if any(x in ("v2", "v4", "v8") for x in ops):
            self.bad(it, "vector atomics")
        sp = "SP_GENERIC"
        for x in ops[1:]:
            h = x.split("::")[0]
            if h == "global":
                sp = "SP_GLOBAL"
            elif h == "shared":
                sp = "SP_SHARED"
        kinds = {
            "add": "AT_ADD",
            "min": "AT_MIN",
            "max": "AT_MAX",
            "and": "AT_AND",
            "or": "AT_OR",
            "xor": "AT_XOR",
            "exch": "AT_EXCH",
            "cas": "AT_CAS",
            "inc": "AT_INC",
            "dec": "AT_DEC",
        }
        k = next((x for x in ops[1:] if x in kinds), None)
        t = self.ty(it)
        tt = {"b32": "u32", "b64": "u64"}.get(t, t).upper()
        if k is None or t == "b128":
            self.bad(it)
        b = TYPE_BITS[t]
        self.count("atomic")
        args = it.args[1:] if has_dst else it.args
        m = args[0]
        a = self.val(m[1], 64)
        if m[1][0] == "s" and m[1][1] in self.shared:
            sp = "SP_SHARED"
        v = self.newtmp()
        sem = (1 if "acquire" in ops or "acq_rel" in ops else 0) | (
            2 if "release" in ops or "acq_rel" in ops else 0
        )
        sem = f" | {sem << 8}" if sem else ""
        hint = any(x.startswith("L2::cache_hint") for x in ops)
        srcs = args[1:]
        if hint:
            srcs = srcs[:-1]
        srcs = [s[1][0] if s[0] == "v" and len(s[1]) == 1 else s for s in srcs]
        self.o.append(
            f"  {CXX[b]} {v}b = {self.val(srcs[0], b)}"
            + (f", {v}c = {self.val(srcs[1], b)}" if len(srcs) > 1 else "")
            + (f", {v}" if has_dst else "")
            + ";"
        )
        self.o.append(
            f"  rt_atom(c, wb, {self.mask(it)}, {sp}, {a}, {m[2]}, {kinds[k]}{sem}, TY_{tt}, &{v}b, "
            f"{'&' + v + 'c' if len(srcs) > 1 else 'nullptr'}, {'&' + v if has_dst else 'nullptr'}, {it.line}, {self.site(it, 'atomic')});"
        )
        if has_dst:
            self.set(it, it.args[0], v, b)

    def i_atom(self, it):
        self._atom(it, True)

    def i_red(self, it):
        if "async" in it.op:
            self.bad(it)
        self._atom(it, False)

    # -- misc
    def _nop(self, it):
        pass

    i_prefetch = i_prefetchu = i_nanosleep = i_discard = i_applypriority = i_griddepcontrol = (
        i_pmevent
    ) = _nop

    def i_createpolicy(self, it):
        self.set(it, it.args[0], "splat64(0)", 64)

    def i_trap(self, it):
        self.o.append(f'  rt_fail(c, wb, {self.mask(it)}, 7, {it.line}, "trap");')

    i_brkpt = i_trap

    def i_x___assertfail(self, it):
        a = [self.val(("r", f"#{x[1]}@0"), 64 if j != 2 else 32) for j, x in enumerate(it.args[:4])]
        self.o.append(
            f"  rt_assert(c, wb, {self.mask(it)}, {a[0]}, {a[1]}, {a[2]}, {a[3]}, {it.line});"
        )

    def i_x_vprintf(self, it):
        a = [self.val(("r", f"#{x[1]}@0"), 64) for x in it.args[:2]]
        e = f"rt_vprintf(c, wb, {self.mask(it)}, {a[0]}, {a[1]}, {it.line})"
        r = f"#{it.args[2][1]}@0" if len(it.args) > 2 else None
        if r in self.regs:
            self.set(it, ("r", r), e, 32)
        else:
            self.o.append(f"  {e};")


def generate(mod, name):
    """Return (C++ text, description dict) of kernel `name`."""
    fn = mod.funcs.get(name)
    if fn is None or fn.kind != "entry":
        raise UnsupportedPtx(
            f"no entry {name}; the module has {[k for k, f in mod.funcs.items() if f.kind == 'entry']}"
        )
    g = KernelGen(mod, fn).build()
    text = g.emit()
    desc = {
        "name": name,
        "params": [[n, *v] for n, v in g.params.items()],
        "param_bytes": g.param_bytes,
        "shared_static": g.shstatic,
        "local_bytes": g.localsize,
        "reqntid": fn.reqntid,
        "maxntid": fn.maxntid,
        "nblocks": len(g.blocks),
        "tables": g.tables,
        "sites": g.sites,
        "gvars": g.gvars,
        "classes": CLASSES,
        "ninstr": sum(len(b.ins) for b in g.blocks),
    }
    return text, desc
