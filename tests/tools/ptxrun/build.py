"""Compile generated C++ with g++ and cache the result."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import BuildError

HERE = Path(__file__).parent
RUNTIME = HERE / "rt"
MARCH = "-march=" + os.environ.get("PTXRUN_MARCH", "native")
COMMON_FLAGS = [
    "-std=gnu++17",
    MARCH,
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-w",
    "-shared",
    "-fPIC",
]
RUNTIME_FLAGS = [*COMMON_FLAGS, "-O3"]
KERNEL_FLAGS = [
    *COMMON_FLAGS,
    "-O1",
    "-fno-trapping-math",
    # These passes do not improve generated code and take half of the compile time.
    "-fno-tree-dse",
    "-fno-dse",
    "-fira-region=one",
    "-fno-ipa-pure-const",
    "-fno-ipa-reference",
    "-fno-ipa-icf",
    "-fno-ipa-modref",
    "-fno-tree-pta",
    "-fno-tree-dominator-opts",
    "-fdisable-rtl-postreload",
    "--param=max-cse-path-length=1",
    "--param=max-cse-insns=100",
]


def cache_dir():
    """Create the cache folder, $PTXRUN_CACHE or ~/.cache/ptxrun, and return its path."""
    folder = Path(os.environ.get("PTXRUN_CACHE") or Path.home() / ".cache" / "ptxrun")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cxx():
    return os.environ.get("PTXRUN_CXX", "g++")


def missing():
    """Return why this machine cannot execute PTX, or None if it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces the compiler that generates PTX"
    if shutil.which(cxx()) is None:
        return f"the C++ compiler {cxx()} is not on PATH"
    version = _output("-dumpfullversion").strip()
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 12:
        return f"{cxx()} must be GCC 12 or newer, got {version or 'another compiler'}"
    return None


def digest(*parts):
    """Return the cache key of `parts`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def write_atomically(path, text):
    """Write a file of the cache so that other processes never read an incomplete file."""
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def _output(*options):
    return subprocess.run([cxx(), *options], capture_output=True, text=True).stdout


@functools.cache
def _target():
    return _output(MARCH, "-Q", "--help=target")


@functools.cache
def _source_key():
    """Return the cache key of the translator, the compiler and the processor."""
    names = ("build.py", "parser.py", "ptx.py", "tokens.py")
    sources = sorted([*RUNTIME.iterdir(), *HERE.glob("codegen/*.py")])
    texts = [path.read_text() for path in (*sources, *(HERE / name for name in names))]
    return digest(texts, _output("-dumpfullversion"), _target())


def _compile(source, library, flags):
    fd, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(fd)
    command = [cxx(), *flags, "-I", str(RUNTIME), "-o", temporary, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        os.unlink(temporary)
        raise BuildError(f"{cxx()} failed on {source}:\n{result.stderr[:4000]}")
    os.replace(temporary, library)


@functools.cache
def runtime():
    """Return the loaded runtime library."""
    path = cache_dir() / f"rt-{_source_key()}.so"
    if not path.exists():
        _compile(RUNTIME / "runtime.cpp", path, RUNTIME_FLAGS)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.ptxrun_launch.restype = ctypes.c_int
    return library


def kernel_key(ptx, name):
    """Return the key of a kernel in the cache."""
    ptx = re.sub(r"(?m)^\s*\.file.*$", "", ptx)  # its paths may contain temporary folders
    return digest(_source_key(), name, ptx)


def build_kernel(key, generate):
    """Return (library, description) of a kernel, from the cache if possible.

    `generate()` returns (C++ text, description) and is called only on a cache miss.
    """
    folder = cache_dir()
    library, description = folder / f"k-{key}.so", folder / f"k-{key}.json"
    if not (library.exists() and description.exists()):
        text, described = generate()
        source = folder / f"k-{key}-{os.getpid()}.cpp"
        source.write_text(text)
        flags = list(KERNEL_FLAGS)
        if not re.search(r"-mavx512f\s+\[enabled\]", _target()):
            # Without AVX-512 the generated code is longer, and this pass takes most of the time.
            flags.append("-fdisable-rtl-combine")
        _compile(source, library, flags)
        if os.environ.get("PTXRUN_KEEP"):
            os.replace(source, folder / f"k-{key}.cpp")
        else:
            source.unlink()
        write_atomically(description, json.dumps(described))
    runtime()
    return ctypes.CDLL(str(library)), json.loads(description.read_text())
