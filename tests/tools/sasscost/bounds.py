"""Bounds and an estimate of tensor core utilization in a loop.

The unit of work is one trip through a loop by one CTA, with all warps that run the loop. A trip
occupies each pipe of an SM for these clocks:

    issue    instructions x warps / 4 (four schedulers, one warp instruction per clock each)
    tensor   FLOPs / (dense FLOPs per clock and SM of the instruction kind)
    fma      fp32 results x 32 x warps / rate, and integer multiply-adds at their own rate
    alu      integer, compare, select, min/max, logic and F2FP, likewise
    mufu     MUFU and the conversions that share its pipe, likewise
    smem     bytes / 128: LDS, STS, LDSM, STSM, operands of wgmma and tcgen05, writes of LDGSTS,
             and 128 bytes per SHFL. Writes of TMA are not counted, because the mnemonic does not
             contain their size.

Bound (a), perfect overlap: utilization <= tensor / max(all pipes).

Bound (b), no overlap inside a unit, overlap across units (asymptotic bound of a closed queueing
network with N customers): a unit runs MMA and softmax strictly one after the other. A unit is one
warp for HMMA, one warpgroup for wgmma, one CTA for tcgen05. A unit that is alone on its scheduler
needs S = max(tensor, its reads of shared memory) + max(other pipes) clocks per trip. With N units
per scheduler (per SM for tcgen05), utilization <= min((a), N x tensor / S). A kernel that pipelines
MMA against softmax inside one warpgroup is bound by (a), not (b).

Estimate (m): exact mean-value analysis of the same network of two stations (MMA, everything else)
with exponential service times, capped by (a). If a barrier in the loop synchronizes warps, these
warps are one unit, because they cannot drift apart by more than the distance between two barriers.
The share of MUFU work that is issued while a wgmma is in flight is subtracted from the serial part,
up to half of the MMA time, because usually one of a trip's two products is in flight. (m) is not a
bound. With N >= 2, bound (b) often equals (a).

If ptxas serializes wgmmas (see `waits.wgmma_waits`), nothing overlaps with the MMA inside a
warpgroup, so (a) is at most (b). Each such wgmma adds `Arch.wgmma_latency` clocks to the
warpgroup's trip, during which other warpgroups may use the tensor cores.

All three ignore latency, synchronization, bank conflicts, L2 and HBM bandwidth, and the loop's
prologue and epilogue.
"""

from __future__ import annotations

from collections import Counter

from .arch import get_arch


def mva(n, d1, d2, z=0.0):
    """Return the throughput of a closed network of two stations and a delay with `n` customers.

    `d1` and `d2` are the service times of the stations, `z` is the delay. The result for a
    fractional `n` is interpolated.
    """

    def throughput(customers):
        q1 = q2 = x = 0.0
        for i in range(1, customers + 1):
            r1, r2 = d1 * (1 + q1), d2 * (1 + q2)
            x = i / (r1 + r2 + z)
            q1, q2 = x * r1, x * r2
        return x

    low = int(n)
    if n <= 0:
        return 0.0
    return throughput(low) + (n - low) * (throughput(low + 1) - throughput(low))


