"""Kernels with inlined calls, memory offsets and basic blocks."""

from __future__ import annotations

from ..errors import UnsupportedPtx
from ..ptx import TYPE_BITS, Instr, Label
from .blocks import split_into_blocks

MAX_DEPTH = 24  # of nested calls


def align_up(x, alignment):
    return (x + alignment - 1) // alignment * alignment


class Program:
    """Kernel in the form that the emitter translates.

    `params` maps a parameter to (offset, bytes, type, count, alignment). `shared` and `locals` map
    a variable to its offset.
    """

    def __init__(self, mod, function):
        self.mod, self.function = mod, function
        self.regs, self.vars = dict(function.regs), {}
        self.branch_targets = dict(function.branchtargets)
        self._inlined = 0
        body = []
        self._flatten(function, 0, lambda r: r, {}, None, body)
        self._lay_out_params()
        self._lay_out_shared(body)
        self._lay_out_locals()
        self._mark_call_params(body)
        self.has_wgmma = any(isinstance(it, Instr) and it.op[0] == "wgmma" for it in body)
        self.blocks = split_into_blocks(self, body)

    def source_line(self, number):
        lines = self.mod.lines
        return lines[number - 1].strip() if number <= len(lines) else "?"

    def reject(self, it, why="unsupported instruction"):
        """Raise UnsupportedPtx for an instruction."""
        line = self.source_line(it.line)
        raise UnsupportedPtx(f"{self.function.name}: line {it.line}: {why}: `{line}`")

    def pseudo_register(self, name, offset, bits):
        """Return the pseudo register of a part of a call parameter, at least `bits` wide."""
        register, bits = f"#{name}@{offset}", max(16, bits)
        if bits > TYPE_BITS[self.regs.get(register, "pred")]:
            self.regs[register] = f"b{bits}"
        return register

    def _flatten(self, fn, depth, renamed, params, end, out):
        """Append the body of `fn` to `out`, with its calls inlined.

        `renamed` is a function that renames registers, `params` maps .param variables. A return
        becomes a branch to label `end`.
        """
        if depth > MAX_DEPTH:
            raise UnsupportedPtx(
                f"{self.function.name}: calls must be nested at most {MAX_DEPTH} deep; recursion "
                "is not supported"
            )
        suffix, labels = f"$i{self._inlined}", {}

        def operand(o):
            kind = o[0]
            if kind == "r":
                return ("r", renamed(o[1]))
            if kind in ("v", "l"):
                return (kind, [operand(x) for x in o[1]])
            if kind == "m":
                return ("m", operand(o[1]), o[2], *(operand(x) for x in o[3:]))
            if kind == "n":
                return ("n", operand(o[1]))
            if kind == "pp":
                return ("pp", operand(o[1]), operand(o[2]))
            if kind == "s":
                return ("s", params.get(o[1], labels.get(o[1], o[1])), *o[2:])
            return o

        if depth:
            for it in fn.body:
                if isinstance(it, Label):
                    labels[it.name] = it.name + suffix
            for name, targets in fn.branchtargets.items():
                labels[name] = name + suffix
                self.branch_targets[labels[name]] = [labels.get(x, x) for x in targets]
        for v in fn.vars:
            if depth and v.space != "shared":
                params.setdefault(v.name, v.name + suffix)
                self.vars[v.name + suffix] = v
            else:
                self.vars[v.name] = v
        for it in fn.body:
            if isinstance(it, Label):
                out.append(Label(labels.get(it.name, it.name), it.line))
                continue
            pred = (renamed(it.pred[0]), it.pred[1]) if it.pred else None
            if it.op[0] == "ret" and depth:
                out.append(Instr(["bra"], pred, [("s", end)], it.line))
                continue
            ins = Instr(list(it.op), pred, [operand(a) for a in it.args], it.line)
            if it.op[0] == "call":
                self._inline(ins, depth, out)
            else:
                out.append(ins)

    def _inline(self, call, depth, out):
        """Append the body of a called function to `out`."""
        rets, args, name = [], [], None
        for a in call.args:
            if a[0] == "l" and name is None:
                rets = [x[1] for x in a[1]]
            elif a[0] == "l":
                args = [x[1] for x in a[1]]
            elif a[0] == "s" and name is None:
                name = a[1]
            elif a[0] == "r":
                raise UnsupportedPtx(f"line {call.line}: indirect calls are not supported")
        if name in ("vprintf", "__assertfail"):
            operands = [("p", x) for x in args + rets]
            out.append(Instr(["$" + name], call.pred, operands, call.line))
            return
        fn = self.mod.funcs.get(name)
        if fn is None or fn.body is None:
            raise UnsupportedPtx(f"line {call.line}: unsupported call of external function {name}")
        if call.pred:
            skip = f"$skip{self._inlined}_{call.line}"
            register, negated = call.pred
            out.append(Instr(["bra"], (register, not negated), [("s", skip)], call.line))
        self._inlined += 1
        n = self._inlined
        params = {v.name: a for v, a in zip(fn.params, args, strict=True)}
        params.update((v.name, a) for v, a in zip(fn.rets, rets, strict=True))
        for r, kind in fn.regs.items():
            self.regs[f"{r}$i{n}"] = kind
        end = f"$end$i{n}"
        self._flatten(fn, depth + 1, lambda r: f"{r}$i{n}", params, end, out)
        out.append(Label(end, call.line))
        if call.pred:
            out.append(Label(skip, call.line))

    def _lay_out_params(self):
        offset, self.params = 0, {}
        for v in self.function.params:
            offset = align_up(offset, v.align)
            self.params[v.name] = (offset, v.size, v.elt, v.count, v.align)
            offset += v.size
        self.param_bytes = offset

    def _lay_out_shared(self, body):
        """Assign offsets to the shared variables in use; those of dynamic size come last."""
        used = {
            name for it in body if isinstance(it, Instr) for a in it.args for name in symbols_of(a)
        }
        names = {id(v): name for name, v in self.vars.items()}
        offset, self.shared, dynamic = 0, {}, []
        for v in (*self.mod.vars.values(), *self.vars.values()):
            name = names.get(id(v), v.name)
            if v.space != "shared" or name not in used:
                continue
            if v.extern or v.count == 0:
                dynamic.append((name, v))
                continue
            offset = align_up(offset, v.align)
            self.shared[name] = offset
            offset += v.size
        if dynamic:
            offset = align_up(offset, max(16, *(v.align for _, v in dynamic)))
            self.shared.update((name, offset) for name, _ in dynamic)
        self.shared_bytes = offset

    def _lay_out_locals(self):
        offset, self.locals = 0, {}
        for name, v in self.vars.items():
            if v.space == "local":
                offset = align_up(offset, v.align)
                self.locals[name] = offset
                offset += v.size
        self.local_bytes = align_up(offset, 16)

    def _mark_call_params(self, body):
        """Replace accesses to the .param variables of calls by accesses to pseudo registers."""
        for it in body:
            if isinstance(it, Label) or it.op[0] not in ("ld", "st") or len(it.op) == 1:
                continue
            is_load = it.op[0] == "ld"
            m = it.args[1 if is_load else 0]
            if (
                it.op[1].split("::")[0] == "param"
                and m[0] == "m"
                and m[1][0] == "s"
                and m[1][1] not in self.params
            ):
                it.op[0] = "$ldp" if is_load else "$stp"


def symbols_of(operand):
    """Return the names of the variables and labels in an operand."""
    kind = operand[0]
    if kind == "s":
        return [operand[1]]
    if kind in ("v", "l"):
        return [name for x in operand[1] for name in symbols_of(x)]
    if kind in ("m", "n"):
        return [name for x in (operand[1], *operand[3:4]) for name in symbols_of(x)]
    return []
