"""Report of a kernel: its loops, partitions and costs.

The counts of a loop are those of its steady path (see `cfg.steady_path`). Code that runs only in
some trips, such as a mask under a branch or a loop that retries a barrier, is not part of the
bounds; `body_instructions` includes it.

The warps of a loop come from `warps.run`. The bounds of a loop with MMAs are computed for all warps
that run loops with MMAs, because two consumer warpgroups may each have a copy of the loop. The
bounds of any other loop are computed for the warps that run it.
"""

from __future__ import annotations

from pathlib import Path

from . import cfg, waits
from . import classify as C
from . import warps as w
from .arch import get_arch, occupancy
from .bounds import bounds
from .counts import count, mma_descriptors
from .disasm import disassemble, parse
from .elfinfo import kernel_attributes
from .partitions import RunLoop, partitions


def _indices(blocks, some):
    """Return the indices of the instructions in the blocks with the numbers `some`."""
    return [i for b in some for i in range(blocks[b].start, blocks[b].end)]


def _is_spin(ins, blocks, loop):
    """Return whether a loop only waits: it is short, contains a wait and does no work."""
    indices = _indices(blocks, loop.blocks)
    if len(indices) > 40:
        return False
    ops = [C.base(ins[i].op) for i in indices]
    waiting = any(o in ("SYNCS", "USETMAXREG", "NANOSLEEP", "YIELD", "UTCATOMSWS") for o in ops)
    polling = len(indices) <= 14 and any(o in ("LDG", "ATOMG", "LD") for o in ops)
    working = any(
        C.klass(o) in ("tensor", "mufu", "fma") or o in ("STG", "UTMALDG", "LDGSTS") for o in ops
    )
    return (waiting or polling) and not working


