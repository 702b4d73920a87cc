"""What the package's commands share: names of dtypes and devices, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


# What a command tells in one line, as its input's fault: too large for the memory, among others.
BAD_INPUT = (ValueError, OSError, NotImplementedError, torch.OutOfMemoryError)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def device_of(name: str) -> torch.device:
    """The device that `--device` means; `ValueError` if there is none of that name here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; "
            "use --device cpu, or install a PyTorch built for your GPU"
        )
    return device


def run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `command`; its exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        command(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from complaining as it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BAD_INPUT as error:
        # In one write, so that lines of several ranks do not mix.
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0
