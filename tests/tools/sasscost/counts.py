"""Instruction counts of a code section, by pipe."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from . import classify as C


@dataclass
class Counts:
    """Instructions of one warp, with their FLOPs, bytes and slots per pipe."""

    n: int = 0
    by_class: Counter = field(default_factory=Counter)
    by_op: Counter = field(default_factory=Counter)
    tensor_ops: Counter = field(default_factory=Counter)
    # FLOPs by kind of MMA: per warp for MMAs of a warp or warpgroup, per CTA for tcgen05.
    flops_warp: Counter = field(default_factory=Counter)
    flops_cta: Counter = field(default_factory=Counter)
    fma_lanes: float = 0  # fp32 results per thread
    imad: int = 0
    alu: int = 0
    xu: int = 0
    # Bytes of shared-memory traffic: per warp (including a quarter of the operands of wgmma), the
    # part of it that MMAs read (LDSM and operands of wgmma), and per CTA (operands of tcgen05).
    smem_warp: float = 0
    smem_mma: float = 0
    smem_cta: float = 0
    global_bytes: float = 0  # per warp: LDG, STG, LDGSTS
    spills: int = 0
    unresolved: int = 0

    def add(self, ins, descriptor=None):
        if ins.dead:
            return
        kind, opcode = C.klass(ins.op), C.base(ins.op)
        self.n += 1
        self.by_class[kind] += 1
        self.by_op[opcode] += 1
        if kind == "tensor":
            self._add_mma(ins, opcode, descriptor)
        elif kind == "fma":
            self.fma_lanes += 2 if opcode in ("FADD2", "FMUL2", "FFMA2") else 1
        elif kind == "half":
            self.fma_lanes += 1
        elif kind == "imad":
            self.imad += 1
        elif kind == "alu" or (kind == "conv" and opcode in C.CONV_ALU):
            self.alu += 1
        elif kind in ("mufu", "conv"):
            self.xu += 1
        elif kind == "shared":
            self.smem_warp += 32 * C.access_bytes(ins.op)
            if opcode == "LDSM":
                self.smem_mma += 32 * C.access_bytes(ins.op)
        elif kind == "shuffle" and opcode == "SHFL":
            self.smem_warp += 128
        elif kind == "global":
            if opcode in ("LDG", "STG", "LDGSTS", "LD", "ST"):
                self.global_bytes += 32 * C.access_bytes(ins.op)
            if opcode == "LDGSTS":
                self.smem_warp += 32 * C.access_bytes(ins.op)
        elif kind == "local":
            self.spills += 1

    def _add_mma(self, ins, opcode, descriptor):
        cost = C.tensor_cost(ins, descriptor)
        shape, width = cost["shape"], cost["width"]
        name = opcode + ("." + "x".join(map(str, shape)) if shape else "")
        if opcode.endswith("GMMA"):
            name += "(RS)" if cost["smem"] == shape[1] * shape[2] * width else "(SS)"
        if opcode.startswith("UTC"):
            name += "(TS)" if ins.args.lstrip().startswith("tmem") else "(SS)"
        self.tensor_ops[name] += 1
        self.unresolved += not cost["resolved"]
        flops = cost["flops"] * {2: 1.0, 4: 2.0, 1: 0.5}.get(width, 1.0)  # as bf16 FLOPs
        if cost["scope"] == "cta":
            self.flops_cta[cost["kind"]] += flops
            self.smem_cta += cost["smem"]
        else:
            warps = 4 if cost["scope"] == "warpgroup" else 1
            self.flops_warp[cost["kind"]] += flops / warps
            self.smem_warp += cost["smem"] / warps
            self.smem_mma += cost["smem"] / warps


def count(ins, indices, descriptors):
    """Return the `Counts` of the instructions with these indices."""
    counts = Counts()
    for i in indices:
        counts.add(ins[i], descriptors.get(i))
    return counts


def mma_descriptors(ins):
    """Return the constant tcgen05 descriptor of each MMA, by index.

    The descriptor is the constant that the last UMOV before the MMA, in program order, wrote to its
    register: compilers repeat the UMOV next to the MMA. An MMA without a UMOV gets the most common
    descriptor of the kernel.
    """
    last, found = {}, {}
    for i, x in enumerate(ins):
        move = re.match(r"(UR\d+),\s*(0x[0-9a-f]+)$", x.args)
        if C.base(x.op) == "UMOV" and move:
            last[move[1]] = int(move[2], 16)
        elif C.base(x.op).startswith("UTC"):
            register = C.DESCRIPTOR.search(x.args)
            if register and register[1] in last:
                v = last[register[1]]
                if (v >> 17) & 0x3F and (v >> 24) & 0x1F and v < 1 << 30:
                    found[i] = v
    if found:
        common = Counter(found.values()).most_common(1)[0][0]
        for i, x in enumerate(ins):
            if C.is_tcgen05_mma(x.op):
                found.setdefault(i, common)
    return found
