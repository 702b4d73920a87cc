"""Conversion of the runtime's error reports to exceptions."""

from __future__ import annotations

import enum
import re

from .errors import DivergenceError, ExecutionError, MemoryFault, RaceError, Trap


class Kind(enum.IntEnum):
    """Kinds of errors, with the numbers of rt/runtime.cpp."""

    OOB = 1
    ALIGN = 2
    GLOBAL_RACE = 3
    SHARED_RACE = 4
    DIVERGENCE = 5
    DEADLOCK = 6
    TRAP = 7
    STEPS = 8
    SHARED = 9
    LOCAL = 10
    MISC = 11


def launch_error(kernel, report, ranges, block):
    """Return the exception for an error report of the runtime.

    `ranges` holds the (start, end, name, flags) of the memory that the launch may access, `block`
    the shape of a thread block.
    """
    message, address = report.msg.decode(errors="replace"), report.addr
    thread, cta = report.thread, tuple(report.ctaid)
    x, y, z = thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])
    where = (
        f"kernel {kernel.name}, CTA {cta}, thread {thread} (tid {(x, y, z)}, warp {thread // 32})"
    )
    if report.line:
        where += f"; {_source_line(kernel.module, report.line)}"
    kind = Kind(report.kind)
    name = {Kind.GLOBAL_RACE: "global", Kind.SHARED_RACE: "shared"}.get(kind, kind.name.lower())

    def error(cls, text):
        return cls(text, name, kernel.name, report.line, cta, thread, address)

    if kind == Kind.OOB:
        return error(
            MemoryFault,
            f"out-of-range global {message} of {report.aux} bytes at address {address:#x} "
            f"by {where}; {_nearest(ranges, address)}",
        )
    if kind == Kind.ALIGN:
        text = f"{message} {address:#x} for a {report.aux}-byte access by {where}"
        return error(MemoryFault, text)
    if kind in (Kind.SHARED, Kind.LOCAL):
        space, owner = ("shared", "block") if kind == Kind.SHARED else ("local", "thread")
        return error(
            MemoryFault,
            f"out-of-range {space} {message} at offset {address} "
            f"(the {owner} has {report.aux} bytes) by {where}",
        )
    if kind == Kind.GLOBAL_RACE:
        position = next(
            (f"{n}+{address - lo} bytes" for lo, hi, n, _ in ranges if lo <= address < hi),
            hex(address),
        )
        other = f"CTA number {report.aux}" if report.aux >= 0 else "several CTAs or an atomic"
        text = f"global-memory race: {message} at {position}, earlier access by {other}; {where}"
        return error(RaceError, text)
    if kind == Kind.SHARED_RACE:
        other = "a bulk copy" if report.aux == -2 else "several other warps or an atomic"
        if 0 <= report.aux < 64:
            other = f"warp {report.aux}"
        return error(
            RaceError,
            f"shared-memory race: {message} at shared offset {address}, earlier access by {other} "
            f"without a barrier in between; {where}",
        )
    cls = {
        Kind.DIVERGENCE: DivergenceError,
        Kind.DEADLOCK: DivergenceError,
        Kind.TRAP: Trap,
    }.get(kind, ExecutionError)
    return error(cls, f"{message} ({where})")


def _source_line(module, line):
    """Describe a line of the PTX text and the source line that it was compiled from."""
    lines = module.text.split("\n")
    text = lines[line - 1].strip() if 0 < line <= len(lines) else "?"
    if len(text) > 200:  # a wgmma lists up to 128 registers
        text = re.sub(r"\{[^{}]{80,}\}", "{...}", text)
    source = ""
    if location := module.mod.loc.get(line):
        file = module.mod.files.get(location[0], f"file {location[0]}")
        source = f", source {file}:{location[1]}"
    return f"PTX line {line}: `{text}`{source}"


def _nearest(ranges, address):
    """Describe the range that is nearest to an address outside all ranges."""
    tensors = [(lo, hi, name) for lo, hi, name, _ in ranges if name != "parameters"]
    if not tensors:
        return "no tensors were passed"
    lo, hi, name = min(tensors, key=lambda r: max(r[0] - address, address - r[1] + 1, 0))
    if address < lo:
        position = f"{lo - address} bytes before its start"
    elif address >= hi:
        position = f"{address - hi} bytes past its end"
    else:
        position = f"access starts at byte {address - lo}"
    return f"nearest tensor: {name} [{lo:#x}, {hi:#x}) of {hi - lo} bytes, {position}"
