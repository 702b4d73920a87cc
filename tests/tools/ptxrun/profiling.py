"""Instruction and traffic counts of each launch, and a model that computes times from them."""

from __future__ import annotations

import ctypes
import math

from .buffers import CONST
from .codegen import CLASSES
from .options import Options

# Rates per SM are thread results per clock, from the arithmetic throughput table of the CUDA C++
# Programming Guide (compute capability 8.0 and 9.0). Tensor core, clock and DRAM rates are from the
# data sheets of A100 SXM and H100 SXM.
DEVICES = {
    "a100": {
        "label": "A100-SXM 80GB",
        "sms": 108,
        "clock": 1.41e9,
        "dram": 2.039e12,
        "l2": 5120 * 1.41e9,
        "mma": 2048.0,
        "issue": 4.0,
        "fp32": 64.0,
        "fp16": 128.0,
        "fp64": 32.0,
        "int_alu": 64.0,
        "int_mul": 64.0,
        "mufu": 16.0,
        "cvt_pack": 64.0,
        "cvt": 16.0,
        "shfl": 32.0,
        "shared": 1.0,
        "lsu": 1.0,
        "smem_per_sm": 167936,
    },
    # "mma" is the rate of mma.sync, about 62 % of the peak in published benchmarks. wgmma reaches
    # the peak: its FLOPs have the weight 0.62.
    "h100": {
        "label": "H100-SXM, mma.sync",
        "sms": 132,
        "clock": 1.83e9,
        "dram": 3.35e12,
        "l2": 5.5e12,
        "mma": 4096.0 * 0.62,
        "issue": 4.0,
        "fp32": 128.0,
        "fp16": 256.0,
        "fp64": 64.0,
        "int_alu": 64.0,
        "int_mul": 64.0,
        "mufu": 16.0,
        "cvt_pack": 64.0,
        "cvt": 64.0,
        "shfl": 32.0,
        "shared": 1.0,
        "lsu": 1.0,
        "smem_per_sm": 233472,
    },
}

_records = []


