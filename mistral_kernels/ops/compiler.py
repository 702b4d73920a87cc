"""Compile the sources in csrc into one library per device type, with ninja.

CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS have the same meaning as in
torch.utils.cpp_extension. That module is not used, for two reasons. Its lock remains after a killed
build and blocks all later builds. It cannot compile CUDA if PyTorch is a CPU build, but `setup.py`
needs to. This module imports no other module of the package, because `setup.py` loads it alone.

PyTorch's headers take longer to compile than most of the sources that include them. Therefore the
compiler reads many sources as one unit, a generated file that includes them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch

BUILD_VARIABLE = "MISTRAL_KERNELS_BUILD"
DEVICE_TYPES = ("cpu", "cuda")
UNFINISHED = ".building-"  # prefix of the folder that holds the objects of an unfinished build

_PACKAGE = Path(__file__).parent.parent
INSTALLED = _PACKAGE / "csrc"  # sources and libraries of an installed package
SOURCES = INSTALLED if INSTALLED.is_dir() else _PACKAGE.parent / "csrc"

_FLAGS = [
    "-std=c++17",
    # The binary runs with torch 2.10 and later: code that uses newer parts of the ABI is rejected.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
_HOST_FLAGS = [
    "-fPIC",
    "-ffp-contract=off",  # no fused multiply-adds, as on the GPU
    "-fvisibility=hidden",  # both libraries define the same symbols and are loaded globally
]

# The operators check arguments and call kernels: -O3 would take longer and gain nothing.
_OPERATOR_FLAGS, _KERNEL_FLAGS = ["-O1"], ["-O3"]

_LINKED = "library.so"  # the library before it is complete
_UNITS_PER_SET = 2  # so that two compilers work at once


class InstructionSet(NamedTuple):
    """An instruction set that the sources in csrc/cpu/kernels are compiled for.

    Attributes:
        features: the required features of the processor, named as in /proc/cpuinfo.
        options: options of the compiler.
    """

    features: list[str]
    options: list[str]


def instruction_sets_of(machine: str) -> dict[str, InstructionSet]:
    """Return the instruction sets of a processor architecture, named as by `platform.machine`.

    csrc/cpu/instruction_sets.h lists the same names, instruction_sets.cpp checks the same features.
    """
    if machine == "aarch64":  # Linux; macOS, which has no /proc/cpuinfo, calls it "arm64"
        bf16 = InstructionSet(["bf16"], ["-march=armv8.2-a+bf16"])
        return {"plain": InstructionSet([], []), "neon_bf16": bf16}
    sets: dict[str, list[str]] = {"plain": []}
    if machine in ("x86_64", "AMD64"):
        avx2 = ["avx2", "fma", "f16c"]
        avx512 = [*avx2, "avx512f", "avx512bw", "avx512dq", "avx512vl"]
        sets |= {"avx2": avx2, "avx512": avx512, "avx512_bf16": [*avx512, "avx512_bf16"]}
    return {
        name: InstructionSet(features, [f"-m{x.replace('_', '')}" for x in features])
        for name, features in sets.items()
    }


INSTRUCTION_SETS = instruction_sets_of(platform.machine())


class BuildError(RuntimeError):
    """A library could not be built. The message includes the output of the compiler."""


class NotBuiltError(BuildError):
    """No build was started, for example without a compiler or with MISTRAL_KERNELS_BUILD=never."""


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


def supported_instruction_sets() -> list[str]:
    """Return the names of the instruction sets that this processor supports, best first."""
    features: set[str] = set()
    if len(INSTRUCTION_SETS) > 1:
        with open("/proc/cpuinfo") as file:
            line = next((x for x in file if x.startswith(("flags", "Features"))), "")
        features.update(line.split())
    return [name for name, x in INSTRUCTION_SETS.items() if features.issuperset(x.features)][::-1]


def build(
    device_type: str,
    library: Path,
    *,
    instruction_sets: Sequence[str] = (),
    architectures: str = "",
    locks: Sequence[int] = (),
) -> None:
    """Compile and link `library`, and write its checksum beside it.

    The library is written first, then its checksum, each atomically and with fsync. The objects are
    in a folder beside it, which is removed at the end. After an interrupted build, the next build
    uses the objects that are complete. Hence nothing else may build the same library at the same
    time, and the objects of other sources must not be in that folder.

    Args:
        device_type: "cpu" or "cuda".
        library: the path of the library.
        instruction_sets: keys of `INSTRUCTION_SETS` to compile the CPU kernels for.
        architectures: the GPU architectures to build for, in the format of TORCH_CUDA_ARCH_LIST.
        locks: file descriptors of locks. ninja and the compilers inherit them, so that the locks
            are held while they run, even if this process is killed.

    Raises:
        NotBuiltError: there is no compiler or no ninja, or nvcc has another major version than
            PyTorch's CUDA.
        BuildError: the compiler failed, or an environment variable is malformed.
        OSError: `library` cannot be written.
    """
    compiler = compiler_command(device_type)
    ninja = _ninja()
    jobs = _jobs()
    library = library.absolute()
    sets = f" ({', '.join(instruction_sets)})" if instruction_sets else ""
    print(
        f"mistral_kernels: compiling the {device_type} operators{sets}, once, into "
        f"{library.parent}",
        file=sys.stderr,
    )
    folder = library.parent / f"{UNFINISHED}{device_type}"
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)  # `build_cache` removes abandoned folders by their age
    units = _units(device_type, instruction_sets, architectures)
    for unit in units:
        contents = "".join(f'#include "{source}"\n' for source in unit.sources)
        _write(folder / unit.source, contents)
    commands = {
        unit.object: [*compiler, "-c", *unit.options, unit.source, "-o", unit.object]
        for unit in units
    }
    link = [*compiler, "-shared", *commands, *_link_flags(device_type), "-o", _LINKED]
    rules = ["rule run", "  command = $line", "  description = $out"]
    for unit in units:
        line = _ninja_value(commands[unit.object])
        rules += [f"build {unit.object}: run {unit.source}", f"  line = {line}"]
    rules += [f"build {_LINKED}: run {' '.join(commands)}", f"  line = {_ninja_value(link)}"]
    _write(folder / "build.ninja", "\n".join(rules) + "\n")
    _run([ninja, "-j", str(jobs)], len(units) + 1, folder, locks)
    _publish(folder / _LINKED, library)
    shutil.rmtree(folder)


def _ninja_value(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _write(path: Path, contents: str) -> None:
    """Write a file unless it has these contents: ninja compiles a rewritten source again."""
    if not path.exists() or path.read_text() != contents:
        path.write_text(contents)


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


def _run(command: Sequence[str], steps: int, folder: Path, locks: Sequence[int]) -> None:
    """Run ninja. On a terminal, print how many steps are done.

    If this function is interrupted, ninja ends the compilers and removes their incomplete objects.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C interrupts this process, which ends ninja
            pass_fds=locks,
        )
        try:
            _await(process, steps, output)
        finally:
            process.terminate()
            process.wait()
        text = _read(output)
    if process.returncode:
        known = ("[", "ninja: build stopped")
        details = "\n".join(x for x in text.splitlines() if not x.startswith(known))
        raise BuildError(f"the compiler failed with code {process.returncode}\n{details}")