def bounds(c, arch, warps, ctas_per_sm, covered=0.0, lockstep=0, serial=0):
    """Return the clocks per pipe of one trip, the bounds (a) and (b), and the estimate (m).

    `c` holds the `Counts` of the steady path, which `warps` warps of each CTA run. `covered` is the
    share of the MUFU work that is issued while a wgmma is in flight, `lockstep` the number of warps
    that a barrier synchronizes (True for all), `serial` the number of serialized wgmmas per trip.
    """
    fastest = max(arch.tensor.values())
    tensor = sum(f * warps / arch.tensor.get(k, fastest) for k, f in c.flops_warp.items()) + sum(
        f / arch.tensor.get(k, fastest) for k, f in c.flops_cta.items()
    )
    mmas = c.by_class["tensor"]
    issued = c.n if not c.flops_cta else c.n - mmas
    cycles = {
        "tensor": tensor,
        "issue": issued * warps / arch.issue,
        "fma": 32 * (c.fma_lanes / arch.fma + c.imad / arch.imad) * warps,
        "alu": 32 * c.alu / arch.alu * warps,
        "mufu": 32 * c.xu / arch.xu * warps,
        "smem": (c.smem_warp * warps + c.smem_cta) / arch.smem_bytes,
    }
    result = {"cycles": {k: round(v, 1) for k, v in cycles.items()}, "warps": warps}
    if tensor <= 0:
        return result
    limiter = max(cycles, key=cycles.get)
    a = tensor / cycles[limiter]
    delay = serial * arch.wgmma_latency
    units, one, mma, other = _unit(c, arch, warps, ctas_per_sm, cycles)
    b = min(a, units * one / (mma + other + delay)) if units else 0.0
    if serial and b < a:
        a, limiter = b, "wgmma waits"
    together = warps if lockstep is True else min(int(lockstep), warps)
    customers = units, one, mma, other
    if not c.flops_cta and (together > 4 or (lockstep and together >= warps)):
        # Warps that a barrier synchronizes in every trip are one unit.
        share = together / warps
        mma_all = max(tensor, c.smem_mma * warps / arch.smem_bytes)
        other_all = max(
            (c.n - mmas) * warps / arch.issue,
            cycles["fma"],
            cycles["alu"],
            cycles["mufu"],
            (c.smem_warp - c.smem_mma) * warps / arch.smem_bytes,
        )
        customers = ctas_per_sm / share, tensor * share, mma_all * share, other_all * share
    n, one, mma, other = customers
    serial_other = other - min(covered * other, mma / 2)
    m = min(a, one * mva(n, mma, serial_other, delay)) if n else 0.0
    # TFLOP/s at the clock of the reference GPU and the rate of the MMA instructions in use: HMMA on
    # sm_90 does not reach the peak of wgmma even at 100 % utilization.
    flops = sum(c.flops_warp.values()) * warps + sum(c.flops_cta.values())
    full = flops / tensor * arch.sms * arch.ghz / 1e3
    hmmas = (sum(c.flops_warp.values()) + sum(c.flops_cta.values()) / warps) / 4096.0
    return {
        **result,
        "est_m": round(m, 4),
        "tflops_m": round(m * full, 1),
        "peak_tflops": round(arch.peak_tflops, 1),
        "bound_a": round(a, 4),
        "limiter_a": limiter,
        "bound_b": round(b, 4),
        "units": units,
        "tflops_a": round(a * full, 1),
        "tflops_b": round(b * full, 1),
        "nonmma_per_mma": round((c.n - mmas) / mmas, 2) if mmas else None,
        "nonmma_per_hmma_equiv": round((c.n - mmas) / hmmas, 2) if hmmas else None,
        "mflop_per_trip": round(flops / 1e6, 6),
    }


def _unit(c, arch, warps, ctas_per_sm, cycles):
    """Return the units per scheduler (per SM for tcgen05) and one unit's clocks per trip.

    The three clock counts are for the MMAs, for the MMAs with their reads of shared memory, and for
    everything else.
    """
    tensor, mmas = cycles["tensor"], c.by_class["tensor"]
    if c.flops_cta:
        other = max(
            (c.n - mmas) * warps / arch.issue,
            cycles["fma"],
            cycles["alu"],
            cycles["mufu"],
            (c.smem_warp - c.smem_mma) * warps / arch.smem_bytes,
        )
        return ctas_per_sm, tensor, max(tensor, c.smem_cta / arch.smem_bytes), other
    one = tensor * 4 / warps
    reads = c.smem_mma / arch.smem_bytes * (4 if "HGMMA" in c.flops_warp else 1)
    other = max(c.n - mmas, *(4 * cycles[pipe] / warps for pipe in ("fma", "alu", "mufu")))
    return max(ctas_per_sm, 0) * warps / 4, one, max(one, reads), other


def combine(kernel, loop_warps, arch, ctas_per_sm=1):
    """Return bound (a) of a warp-specialized kernel over the loops of its partitions.

    `loop_warps` maps a loop to its number of warps, as in {"L2": 4, "L9": 4, "L10": 1}. All these
    loops must make the same number of trips.
    """
    arch = get_arch(arch)
    cycles, alone, flops = Counter(), {}, 0.0
    for loop in kernel["loops"]:
        name = loop["name"]
        if name not in loop_warps:
            continue
        warps, c = loop_warps[name], loop["counts"]
        own = bounds(c, arch, warps, ctas_per_sm)["cycles"]
        cycles.update(own)
        flops += sum(c.flops_warp.values()) * warps + sum(c.flops_cta.values())
        alone[name] = max(
            *(v for k, v in own.items() if k not in ("tensor", "issue")),
            loop["steady_instructions"] * max(1, warps / 4),
        )
    limiter = max(cycles, key=cycles.get)
    utilization = cycles["tensor"] / cycles[limiter]
    full = flops / cycles["tensor"] * arch.sms * arch.ghz / 1e3
    return {
        "cycles": {k: round(v, 1) for k, v in cycles.items()},
        "bound_a": round(utilization, 4),
        "limiter_a": limiter,
        "tflops_a": round(utilization * full, 1),
        "alone": alone,
        "peak_tflops": round(arch.peak_tflops, 1),
    }
