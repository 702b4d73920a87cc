"""CUDA C++ kernels, compiled to PTX by nvcc."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from . import build
from .errors import LaunchError
from .launch import load


def compile_cuda(source, arch="sm_80", options=()):
    """Compile CUDA C++ with nvcc to PTX and return the `Module`.

    `source` is the text of a program or the path of a .cu file. The PTX of a text without quoted
    includes is cached. A file, or a text with quoted includes, is compiled every time, because its
    headers may have changed. Kernels translated from PTX are always cached. The compiler is $NVCC,
    by default nvcc.

    Raises:
        LaunchError: nvcc rejects the program.
        FileNotFoundError: nvcc is absent.
    """
    options = [str(x) for x in options]
    is_path = isinstance(source, os.PathLike) or (
        "\n" not in source and source.endswith((".cu", ".cuh"))
    )
    if is_path or re.search(r'^\s*#\s*include\s*"', source, re.M):
        return load(_compile(source, is_path, arch, options))
    cached = build.cache_dir() / f"cu-{build.digest(source, arch, options)}.ptx"
    if not cached.exists():
        build.write_atomically(cached, _compile(source, is_path, arch, options))
    return load(cached.read_text())


def _compile(source, is_path, arch, options):
    with tempfile.TemporaryDirectory() as folder:
        file, ptx = Path(source) if is_path else Path(folder, "k.cu"), Path(folder, "k.ptx")
        if not is_path:
            file.write_text(source)
        nvcc = os.environ.get("NVCC", "nvcc")
        command = [nvcc, "-ptx", f"-arch={arch}", "-lineinfo", *options, "-o", str(ptx), str(file)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise LaunchError(f"nvcc failed:\n{result.stderr[:4000]}")
        return ptx.read_text()