def _await(process: subprocess.Popen[bytes], steps: int, output: IO[bytes]) -> None:
    started, width = time.monotonic(), 0
    while True:
        try:
            process.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                # After an interruption, ninja counts only the remaining steps.
                counts = re.findall(r"^\[(\d+)/(\d+)\]", _read(output), re.M)
                done = steps - int(counts[-1][1]) + int(counts[-1][0]) if counts else 0
                seconds = time.monotonic() - started
                line = f"mistral_kernels: compiled {done} of {steps} files, {seconds:.0f} s"
                print(f"\r{line:{width}}", end="", file=sys.stderr, flush=True)
                width = len(line)
    if width:
        print(f"\r{'':{width}}\r", end="", file=sys.stderr, flush=True)


def _read(output: IO[bytes]) -> str:
    return os.pread(output.fileno(), 1 << 24, 0).decode(errors="replace")


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


def compiler_command(device_type: str) -> list[str]:
    """Return the command of the compiler. Raise NotBuiltError if there is none."""
    try:
        cxx = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX must be a command, got {os.environ['CXX']!r}: {error}") from None
    if device_type == "cpu":
        name, *options = cxx or ["c++"]
        compiler = shutil.which(name)
        if compiler is None:
            raise NotBuiltError(
                f"no compiler: {name} is not on PATH; install a C++ compiler, or set CXX"
            )
        return [os.path.abspath(compiler), *options]
    compiler = nvcc()
    if compiler is None:
        raise NotBuiltError("no nvcc: neither on PATH nor in CUDA_HOME; install the CUDA toolkit")
    _check_cuda_version(compiler)
    names = [word for word in cxx if not word.startswith("-")]
    return [compiler, *(f"-ccbin={name}" for name in names[-1:])]  # the name before may be ccache


