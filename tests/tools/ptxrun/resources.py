"""Registers, stack and shared memory of compiled kernels, as the CUDA tools report them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import LaunchError


def nvidia_tool(name):
    """Return the path of ptxas or cuobjdump: Triton's copy if present, else the one on PATH."""
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} not found: install Triton or add {name} to PATH")
    return path


def resource_usage(cubin):
    """Return registers, stack and shared memory of each kernel in a cubin.

    `cubin` is bytes or a compiled Triton kernel. Raises FileNotFoundError if cuobjdump is absent.
    """
    if hasattr(cubin, "asm"):
        cubin = cubin.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    return {
        name: {k.lower(): int(v) for k, v in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", usage)}
        for name, usage in re.findall(r"Function (\S+):\s*\n\s*(.*)", text)
    }


def assemble(ptx, arch):
    """Compile PTX text with ptxas for `arch` and return the cubin.

    The ptxas on PATH is preferred to Triton's: nvcc writes PTX of its own version, for which
    Triton's ptxas may be too old.
    """
    ptxas = shutil.which("ptxas") or nvidia_tool("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        command = [ptxas, f"-arch={arch}", "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise LaunchError(f"ptxas failed:\n{result.stderr[:4000]}")
        return cubin.read_bytes()
