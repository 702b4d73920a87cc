"""Registers that an instruction reads and writes."""

from __future__ import annotations

from ..errors import UnsupportedPtx
from ..ptx import TYPE_BITS

# Instructions whose first operand is not written.
WRITES_NOTHING = {
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
    "brx",
    "tensormap",
    "setmaxnreg",
    "bar",
    "barrier",
}


def register_bits(kind):
    """Return the width in bits of a register of a PTX type; 8-bit types take 16 bits."""
    bits = TYPE_BITS[kind]
    if bits == 128:
        raise UnsupportedPtx("128-bit registers are not supported")
    return 16 if bits == 8 else bits


def registers_of(operand):
    """Return the registers of an operand, in order."""
    if operand[0] == "r":
        return [operand[1]]
    if operand[0] in ("v", "l"):
        return [r for x in operand[1] for r in registers_of(x)]
    if operand[0] in ("m", "n"):
        return registers_of(operand[1])
    return []


def accumulators(it):
    """Return the accumulator registers of a wgmma; an empty set for any other instruction."""
    if it.op[0] == "wgmma" and it.op[1] == "mma_async":
        return set(registers_of(it.args[0]))
    return set()


def call_param_registers(program, it):
    """Return the pseudo registers of a load from or store to a call parameter."""
    kind, memory = it.op[-1], it.args[1 if it.op[0] == "$ldp" else 0]
    count = next((int(x[1:]) for x in it.op if x in ("v2", "v4")), 1)
    size = TYPE_BITS[kind]
    return [
        program.pseudo_register(memory[1][1], memory[2] + j * size // 8, size) for j in range(count)
    ]


def uses_and_defs(program, it):
    """Return the registers that an instruction reads, and those that it writes, as lists.

    A predicated instruction also reads the registers that it writes: their values are kept where
    the predicate is false.
    """
    uses, defs = [], []
    op = it.op[0]

    def walk(operand, found):
        kind = operand[0]
        if kind == "r":
            found.append(operand[1])
        elif kind in ("v", "l"):
            for x in operand[1]:
                walk(x, found)
        elif kind in ("m", "n"):
            walk(operand[1], uses)
            if len(operand) > 3:
                walk(operand[3], uses)
        elif kind == "pp":
            walk(operand[1], found)
            walk(operand[2], found)

    def walk_all(operands, found):
        for x in operands:
            walk(x, found)

    if op == "$ldp":
        uses += call_param_registers(program, it)
        walk(it.args[0], defs)
    elif op == "$stp":
        defs += call_param_registers(program, it)
        walk(it.args[1], uses)
    elif op in ("$vprintf", "$__assertfail"):
        for _, name in it.args:
            register = f"#{name}@0"
            if register in program.regs:
                (defs if name.startswith("retval") else uses).append(register)
    elif op == "wgmma":
        if it.op[1] == "mma_async":
            walk(it.args[0], defs)
            if it.args[3] != ("i", 0):
                walk(it.args[0], uses)
            walk_all(it.args[1:], uses)
    elif op == "mbarrier":
        has_result = it.op[1] in ("test_wait", "try_wait", "pending_count")
        if has_result or it.args[0][0] == "r":
            walk(it.args[0], defs)
            walk_all(it.args[1:], uses)
        else:
            walk_all(it.args, uses)
    elif op in WRITES_NOTHING or (op == "wmma" and it.op[1] == "store"):
        walk_all(it.args, uses)
    elif it.args:
        walk(it.args[0], defs)
        walk_all(it.args[1:], uses)
    if op in ("addc", "subc", "madc"):
        uses.append("#cc")
    if "cc" in it.op and op in ("add", "sub", "mad", "addc", "subc", "madc"):
        defs.append("#cc")
    if it.pred:
        uses.append(it.pred[0])
        uses += defs
    return uses, defs
