"""Find, build and load the compiled operators of csrc: one library per device type.

A library is loaded from the installed package, if `setup.py` has built it there. Otherwise it is
loaded from the cache of PyTorch's extensions. If it is not there either, it is compiled into that
cache. The libraries are optional: without one, PyTorch or Triton runs instead, and `status` returns
the reason.

- MISTRAL_KERNELS_BUILD=never: do not compile.
- MISTRAL_KERNELS_BUILD=always: raise an error if a library that this machine supports can neither
  be found nor built.
- MISTRAL_KERNELS_CPU: the instruction set of the CPU kernels; by default the best one that the
  processor supports. A library is compiled for this set only. With "all", it is compiled for every
  set, and the best one runs.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from mistral_kernels.ops import build_cache, dispatch
from mistral_kernels.ops.compiler import (
    BUILD_VARIABLE,
    DEVICE_TYPES,
    INSTALLED,
    INSTRUCTION_SETS,
    BuildError,
    NotBuiltError,
    build,
    build_setting,
    compiler_command,
    fingerprint,
    library_name,
    supported_instruction_sets,
)

CPU_VARIABLE = "MISTRAL_KERNELS_CPU"
BUILD_COMMAND = "python -m mistral_kernels build"


class _Library(NamedTuple):
    is_loaded: bool
    status: str
    instruction_set: str = ""  # of the CPU kernels


_libraries: dict[str, _Library] = {}
_lock = threading.Lock()


def load(device_type: str) -> bool:
    """Load csrc's library for `device_type`; return whether there is one.

    The first call may compile the library, which takes seconds; it prints a line on stderr then.
    The result is cached for the process.

    Raises:
        ValueError: MISTRAL_KERNELS_BUILD is not auto, never or always, or MISTRAL_KERNELS_CPU is
            not an instruction set of this processor.
        RuntimeError: MISTRAL_KERNELS_BUILD=always, csrc supports `device_type` on this machine, and
            the library can neither be found nor built.
    """
    library = _libraries.get(device_type)
    if library is None:
        with _lock:
            if device_type not in _libraries:
                _libraries[device_type] = _find(device_type, compiles=True)
            library = _libraries[device_type]
    return library.is_loaded


def supports(x: torch.Tensor) -> bool:
    """Return whether csrc's CPU library supports `x` and can be loaded. Load it if it does."""
    supported = x.is_cpu and x.dtype != torch.float64 and dispatch.uses_csrc("cpu")
    return supported and load("cpu")


def instruction_set() -> str:
    """Return the instruction set of the loaded CPU kernels; empty if no library is loaded."""
    library = _libraries.get("cpu")
    return library.instruction_set if library else ""


def apply_backend_setting() -> None:
    """Enable or disable the kernels of the loaded libraries, as MISTRAL_KERNELS_BACKEND sets."""
    for device_type, library in _libraries.items():
        if library.is_loaded:
            _enable_if_chosen(device_type)


def _enable_if_chosen(device_type: str) -> None:
    getattr(torch.ops.mistral_kernels, f"enable_{device_type}")(dispatch.uses_csrc(device_type))


def status(device_type: str) -> str:
    """Return one line: the path that the library was loaded from, or why there is no library.

    A library that exists is loaded; none is compiled.
    """
    try:
        with _lock:
            library = _libraries.get(device_type) or _find(device_type, compiles=False)
            if library.is_loaded:
                _libraries[device_type] = library
    except (RuntimeError, ValueError) as error:
        return f"not loaded: {_one_line(error)}"
    return library.status


def _find(device_type: str, compiles: bool) -> _Library:
    setting = build_setting()
    installed = INSTALLED / library_name(device_type)
    reason = _why_unavailable(device_type)
    if reason is not None:
        if installed.exists():
            reason += f"; {installed} was built at installation and is not used"
        return _Library(False, f"not loaded: {reason}")
    failures: list[Exception] = []
    try:
        if installed.exists():
            with _collecting(failures):
                build_cache.verify_checksum(installed)
                return _open(device_type, installed)
        return _from_cache(device_type, setting, compiles, failures)
    except (BuildError, OSError) as error:
        failures.append(error)
    if setting == "always" and compiles:
        reasons = "\n".join(map(str, failures))
        raise RuntimeError(f"no library for {device_type}, and {BUILD_VARIABLE}=always: {reasons}")
    if compiles and not isinstance(failures[-1], NotBuiltError):
        remedy = f"{BUILD_VARIABLE}=never stops further attempts"
        print(f"mistral_kernels: {_one_line(failures[-1])}; {remedy}", file=sys.stderr)
    return _Library(False, f"not loaded: {'; '.join(map(_one_line, failures))}")


