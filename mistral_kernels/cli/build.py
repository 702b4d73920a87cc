"""Compile the operators of csrc: `python -m mistral_kernels build`.

Without this command, the first call of an operator compiles them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mistral_kernels.cli.command import Parser, run, write_out
from mistral_kernels.ops import extension
from mistral_kernels.ops.compiler import DEVICE_TYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_build, argv)


def _build(argv: Sequence[str] | None) -> None:
    Parser(
        prog="python -m mistral_kernels build",
        description="Compile the C++ operators, and the CUDA operators if this machine has a GPU "
        "and nvcc. Libraries that are compiled already are not compiled again.",
    ).parse_args(argv)
    for device_type in DEVICE_TYPES:
        extension.load(device_type)
        write_out(f"csrc {device_type}: {extension.status(device_type)}\n")
    if not extension.load("cpu"):
        reason = extension.status("cpu").removeprefix("not loaded: ")
        raise ValueError(f"the library for cpu cannot be built: {reason}")
