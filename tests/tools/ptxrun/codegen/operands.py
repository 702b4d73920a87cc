"""Translation of operands to C++ expressions and assignments."""

from __future__ import annotations

from ..errors import UnsupportedPtx
from ..ptx import TYPE_BITS, f32_bits, f64_bits
from .classes import CLASS_INDEX
from .registers import register_bits

CXX = {1: "u32", 16: "V16", 32: "V32", 64: "V64"}
SPLAT = {16: "splat16", 32: "splat32", 64: "splat64"}

_SPECIAL = {
    "%tid.x": "w.tidx",
    "%tid.y": "w.tidy",
    "%tid.z": "w.tidz",
    "%laneid": "w.laneid",
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
    # A cluster has one block.
    "%cluster_ctarank": "splat32(0)",
    "%cluster_nctarank": "splat32(1)",
    **{
        f"{register}.{x}": f"splat32(c.{array}[{i}])"
        for register, array in (
            ("%ntid", "ntid"),
            ("%ctaid", "ctaid"),
            ("%nctaid", "nctaid"),
            ("%clusterid", "ctaid"),
            ("%nclusterid", "nctaid"),
        )
        for i, x in enumerate("xyz")
    },
    **{f"%cluster_ctaid.{x}": "splat32(0)" for x in "xyz"},
    **{f"%cluster_nctaid.{x}": "splat32(1)" for x in "xyz"},
}


def elements(operand):
    """Return the elements of a vector operand; a list of the operand itself for any other."""
    return operand[1] if operand[0] == "v" else [operand]


def converted(expr, bits, to, signed=False):
    """Return the conversion of a vector from `bits` to `to` bits per lane."""
    steps = {16: 0, 32: 1, 64: 2}
    name = "narrow" if to < bits else "widen_s" if signed else "widen_u"
    for _ in range(abs(steps[to] - steps[bits])):
        expr = f"{name}({expr})"
    return expr


