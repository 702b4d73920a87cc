"""Pipe class of a SASS opcode, and the cost of one warp instruction on its pipe."""

from __future__ import annotations

import re


def _opcodes(text):
    return frozenset(text.split())


TENSOR = _opcodes(
    "HMMA IMMA DMMA QMMA OMMA BMMA HGMMA QGMMA IGMMA BGMMA "
    "UTCHMMA UTCQMMA UTCIMMA UTCOMMA UTCMXQMMA"
)
FMA = _opcodes("FADD FMUL FFMA FADD32I FMUL32I FFMA32I FSWZADD FADD2 FMUL2 FFMA2")
HALF = _opcodes("HADD2 HMUL2 HFMA2 HADD2_32I HMUL2_32I HFMA2_32I HSET2 HSETP2 HMNMX2 HADD2.F32")
IMAD = _opcodes("IMAD IMUL IDP IDP4A IMAD32I IMUL32I XMAD")
XU = _opcodes("MUFU")
CONV_XU = _opcodes("I2F F2I F2F FRND I2I POPC FLO BREV F2IP")
CONV_ALU = _opcodes("F2FP I2FP I2IP")
SHARED = _opcodes("LDS STS LDSM STSM ATOMS LDS_LDU MOVM")
LOCAL = _opcodes("LDL STL")
GLOBAL = _opcodes(
    "LDG STG LDGSTS ATOMG ATOM RED REDG LD ST UTMALDG UTMASTG UTMAREDG UTMAPF UTMACMDFLUSH "
    "UBLKCP UBLKRED UBLKPF TLD TEX CCTL"
)
TMEM = _opcodes("LDTM STTM LDT STT UTCCP UTCSHIFT")
CONST = _opcodes("LDC ULDC LDCU")
SHUFFLE = _opcodes("SHFL VOTE MATCH REDUX VOTEU CREDUX R2UR UREDUX")
BARRIER = _opcodes(
    "BAR SYNCS DEPBAR LDGDEPBAR WARPSYNC MEMBAR FENCE ERRBAR WARPGROUP UTCBAR NANOSLEEP ELECT "
    "ACQBULK USETMAXREG B2R R2B BMOV UCGABAR_ARV UCGABAR_WAIT UTMACCTL ARRIVES CGAERRBAR YIELD "
    "UTCATOMSWS PREEXIT ACQSHMINIT WARPGROUPSET DEPBAR_ CCTLL QSPC GETLMEMBASE"
)
BRANCH = _opcodes("BRA BRX BRXU JMP JMX CALL RET EXIT BREAK BSSY BSYNC KILL BPT RPCMOV")
NOP = _opcodes("NOP")
ALU = _opcodes(
    "IADD3 IADD IADD32I LOP3 LOP LOP32I SHF SHL SHR LEA ISETP FSETP FSEL SEL FMNMX FMNMX3 IMNMX "
    "VIMNMX VIMNMX3 VIADD VIADDMNMX PRMT PLOP3 P2R R2P MOV MOV32I SGXT BMSK IABS CS2R FCHK FSET "
    "ISET ISCADD LEPC PSETP VABSDIFF VABSDIFF4 VHMNMX FMNMX2 ICMP CSETP PMTRIG I2IP SCATTER"
)

# Opcodes by class. An opcode belongs to the first class that lists it.
_BY_OPCODE = {
    "tensor": TENSOR,
    "fma": FMA,
    "half": HALF,
    "imad": IMAD,
    "mufu": XU,
    "conv": CONV_XU | CONV_ALU,
    "shared": SHARED,
    "local": LOCAL,
    "global": GLOBAL,
    "tmem": TMEM,
    "const": CONST,
    "shuffle": SHUFFLE,
    "barrier": BARRIER,
    "branch": BRANCH,
    "nop": NOP,
    "alu": ALU,
}
CLASSES = [
    "tensor",
    "fma",
    "half",
    "imad",
    "alu",
    "mufu",
    "conv",
    "shared",
    "global",
    "local",
    "tmem",
    "const",
    "shuffle",
    "barrier",
    "branch",
    "uniform",
    "nop",
    "other",
]

DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")


def base(op):
    """Return the opcode of a mnemonic: the part before the first dot."""
    return op.split(".", 1)[0]


