"""Control-flow graph, dominators and natural loops of a disassembled kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from .classify import base


@dataclass
class Block:
    i: int
    start: int  # index of the first instruction
    end: int  # one past the last
    succ: list = field(default_factory=list)
    pred: list = field(default_factory=list)


@dataclass
class Loop:
    header: int
    blocks: set
    latches: list
    parent: Loop = None
    depth: int = 1
    children: list = field(default_factory=list)


def build(ins, labels):
    """Return the basic blocks of a kernel, in the order of its instructions."""
    n = len(ins)
    lead = {0}
    for i in labels.values():
        if i < n:
            lead.add(i)
    for i, x in enumerate(ins):
        if base(x.op) in ("BRA", "BRX", "BRXU", "JMP", "EXIT", "RET", "KILL") and i + 1 < n:
            lead.add(i + 1)
    starts = sorted(lead)
    blocks = [
        Block(k, s, (starts[k + 1] if k + 1 < len(starts) else n)) for k, s in enumerate(starts)
    ]
    at = {b.start: b.i for b in blocks}
    for b in blocks:
        last = ins[b.end - 1]
        op = base(last.op)
        succ = []
        # The condition of BRA.U, BRA.DIV and BRA.CONV is an operand.
        cond = bool(last.pred and last.pred not in ("@PT", "@UPT")) or (
            op == "BRA" and (last.args.split("`")[0].strip(" ,") != "")
        )
        if last.dead:
            succ = [b.i + 1]
        elif op in ("BRA", "JMP", "BRX", "BRXU"):
            for t in last.targets:
                j = labels.get(t)
                if j is not None and j in at:
                    succ.append(at[j])
            if cond and op not in ("BRX", "BRXU"):
                succ.append(b.i + 1)
        elif op in ("EXIT", "RET", "KILL"):
            if cond:
                succ.append(b.i + 1)
        else:
            succ.append(b.i + 1)
        b.succ = [s for s in dict.fromkeys(succ) if s < len(blocks)]
    for b in blocks:
        for s in b.succ:
            blocks[s].pred.append(b.i)
    return blocks


def dominators(blocks, root=0):
    order, seen = [], set()
    st = [(root, iter(blocks[root].succ))]
    seen.add(root)
    while st:
        x, it = st[-1]
        for s in it:
            if s not in seen:
                seen.add(s)
                st.append((s, iter(blocks[s].succ)))
                break
        else:
            order.append(x)
            st.pop()
    rpo = order[::-1]
    num = {b: i for i, b in enumerate(rpo)}
    idom = {root: root}
    changed = True
    while changed:
        changed = False
        for b in rpo[1:]:
            ps = [p for p in blocks[b].pred if p in idom]
            if not ps:
                continue
            d = ps[0]
            for p in ps[1:]:
                x, y = d, p
                while x != y:
                    while num[x] > num[y]:
                        x = idom[x]
                    while num[y] > num[x]:
                        y = idom[y]
                d = x
            if idom.get(b) != d:
                idom[b] = d
                changed = True
    return idom


def dominates(idom, a, b):
    while True:
        if a == b:
            return True
        if idom.get(b, b) == b:
            return False
        b = idom[b]


def loops(blocks):
    """Return the natural loops, outermost first in program order.

    Loops that share a header are merged.
    """
    if not blocks:
        return []
    idom = dominators(blocks)
    by_header = {}
    for b in blocks:
        if b.i not in idom:
            continue
        for s in b.succ:
            if dominates(idom, s, b.i):
                body = by_header.setdefault(s, ({s}, []))
                body[1].append(b.i)
                st = [b.i]
                while st:
                    x = st.pop()
                    if x in body[0]:
                        continue
                    body[0].add(x)
                    st += [p for p in blocks[x].pred if p in idom]
    found = [Loop(header, *parts) for header, parts in by_header.items()]
    found.sort(key=lambda x: (blocks[x.header].start, -len(x.blocks)))
    for x in found:
        around = [y for y in found if y is not x and x.header in y.blocks and x.blocks < y.blocks]
        if around:
            x.parent = min(around, key=lambda y: len(y.blocks))
            x.parent.children.append(x)
    for x in found:
        x.depth, parent = 1, x.parent
        while parent is not None:
            x.depth, parent = x.depth + 1, parent.parent
    return found


def steady_path(blocks, loop, weight, cost):
    """Return the blocks of one trip through `loop`; None if its body is irreducible.

    The trip is the acyclic path from the header to a latch with the largest sum of `weight` (the
    tensor work) and, among such paths, the smallest sum of `cost` (instructions).
    """
    body = list(loop.blocks)
    inside = loop.blocks
    idom = dominators(blocks)
    fwd = {
        b: [
            s
            for s in blocks[b].succ
            if s in inside and s != loop.header and not dominates(idom, s, b)
        ]
        for b in body
    }
    indeg = dict.fromkeys(body, 0)
    for b in body:
        for s in fwd[b]:
            indeg[s] += 1
    order, st = [], [b for b in body if indeg[b] == 0]
    while st:
        x = st.pop()
        order.append(x)
        for s in fwd[x]:
            indeg[s] -= 1
            if indeg[s] == 0:
                st.append(s)
    if len(order) != len(body):
        return None
    best = {loop.header: ((weight(loop.header), -cost(loop.header)), None)}
    for x in order:
        if x not in best:
            continue
        (w, c), _ = best[x]
        for s in fwd[x]:
            v = (w + weight(s), c - cost(s))
            if s not in best or v > best[s][0]:
                best[s] = (v, x)
    ends = [latch for latch in loop.latches if latch in best]
    if not ends:
        return None
    e = max(ends, key=lambda latch: best[latch][0])
    path = []
    while e is not None:
        path.append(e)
        e = best[e][1]
    return path[::-1]
