"""The compiled operators of csrc, one library for each type of device: found, or built once.

A library is taken from the package, where `setup.py` puts what it could build; else from PyTorch's
cache of extensions; else it is compiled into that cache. Nothing here is needed: without a library
other backends serve, and `status` says why there is none. MISTRAL_KERNELS_BUILD=never compiles
nothing; MISTRAL_KERNELS_BUILD=always raises where a library can neither be found nor built.
MISTRAL_KERNELS_CPU names the instruction set of the kernels for the CPU, otherwise the best. CXX,
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and TORCH_EXTENSIONS_DIR mean what they mean to
torch.utils.cpp_extension, which itself is of no use here: its lock outlives a killed build and
stops everybody else, and it compiles no CUDA beside a CPU build of PyTorch, as `setup.py` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._appdirs

BUILD_VARIABLE = "MISTRAL_KERNELS_BUILD"
CPU_VARIABLE = "MISTRAL_KERNELS_CPU"
DEVICE_TYPES = ("cpu", "cuda")

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

# The sources in cpu/kernels are compiled for each of these; csrc/cpu/dispatch.cpp asks the
# processor for what the flags name.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_INSTRUCTION_SETS: dict[str, list[str]] = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    _INSTRUCTION_SETS |= {
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    }


class BuildError(RuntimeError):
    """A library could not be built; the message holds the compiler's own words."""


class _Library(NamedTuple):
    operators: Any | None
    status: str


_libraries: dict[str, _Library] = {}
_lock = threading.Lock()


def load(device_type: str) -> Any | None:
    """The operators for tensors on `device_type`, a namespace of `torch.ops`; None without them.

    The first call may compile, and says so on stderr; the answer stays for the process.

    Raises:
        ValueError: MISTRAL_KERNELS_BUILD is none of auto, never, always, or MISTRAL_KERNELS_CPU no
            instruction set of this processor.
        RuntimeError: there is no library though MISTRAL_KERNELS_BUILD=always.
    """
    library = _libraries.get(device_type)
    if library is None:
        with _lock:
            if device_type not in _libraries:
                _libraries[device_type] = _find(device_type)
            library = _libraries[device_type]
    return library.operators


def cpu_operators(x: torch.Tensor) -> Any | None:
    """The operators for the CPU where they serve `x` on the torch backend; float64 they do not."""
    if not x.is_cpu or x.dtype == torch.float64:
        return None
    return load("cpu")


def status(device_type: str) -> str:
    """One line: where the library for `device_type` was loaded from, or why there is none."""
    try:
        load(device_type)
    except (RuntimeError, ValueError) as error:
        return f"not loaded: {_one_line(error)}"
    return _libraries[device_type].status


def build_setting() -> str:
    """MISTRAL_KERNELS_BUILD: auto, never or always; ValueError if it is anything else."""
    setting = os.environ.get(BUILD_VARIABLE, "auto")
    if setting not in ("auto", "never", "always"):
        raise ValueError(f"{BUILD_VARIABLE} is {setting!r}; expected 'auto', 'never' or 'always'")
    return setting


def library_name(device_type: str) -> str:
    """The file name of a library, which is the namespace of its operators too."""
    return f"mistral_kernels_{device_type}.so"


