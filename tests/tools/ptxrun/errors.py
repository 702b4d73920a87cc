"""Exceptions that ptxrun raises."""

from __future__ import annotations


class PtxRunError(RuntimeError):
    """Base class of all errors that ptxrun raises."""


class PtxSyntaxError(PtxRunError):
    """Error in the syntax of a PTX text."""


class UnsupportedPtx(PtxRunError):
    """Instruction or operand form that ptxrun does not implement."""


class BuildError(PtxRunError):
    """Generated C++ code that the host compiler rejects: a bug in ptxrun."""


class LaunchError(PtxRunError):
    """Invalid launch configuration or arguments."""


class ExecutionError(PtxRunError):
    """Invalid operation of a running kernel.

    `kind` is the name of a `faults.Kind` in lower case ("global" and "shared" for the two kinds of
    races). `line` is the line of the PTX text, `thread` the number of the thread in its CTA.
    """

    def __init__(
        self, message, kind=None, kernel=None, line=None, cta=None, thread=None, address=None
    ):
        super().__init__(message)
        self.kind = kind
        self.kernel = kernel
        self.line = line
        self.cta = cta
        self.thread = thread
        self.address = address


class MemoryFault(ExecutionError):
    """Out-of-range or misaligned access."""


class RaceError(ExecutionError):
    """Data race, found with `racecheck=True`."""


class DivergenceError(ExecutionError):
    """Warp-level instruction executed by the wrong lanes, or barrier that cannot complete."""


class Trap(ExecutionError):
    """Executed `trap` instruction or failed device assertion."""
