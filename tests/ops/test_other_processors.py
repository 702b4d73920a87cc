"""csrc's CPU library for processors that this machine does not have.

Each test builds the library for another processor and runs the tests of the CPU kernels with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.builds import fake_compiler, needs_compiler

from mistral_kernels.ops import compiler
from mistral_kernels.ops.extension import CPU_VARIABLE

FOLDER = Path(__file__).parent
SUPPORT = FOLDER.parent / "support"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def run_cpu_tests(*options: str, **environment: str) -> list[str]:
    """Run the tests of the CPU kernels in another process; return the lines of its output."""
    tests = map(str, (*FOLDER.glob("test_cpu_*.py"), FOLDER / "test_matmul.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def aarch64_library(tmp_path_factory) -> Path:
    """Return a program that runs csrc's operators on 64-bit Arm."""
    for name in (CROSS_COMPILER, EMULATOR):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}; install Debian's g++-aarch64-linux-gnu and qemu-user")
    folder = tmp_path_factory.mktemp("aarch64")
    sets = compiler.instruction_sets_of("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "INSTRUCTION_SETS", sets)
        units = compiler._units("cpu", list(sets))
    program = str(SUPPORT / "emulated_library.cpp")
    units.append(compiler._Unit("program.cpp", units[-1].options, [program]))

    def compile_unit(unit: compiler._Unit) -> None:
        contents = "".join(f'#include "{source}"\n' for source in unit.sources)
        (folder / unit.source).write_text(contents)
        command = [CROSS_COMPILER, "-c", *unit.options, unit.source, "-o", unit.object]
        subprocess.run(command, cwd=folder, check=True)

    with ThreadPoolExecutor(compiler._jobs()) as threads:
        list(threads.map(compile_unit, units))
    objects = [unit.object for unit in units]
    subprocess.run([CROSS_COMPILER, "-static", *objects, "-o", "library"], cwd=folder, check=True)
    return folder / "library"


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["max", "cortex-a72"])
def test_aarch64(processor, aarch64_library):
    """cortex-a72 has no BF16 instructions: the emulator ends at an instruction that it lacks."""
    lines = run_cpu_tests(
        "-p",
        "support.emulated_library",
        PYTHONPATH=os.pathsep.join([str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")]),
        MISTRAL_KERNELS_EMULATOR=f"{EMULATOR} -cpu {processor} {aarch64_library}",
    )
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    assert all("has no neon_bf16" in line for line in skipped)
    assert bool(skipped) == (processor == "cortex-a72")


@needs_compiler
@pytest.mark.slow
def test_avx512(tmp_path):
    """Vectors of AVX-512 are two registers of AVX2; see support/avx512.h."""
    if "avx512_bf16" in compiler.supported_instruction_sets():
        pytest.skip("this processor has AVX-512 BF16: the other tests use it")
    if "avx2" not in compiler.supported_instruction_sets():
        pytest.skip("this processor has no AVX2")
    script = fake_compiler(
        tmp_path,
        "for word; do",
        "  shift",
        "  case $word in",
        "    -mavx512*) continue ;;",
        f"    -DINSTRUCTION_SET=avx512*) set -- \"$@\" -include '{SUPPORT}/avx512.h' ;;",
        "  esac",
        '  set -- "$@" "$word"',
        '  [ "$word" = -DINSTRUCTION_SET=avx512_bf16 ] && set -- "$@" -DWITH_BF16',
        "done",
        # -O3 takes minutes per file; GCC 12's SRA crashes on vectors of 64 bytes.
        f'exec {os.environ.get("CXX", "c++")} "$@" -O1 -fno-tree-sra -Wno-psabi '
        "'-D__builtin_cpu_supports(feature)=1'",
    )
    lines = run_cpu_tests(
        "-k",
        "avx512",
        CXX=script,
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        **{compiler.BUILD_VARIABLE: "always", CPU_VARIABLE: "all"},
    )
    assert not any(line.startswith("SKIPPED") for line in lines)