class Profile:
    """Counts of one launch.

    `counts` holds the executions per instruction class, counted once per warp; `lane_counts` counts
    once per active lane. `tensors` maps a tensor's name to its size and to the distinct bytes read
    and written, rounded to sectors of 32 bytes.
    """

    def __init__(self, name, grid, block, shared):
        self.name, self.grid, self.block, self.shared = name, tuple(grid), tuple(block), shared
        self.ctas = grid[0] * grid[1] * grid[2]
        self.counts = dict.fromkeys(CLASSES, 0)
        self.lane_counts = dict.fromkeys(CLASSES, 0)
        self.instructions = 0
        self.mma_flop = 0
        self.mma_weighted = 0.0
        self.divergent_branches = 0
        self.global_read_sectors = self.global_write_sectors = 0
        self.global_read_bytes = self.global_write_bytes = 0
        self.global_requests = 0
        self.cp_async_bytes = 0
        self.tma_load_bytes = self.tma_store_bytes = self.tma_requests = 0
        self.shared_wavefronts = self.shared_ideal = 0
        self.atomic_lanes = 0
        self.local_bytes = 0
        self.tensors = {}

    @property
    def dram_read(self):
        return sum(t["read"] for t in self.tensors.values())

    @property
    def dram_write(self):
        return sum(t["write"] for t in self.tensors.values())

    @property
    def dram_bytes(self):
        return self.dram_read + self.dram_write

    @property
    def sector_efficiency(self):
        s = self.global_read_sectors + self.global_write_sectors
        return (
            (self.global_read_bytes + self.global_write_bytes) / (32.0 * s) if s else float("nan")
        )

    @property
    def bank_conflict_factor(self):
        return self.shared_wavefronts / self.shared_ideal if self.shared_ideal else float("nan")

    def times(self, device="a100"):
        """Return the seconds that the launch needs per resource if no other resource limits it."""
        d = DEVICES[device]
        ctas = max(1, self.ctas)
        # The busiest SM runs ceil(CTAs / SMs) blocks.
        f = math.ceil(ctas / d["sms"]) / ctas / d["clock"]
        c = self.counts
        return {
            "tensor": self.mma_weighted / d["mma"] * f,
            "fp32": 32.0 * (c["fp32_fma"] + c["fp32_add_mul"]) / d["fp32"] * f,
            "fp16": 32.0 * c["fp16"] / d["fp16"] * f,
            "fp64": 32.0 * c["fp64"] / d["fp64"] * f,
            "int/alu": 32.0 * (c["int_alu"] + c["setp_sel"] + c["fp32_other"]) / d["int_alu"] * f,
            "imul": 32.0 * c["int_mul"] / d["int_mul"] * f,
            "mufu": 32.0 * (c["mufu"] / d["mufu"] + c["cvt"] / d["cvt"]) * f,
            "cvt": 32.0 * c["cvt_pack"] / d["cvt_pack"] * f,
            "shfl": 32.0 * c["shfl"] / d["shfl"] * f,
            "shared": self.shared_wavefronts / d["shared"] * f,
            "issue": (self.instructions - c["mov"]) / d["issue"] * f,
            "L2": 32.0 * (self.global_read_sectors + self.global_write_sectors) / d["l2"],
            "DRAM": self.dram_bytes / d["dram"],
        }

    def bound(self, device="a100"):
        """Return (resource, seconds) of the slowest resource."""
        t = self.times(device)
        k = max(t, key=t.get)
        return k, t[k]

    def __str__(self):
        lines = [
            f"{self.name}: grid {self.grid}, block {self.block}, {self.shared} bytes shared, "
            f"{self.ctas} CTAs",
            f"  warp instructions {self.instructions}, mma {self.mma_flop / 1e9:.4f} GFLOP, "
            f"divergent branches {self.divergent_branches}",
            "  " + ", ".join(f"{k} {v}" for k, v in self.counts.items() if v),
            f"  global: read {self.global_read_bytes} B in {self.global_read_sectors} sectors, "
            f"written {self.global_write_bytes} B in {self.global_write_sectors} sectors, "
            f"{self.global_requests} requests, efficiency {self.sector_efficiency:.3f}, "
            f"cp.async {self.cp_async_bytes} B, TMA loads {self.tma_load_bytes} B, "
            f"stores {self.tma_store_bytes} B in {self.tma_requests} copies",
            f"  shared: {self.shared_wavefronts} wavefronts, {self.shared_ideal} without "
            f"conflicts (factor {self.bank_conflict_factor:.3f})",
        ]
        lines += [
            f"  {n}: {t['size']} B, unique read {t['read']} B, unique written {t['write']} B"
            for n, t in self.tensors.items()
        ]
        for device, rates in DEVICES.items():
            resource, seconds = self.bound(device)
            times = sorted(self.times(device).items(), key=lambda x: -x[1])
            each = ", ".join(f"{name} {t * 1e6:.2f}" for name, t in times if t > 0)
            lines.append(
                f"  model {rates['label']}: {seconds * 1e6:.2f} us bound by {resource}; "
                f"us per resource: {each}"
            )
        return "\n".join(lines)

    def _count_accesses(self, kind, m):
        """Add the accesses `m` of an instruction of class `kind` to the counts."""
        self.shared_wavefronts += m.wave
        self.shared_ideal += m.ideal
        # A generic access to shared memory has no sectors, and its bytes are not global traffic.
        n = m.bytes if m.sect or kind in ("cp_async", "tma", "tma_store") else 0
        if kind in ("ld_global", "cp_async", "tma"):
            self.global_read_sectors += m.sect
            self.global_read_bytes += n
        elif kind in ("st_global", "atomic", "tma_store"):
            self.global_write_sectors += m.sect
            self.global_write_bytes += n
        if kind in ("ld_global", "cp_async", "st_global"):
            self.global_requests += m.req
        if kind == "cp_async":
            self.cp_async_bytes += m.bytes
        elif kind in ("tma", "tma_store"):  # whole boxes, including parts out of bounds
            self.tma_requests += m.req
            if kind == "tma":
                self.tma_load_bytes += m.bytes
            else:
                self.tma_store_bytes += m.bytes
        elif kind == "atomic":
            self.atomic_lanes += m.lanes
        elif kind in ("ld_local", "st_local"):
            self.local_bytes += m.bytes


