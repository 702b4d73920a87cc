"""Waits in a loop: for wgmmas in flight, and at barriers."""

from __future__ import annotations

from . import classify as C
from . import warps


def _waits_for_all(x):
    """Return whether `x` waits until no wgmma is in flight."""
    return _is_wait(x) and x.args.replace(" ", "").endswith(",0x0")


def _is_wait(x):
    return C.base(x.op) == "WARPGROUP" and "DEPBAR" in x.op


def overlap(seq):
    """Return (MUFUs issued while a wgmma is in flight, MUFUs) of one trip.

    `seq` holds the instructions of the steady path. A wgmma is in flight from its issue to the next
    wait for all wgmmas. Two trips are followed, because a wgmma may be in flight across the back
    edge.
    """
    in_flight, covered, total = False, 0, 0
    for _ in range(2):
        covered = total = 0
        for x in seq:
            if C.is_wgmma(x.op):
                in_flight = True
            elif _waits_for_all(x):
                in_flight = False
            elif C.base(x.op) == "MUFU":
                total += 1
                covered += in_flight
    return covered, total


def wgmma_waits(seq, cyclic=True):
    """Return the counts of wgmmas and their waits in one trip: hgmma, depbars, alone, serialized.

    An HGMMA is alone if a wait for all wgmmas precedes it and another such wait follows before the
    next HGMMA. It is serialized if it is alone and the HGMMA before or after it in the same trip
    has the same accumulator. A product of several k-steps needs one wait at its end; ptxas adds a
    wait at each k-step when it serializes wgmmas. A product of one k-step is alone, not serialized.
    """
    events = []  # the accumulator of each HGMMA; None for each wait for all wgmmas
    for x in seq:
        if C.is_wgmma(x.op):
            events.append(x.args.split(",")[0].strip())
        elif _waits_for_all(x):
            events.append(None)
    issued = [i for i, event in enumerate(events) if event]

    def waits(i, at_the_end):
        return events[i % len(events)] is None if cyclic or 0 <= i < len(events) else at_the_end

    alone = [i for i in issued if waits(i - 1, True) and waits(i + 1, False)]
    order = {i: k for k, i in enumerate(issued)}

    def neighbors(i):
        return [issued[k] for k in (order[i] - 1, order[i] + 1) if 0 <= k < len(issued)]

    serialized = [i for i in alone if any(events[j] == events[i] for j in neighbors(i))]
    return {
        "hgmma": len(issued),
        "depbars": sum(map(_is_wait, seq)),
        "alone": len(alone),
        "serialized": len(serialized),
    }


def barriers(ins, seq, resolved, cta_threads, loop_threads):
    """Return the counts of barriers on a loop's steady path, and its ping-pong or None.

    `seq` holds the indices of the instructions, `resolved` maps an index to [ids or None, thread
    counts or None], as `warps.run` returns them. A barrier without a thread count, or with a count
    that reaches the CTA's size, is CTA-wide; a barrier with a smaller count belongs to a partition.
    A barrier at which warps arrive without waiting (BAR.ARV) orders warps, as a queue or a
    ping-pong does, but does not synchronize them.
    """

    def ids_and_counts(i):
        operands = warps.operands(ins[i].args)
        known = [_constant(t) for t in [*operands, "", ""][:2]]
        ids, counts = resolved.get(i) or known
        has_count = len(operands) > 1 and "P" not in operands[1]  # BAR.RED has a predicate
        return ids, counts if has_count else {cta_threads}

    arrived = set()
    for i, x in enumerate(ins):
        if x.op.startswith("BAR.ARV") and not x.dead:
            arrived |= ids_and_counts(i)[0] or set()
    arrivals = [ids_and_counts(i) for i in seq if ins[i].op.startswith("BAR.ARV")]
    found = {"cta": 0, "partition": 0, "ordered": 0, "lockstep_warps": 0}
    ping_pong = None
    for i in seq:
        if not ins[i].op.startswith(("BAR.SYNC", "BAR.RED")):
            continue
        ids, counts = ids_and_counts(i)
        threads = max(counts) if counts and None not in counts else None
        if threads is not None and threads >= cta_threads:
            found["cta"] += 1
            found["lockstep_warps"] = cta_threads // 32
        elif (ids & arrived) if ids else arrivals:
            found["ordered"] += 1
            whole_warpgroups = threads and threads > 128 and threads % 128 == 0
            for other_ids, other_counts in arrivals:
                another = other_ids is None or ids is None or other_ids != ids or len(ids) > 1
                if (
                    whole_warpgroups
                    and other_counts == counts
                    and threads <= loop_threads
                    and another
                ):
                    both = sorted((ids or set()) | (other_ids or set()))
                    ping_pong = {"threads": threads, "ids": both}
        else:
            found["partition"] += 1
            if threads:
                together = min(threads, loop_threads) // 32
                found["lockstep_warps"] = max(found["lockstep_warps"], together)
    return found, ping_pong


def _constant(operand):
    """Return the value of an immediate operand as a set; None for a register."""
    return None if operand.startswith(("R", "UR")) else {warps.immediate(operand)}