def klass(op):
    """Return the class of a mnemonic, one of `CLASSES`."""
    b = base(op)
    for name, opcodes in _BY_OPCODE.items():
        if b in opcodes:
            return name
    return "uniform" if b.startswith("U") or b == "S2UR" else "other"


def is_wgmma(op):
    return base(op).endswith("GMMA") and not base(op).startswith("UTC")


def is_tcgen05_mma(op):
    return base(op).startswith("UTC") and "MMA" in op


def mma_shape(op):
    """Return (m, n, k) of a tensor mnemonic; None for tcgen05, whose shape is in a descriptor."""
    for part in op.split(".")[1:]:
        m = (
            re.fullmatch(r"(\d+)x(\d+)x(\d+)", part)
            or re.fullmatch(r"(16)(8)(4|8|16|32|64|128|256)", part)
            or re.fullmatch(r"(8)(8)(4|16|32|128)", part)
        )
        if m:
            return tuple(map(int, m.groups()))
    return None


def descriptor_shape(v, op):
    """Return (m, n, k) of a tcgen05 instruction descriptor.

    N / 8 is in bits 17-22 and M / 16 in bits 24-28 (PTX ISA, "Instruction descriptor"); K is 32
    bytes of operand A.
    """
    n, m = ((v >> 17) & 0x3F) << 3, ((v >> 24) & 0x1F) << 4
    k = {"UTCHMMA": 16, "UTCQMMA": 32, "UTCIMMA": 32, "UTCOMMA": 64}.get(base(op), 16)
    if base(op) == "UTCHMMA" and (v >> 7) & 7 == 2:  # tf32 operands
        k = 8
    return m, n, k


def tensor_cost(ins, descriptor=None):
    """Return the cost of one tensor instruction as a dict.

    `flops` counts the work of the whole `scope`: "warp", "warpgroup" (4 warps), or "cta" for a
    tcgen05 MMA, which a single thread issues. `smem` is the number of operand bytes that the scope
    reads from shared memory, `width` the bytes per element. `resolved` is True if the shape is
    known.
    """
    b = base(ins.op)
    sparse = 2 if ".SP" in ins.op else 1
    if b.startswith("UTC"):
        m, n, k = descriptor_shape(descriptor, ins.op) if descriptor is not None else (128, 64, 16)
        ctas = 2 if "2CTA" in ins.op else 1
        width = 2 if b == "UTCHMMA" else 1
        if b == "UTCHMMA" and k == 8:
            width = 4
        a_bytes = 0 if ins.args.lstrip().startswith("tmem") else m // ctas * k * width
        return {
            "kind": "UTCMMA",
            "flops": 2 * m * n * k * sparse // ctas,
            "scope": "cta",
            "smem": a_bytes + n // ctas * k * width,
            "shape": (m, n, k),
            "resolved": descriptor is not None,
            "width": width,
        }
    shape = mma_shape(ins.op)
    cost = {"scope": "warp", "smem": 0, "shape": shape, "resolved": shape is not None}
    if shape is None:
        return {**cost, "kind": b, "flops": 0, "width": 2}
    m, n, k = shape
    cost["flops"] = 2 * m * n * k * sparse
    if not b.endswith("GMMA"):
        width = {"HMMA": 4 if "TF32" in ins.op else 2, "QMMA": 1, "IMMA": 1}.get(b, 2)
        return {**cost, "kind": "HMMA", "width": width}
    width = {"HGMMA": 4 if "TF32" in ins.op else 2, "QGMMA": 1, "IGMMA": 1}.get(b, 2)
    operands = [x.strip() for x in ins.args.split(",")]
    a_in_registers = len(operands) > 1 and re.match(r"R\d", operands[1]) is not None
    smem = (0 if a_in_registers else m * k * width) + n * k * width
    return {**cost, "kind": "HGMMA", "scope": "warpgroup", "smem": smem, "width": width}


def access_bytes(op):
    """Return the bytes per thread of a load or store."""
    parts = op.split(".")
    if base(op) in ("LDSM", "STSM", "MOVM"):
        return {"4": 16, "2": 8}.get(parts[-1], 4)
    for p in parts:
        if p in ("128", "64", "256"):
            return int(p) // 8
        if p in ("U8", "S8"):
            return 1
        if p in ("U16", "S16"):
            return 2
    return 4
