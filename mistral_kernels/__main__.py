"""Command `mistral-kernels`, also `python -m mistral_kernels`, which runs the other commands.

Without arguments, it runs the command `report`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from mistral_kernels import __version__
from mistral_kernels.cli.command import Parser, enter, run, wrapped, write_out


class _Command(NamedTuple):
    module: str
    summary: str
    arguments: tuple[str, ...] = ()  # are put before the arguments of the user


_COMMANDS = {
    "generate": _Command("generate", "continue a text"),
    "chat": _Command(
        "generate", "chat with an instruct model; the same as generate --chat", ("--chat",)
    ),
    "convert": _Command(
        "convert", "convert a checkpoint between Mistral's and Hugging Face's formats"
    ),
    "train": _Command("train", "train a small model, or continue the training of a checkpoint"),
    "report": _Command(
        "cli.report",
        "print what is installed and which backend runs (default); --check tests the operators",
    ),
    "build": _Command("cli.build", "compile the C++ and CUDA operators now, not at first use"),
}
_REPORT_OPTIONS = ("--check",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return _prepare(sys.argv[1:] if argv is None else argv)()


def console() -> None:
    """Run the command as a process; the entry point of `mistral-kernels`."""
    # Import the command's module before `enter`, which removes the handlers that print an error or
    # an interrupt of an import on one line.
    enter(_prepare(sys.argv[1:]))


def _prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Import the module of a command, and return the function that runs the command."""
    name, *rest = argv or ["report"]
    if name in _REPORT_OPTIONS:
        name, rest = "report", list(argv)
    if name not in _COMMANDS:
        return partial(run, _describe, argv)
    command = _COMMANDS[name]
    module = importlib.import_module(f"mistral_kernels.{command.module}")
    return partial(module.main, [*command.arguments, *rest])


def _describe(argv: Sequence[str]) -> None:
    """Print the help or the version, or an error if `argv` has neither option."""
    parser = Parser(
        prog="python -m mistral_kernels",
        usage="%(prog)s [COMMAND] [OPTIONS]",
        description=wrapped("Kernels, checkpoints and text generation of Mistral models."),
        epilog="\n".join(
            [
                "commands:",
                *(
                    wrapped(f"  {name:10}{command.summary}", indent=12)
                    for name, command in _COMMANDS.items()
                ),
                "",
                wrapped("COMMAND --help describes the options of a command."),
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if not argv[0].startswith("-"):
        parser.error(_unknown(argv[0]))
    if parser.parse_args(argv).version:
        write_out(f"mistral_kernels {__version__}\n")


def _unknown(name: str) -> str:
    names = ", ".join(_COMMANDS)
    near = difflib.get_close_matches(name.lower(), _COMMANDS, 1)
    if not near and " " in name:
        near = ["generate"]  # the argument is probably a prompt
    return f"command must be one of {names}, got {name!r}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


if __name__ == "__main__":
    console()
