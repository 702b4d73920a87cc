"""Rates and limits of GPU architectures, from which the bounds are computed.

Every rate is a peak per SM and clock from the sources below. No rate is measured in this project.

Sources
-------
[PG]    NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions", table "Throughput of Native
        Arithmetic Instructions (results per clock cycle per multiprocessor)", columns 8.0, 8.6,
        8.9, 9.0, 10.0 and 12.0: fp32 add/mul/fma, MUFU ("32-bit reciprocal, rsqrt, log2, exp2,
        sine, cosine": 16), 32-bit integer add/compare/min/max/logic (64), integer multiply-add
        (64), type conversions except 64-bit and 8/16-bit to 32-bit (64), warp shuffle (32). For
        12.0 the integer add rate is assumed to be 64 as well, which is conservative: GB20x unifies
        INT32 with FP32 cores.
[CC]    The same guide, "Technical Specifications per Compute Capability": resident warps and
        blocks, registers, shared memory per SM and per block, of which one KiB is reserved per
        block from 8.0 on. "Compute Capability 8.x/9.0/10.0/12.0 - Architecture": four warp
        schedulers issue one warp instruction per clock each.
[A100]  NVIDIA A100 whitepaper: 1024 dense fp16/bf16 FMA per clock and SM (312 TFLOP/s, 108 SMs,
        1.41 GHz); 64 FP32 lanes per SM.
[GA102] NVIDIA Ampere GA102 whitepaper: 512 dense fp16 FMA per clock and SM (A40: 149.7 TFLOP/s
        with fp32 accumulation); GeForce parts run fp32 accumulation at half of that.
[AD102] NVIDIA Ada whitepaper: the rate per SM of GA102 (L40S 362 TFLOP/s dense); GeForce halves
        fp32 accumulation (RTX 4090: 165 TFLOP/s).
[H100]  NVIDIA H100 whitepaper: 2048 dense bf16 FMA per clock and SM for wgmma (989.4 TFLOP/s,
        132 SMs, 1.83 GHz); 128 FP32 lanes; 228 KiB shared memory + L1.
[LUO]   Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture through
        Microbenchmarking", arXiv:2402.13499 and 2501.12084: mma.sync on Hopper reaches on average
        about 63 % of the wgmma peak, the only published rate of HMMA on sm_90.
[B200]  NVIDIA Blackwell architecture brief: 2.25 PFLOP/s dense bf16 on 148 SMs, that is 8192
        FLOP per clock and SM at 1.85 GHz. The roofline of the FlashAttention-4 paper has the same
        8192 (tensor), 16 (exp) and 128 bytes (shared memory) per clock and SM.
[GB202] NVIDIA RTX Blackwell whitepaper: RTX PRO 6000 503.8 TFLOP/s dense fp16 with fp32
        accumulation on 188 SMs (1024 FLOP per clock and SM); GeForce (RTX 5090: 209.5) half.
[SMEM]  32 banks of 4 bytes per clock and SM (Programming Guide, "Shared Memory", 5.x and later).

Assumptions, without a published source (`assumed` in reports)
--------------------------------------------------------------
* HMMA (mma.sync) on sm_100: 2048 FLOP per clock and SM, the rate of sm_80.
* F2FP (an fp32 pair to packed bf16 or fp16) issues at the conversion rate of [PG], on the ALU pipe.
* IMAD runs on the fp32 multiply-add pipe at the integer multiply-add rate of [PG].
* Packed fp32 (FFMA2, FMUL2, FADD2; sm_100+) takes one issue slot for two fp32 results per lane.
* A wgmma that is waited for alone exposes 60 clocks in addition to its time on the tensor cores:
  about one HMMA (33 clocks) and one load from shared memory (29 clocks).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """Rates per SM and clock, limits per SM and CTA, and the reference GPU."""

    name: str
    tensor: dict  # dense bf16 FLOPs by kind of MMA instruction
    fma: int  # fp32 results
    max_ctas: int
    max_warps: int
    smem_sm: int  # bytes
    sms: int  # of the reference GPU
    ghz: float  # clock at which the reference GPU has the published dense bf16 peak
    part: str
    imad: int = 64
    alu: int = 64  # integer add, logic, compare, select, min/max, F2FP
    xu: int = 16  # MUFU and the conversions that share its pipe
    smem_bytes: int = 128  # read or written in shared memory
    issue: int = 4  # warp instructions
    regs_sm: int = 65536
    wgmma_latency: int = 60  # clocks exposed by each wgmma that is waited for alone
    assumed: tuple = field(default=())

    @property
    def smem_cta(self):
        return self.smem_sm - KIB

    @property
    def peak_tflops(self):
        return max(self.tensor.values()) * self.sms * self.ghz / 1e3


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", {"HMMA": 2048}, 64, 32, 64, 164 * KIB, 108, 1.41, "A100 SXM"),
        Arch("sm_86", {"HMMA": 1024}, 128, 16, 48, 100 * KIB, 84, 1.74, "A40"),
        Arch("sm_89", {"HMMA": 1024}, 128, 24, 48, 100 * KIB, 142, 2.49, "L40S"),
        Arch(
            "sm_90",
            {"HGMMA": 4096, "HMMA": 2580},
            128,
            32,
            64,
            228 * KIB,
            132,
            1.83,
            "H100 SXM",
            assumed=("HMMA", "wgmma latency"),
        ),
        Arch(
            "sm_100",
            {"UTCMMA": 8192, "HMMA": 2048},
            128,
            32,
            64,
            228 * KIB,
            148,
            1.855,
            "B200",
            assumed=("HMMA",),
        ),
        Arch("sm_120", {"HMMA": 1024}, 128, 24, 48, 100 * KIB, 188, 2.617, "RTX PRO 6000"),
    )
}


def get_arch(name, geforce=False):
    """Return the `Arch` of a name such as "sm_90", "sm_90a" or 90; `geforce`: half tensor rate."""
    n = str(name).lower().replace("sm", "").strip("_").rstrip("af")
    a = ARCHS["sm_" + n]
    if geforce and n in ("86", "89", "120"):
        a = replace(a, tensor={k: v // 2 for k, v in a.tensor.items()})
    return a


def occupancy(arch, regs, warps_per_cta, smem_static=0, smem_dynamic=0, tmem_cols=0):
    """Return the resident CTAs and warps per SM, and the limiting resources.

    Registers are allocated in units of 256 per warp (per thread rounded up to 8), 64 K per SM.
    Shared memory is rounded up to 128 bytes, plus 1 KiB reserved per CTA [CC]. Tensor memory
    (sm_100) has 512 columns per SM.
    """
    lim = {}
    r = max(1, -(-regs // 8) * 8)
    warps_by_regs = (arch.regs_sm // 4 // (r * 32)) * 4
    lim["registers"] = warps_by_regs // warps_per_cta
    lim["warps"] = arch.max_warps // warps_per_cta
    lim["blocks"] = arch.max_ctas
    s = smem_static + smem_dynamic
    if s > arch.smem_cta:
        lim["shared memory"] = 0
    else:
        lim["shared memory"] = arch.smem_sm // (-(-s // 128) * 128 + KIB)
    if tmem_cols:
        lim["tensor memory"] = 512 // tmem_cols
    ctas = min(lim.values())
    limiter = [k for k, v in lim.items() if v == ctas]
    return {
        "ctas_per_sm": ctas,
        "warps_per_sm": ctas * warps_per_cta,
        "limited_by": limiter,
        "limits": lim,
    }
