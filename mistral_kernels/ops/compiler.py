"""Compile csrc: the sources, the flags, and the commands that make one library of them.

CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.utils.cpp_extension,
which itself is of no use here: its lock outlives a killed build and stops everybody else, and it
compiles no CUDA beside a CPU build of PyTorch, as `setup.py` does. This module imports nothing of
the package: `setup.py` loads it alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

BUILD_VARIABLE = "MISTRAL_KERNELS_BUILD"
DEVICE_TYPES = ("cpu", "cuda")
UNFINISHED = ".building-"  # begins the name of the folder in which a library is made

_PACKAGE = Path(__file__).parent.parent
INSTALLED = _PACKAGE / "csrc"  # what an installed package has: the sources, and libraries
SOURCES = INSTALLED if INSTALLED.is_dir() else _PACKAGE.parent / "csrc"

_FLAGS = [
    "-O3",
    "-std=c++17",
    # One binary for this PyTorch and all later ones; what is newer does not compile.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
_HOST_FLAGS = [
    "-fPIC",
    "-ffp-contract=off",  # products are rounded before they are added, as on the GPU
    "-fvisibility=hidden",  # both libraries define the same names, and PyTorch loads them globally
]

# The sources in cpu/kernels are compiled for each of these; csrc/cpu/instruction_sets.cpp asks the
# processor for what the flags name.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS: dict[str, list[str]] = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    }


class BuildError(RuntimeError):
    """A library could not be built; the message holds the compiler's own words."""


class NotBuiltError(BuildError):
    """No build was attempted: no compiler, no GPU, or MISTRAL_KERNELS_BUILD=never."""


def build_setting() -> str:
    """Return the value of MISTRAL_KERNELS_BUILD; ValueError if it is no known one."""
    setting = os.environ.get(BUILD_VARIABLE, "auto")
    if setting not in ("auto", "never", "always"):
        raise ValueError(f"{BUILD_VARIABLE} must be 'auto', 'never' or 'always', got {setting!r}")
    return setting


def library_name(device_type: str) -> str:
    """Return the file name of a library."""
    return f"mistral_kernels_{device_type}.so"


def checksum_file(library: Path) -> Path:
    """Return the path of the file with the SHA-256 of a library, in hexadecimal digits."""
    return library.with_name(f"{library.name}.sha256")


def build(device_type: str, library: Path, architectures: str = "") -> None:
    """Compile and link `library`, and write its checksum beside it.

    The library appears whole or not at all; it is on the disk before its checksum is. An interrupt
    ends the compilers and removes what they have written.

    Args:
        architectures: of the GPUs to build for, as TORCH_CUDA_ARCH_LIST gives them.

    Raises:
        NotBuiltError: there is no compiler.
        BuildError: the compiler failed, or a variable that it needs is malformed.
        OSError: `library` cannot be written.
    """
    compiler = _compiler(device_type)
    jobs = _jobs()
    compilations = _compilations(device_type, architectures)
    library = library.absolute()
    library.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"mistral_kernels: compiling the {device_type} operators, once, for about a minute, "
        f"into {library.parent}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=UNFINISHED) as folder:
        objects = [os.path.join(folder, f"{i}.o") for i in range(len(compilations))]
        commands = [
            [*compiler, "-c", *x, "-o", path] for x, path in zip(compilations, objects, strict=True)
        ]
        unfinished = Path(folder, library.name)
        _run(commands, jobs)
        link = [*compiler, "-shared", *objects, *_link_flags(device_type), "-o", str(unfinished)]
        _run([link], jobs)
        _publish(unfinished, library)


