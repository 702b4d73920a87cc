"""Parser for the PTX that Triton and nvcc generate for sm_80 and sm_90a.

The body of a function is a flat list of `Label` and `Instr`. The parser flattens nested scopes and
renames what they declare.
"""

from __future__ import annotations

from .errors import PtxSyntaxError
from .ptx import TYPE_BITS, Function, Instr, Label, Var
from .tokens import Tokens


class _Parser(Tokens):
    scope_id = 0

    def parse(self):
        while self.kind() != "eof":
            t = self.peek()
            if t == ".version":
                self.i += 1
                self.m.version = self.next()
            elif t == ".target":
                self.i += 1
                self.m.target = self.next()
                while self.peek() == ",":
                    self.i += 1
                    self.next()
            elif t == ".address_size":
                self.i += 1
                self.next()
            elif t == ".section":
                self.i += 1
                while self.peek() != "{":
                    self.i += 1
                self.skip_braces()
            elif t == ".pragma" or t == ".alias":
                self.skip_to(";")
            elif t in (
                ".visible",
                ".weak",
                ".extern",
                ".common",
                ".entry",
                ".func",
                ".global",
                ".const",
                ".shared",
                ".tex",
            ):
                self._decl()
            elif t == ";":
                self.i += 1
            else:
                raise PtxSyntaxError(f"line {self.line()}: unexpected {t!r} at module level")
        return self.m

    def _decl(self):
        extern = False
        while self.peek() in (".visible", ".weak", ".extern", ".common"):
            extern |= self.peek() == ".extern"
            self.i += 1
        t = self.peek()
        if t in (".entry", ".func"):
            self._function()
        else:
            for v in self._vardecl(extern):
                self.m.vars[v.name] = v

    def _vardecl(self, extern=False):
        space = self.next()[1:]
        align, elt = None, None
        vec = 1
        while self.kind() == "dir":
            d = self.next()
            if d == ".align":
                align = int(self.next(), 0)
            elif d in (".v2", ".v4"):
                vec = int(d[2:])
            elif d == ".ptr":
                pass
            elif d[1:] in TYPE_BITS:
                elt = d[1:]
            elif d in (".global", ".shared", ".const", ".local", ".attribute"):
                if d == ".attribute":
                    self.expect("(")
                    self.skip_to(")")
            else:
                raise PtxSyntaxError(f"line {self.line()}: unknown declaration attribute {d}")
        out = []
        while True:
            name = self.next()
            hi = None
            if self.peek() == "<":
                self.i += 1
                hi = int(self.next(), 0)
                self.expect(">")
            count = None
            while self.peek() == "[":
                self.i += 1
                c = 0 if self.peek() == "]" else int(self.next().rstrip("U"), 0)
                self.expect("]")
                count = c if count is None else count * c
            init = None
            if self.peek() == "=":
                self.i += 1
                init = self._init()
            e = elt
            if vec > 1:
                count = vec * (1 if count is None else count)
            if hi is not None:
                out += [Var(space, f"{name}{q}", align, e, count, init, extern) for q in range(hi)]
            else:
                out.append(
                    Var(space, name, align or max(1, TYPE_BITS[e] // 8), e, count, init, extern)
                )
            if self.peek() == ",":
                self.i += 1
                continue
            break
        if self.peek() == ";":
            self.i += 1
        return out

    def _init(self):
        if self.peek() == "{":
            self.i += 1
            v = []
            while self.peek() != "}":
                x = self._init()
                if isinstance(x, list):
                    v.extend(x)
                else:
                    v.append(x)
                if self.peek() == ",":
                    self.i += 1
            self.i += 1
            return v
        if self.peek() == "-":
            self.i += 1
            x = self._init()
            return -x
        k, t, ln = self.toks[self.i]
        self.i += 1
        if k == "int":
            return int(t.rstrip("U"), 0)
        if k == "flt":
            return ("flt", t)
        if k == "id":
            off = 0
            if t == "generic" and self.peek() == "(":
                self.i += 1
                t = self.next()
                self.expect(")")
            if self.peek() == "+":
                self.i += 1
                off = int(self.next(), 0)
            return ("sym", t, off)
        raise PtxSyntaxError(f"line {ln}: unsupported initializer {t!r}")

    def _params(self):
        ps = []
        if self.peek() != "(":
            return ps
        self.i += 1
        while self.peek() != ")":
            if self.peek() in (".param", ".reg"):
                space = self.next()[1:]
                align, elt = None, None
                while self.kind() == "dir":
                    d = self.next()
                    if d == ".align":
                        align = int(self.next(), 0)
                    elif d[1:] in TYPE_BITS:
                        elt = d[1:]
                name = self.next()
                count = None
                if self.peek() == "[":
                    self.i += 1
                    count = 0 if self.peek() == "]" else int(self.next(), 0)
                    self.expect("]")
                al = align
                if count is None or al is None:
                    # The alignment after .ptr is the alignment of the pointee.
                    al = max(1, TYPE_BITS[elt] // 8) if count is None else (al or 1)
                ps.append(Var(space, name, al, elt, count))
            elif self.peek() == ",":
                self.i += 1
            else:
                raise PtxSyntaxError(
                    f"line {self.line()}: unexpected {self.peek()!r} in parameter list"
                )
        self.i += 1
        return ps

    def _function(self):
        kind = self.next()[1:]
        line = self.line()
        rets = self._params() if (kind == "func" and self.peek() == "(") else []
        name = self.next()
        params = self._params()
        f = Function(name, kind, params, rets, line)
        while self.peek() not in ("{", ";"):
            d = self.next()
            if d in (".reqntid", ".maxntid"):
                dims = [int(self.next(), 0)]
                while self.peek() == ",":
                    self.i += 1
                    dims.append(int(self.next(), 0))
                setattr(f, d[1:], tuple(dims + [1] * (3 - len(dims))))
            elif d == ".maxnreg":
                f.maxnreg = int(self.next(), 0)
            elif d in (".minnctapersm", ".maxnctapersm"):
                self.next()
            elif d == ".reqnctapercluster":
                f.cluster = [int(self.next(), 0)]
                while self.peek() == ",":
                    self.i += 1
                    f.cluster.append(int(self.next(), 0))
            elif d in (".noreturn", ".abi_preserve", ".abi_preserve_control"):
                pass
            elif d == ".pragma":
                self.skip_to(";")
            elif d in (".explicitcluster", ".maxclusterrank", ".blocksareclusters"):
                while self.kind() == "int" or self.peek() == ",":
                    self.i += 1
            else:
                raise PtxSyntaxError(f"line {self.line()}: unknown function directive {d!r}")
        if self.peek() == ";":
            self.i += 1
            self.m.funcs.setdefault(name, f)
            return
        f.body = []
        self.i += 1
        for v in params + rets:
            if v.space == "reg":
                f.regs[v.name] = v.elt
        self._scope(f, {})
        self.m.funcs[name] = f

    def _scope(self, f, names):
        """Parse a scope; `names` maps the names declared in enclosing scopes to unique names."""
        names = dict(names)
        top = not names.get("#nested")
        names["#nested"] = True
        self.scope_id += 1
        suffix = "" if top else f"$s{self.scope_id}"
        # Rename the labels of a nested scope first, because a branch may precede its label.
        if not top:
            d, j = 1, self.i
            while d:
                t = self.toks[j][1]
                if t == "{":
                    d += 1
                elif t == "}":
                    d -= 1
                elif (
                    d == 1
                    and self.toks[j][0] == "id"
                    and self.toks[j + 1][1] == ":"
                    and self.toks[j - 1][1] in (";", "{", "}", ":")
                ):
                    names[t] = t + suffix
                j += 1
        while True:
            t = self.peek()
            k = self.kind()
            if t == "}":
                self.i += 1
                return
            if t == ";":
                self.i += 1
            elif t == "{":
                self.i += 1
                self._scope(f, names)
            elif t == ".reg":
                self.i += 1
                ty = None
                while self.kind() == "dir":
                    d = self.next()
                    if d not in (".v2", ".v4"):
                        ty = d[1:]
                while True:
                    nm = self.next()
                    if self.peek() == "<":
                        self.i += 1
                        cnt = int(self.next(), 0)
                        self.expect(">")
                        for q in range(cnt):
                            r = f"{nm}{q}"
                            names[r] = r + suffix
                            f.regs[r + suffix] = ty
                    else:
                        names[nm] = nm + suffix
                        f.regs[nm + suffix] = ty
                    if self.peek() == ",":
                        self.i += 1
                        continue
                    break
                self.expect(";")
            elif t in (".shared", ".local", ".param", ".const", ".global"):
                for v in self._vardecl():
                    if suffix:
                        names[v.name] = v.name + suffix
                        v.name += suffix
                    f.vars.append(v)
            elif t == ".pragma":
                self.skip_to(";")
            elif t == ".section":
                while self.peek() != "{":
                    self.i += 1
                self.skip_braces()
            elif k == "id" and self.peek(1) == ":":
                nm = self.next()
                ln = self.line()
                self.i += 1
                nm = names.get(nm, nm)
                if self.peek() in (".branchtargets", ".calltargets"):
                    self.i += 1
                    tg = []
                    while self.peek() != ";":
                        x = self.next()
                        if x != ",":
                            tg.append(names.get(x, x))
                    f.branchtargets[nm] = tg
                elif self.peek() == ".callprototype":
                    self.skip_to(";")
                else:
                    f.body.append(Label(nm, ln))
            else:
                f.body.append(self._instr(f, names))

    def _instr(self, f, names):
        line = self.line()
        pred = None
        if self.peek() == "@":
            self.i += 1
            neg = False
            if self.peek() == "!":
                self.i += 1
                neg = True
            r = self.next()
            pred = (names.get(r, r), neg)
        if self.kind() != "id":
            raise PtxSyntaxError(f"line {line}: expected an instruction, found {self.peek()!r}")
        op = self.next().split(".")
        args = []
        while self.peek() != ";":
            if self.peek() == ",":
                self.i += 1
                continue
            args.append(self._operand(f, names))
        self.i += 1
        return Instr(op, pred, args, line)

    def _operand(self, f, names):
        t, k = self.peek(), self.kind()
        if t == "{":
            self.i += 1
            v = []
            while self.peek() != "}":
                if self.peek() == ",":
                    self.i += 1
                    continue
                v.append(self._operand(f, names))
            self.i += 1
            return ("v", v)
        if t == "(":
            self.i += 1
            v = []
            while self.peek() != ")":
                if self.peek() == ",":
                    self.i += 1
                    continue
                v.append(self._operand(f, names))
            self.i += 1
            return ("l", v)
        if t == "[":
            self.i += 1
            base = self._operand(f, names)
            off = 0
            while self.peek() in ("+", "-"):
                sg = -1 if self.next() == "-" else 1
                if self.peek() == "-":
                    sg = -sg
                    self.i += 1
                off += sg * int(self.next().rstrip("U"), 0)
            coords = ()
            if self.peek() == ",":  # tensor copies: [map, {coordinates}]
                self.i += 1
                coords = (self._operand(f, names),)
                if coords[0][0] != "v" or self.peek() == ",":
                    raise PtxSyntaxError(
                        f"line {self.line()}: unsupported form of a tensor or texture address"
                    )
            self.expect("]")
            if base[0] == "s" and len(base) > 2:
                base, off = base[:2], off + base[2]
            return ("m", base, off, *coords)
        if t == "!":
            self.i += 1
            return ("n", self._operand(f, names))
        if t == "-":
            self.i += 1
            o = self._operand(f, names)
            if o[0] == "i":
                return ("i", -o[1])
            if o[0] == "f":
                return ("f", -o[1])
            raise PtxSyntaxError(f"line {self.line()}: the operand after '-' must be a number")
        if k == "int":
            self.i += 1
            return ("i", int(t.rstrip("U"), 0))
        if k == "flt":
            self.i += 1
            if t[:2] in ("0f", "0F"):
                return ("x32", int(t[2:], 16))
            if t[:2] in ("0d", "0D"):
                return ("x64", int(t[2:], 16))
            return ("f", float(t))
        if k == "id":
            self.i += 1
            if t == "_":
                return ("_",)
            nm = names.get(t, t)
            if nm in f.regs:
                o = ("r", nm)
            elif t.startswith("%"):
                base = t.partition(".")[0]
                if names.get(base, base) in f.regs:
                    raise PtxSyntaxError(f"line {self.line()}: unsupported vector component {t}")
                o = ("sr", t)
            else:
                o = ("s", nm)
            if self.peek() == "|":
                self.i += 1
                q = self._operand(f, names)
                return ("pp", o, q)
            if o[0] == "s" and self.peek() in ("+", "-") and self.kind(1) == "int":
                sg = -1 if self.next() == "-" else 1
                return ("s", nm, sg * int(self.next(), 0))
            return o
        raise PtxSyntaxError(f"line {self.line()}: unsupported operand {t!r}")


def parse(text):
    """Parse a PTX text and return its `Module`."""
    return _Parser(text).parse()