def record(kernel, name, grid, block, shared, run, ranges, entries):
    """Append the profile of a launch to `profiles`.

    `run` holds the counters of the launch, `entries` the runtime's records of the accessible
    `ranges`.
    """
    p = Profile(name, grid, block, shared + kernel.desc["shared_static"])
    p.divergent_branches = sum(run.divergences)
    for table, warps, lanes in zip(kernel.desc["tables"], run.executions, run.lanes, strict=True):
        p.mma_flop += warps * table["f"]
        p.mma_weighted += warps * table["w"]
        for k, v in table["c"].items():
            p.counts[CLASSES[int(k)]] += warps * v
            p.lane_counts[CLASSES[int(k)]] += lanes * v
    p.instructions = sum(p.counts.values())
    for (_, kind), accesses in zip(kernel.desc["sites"], run.accesses, strict=False):
        p._count_accesses(CLASSES[kind], accesses)
    for entry, (start, end, tensor, flags) in zip(entries, ranges, strict=False):
        if tensor == "parameters":
            continue
        touched = ctypes.string_at(entry.touch, (end - start) // 32 + 2)
        both = touched.count(3)
        read, written = touched.count(1) + both, touched.count(2) + both
        if read or written or not flags & CONST:
            size = end - start
            p.tensors[tensor] = {
                "size": size,
                "read": min(size, 32 * read),
                "write": min(size, 32 * written),
            }
    _records.append(p)


def profiles():
    """Return the profiles of all launches since `reset_profile`."""
    return list(_records)


def last_profile():
    """Return the profile of the last launch; None if there is none."""
    return _records[-1] if _records else None


def reset_profile():
    """Drop the profiles of all launches."""
    _records.clear()


def report(device="a100", file=None, out=True):
    """Return a table with one row per kernel, and print it unless `out` is False."""
    by_kernel = {}
    for p in _records:
        by_kernel.setdefault(p.name, []).append(p)
    rows = []
    for name, ps in by_kernel.items():
        sectors = sum(p.global_read_sectors + p.global_write_sectors for p in ps)
        moved = sum(p.global_read_bytes + p.global_write_bytes for p in ps)
        wavefronts, ideal = sum(p.shared_wavefronts for p in ps), sum(p.shared_ideal for p in ps)
        seconds = {}
        for p in ps:
            resource, t = p.bound(device)
            seconds[resource] = seconds.get(resource, 0.0) + t
        total = sum(seconds.values())
        cells = [
            name[:40],
            str(len(ps)),
            str(sum(p.ctas for p in ps)),
            f"{sum(p.mma_flop for p in ps) / 1e9:.4f}",
            f"{sum(p.dram_bytes for p in ps) / 1e6:.3f}",
            f"{moved / (32 * sectors):.3f}" if sectors else "-",
            f"{wavefronts / ideal:.2f}" if ideal else "-",
            max(seconds, key=seconds.get),
            f"{total * 1e6:.2f}",
        ]
        rows.append((total, cells))
    rows.sort(key=lambda row: -row[0])
    head = "kernel, launches, CTAs, mma GFLOP, DRAM MB, sect.eff, bank x, bound, model us"
    table = [head.split(", "), *(cells for _, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = "\n".join(
        [
            f"model: {DEVICES[device]['label']} "
            "(lower bound from instruction and byte counts, not a measured time)",
            *(
                "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                for row in table
            ),
        ]
    )
    if out:
        print(text, file=file)
    return text


def model_time_of(function, device="a100"):
    """Call `function` and return the model's seconds for its launches."""
    profiling, count = Options.profile, len(_records)
    Options.profile = True
    try:
        function()
    finally:
        Options.profile = profiling
    seconds = sum(p.bound(device)[1] for p in _records[count:])
    if not profiling:
        del _records[count:]
    return seconds