class _Analysis:
    """Analysis of a kernel: its blocks, loops, warps, partitions and MMA descriptors."""

    def __init__(self, ins, labels, cta_warps, launch_regs, linear):
        self.ins, self.cta_warps = ins, cta_warps
        self.blocks = cfg.build(ins, labels)
        # With more than one CTA dimension, threadIdx.x does not give the number of the warp.
        linear = linear and not any(
            C.base(x.op) in ("S2R", "S2UR") and x.args.endswith(("SR_TID.Y", "SR_TID.Z"))
            for x in ins
        )
        self.flow = w.run(ins, self.blocks, cta_warps, linear)
        self.descriptors = mma_descriptors(ins)
        self.block_of = {i: b.i for b in self.blocks for i in range(b.start, b.end)}
        all_loops = cfg.loops(self.blocks)
        self.spins = [x for x in all_loops if _is_spin(ins, self.blocks, x)]
        self.loops = [x for x in all_loops if x not in self.spins]
        self.names = {id(x): f"L{n}" for n, x in enumerate(self.loops)}
        spinning = {b for x in self.spins for b in x.blocks}
        live = {self.block_of[i] for i, _ in self.flow.sites} - spinning
        # A loop that sets registers is the one in which Triton's workers wait for work.
        self.dispatching = [x for x in self.loops if x.blocks & live]
        self.run_loops = [
            RunLoop(self.names[id(x)], x, self.mask(x), self._has_mma(x))
            for x in self.loops
            if x not in self.dispatching
        ]
        self.partitions, self.partition_of, self.pool = partitions(
            ins, self.blocks, self.run_loops, self.flow, cta_warps, launch_regs
        )
        self._count_mma_warps()

    def mask(self, loop):
        """Return the bit mask of the warps that may run a loop."""
        return self.flow.masks.get(loop.header) or (1 << self.cta_warps) - 1

    def _has_mma(self, loop):
        ops = (self.ins[i].op for i in _indices(self.blocks, loop.blocks))
        return any(C.klass(op) == "tensor" and not C.base(op).startswith("UTC") for op in ops)

    def _partition(self, name):
        """Return the partition of a loop if a barrier gives its number of warps, else None."""
        p = self.partitions[self.partition_of[name]] if name in self.partition_of else None
        return p if p and p["warps"] is None else None

    def _count_mma_warps(self):
        self.mma_mask, extra, seen = 0, 0, set()
        for x in self.run_loops:
            p = self._partition(x.name)
            if not x.has_mma:
                continue
            if p is None:
                self.mma_mask |= x.mask
            else:
                extra += 0 if seen & set(p["loops"]) else p["count"]  # once per partition
                seen.add(x.name)
        known = bin(self.mma_mask).count("1")
        self.mma_warps = min(extra + known, self.cta_warps) or self.cta_warps
        self.mma_loops = {x.name for x in self.run_loops if x.has_mma}

    def own_warps(self, loop):
        p = self._partition(self.names[id(loop)])
        return p["count"] if p else bin(self.mask(loop)).count("1")

    def steady_path(self, loop, inner):
        """Return the blocks of one trip except `inner`, and whether a path was found."""

        def work(b):
            if b in inner:
                return 0
            return sum(
                C.tensor_cost(self.ins[i], self.descriptors.get(i))["flops"]
                for i in _indices(self.blocks, [b])
                if C.klass(self.ins[i].op) == "tensor" and not self.ins[i].dead
            )

        def cost(b):
            return 0 if b in inner else self.blocks[b].end - self.blocks[b].start

        path = cfg.steady_path(self.blocks, loop, work, cost)
        return [b for b in path or sorted(loop.blocks) if b not in inner], path is not None

    def is_queue(self, ids):
        """Return whether warps outside MMA loops use the barriers `ids`, as queue producers do."""
        return bool(self.mma_mask) and any(
            used and used & set(ids) and self.flow.masks.get(self.block_of[i], 0) & ~self.mma_mask
            for i, (used, _) in self.flow.barriers.items()
        )

    def report(self, loop, arch, ctas_per_sm, warps, loop_warps):
        """Return the report of one loop as a dict; `warps`, unless None, replaces those found."""
        name = self.names[id(loop)]
        children = [x for x in loop.children if x not in self.spins]
        inner = {b for x in children for b in x.blocks}
        path, path_found = self.steady_path(loop, inner)
        body = count(self.ins, _indices(self.blocks, sorted(loop.blocks - inner)), self.descriptors)
        steady = count(self.ins, _indices(self.blocks, sorted(path)), self.descriptors)
        indices = [i for i in _indices(self.blocks, path) if not self.ins[i].dead]
        sequence = [self.ins[i] for i in indices]
        covered, mufus = waits.overlap(sequence)
        wgmmas = waits.wgmma_waits(sequence)
        own = self.own_warps(loop)
        default = warps or (self.mma_warps if name in self.mma_loops else own)
        running = (loop_warps or {}).get(name, default)
        barriers, ping_pong = waits.barriers(
            self.ins, indices, self.flow.barriers, 32 * self.cta_warps, 32 * running
        )
        if ping_pong and self.is_queue(ping_pong["ids"]):
            ping_pong = None
        bound = bounds(
            steady,
            arch,
            running,
            ctas_per_sm,
            covered / mufus if mufus else 0.0,
            barriers["lockstep_warps"],
            wgmmas["serialized"],
        )
        if ping_pong and wgmmas["hgmma"]:
            # Share of a warpgroup's MUFU clocks that fits under the products of the others.
            cycles, units = bound["cycles"], max(ping_pong["threads"] // 128, 1)
            share = (units - 1) * cycles["tensor"] / cycles["mufu"] if cycles["mufu"] else 1.0
            ping_pong = {**ping_pong, "units": units, "mufu_share": round(min(1.0, share), 4)}
        parent = loop.parent
        while parent is not None and parent in self.spins:
            parent = parent.parent
        return {
            "name": name,
            "depth": loop.depth,
            "parent": self.names[id(parent)] if parent else None,
            "addr": [
                self.ins[self.blocks[loop.header].start].addr,
                max(self.ins[self.blocks[b].end - 1].addr for b in loop.blocks),
            ],
            "children": [self.names[id(x)] for x in children],
            "spin_loops_inside": sum(1 for x in self.spins if x.header in loop.blocks),
            "body_instructions": body.n,
            "steady_instructions": steady.n,
            "path_found": path_found,
            "classes": {k: steady.by_class[k] for k in C.CLASSES if steady.by_class[k]},
            "tensor_ops": dict(steady.tensor_ops),
            "spills": body.spills,
            "global_bytes_per_warp": steady.global_bytes,
            "unresolved_mma": body.unresolved,
            "ops": dict(steady.by_op.most_common()),
            "mufu_under_wgmma": [covered, mufus],
            "cta_barriers": barriers["cta"],
            "barriers": barriers,
            "serialized_wgmma": [wgmmas["serialized"], wgmmas["hgmma"]],
            "wgmma_waits": wgmmas,
            "pingpong": ping_pong if wgmmas["hgmma"] else None,
            "dispatch": loop in self.dispatching,
            "own_warps": own,
            "partition": self.partition_of.get(name),
            "bounds": bound,
            "counts": steady,
        }


def analyze_kernel(
    ins,
    labels,
    arch,
    warps,
    ctas_per_sm,
    loop_warps=None,
    cta_warps=None,
    launch_regs=None,
    linear=True,
):
    """Return the report of a kernel as a dict.

    `warps` is the number of warps that run the loops, `cta_warps` (by default the same) the number
    of warps of the CTA. If the two differ, `warps` applies to every loop; if not, each loop of a
    warp-specialized kernel gets the warps that run it. `loop_warps` maps a loop to a number of
    warps and overrides both. `linear` is True if the CTA has one dimension.
    """
    cta_warps = cta_warps or warps
    kernel = _Analysis(ins, labels, cta_warps, launch_regs, linear)
    total = count(ins, range(len(ins)), kernel.descriptors)
    every = waits.wgmma_waits([x for x in ins if not x.dead], cyclic=False)
    given = warps if warps != cta_warps else None
    return {
        "partitions": kernel.partitions,
        "register_pool": kernel.pool,
        "serialized_wgmma": [every["serialized"], every["hgmma"]],
        "instructions": total.n,
        "classes": {k: total.by_class[k] for k in C.CLASSES if total.by_class[k]},
        "ops": dict(total.by_op.most_common()),
        "tensor_ops": dict(total.tensor_ops),
        "spill_instructions": total.spills,
        "loops": [kernel.report(x, arch, ctas_per_sm, given, loop_warps) for x in kernel.loops],
        "total_counts": total,
    }


def main_loop(kernel):
    """Return the loop in which a kernel spends its time.

    The main loop is the innermost loop with tensor work that does the most FLOPs per instruction.
    Without tensor work it is the innermost loop with the most instructions. The result is None if
    there are no loops.
    """

    def density(loop):
        flops = loop["bounds"]["mflop_per_trip"] / max(loop["steady_instructions"], 1)
        return flops, -loop["body_instructions"]

    with_mma = [x for x in kernel["loops"] if "bound_a" in x["bounds"] and not x.get("dispatch")]
    names = {x["name"] for x in with_mma}
    if with_mma:
        return max((x for x in with_mma if not names & set(x["children"])), key=density)
    inner = [x for x in kernel["loops"] if not x["children"]]
    return max(inner, key=lambda x: x["steady_instructions"], default=None)


def analyze(
    cubin, arch=None, warps=None, smem=0, loop_warps=None, kernel=None, tmem_cols=0, geforce=False
):
    """Return the reports of the kernels in a cubin.

    Args:
        cubin: bytes or path of the cubin.
        arch: name of the architecture; None means the target of the cubin.
        warps: warps per CTA; None means the cubin's REQNTID / 32, else its launch bounds / 32, else
            4. If the cubin has a REQNTID of another size, `warps` applies to every loop.
        smem: dynamic shared memory per CTA in bytes.
        loop_warps: warps per loop, as in {"L3": 8}, instead of those found for the loop.
        kernel: report only kernels whose name has this part.
        tmem_cols: columns of tensor memory per CTA.
        geforce: use the tensor rate of GeForce GPUs.
    """
    if isinstance(cubin, (str, Path)):
        cubin = Path(cubin).read_bytes()
    attributes = kernel_attributes(cubin)
    target, kernels = parse(disassemble(cubin))
    arch = get_arch(arch or target, geforce)
    reports = []
    for name, (ins, labels) in kernels.items():
        if kernel and kernel not in name:
            continue
        own = attributes.get(name, {})
        threads = own.get("reqntid") or own.get("max_threads") or 128
        loop_default = warps or threads // 32
        cta_warps = threads // 32 if own.get("reqntid") else loop_default
        resident = occupancy(
            arch, own.get("regs", 0) or 1, cta_warps, own.get("static_smem", 0), smem, tmem_cols
        )
        report = analyze_kernel(
            ins,
            labels,
            arch,
            loop_default,
            resident["ctas_per_sm"],
            loop_warps,
            cta_warps,
            own.get("regs"),
            own.get("linear", True),
        )
        main = main_loop(report)
        reports.append(
            {
                **report,
                "kernel": name,
                "arch": arch.name,
                "regs": own.get("regs"),
                "stack": own.get("stack"),
                "static_smem": own.get("static_smem"),
                "dynamic_smem": smem,
                "warps": loop_default,
                "occupancy": resident,
                "threads": threads if own.get("reqntid") else loop_default * 32,
                "assumed": list(arch.assumed),
                "main_loop": main["name"] if main else None,
            }
        )
    return reports
