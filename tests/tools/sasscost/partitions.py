"""Partitions of a warp-specialized kernel: groups of warps, their loops, registers and roles."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from . import classify as C
from . import warps as w
from .cfg import Loop

LOADS = {"UTMALDG", "UBLKCP", "LDGSTS"}


class RunLoop(NamedTuple):
    """Loop, with the bit mask of the warps that run it."""

    name: str
    loop: Loop
    mask: int
    has_mma: bool


def partitions(ins, blocks, loops, flow, cta_warps, launch_regs):
    """Group the `RunLoop`s by the setmaxnreg in force or, without one, by the warps that run them.

    `flow` is the kernel's `warps.Flow`. Returns the partitions as dicts, a dict from loop name to
    the index of its partition, and [registers that the partitions request, registers that the
    launch provides], both in registers x warps; None if these are not known.
    """
    all_warps = (1 << cta_warps) - 1
    groups = {}
    for x in loops:
        in_force = frozenset(flow.in_force.get(x.loop.header, {-1}))
        key = in_force, 0 if in_force != {-1} else x.mask
        groups.setdefault(key, []).append(x)
    found, index = [], {}
    for (in_force, _), members in groups.items():
        sites = [i for i in in_force if i >= 0]
        mask = _mask(members, blocks, flow, sites)
        if not sites and mask == all_warps:
            continue  # all warps run the group: it is not a partition
        for x in members:
            index[x.name] = len(found)
        found.append(_Partition(members, blocks, flow, sites, mask, cta_warps, launch_regs))
    for p in found:
        p.find_count(found, ins, blocks, flow, all_warps)
    pool = None
    known = [p for p in found if p.warps_from == "warp number"]
    if (
        launch_regs
        and flow.sites
        and len(known) == len(found) > 1
        and sum(p.mask for p in known) == all_warps
        and sum(len(p.warps) for p in found) == cta_warps
    ):
        requested = sum(p.regs * len(p.warps) for p in found)
        pool = [requested, launch_regs * cta_warps]
    return [p.as_dict(ins, blocks) for p in found], index, pool


def _mask(members, blocks, flow, sites):
    """Return the mask of the warps that run a group's loops or set its registers."""
    mask = 0
    for x in members:
        mask |= x.mask
    for b in blocks:
        if sites and flow.set_in.get(b.i) in sites:
            mask |= flow.masks.get(b.i, 0)
    return mask


class _Partition:
    def __init__(self, members, blocks, flow, sites, mask, cta_warps, launch_regs):
        by_site = dict(flow.sites)
        regs = sorted({by_site[i] for i in sites if by_site[i]})
        self.members, self.sites, self.mask = members, sites, mask
        self.warps = [i for i in range(cta_warps) if mask >> i & 1]
        self.warps_from = "warp number"
        self.count = len(self.warps)
        self.regs = regs[-1] if regs else launch_regs
        self.has_setmaxnreg = bool(regs)
        self.blocks = set().union(*[x.loop.blocks for x in members])
        if sites:
            self.blocks |= {b for b, set_at in flow.in_force.items() if set_at <= set(sites)}

    def find_count(self, found, ins, blocks, flow, all_warps):
        """Set the number of warps from a barrier if the warp number does not determine it.

        The barrier is the smallest that no other partition uses.
        """
        shared = any(q.mask & self.mask for q in found if q is not self and q.sites and self.sites)
        if not shared and not (self.mask == all_warps and len(found) > 1):
            return
        mine, others = {}, set()
        for i, (ids, counts) in flow.barriers.items():
            inside = any(blocks[b].start <= i < blocks[b].end for b in self.blocks)
            if ins[i].op.startswith("BAR.ARV") or not inside:
                others |= ids or set()
            elif (
                ids and counts and len(ids) == len(counts) == 1 and len(w.operands(ins[i].args)) > 1
            ):
                mine.setdefault(next(iter(ids)), set()).update(counts)
        threads = [
            n
            for barrier, counts in mine.items()
            if barrier not in others
            for n in counts
            if n and n < 32 * len(self.warps)
        ]
        self.warps_from = "barrier" if threads else "unknown"
        if threads:
            self.count = max(min(threads) // 32, 1)

    def as_dict(self, ins, blocks):
        ops = Counter(
            C.base(ins[i].op) for b in self.blocks for i in range(blocks[b].start, blocks[b].end)
        )
        has_mma = any(x.has_mma for x in self.members) or any(map(C.is_tcgen05_mma, ops))
        return {
            "warps": None if self.warps_from == "barrier" else self.warps,
            "regs": self.regs,
            "setmaxnreg": self.has_setmaxnreg,
            "loops": [x.name for x in self.members],
            "warps_from": self.warps_from,
            "count": self.count,
            "role": "mma" if has_mma else "load" if LOADS & set(ops) else "other",
        }
