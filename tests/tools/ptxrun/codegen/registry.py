"""The functions that translate instructions, by opcode."""

from __future__ import annotations

INSTRUCTIONS = {}


def instruction(*opcodes):
    """Register a function of (emitter, instruction) for these opcodes."""

    def register(function):
        INSTRUCTIONS.update(dict.fromkeys(opcodes, function))
        return function

    return register
