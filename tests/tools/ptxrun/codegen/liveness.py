"""Registers that are live after a block, and registers that wgmmas in flight may write."""

from __future__ import annotations

from ..errors import UnsupportedPtx
from .registers import accumulators, registers_of, uses_and_defs


def find_live_registers(program):
    """Set the bit masks of registers of each block: `reads`, `writes`, `live_in`, `live_out`.

    Returns a dict from register to bit. `block.registers` lists the registers of a block in order
    of use. `reads` holds the registers that a block reads before it writes them.
    """
    program.regs["#cc"] = "pred"
    bit_of = {r: 1 << i for i, r in enumerate(program.regs)}
    for b in program.blocks:
        b.reads = b.writes = b.live_out = 0
        listed = {}
        for it in b.ins:
            uses, defs = uses_and_defs(program, it)
            for r in (*uses, *defs):
                if r not in bit_of:
                    raise UnsupportedPtx(f"line {it.line}: undeclared register {r} in {it.text}")
            for r in uses:
                if not b.writes & bit_of[r]:
                    b.reads |= bit_of[r]
            for r in defs:
                b.writes |= bit_of[r]
            listed.update(dict.fromkeys((*uses, *defs)))
        b.registers = list(listed)
        b.live_in = b.reads
    changed = True
    while changed:
        changed = False
        for b in reversed(program.blocks):
            live_out = 0
            for s in b.succ:
                live_out |= s.live_in
            live_in = b.reads | (live_out & ~b.writes)
            changed |= (live_in, live_out) != (b.live_in, b.live_out)
            b.live_in, b.live_out = live_in, live_out
    return bit_of


def find_wgmma_registers(program, bit_of):
    """Return the accumulators, the registers that may hold results in flight, and unfenced wgmmas.

    A move copies the state of its source. A wgmma is unfenced if, on any path, a register that it
    reads was written after the last wgmma.fence.
    """
    instructions = [it for b in program.blocks for it in b.ins]
    own = {r for it in instructions for r in accumulators(it)}
    moves = [
        (it.args[0][1], it.args[1][1])
        for it in instructions
        if it.op[0] == "mov" and it.args[0][0] == it.args[1][0] == "r"
    ]
    in_flight, count = set(own), 0
    while count != len(in_flight):
        count = len(in_flight)
        in_flight |= {target for target, source in moves if source in in_flight}
    return own, in_flight, _unfenced(program, bit_of)


def _unfenced(program, bit_of):
    """Return the wgmmas that read a register written after the last wgmma.fence."""
    written = dict.fromkeys(program.blocks)  # registers, at the start of each block
    written[program.blocks[0]] = 0
    work, found = [program.blocks[0]], set()
    while work:
        b = work.pop()
        now = written[b]
        for it in b.ins:
            now = _after(program, bit_of, it, now, found)
        for s in b.succ:
            if s is None:
                continue
            joined = now if written[s] is None else written[s] | now
            if joined != written[s]:
                written[s] = joined
                work.append(s)
    return found


def _after(program, bit_of, it, written, found):
    """Return the registers written since the last fence, updated by an instruction.

    `written` holds them before the instruction. An unfenced wgmma is added to `found`.
    """
    if it.op[0] == "wgmma":
        if it.op[1] == "fence":
            return 0
        if it.op[1] == "mma_async":
            read = set(registers_of(it.args[1])) if it.args[1][0] == "v" else set()
            if it.args[3] != ("i", 0):
                read |= accumulators(it)
            if any(written & bit_of[r] for r in read):
                found.add(it)
            for r in accumulators(it):
                written &= ~bit_of[r]
        return written
    if it.op[0] == "mov" and it.args[0][0] == "r" and it.args[1][0] in ("r", "i", "f", "x32"):
        bit, source = bit_of[it.args[0][1]], it.args[1]
        if source[0] == "r" and written & bit_of[source[1]]:
            return written | bit
        return written & ~bit
    for r in uses_and_defs(program, it)[1]:
        written |= bit_of[r]
    return written
