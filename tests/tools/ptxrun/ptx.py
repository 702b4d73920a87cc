"""Modules, functions, variables and instructions of PTX."""

from __future__ import annotations

import struct

_NAMES = {
    1: "pred",
    8: "b8 u8 s8",
    16: "b16 u16 s16 f16 bf16 e4m3x2 e5m2x2",
    32: "b32 u32 s32 f32 f16x2 bf16x2 tf32",
    64: "b64 u64 s64 f64",
    128: "b128",
}
TYPE_BITS = {name: bits for bits, names in _NAMES.items() for name in names.split()}


class Label:
    """Label, with its line in the PTX text."""

    __slots__ = ("line", "name")

    def __init__(self, name, line):
        self.name, self.line = name, line

    def __repr__(self):
        return f"{self.name}:"


class Instr:
    """PTX instruction.

    `op` is the list of the parts of its opcode, `pred` is (register, negated) or None, `args` are
    its operands. An operand is a tuple whose first element names its kind:

    * ("r", register), ("sr", special register), ("_",) for an unused result;
    * ("i", int), ("f", float), ("x32", bits), ("x64", bits);
    * ("s", variable or label) or ("s", variable, offset);
    * ("m", base, offset) or ("m", map, offset, coordinates) for memory;
    * ("v", operands) in braces, ("l", operands) in parentheses;
    * ("n", operand) for a negated predicate, ("pp", p, q) for p|q.
    """

    __slots__ = ("args", "block", "line", "op", "pred")

    def __init__(self, op, pred, args, line):
        self.op, self.pred, self.args, self.line = op, pred, args, line

    @property
    def text(self):
        return ".".join(self.op)

    def __repr__(self):
        return f"L{self.line} {self.pred or ''} {self.text} {self.args}"


class Var:
    """Variable in the .global, .const, .shared, .local or .param space."""

    def __init__(self, space, name, align, elt, count, init=None, extern=False):
        self.space, self.name, self.align, self.elt, self.count = space, name, align, elt, count
        self.init, self.extern = init, extern

    @property
    def elt_bytes(self):
        return max(1, TYPE_BITS[self.elt] // 8)

    @property
    def size(self):
        return self.elt_bytes * (1 if self.count is None else self.count)


class Function:
    """Function (.func) or kernel (.entry). `body` is None for a declaration."""

    def __init__(self, name, kind, params, rets, line):
        self.name, self.kind, self.params, self.rets, self.line = name, kind, params, rets, line
        self.body = None
        self.regs = {}  # name -> type
        self.vars = []  # shared / local / param variables declared in the body
        self.branchtargets = {}
        self.reqntid = None
        self.maxntid = None
        self.maxnreg = 0
        self.cluster = None


class Module:
    """Variables, functions and lines of a PTX text.

    `loc` maps a line of the text to (file number, line, column) of its source, `files` a file
    number to a path.
    """

    def __init__(self):
        self.version = self.target = None
        self.vars = {}
        self.funcs = {}
        self.loc = {}
        self.files = {}
        self.lines = []


def f32_bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def f64_bits(x):
    return struct.unpack("<Q", struct.pack("<d", x))[0]
