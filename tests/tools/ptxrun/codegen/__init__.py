"""Translation of a PTX kernel to C++: one function per basic block, on whole-warp registers.

`program` inlines calls and lays out memory, `blocks` splits the code into basic blocks, `liveness`
finds the registers that outlive a block, and `emit` writes the C++. The other modules translate
the instructions, by subject.
"""

from __future__ import annotations

from ..errors import UnsupportedPtx
from . import arithmetic, bits, compare, convert, hopper, matrix, memory, warp  # noqa: F401
from .classes import CLASSES
from .emit import Emitter
from .program import Program

__all__ = ["CLASSES", "generate"]


def generate(mod, name):
    """Return the C++ text of kernel `name` of a parsed module, and its description as a dict."""
    function = mod.funcs.get(name)
    if function is None or function.kind != "entry":
        entries = [k for k, f in mod.funcs.items() if f.kind == "entry"]
        raise UnsupportedPtx(f"kernel must be one of {entries}, got {name!r}")
    program = Program(mod, function)
    emitter = Emitter(program)
    text = emitter.emit()
    return text, {
        "name": name,
        "params": [[n, *v] for n, v in program.params.items()],
        "param_bytes": program.param_bytes,
        "shared_static": program.shared_bytes,
        "local_bytes": program.local_bytes,
        "reqntid": function.reqntid,
        "maxntid": function.maxntid,
        "nblocks": len(program.blocks),
        "tables": emitter.tables,
        "sites": emitter.sites,
        "gvars": emitter.gvars,
        "classes": CLASSES,
        "ninstr": sum(len(b.ins) for b in program.blocks),
    }