class Operands:
    """Expressions, temporaries and counters of the block that is being emitted."""

    def __init__(self, program):
        self.program = program
        self.regs, self.shared, self.params = program.regs, program.shared, program.params
        self.sites = []  # (line, class) of each instruction that accesses memory
        self.names = {}  # C++ names by register
        self.begin_block()

    def begin_block(self):
        self.o = []  # lines of C++
        self.tmp = 0
        self.counts = {}  # instructions by class
        self.flops, self.weighted_flops = 0, 0.0

    def bad(self, it, why="unsupported instruction"):
        self.program.reject(it, why)

    def count(self, cls, n=1):
        k = CLASS_INDEX[cls]
        self.counts[k] = self.counts.get(k, 0) + n

    def site(self, it, cls):
        """Add a site, an instruction whose accesses are counted, and return its number."""
        self.sites.append((it.line, CLASS_INDEX[cls]))
        return len(self.sites) - 1

    def newtmp(self):
        self.tmp += 1
        return f"t{self.tmp}"

    def tmpv(self, expr, bits, out=None):
        """Declare a variable with the value `expr` and return its name."""
        t = self.newtmp()
        (self.o if out is None else out).append(f"  {CXX[bits]} {t} = {expr};")
        return t

    def bits(self, register):
        return register_bits(self.regs[register])

    def ty(self, it):
        t = it.op[-1]
        if t not in TYPE_BITS:
            self.bad(it, "unknown type")
        return t

    def rounding(self, it):
        """Return the rounding mode of an instruction: rz, rm, rp, or None for to-nearest."""
        return next((r for r in ("rz", "rm", "rp") if r in it.op), None)

    def pred(self, it):
        if not it.pred:
            return "0xffffffffu"
        register, negated = it.pred
        return ("~" if negated else "") + self.names[register]

    def mask(self, it):
        """Return the active lanes in which an instruction's predicate is true."""
        return "m" if not it.pred else f"(m & {self.pred(it)})"

    def address(self, m, bits):
        """Return "base, offset" of a memory operand."""
        return f"{self.val(m[1], bits)}, {m[2]}"

    def call(self, it, function, *args, site=None, line=""):
        """Return a call of a runtime function for the active lanes of an instruction.

        `site` is the class of its accesses if they are counted. `line` is appended to the line
        number.
        """
        args = [self.mask(it), *args, f"{it.line}{line}"]
        if site is not None:
            args.append(self.site(it, site))
        return f"{function}(c, wb, {', '.join(map(str, args))})"

    def vals(self, operands, bits):
        """Return the expressions of operands, separated by commas."""
        return ", ".join(self.val(x, bits) for x in operands)

    def uniform(self, operand, out=None):
        """Return the scalar value of an operand that is the same in all active lanes."""
        if operand[0] == "i":
            return str(operand[1])
        return f"(i32)((u32*)&{self.tmpv(self.val(operand, 32), 32, out)})[__builtin_ctz(m)]"

    def val(self, o, bits, signed=False):
        """Return the expression of operand `o` as a lane vector of the given width."""
        k = o[0]
        if k == "r":
            own = self.bits(o[1])
            if own != bits and 1 in (own, bits):
                raise UnsupportedPtx(f"predicate {o[1]} cannot be used as a {bits}-bit value")
            name = self.names[o[1]]
            return name if own == bits else converted(name, own, bits, signed)
        if k == "i":
            if bits == 1:
                return "0xffffffffu" if o[1] else "0u"
            return f"{SPLAT[bits]}({hex(o[1] & ((1 << bits) - 1))}{'ull' if bits == 64 else 'u'})"
        if k == "x32" and bits != 64:
            return f"splat32({hex(o[1])}u)"
        if k in ("x32", "x64"):
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
        if k == "v" and len(o[1]) == 1:
            return self.val(o[1][0], bits, signed)
        if k == "v":
            joined = self._joined(o[1], bits // len(o[1]))
            if joined is not None:
                return joined
        raise UnsupportedPtx(f"operand {o} cannot be used as a {bits}-bit value")

    def _joined(self, elements, bits):
        """Return elements of `bits` bits, joined to one value; None for unsupported shapes."""
        x = [self.val(e, max(bits, 16)) for e in elements]
        if len(x) == 2 and bits in (8, 16, 32):
            name = {8: "vec8", 16: "pack16", 32: "pack32"}[bits]
            return f"{name}({x[0]}, {x[1]})"
        if len(x) == 4 and bits == 16:
            return f"pack32(pack16({x[0]}, {x[1]}), pack16({x[2]}, {x[3]}))"
        if len(x) == 4 and bits == 8:
            return f"pack16(vec8({x[0]}, {x[1]}), vec8({x[2]}, {x[3]}))"
        return None

    def sym(self, name, bits, off=0):
        """Return the address of a variable."""
        for offsets in (self.shared, self.program.locals):
            if name in offsets:
                return f"{SPLAT[bits]}({offsets[name] + off})"
        if name in self.gname:
            return f"splat64((u64){self.gname[name]} + {off})"
        if name in self.params:
            if bits == 32:  # an address of the .param space: cvta.param adds the base
                return f"splat32({self.params[name][0] + off})"
            return f"splat64((u64)c.params + {self.params[name][0] + off})"
        raise UnsupportedPtx(f"unknown symbol {name}")

    def special(self, name, bits):
        """Return the value of a special register."""
        if name in ("%clock64", "%globaltimer"):
            return "splat64(rt_clock())"
        if name not in _SPECIAL:
            raise UnsupportedPtx(f"unsupported special register {name}")
        return converted(_SPECIAL[name], 32, bits)

    def set(self, it, dst, expr, bits, signed=False):
        """Assign a value of `bits` bits to a register or a vector of registers.

        The value is widened or narrowed to the width of the register.
        """
        if dst[0] == "_":
            self.o.append(f"  (void)({expr});")
        elif dst[0] == "v" and len(dst[1]) == 1:
            self.set(it, dst[1][0], expr, bits, signed)
        elif dst[0] == "v":
            part_bits = bits // len(dst[1])
            parts = _parts(self.tmpv(expr, bits), len(dst[1]), part_bits)
            if parts is None:
                raise UnsupportedPtx(f"line {it.line}: unsupported vector destination")
            for d, part in zip(dst[1], parts, strict=True):
                if d[0] != "_":
                    self.set(it, d, part, max(part_bits, 16))
        elif dst[0] != "r":
            raise UnsupportedPtx(f"line {it.line}: unsupported destination {dst}")
        else:
            own, name = self.bits(dst[1]), self.names[dst[1]]
            if own != bits:
                expr = converted(expr, bits, own, signed)
            if it.pred:
                expr = f"sel({self.pred(it)}, {expr}, {name})"
            self.o.append(f"  {name} = {expr};")


def _parts(t, count, bits):
    """Return the `count` elements of `bits` bits in `t`; None for unsupported shapes."""
    if count == 2 and bits == 32:
        return [f"lo32({t})", f"hi32({t})"]
    if count == 2 and bits == 16:
        return [f"lo16({t})", f"hi16({t})"]
    if count == 2 and bits == 8:
        return [f"and_16({t}, splat16(255))", f"shr_u16i({t}, 8)"]
    if count == 4 and bits == 16:
        return [f"{half}({word}({t}))" for word in ("lo32", "hi32") for half in ("lo16", "hi16")]
    if count == 4 and bits == 8:
        return [f"narrow(and_32(shr_u32i({t}, {8 * j}), splat32(255)))" for j in range(4)]
    return None
