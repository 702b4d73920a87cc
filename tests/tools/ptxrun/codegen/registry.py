"""Table of the functions that translate instructions, by opcode."""

from __future__ import annotations

INSTRUCTIONS = {}


def instruction(*opcodes):
    """Decorate a function of (emitter, instruction) that translates these opcodes."""

    def register(function):
        INSTRUCTIONS.update(dict.fromkeys(opcodes, function))
        return function

    return register