def build(device_type: str, library: Path, architectures: str = "") -> None:
    """Compile and link `library`, which appears whole or not at all.

    Args:
        architectures: of the GPUs to build for, as TORCH_CUDA_ARCH_LIST gives them.

    Raises:
        BuildError: there is no compiler, or it failed.
        OSError: `library` cannot be written.
    """
    compiler = _compiler(device_type)
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"no compiler: {compiler[0]} is not on PATH")
    compilations = _compilations(device_type, architectures)
    library = library.absolute()
    library.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"mistral_kernels: compiling the {device_type} operators, once, for about a minute, "
        f"into {library.parent}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
        objects = [os.path.join(folder, f"{i}.o") for i in range(len(compilations))]
        commands = [[*compiler, "-c", *x, "-o", path] for x, path in zip(compilations, objects)]
        unfinished = os.path.join(folder, library.name)
        jobs = os.environ.get("MAX_JOBS", "")
        try:
            with ThreadPoolExecutor(int(jobs) if jobs.isdigit() else os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            _run([*compiler, "-shared", *objects, *_link_flags(device_type), "-o", unfinished])
        except BuildError as failure:
            remedy = f"{BUILD_VARIABLE}=never stops further attempts"
            print(f"mistral_kernels: {_one_line(failure)}; {remedy}", file=sys.stderr)
            raise
        os.replace(unfinished, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        cwd=SOURCES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise BuildError(f"{command[0]} ended with {done.returncode}\n{done.stdout}")


def nvcc() -> str | None:
    """The path of nvcc, looked for where torch.utils.cpp_extension does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folder = os.path.join(home, "bin") if home else None
    return shutil.which("nvcc", path=folder) or (
        None if home else shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def _compiler(device_type: str) -> list[str]:
    cxx = shlex.split(os.environ.get("CXX", ""))
    if device_type == "cpu":
        return cxx or ["c++"]
    compiler = nvcc()
    if compiler is None:
        raise BuildError("no nvcc: neither on PATH nor in CUDA_HOME; install the CUDA toolkit")
    _check_cuda_version(compiler)
    return [compiler, *(f"-ccbin={word}" for word in cxx[-1:])]  # the first may be ccache


def _compilations(device_type: str, architectures: str) -> list[list[str]]:
    """The arguments that compile each object of a library, in the folder of the sources."""
    flags = [
        *_FLAGS,
        f"-DKERNELS_NAMESPACE={library_name(device_type).removesuffix('.so')}",
        f"-DKERNELS_DEVICE={device_type.upper()}",
        "-isystem",
        str(Path(torch.__file__).parent / "include"),
    ]
    if device_type == "cuda":
        flags += ["-DKERNELS_FOR_CUDA", f"-Xcompiler={','.join(_HOST_FLAGS)}"]
        flags += _gencode(architectures)
        threads = f"--threads={os.environ.get('MAX_JOBS') or 0}"  # 0: one for each processor
        return [[*flags, "bindings.cpp"], [*flags, threads, "rolling_cache.cu"]]
    flags += _HOST_FLAGS
    kernels = [
        [*flags, *options, f"-DINSTRUCTION_SET={name}", source]
        for name, options in _INSTRUCTION_SETS.items()
        for source in _sources("cpu/kernels")
    ]
    return [*([*flags, source] for source in ("bindings.cpp", *_sources("cpu"))), *kernels]


def _sources(folder: str) -> list[str]:
    return [f"{folder}/{source.name}" for source in sorted((SOURCES / folder).glob("*.cpp"))]


def _link_flags(device_type: str) -> list[str]:
    flags = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
    if device_type == "cuda":
        # PyTorch's own runtime; and nothing is used of libtorch but that it brings libtorch_cuda.
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
    """A library needs the runtime of nvcc's major version, and has that of PyTorch."""
    if torch.version.cuda is None:  # built for another PyTorch
        return
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.", done.stdout)
    if release is None or release[1] != _cuda_major():
        found = f"of CUDA {release[1]}" if release else "of no known version"
        raise BuildError(f"{compiler} is {found}, this PyTorch of CUDA {torch.version.cuda}")


def _cuda_major() -> str:
    return str(torch.version.cuda).partition(".")[0]


def _find(device_type: str) -> _Library:
    setting = build_setting()
    installed = INSTALLED / library_name(device_type)
    reason = _why_not_here(device_type)
    if reason is not None:
        if installed.exists():
            reason += f"; {installed} was built at installation and is left alone"
        return _Library(None, f"not loaded: {reason}")
    failures: list[Exception] = []
    try:
        if installed.exists():
            with _remembering(failures):
                return _open(device_type, installed)
        cached = _cached(device_type, architectures := _architectures(device_type))
        if cached.exists():
            with _remembering(failures):
                return _open(device_type, cached)
        if setting == "never":
            raise BuildError(f"not compiled, since {BUILD_VARIABLE}=never")
        build(device_type, cached, architectures)
        return _open(device_type, cached)
    except (BuildError, OSError) as error:
        failures.append(error)
    if setting == "always":
        reasons = "\n".join(map(str, failures))
        raise RuntimeError(f"no library for {device_type}, and {BUILD_VARIABLE}=always: {reasons}")
    return _Library(None, f"not loaded: {'; '.join(map(_one_line, failures))}")


def _why_not_here(device_type: str) -> str | None:
    """Why there is no library to be had for `device_type`, whatever is installed."""
    if device_type not in DEVICE_TYPES:
        return f"csrc has nothing for {device_type} tensors"
    if sys.platform == "win32":
        return "csrc is not built on Windows"
    if device_type == "cuda" and torch.version.cuda is None:
        return f"this PyTorch is a {'ROCm' if torch.version.hip else 'CPU'} build"
    return None


def _open(device_type: str, library: Path) -> _Library:
    if _ends_too_soon(library):
        raise BuildError(f"{library} does not load: it is not whole")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load: {error.__cause__ or error}") from error
    operators = getattr(torch.ops, library_name(device_type).removesuffix(".so"))
    status = f"loaded from {library}"
    if device_type == "cpu":
        status += f", kernels for {_choose_instruction_set(operators)}"
    return _Library(operators, status)


def _choose_instruction_set(operators: Any) -> str:
    supported = operators.instruction_sets().split()
    setting = os.environ.get(CPU_VARIABLE, supported[0])
    if setting not in supported:
        names = " or ".join(map(repr, supported))
        raise ValueError(f"{CPU_VARIABLE} is {setting!r}; expected {names} on this processor")
    operators.use_instruction_set(setting)
    return setting


def _ends_too_soon(library: Path) -> bool:
    """Loading such a file would kill the process. In ELF the section headers come last."""
    with library.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF"):
        return False
    if len(header) < 64:
        return True
    (offset,), (size, count) = (
        struct.unpack_from("<Q", header, 40),
        struct.unpack_from("<HH", header, 58),
    )
    return library.stat().st_size < offset + size * count


@contextlib.contextmanager
def _remembering(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except BuildError as error:
        failures.append(error)


def _architectures(device_type: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or the architectures of the GPUs that are here."""
    if device_type == "cpu":
        return ""
    setting = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if setting not in ("", "native"):
        return setting
    if not torch.cuda.is_available():
        raise BuildError("no GPU is present, and TORCH_CUDA_ARCH_LIST names no architecture")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def _cached(device_type: str, architectures: str) -> Path:
    """Where a library is kept: by what went into it, so that none is ever out of date."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.rglob("*")):
        if source.suffix in (".h", ".cpp", ".cu"):
            digest.update(source.read_bytes())
    compiler = (_FLAGS, _HOST_FLAGS, _INSTRUCTION_SETS, os.environ.get("CXX"), platform.machine())
    cuda = (_cuda_major(), architectures) if device_type == "cuda" else None
    digest.update(repr((compiler, cuda)).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = root or torch._appdirs.user_cache_dir("torch_extensions")
    return Path(root, "mistral_kernels", digest.hexdigest()[:16], library_name(device_type))


def _one_line(error: Exception) -> str:
    """The line of a message that says most: a compiler's first error, not the linker's last."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = (x for x in rest if re.search(r"\berror\b", x, re.I) and "collect2" not in x)
    return next(errors, rest[0] if rest else first)