def _from_cache(
    device_type: str, setting: str, compiles: bool, failures: list[Exception]
) -> _Library:
    sets, architectures = _instruction_sets(device_type), _architectures(device_type)
    folder = build_cache.folder_of(fingerprint(device_type, sets, architectures))
    cached = folder / library_name(device_type)
    if os.path.lexists(cached):
        is_valid = False
        with _collecting(failures):
            build_cache.check_private(folder)
            is_valid = bool(build_cache.verify_checksum(cached))
            return _open(device_type, cached)
        if is_valid:  # compiling again, at every start, would give the same library
            raise BuildError(f"{failures.pop()}; remove {folder} to compile it again")
    if setting == "never":
        raise NotBuiltError(f"not compiled, since {BUILD_VARIABLE}=never")
    if not compiles:
        compiler_command(device_type)  # raises an error if the first use cannot compile either
        raise NotBuiltError(f"not compiled yet; the first use or `{BUILD_COMMAND}` compiles it")
    with build_cache.locked(folder) as lock:
        if not _is_built_meanwhile(cached):
            build(
                device_type,
                cached,
                instruction_sets=sets,
                architectures=architectures,
                locks=[lock],
            )
    return _open(device_type, cached)


def _is_built_meanwhile(cached: Path) -> bool:
    """Return whether another process has built the library while this one waited for the lock."""
    try:
        return bool(build_cache.verify_checksum(cached))
    except (BuildError, OSError):
        return False


def _why_unavailable(device_type: str) -> str | None:
    """Return why no library can be used for `device_type`; None if one can."""
    if device_type not in DEVICE_TYPES:
        return f"csrc has no kernels for {device_type} tensors"
    if sys.platform == "win32":
        return "csrc is not built on Windows"
    if device_type == "cuda" and torch.version.cuda is None:
        return f"this PyTorch is a {'ROCm' if torch.version.hip else 'CPU'} build"
    return None


def _open(device_type: str, library: Path) -> _Library:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error.__cause__ or error}") from error
    if not hasattr(torch.ops.mistral_kernels, f"enable_{device_type}"):
        raise BuildError(f"{library} cannot be loaded: it does not define the operators")
    _enable_if_chosen(device_type)
    if device_type != "cpu":
        return _Library(True, f"loaded from {library}")
    name = _choose_instruction_set()
    return _Library(True, f"loaded from {library}, kernels for {name}", name)


def _choose_instruction_set() -> str:
    operators = torch.ops.mistral_kernels
    compiled, wanted = operators.instruction_sets().split(), _instruction_sets("cpu")
    chosen = [name for name in wanted if name in compiled]
    if not chosen:
        names = ", ".join(compiled) or "none of this processor's instruction sets"
        raise BuildError(f"the library has kernels for {names}, not for {wanted}")
    operators.use_instruction_set(chosen[0])
    return chosen[0]


def _instruction_sets(device_type: str) -> list[str]:
    """Return the instruction sets to compile for. The first one is the one to use."""
    if device_type != "cpu":
        return []
    supported = supported_instruction_sets()
    setting = os.environ.get(CPU_VARIABLE)
    if setting is None:
        return supported[:1]
    if setting == "all":
        return [*supported, *(name for name in INSTRUCTION_SETS if name not in supported)]
    if setting not in supported:
        names = " or ".join(map(repr, ("all", *supported)))
        raise ValueError(f"{CPU_VARIABLE} must be {names} on this processor, got {setting!r}")
    return [setting]


@contextmanager
def _collecting(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (BuildError, OSError) as error:
        failures.append(error)


def _architectures(device_type: str) -> str:
    """Return TORCH_CUDA_ARCH_LIST, or the architectures of the GPUs of this machine."""
    if device_type == "cpu":
        return ""
    setting = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if setting not in ("", "native"):
        return setting
    if not torch.cuda.is_available():
        raise NotBuiltError("no GPU is present, and TORCH_CUDA_ARCH_LIST names no architecture")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def _one_line(error: Exception) -> str:
    """Return the most informative line of a message: the compiler's first error if there is one."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = (x for x in rest if re.search(r"\berror\b", x, re.I) and "collect2" not in x)
    return next(errors, rest[0] if rest else first)
