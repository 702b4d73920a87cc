"""Basic blocks of a kernel, in the order in which diverged lanes execute them."""

from __future__ import annotations

from ..errors import UnsupportedPtx
from ..ptx import Instr, Label
from .registers import accumulators, call_param_registers, registers_of, uses_and_defs

MAX_BLOCK = 160  # instructions per generated function


class Block:
    """Basic block: instructions without a branch between them.

    `succ` holds all successors, `next` the successor if no branch is taken, `target` the target of
    a branch and `targets` the targets of a brx. `is_last` is False for all parts of a long block
    except the last.
    """

    def __init__(self, label=None):
        self.label, self.ins, self.succ = label, [], []
        self.next = self.target = self.targets = None
        self.is_last = True
        # Registers that the block keeps in memory (wgmma accumulators) and in local variables.
        self.accumulators, self.plain = set(), set()


def is_barrier(it):
    """Return whether the instruction waits at a barrier."""
    return it.op[0] in ("bar", "barrier") and "warp" not in it.op and "arrive" not in it.op


def may_wait(it):
    """Return whether a warp may have to wait for asynchronous work at the instruction."""
    op = it.op
    return (
        (op[0] == "mbarrier" and op[1] in ("try_wait", "test_wait"))
        or (op[0] == "wgmma" and op[1] == "wait_group")
        or (op[0] == "cp" and "bulk" in op and "wait_group" in op)
        or op[0] == "setmaxnreg"
    )


def split_into_blocks(program, body):
    """Return the blocks of `body`, a list of labels and instructions."""
    for it in body:  # first, to determine the widths of pseudo registers
        if isinstance(it, Instr) and it.op[0] in ("$ldp", "$stp"):
            call_param_registers(program, it)
    blocks, labels = _cut(program, body)
    _connect(program, blocks, labels)
    return _shorten(_in_order(blocks))


def _cut(program, body):
    """Return the blocks in text order, and a dict from label to block."""
    blocks, labels = [Block()], {}

    def begin(label=None):
        blocks.append(Block(label))

    for it in body:
        if isinstance(it, Label):
            if blocks[-1].ins or blocks[-1].label is not None:
                begin(it.name)
            blocks[-1].label = it.name
            labels[it.name] = blocks[-1]
            continue
        result = None
        if is_barrier(it) and "red" in it.op:
            kind = it.op[it.op.index("red") + 1]
            if it.args[1][0] != "i":
                program.reject(it, "unsupported barrier number in a register (bar.red)")
            result = Instr(["$barredres", kind], None, [it.args[0], it.args[1]], it.line)
            it = Instr(["bar", "redarrive"], it.pred, it.args[1:], it.line)
        if program.has_wgmma:
            own = accumulators(it)
            if own:
                other = {r for a in it.args[1:] for r in registers_of(a)}
            else:
                uses, defs = uses_and_defs(program, it)
                other = {*uses, *defs}
            current = blocks[-1]
            if own & current.plain or other & (current.accumulators | own):
                begin()
            blocks[-1].accumulators |= own
            blocks[-1].plain |= other
        blocks[-1].ins.append(it)
        ends = it.op[0] in ("bra", "brx", "ret", "exit", "trap")
        if ends or is_barrier(it) or may_wait(it):
            begin()
            if result is not None:
                blocks[-1].ins.append(result)
    blocks.append(Block())
    blocks[-1].ins.append(Instr(["exit"], None, [], body[-1].line if body else 0))
    return blocks, labels


def _connect(program, blocks, labels):
    """Set the successors of the blocks, which are in text order."""
    for i, b in enumerate(blocks):
        b.position = i
        b.next = blocks[i + 1] if i + 1 < len(blocks) else None
        following = [b.next] if b.next else []
        last = b.ins[-1] if b.ins else None
        op = last.op[0] if last is not None else None
        if op == "bra":
            name = last.args[0][1]
            if name not in labels:
                raise UnsupportedPtx(f"line {last.line}: unknown label {name}")
            b.target = labels[name]
            b.succ = [b.target, *(following if last.pred else [])]
        elif op == "brx":
            b.targets = [labels[x] for x in program.branch_targets[last.args[1][1]]]
            b.succ = [*b.targets, *(following if last.pred else [])]
        elif op in ("ret", "exit"):
            b.succ = following if last.pred else []
        else:
            b.succ = following


def _in_order(blocks):
    """Return the reachable blocks in reverse post-order.

    The search visits successors outside loops first, so that they come last.
    """
    depth = _loop_depth(blocks)

    def successors(b):
        return iter(sorted(set(b.succ), key=lambda x: (depth.get(x, 0), -x.position)))

    order, seen = [], {blocks[0]}
    stack = [(blocks[0], successors(blocks[0]))]
    while stack:
        b, remaining = stack[-1]
        s = next((x for x in remaining if x not in seen), None)
        if s is None:
            order.append(b)
            stack.pop()
        else:
            seen.add(s)
            stack.append((s, successors(s)))
    return order[::-1]


def _loop_depth(blocks):
    """Return the loop depth of each block. A back edge leads to an earlier block in the text."""
    depth = dict.fromkeys(blocks, 0)
    for b in blocks:
        for s in b.succ:
            if s.position <= b.position:
                for x in blocks[s.position : b.position + 1]:
                    depth[x] += 1
    return depth


def _shorten(blocks):
    """Split blocks of more than MAX_BLOCK instructions, and return all blocks numbered."""
    first, last, parts = {}, {}, []
    for b in blocks:
        chunks = [b.ins[i : i + MAX_BLOCK] for i in range(0, len(b.ins), MAX_BLOCK)] or [[]]
        if len(chunks) > 1 and len(chunks[-1]) < 8:
            rest = chunks.pop()
            chunks[-1] = chunks[-1] + rest
        before = None
        for chunk in chunks:
            part = Block()
            part.ins, part.id = chunk, len(parts)
            parts.append(part)
            if before is None:
                first[b] = part
            else:
                before.succ, before.next, before.is_last = [part], part, False
            before = part
        last[b] = before
    for b, part in last.items():
        part.succ = [first[s] for s in b.succ]
        part.next = first.get(b.next)
        part.target = first.get(b.target)
        if b.targets is not None:
            part.targets = [first[s] for s in b.targets]
    return parts