def _publish(unfinished: Path, library: Path) -> None:
    digest = Path(unfinished.parent, "checksum")
    digest.write_text(hashlib.sha256(unfinished.read_bytes()).hexdigest())
    for source, target in ((unfinished, library), (digest, checksum_file(library))):
        _sync(source)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(source, target)
    _sync(library.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(commands: Sequence[list[str]], jobs: int) -> None:
    """Run commands in the folder of the sources, `jobs` at a time, until one fails.

    In a thread: an interrupt reaches the main one alone, so no command escapes between its start
    and its place in the list of those to be killed.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(_run_until, stop, commands, jobs)
            while wait([future], timeout=0.1).not_done:  # a signal need not wake a longer wait
                pass
            future.result()
        finally:
            stop.set()


def _run_until(stop: threading.Event, commands: Sequence[list[str]], jobs: int) -> None:
    waiting = list(reversed(commands))
    running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    try:
        while (waiting or running) and not stop.is_set():
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop()))
            ended = [each for each in running if each[0].poll() is not None]
            for process, output in ended:
                running.remove((process, output))
                with output:
                    output.seek(0)
                    said = output.read().decode(errors="replace")
                if process.returncode:
                    name = str(process.args[0])  # type: ignore[index]
                    raise BuildError(f"{name} ended with {process.returncode}\n{said}")
            if not ended:
                time.sleep(0.02)
    finally:
        for process, output in running:
            with output, suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()


def _start(command: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    output = tempfile.TemporaryFile()  # noqa: SIM115, read when the compiler ends
    process = subprocess.Popen(
        command,
        cwd=SOURCES,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, output


def _jobs() -> int:
    """Return how many compilers run at a time."""
    setting = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", setting):
        raise BuildError(f"MAX_JOBS must be a positive integer, got {setting!r}")
    return int(setting)


def nvcc() -> str | None:
    """Return the path of nvcc, looked for where torch.utils.cpp_extension does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folder = os.path.join(home, "bin") if home else None
    return shutil.which("nvcc", path=folder) or (
        None if home else shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def _compiler(device_type: str) -> list[str]:
    try:
        cxx = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX is {os.environ['CXX']!r}: {error}") from None
    if device_type == "cpu":
        name, *options = cxx or ["c++"]
        compiler = shutil.which(name)
        if compiler is None:
            raise NotBuiltError(f"no compiler: {name} is not on PATH")
        return [os.path.abspath(compiler), *options]
    compiler = nvcc()
    if compiler is None:
        raise NotBuiltError("no nvcc: neither on PATH nor in CUDA_HOME; install the CUDA toolkit")
    _check_cuda_version(compiler)
    return [compiler, *(f"-ccbin={word}" for word in cxx[-1:])]  # the first may be ccache


def _compilations(device_type: str, architectures: str) -> list[list[str]]:
    """Return the arguments that compile each object of a library, in the folder of the sources."""
    flags = [
        *_FLAGS,
        "-DKERNELS_NAMESPACE=mistral_kernels",
        f"-DKERNELS_DEVICE={device_type.upper()}",
        "-isystem",
        str(Path(torch.__file__).parent / "include"),
    ]
    if device_type == "cuda":
        flags += ["-DKERNELS_FOR_CUDA", f"-Xcompiler={','.join(_HOST_FLAGS)}"]
        flags += _gencode(architectures)
        threads = f"--threads={_jobs()}"
        kernels = [[*flags, threads, source] for source in _sources("cuda", "*.cu")]
        return [*([*flags, source] for source in _sources(".")), *kernels]
    flags += _HOST_FLAGS
    kernels = [
        [*flags, *options, f"-DINSTRUCTION_SET={name}", source]
        for name, options in INSTRUCTION_SETS.items()
        for source in _sources("cpu/kernels")
    ]
    return [*([*flags, source] for source in (*_sources("."), *_sources("cpu"))), *kernels]


def fingerprint(device_type: str, architectures: str) -> str:
    """Return 16 hexadecimal digits that change with all that goes into a library."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.rglob("*")):
        if source.suffix in (".h", ".cpp", ".cu"):
            digest.update(source.read_bytes())
    compiler = (_FLAGS, _HOST_FLAGS, INSTRUCTION_SETS, os.environ.get("CXX"), platform.machine())
    cuda = (cuda_major(), architectures) if device_type == "cuda" else None
    digest.update(repr((compiler, cuda)).encode())
    return digest.hexdigest()[:16]


def _sources(folder: str, pattern: str = "*.cpp") -> list[str]:
    return [str(x.relative_to(SOURCES)) for x in sorted((SOURCES / folder).glob(pattern))]


def _link_flags(device_type: str) -> list[str]:
    flags = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
    if device_type == "cuda":
        # The CUDA runtime that PyTorch uses. No symbol of libtorch is used: --no-as-needed keeps
        # it, because it loads libtorch_cuda.
        flags = ["--cudart=shared", "-Xlinker=--no-as-needed", *flags]
    return flags


def _gencode(architectures: str) -> list[str]:
    flags = []
    for name in re.split(r"[;\s]+", architectures.strip("; ")):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _check_cuda_version(compiler: str) -> None:
    """Raise NotBuiltError unless nvcc has the CUDA major version of this PyTorch."""
    if torch.version.cuda is None:  # built for another PyTorch
        return
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.", done.stdout)
    if release is None or release[1] != cuda_major():
        found = f"of CUDA {release[1]}" if release else "of no known version"
        raise NotBuiltError(f"{compiler} is {found}, this PyTorch of CUDA {torch.version.cuda}")


def cuda_major() -> str:
    """Return the major version of the CUDA that this PyTorch was built with."""
    return str(torch.version.cuda).partition(".")[0]