def _ninja() -> str:
    """Return the path of ninja: that of the Python package, or one on PATH."""
    folders = os.environ.get("PATH", os.defpath)
    with suppress(ImportError):
        from ninja import BIN_DIR  # an ImportError also if `ninja` is only a folder on sys.path

        folders = f"{BIN_DIR}{os.pathsep}{folders}"
    if (found := shutil.which("ninja", path=folders)) is None:
        raise NotBuiltError("no ninja: run `pip install ninja`")
    return os.path.abspath(found)


class _Unit(NamedTuple):
    """Sources that are compiled as one file.

    Attributes:
        source: name of the file that includes the sources.
        options: options of the compiler.
        sources: the sources, relative to csrc.
    """

    source: str
    options: list[str]
    sources: list[str]

    @property
    def object(self) -> str:
        """Name of the compiled file."""
        return f"{self.source}.o"


def _units(
    device_type: str, instruction_sets: Sequence[str] = (), architectures: str = ""
) -> list[_Unit]:
    flags = [
        *_FLAGS,
        "-DKERNELS_NAMESPACE=mistral_kernels",
        f"-DKERNELS_DEVICE={device_type.upper()}",
        f"-I{SOURCES}",
        "-isystem",
        str(Path(torch.__file__).parent / "include"),
    ]
    if device_type == "cuda":
        flags += ["-DKERNELS_FOR_CUDA", f"-Xcompiler={','.join(_HOST_FLAGS)}"]
        flags += _gencode(architectures)
        kernels = [*flags, *_KERNEL_FLAGS, f"--threads={_jobs()}"]
        return [
            _Unit("kernels.cu", kernels, _sources("cuda", "*.cu")),
            _Unit("operators.cpp", [*flags, *_OPERATOR_FLAGS], _sources(".")),
        ]
    flags += _HOST_FLAGS
    if len(instruction_sets) == 1:
        flags.append(f"-DONLY_INSTRUCTION_SET={instruction_sets[0]}")
    units = []
    for name in instruction_sets:
        options = [*INSTRUCTION_SETS[name].options, *flags, *_KERNEL_FLAGS]
        options.append(f"-DINSTRUCTION_SET={name}")
        for i, sources in enumerate(_divided(_sources("cpu/kernels"), _UNITS_PER_SET)):
            units.append(_Unit(f"{name}_{i}.cpp", options, sources))
    operators = _sources(".") + _sources("cpu")
    return [*units, _Unit("operators.cpp", [*flags, *_OPERATOR_FLAGS], operators)]


def _divided(sources: Sequence[str], parts: int) -> list[list[str]]:
    """Divide sources into `parts` lists of about the same number of bytes."""
    lists: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for size, source in sorted(((SOURCES / x).stat().st_size, x) for x in sources)[::-1]:
        smallest = sizes.index(min(sizes))
        lists[smallest].append(source)
        sizes[smallest] += size
    return lists


def fingerprint(device_type: str, instruction_sets: Sequence[str], architectures: str) -> str:
    """Return a hash, 16 hexadecimal digits, of the sources, the flags and the compiler settings."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.rglob("*")):
        if source.suffix in (".h", ".cpp", ".cu"):
            digest.update(source.read_bytes())
    flags = (_FLAGS, _HOST_FLAGS, _OPERATOR_FLAGS, _KERNEL_FLAGS, _UNITS_PER_SET)
    sets = [(name, INSTRUCTION_SETS[name]) for name in instruction_sets]
    compiler = (flags, sets, os.environ.get("CXX"), platform.machine())
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
