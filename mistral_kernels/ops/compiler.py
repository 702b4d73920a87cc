"""Compile the sources in csrc into one library per device type.

CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS have the same meaning as in
torch.utils.cpp_extension. That module is not used, for two reasons. Its lock remains after a killed
build and blocks all later builds. It cannot compile CUDA if PyTorch is a CPU build, but `setup.py`
needs to. This module imports no other module of the package, because `setup.py` loads it alone.
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
UNFINISHED = ".building-"  # prefix of the temporary folder of a build

_PACKAGE = Path(__file__).parent.parent
INSTALLED = _PACKAGE / "csrc"  # sources and libraries of an installed package
SOURCES = INSTALLED if INSTALLED.is_dir() else _PACKAGE.parent / "csrc"

_FLAGS = [
    "-O3",
    "-std=c++17",
    # The binary runs with torch 2.10 and later: code that uses newer parts of the ABI is rejected.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
_HOST_FLAGS = [
    "-fPIC",
    "-ffp-contract=off",  # no fused multiply-adds, as on the GPU
    "-fvisibility=hidden",  # both libraries define the same symbols and are loaded globally
]

# The sources in csrc/cpu/kernels are compiled once per instruction set.
# csrc/cpu/instruction_sets.cpp checks that the processor supports the features of these flags.
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
    """A library could not be built. The message includes the output of the compiler."""


class NotBuiltError(BuildError):
    """No build was started: no suitable compiler, no GPU, or MISTRAL_KERNELS_BUILD=never."""


def build_setting() -> str:
    """Return the value of MISTRAL_KERNELS_BUILD.

    Raises:
        ValueError: the value is not auto, never or always.
    """
    setting = os.environ.get(BUILD_VARIABLE, "auto")
    if setting not in ("auto", "never", "always"):
        raise ValueError(f"{BUILD_VARIABLE} must be 'auto', 'never' or 'always', got {setting!r}")
    return setting


def library_name(device_type: str) -> str:
    """Return the file name of the library for a device type."""
    return f"mistral_kernels_{device_type}.so"


def checksum_file(library: Path) -> Path:
    """Return the path of the file that contains the SHA-256 of a library, in hexadecimal."""
    return library.with_name(f"{library.name}.sha256")


def build(device_type: str, library: Path, architectures: str = "") -> None:
    """Compile and link `library`, and write its checksum beside it.

    The library is written first, then its checksum, each atomically and with fsync. An interrupt
    kills the compilers and removes their files.

    Args:
        device_type: "cpu" or "cuda".
        library: the path of the library.
        architectures: the GPU architectures to build for, in the format of TORCH_CUDA_ARCH_LIST.

    Raises:
        NotBuiltError: there is no compiler, or nvcc has another major version than PyTorch's CUDA.
        BuildError: the compiler failed, or an environment variable is malformed.
        OSError: `library` cannot be written.
    """
    compiler = _compiler(device_type)
    jobs = _jobs()
    compilations = _compilations(device_type, architectures)
    library = library.absolute()
    library.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"mistral_kernels: compiling the {device_type} operators once, in about one minute, "
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
    """Run commands in the folder of the sources, at most `jobs` at a time, until one fails.

    The commands are started in another thread, because an interrupt is raised in the main thread
    only. In the main thread, an interrupt between the start of a process and its registration in
    `running` would leave the process running.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(_run_until, stop, commands, jobs)
            while wait([future], timeout=0.1).not_done:  # a signal might not interrupt a long wait
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
            finished = [item for item in running if item[0].poll() is not None]
            for process, output in finished:
                running.remove((process, output))
                with output:
                    output.seek(0)
                    text = output.read().decode(errors="replace")
                if process.returncode:
                    name = str(process.args[0])  # type: ignore[index]
                    raise BuildError(f"{name} exited with code {process.returncode}\n{text}")
            if not finished:
                time.sleep(0.02)
    finally:
        for process, output in running:
            with output, suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # includes its children
            process.wait()


def _start(command: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    output = tempfile.TemporaryFile()  # noqa: SIM115, read when the compiler has ended
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
    """Return the maximal number of concurrent compilers."""
    setting = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", setting):
        raise BuildError(f"MAX_JOBS must be a positive integer, got {setting!r}")
    return int(setting)


def nvcc() -> str | None:
    """Return the path of nvcc, or None. Search the same folders as torch.utils.cpp_extension."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folder = os.path.join(home, "bin") if home else None
    return shutil.which("nvcc", path=folder) or (
        None if home else shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def _compiler(device_type: str) -> list[str]:
    try:
        cxx = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX must be a command, got {os.environ['CXX']!r}: {error}") from None
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
    return [compiler, *(f"-ccbin={word}" for word in cxx[-1:])]  # the word before may be ccache


def _compilations(device_type: str, architectures: str) -> list[list[str]]:
    """Return the compiler arguments of each object, relative to the folder of the sources."""
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
    """Return a hash, 16 hexadecimal digits, of the sources, the flags and the compiler settings."""
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
        # Link to the same CUDA runtime as PyTorch. --no-as-needed keeps libtorch, although none of
        # its symbols is used, because libtorch loads libtorch_cuda.
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
    if torch.version.cuda is None:  # `setup.py` uses a CPU build to compile for a CUDA build
        return
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.", done.stdout)
    if release is None or release[1] != cuda_major():
        found = f"CUDA {release[1]}" if release else "an unknown version"
        raise NotBuiltError(f"{compiler} must be CUDA {cuda_major()} like PyTorch, got {found}")


def cuda_major() -> str:
    """Return the major version of the CUDA toolkit that PyTorch was built with."""
    return str(torch.version.cuda).partition(".")[0]
