"""Exceptions that ptxrun raises."""

from __future__ import annotations


class PtxRunError(RuntimeError):
    """Base class of every error raised by ptxrun."""


class PtxSyntaxError(PtxRunError):
    """The PTX text could not be parsed."""


class UnsupportedPtx(PtxRunError):
    """The PTX text uses an instruction or operand form that is not implemented."""


class BuildError(PtxRunError):
    """The host C++ compiler rejected generated code (a bug in ptxrun)."""


class LaunchError(PtxRunError):
    """The launch configuration or the arguments are not valid."""


class ExecutionError(PtxRunError):
    """The kernel did something invalid while it ran."""

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
    """A data race found with racecheck enabled."""


class DivergenceError(ExecutionError):
    """The wrong lanes executed a .sync or .aligned instruction, or a barrier cannot complete."""


class Trap(ExecutionError):
    """The kernel executed trap (for example a failed device assertion)."""
