"""Tokens of a PTX text."""

from __future__ import annotations

import contextlib
import re

from .errors import PtxSyntaxError
from .ptx import Module

_TOK = re.compile(
    r"""
    (?P<ws>[ \t\r]+)
  | (?P<nl>\n)
  | (?P<str>"(?:[^"\\]|\\.)*")
  | (?P<flt>0[fF][0-9a-fA-F]{8}(?![0-9a-fA-F])|0[dD][0-9a-fA-F]{16}
      |\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)
  | (?P<int>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)
  | (?P<id>[A-Za-z_$%][\w$]*(?:(?:\.|::)[\w$]+)*)
  | (?P<dir>\.[A-Za-z_][\w$]*(?:::[\w$]+)*)
  | (?P<p>[{}()\[\],;:@!|<>+\-=~&*/])
""",
    re.X,
)


class Tokens:
    """Tokens of a PTX text, with the current position of the parser.

    `m` is the module that the parser fills. Comments are removed here, and the source positions
    of .loc and .file directives are stored in `m`.
    """

    def __init__(self, text):
        self.m = Module()
        self.m.lines = text.split("\n")
        self.toks = []
        self._lex(text)
        self.i = 0

    def _lex(self, text):
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
        out = []
        cur = None
        for n, ln in enumerate(text.split("\n"), 1):
            s = ln.lstrip()
            if s.startswith((".loc ", ".loc\t")):
                f = s.split()
                with contextlib.suppress(IndexError, ValueError):
                    cur = (int(f[1]), int(f[2]), int(f[3].rstrip(",")))
                out.append("")
                continue
            if s.startswith((".file ", ".file\t")):
                g = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', s)
                if g:
                    self.m.files[int(g.group(1))] = g.group(2)
                out.append("")
                continue
            if cur is not None:
                self.m.loc[n] = cur
            c = ln.find("//")
            if c >= 0 and '"' not in ln:
                ln = ln[:c]
            out.append(ln)
        text = "\n".join(out)
        pos, line, n = 0, 1, len(text)
        toks = self.toks
        match = _TOK.match
        while pos < n:
            g = match(text, pos)
            if g is None:
                if text.startswith("//", pos):
                    pos = text.find("\n", pos)
                    if pos < 0:
                        break
                    continue
                raise PtxSyntaxError(f"line {line}: cannot read {text[pos : pos + 30]!r}")
            k = g.lastgroup
            pos = g.end()
            if k == "ws":
                continue
            if k == "nl":
                line += 1
                continue
            toks.append((k, g.group(), line))
            if k == "str":
                line += g.group().count("\n")
        toks.append(("eof", "", line))

    def peek(self, k=0):
        return self.toks[self.i + k][1]

    def kind(self, k=0):
        return self.toks[self.i + k][0]

    def line(self):
        return self.toks[self.i][2]

    def next(self):
        t = self.toks[self.i][1]
        self.i += 1
        return t

    def expect(self, s):
        if self.peek() != s:
            raise PtxSyntaxError(f"line {self.line()}: expected {s!r}, found {self.peek()!r}")
        self.i += 1

    def skip_to(self, s):
        while self.next() != s:
            pass

    def skip_braces(self):
        self.expect("{")
        d = 1
        while d:
            t = self.next()
            d += (t == "{") - (t == "}")
            if self.kind() == "eof" and d:
                return
