"""Compile csrc into the wheel if possible; pyproject.toml describes the package.

If PyTorch and ninja are installed in the build environment, as with
`pip install --no-build-isolation .`, the wheel gets a CPU library for all instruction sets if there
is a C++ compiler, and a CUDA library if there is nvcc. The wheel always contains the sources; a
missing library is built from them at the first use.
MISTRAL_KERNELS_BUILD=never builds no library. With MISTRAL_KERNELS_BUILD=always, a library that
cannot be built is an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def load_compiler() -> ModuleType:
    """Load the module mistral_kernels.ops.compiler without importing the package."""
    spec = importlib.util.spec_from_file_location("compiler", "mistral_kernels/ops/compiler.py")
    compiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiler)
    return compiler


def cuda_architectures(nvcc: str) -> str:
    """Return TORCH_CUDA_ARCH_LIST, or those `ARCHITECTURES` that nvcc supports, with PTX."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    supported = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    return ";".join(a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in supported) + "+PTX"


def build_libraries(folder: Path) -> None:
    """Build the libraries into `folder`; print one line for each that cannot be built."""
    if (setting := os.environ.get("MISTRAL_KERNELS_BUILD")) == "never":
        return
    try:
        compiler = load_compiler()
    except Exception as error:  # PyTorch is absent (an isolated build) or broken
        if setting == "always":
            raise
        print(f"mistral_kernels: csrc will be built at the first use: {error}", file=sys.stderr)
        return
    compiler.build_setting()  # raises if MISTRAL_KERNELS_BUILD is invalid
    for device_type in compiler.DEVICE_TYPES:
        nvcc = compiler.nvcc() if device_type == "cuda" else None
        try:
            library = folder / compiler.library_name(device_type)
            compiler.build(
                device_type,
                library,
                instruction_sets=list(compiler.INSTRUCTION_SETS) if device_type == "cpu" else (),
                architectures=cuda_architectures(nvcc) if nvcc else "",
            )
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            needed = device_type == "cpu" or compiler.torch.version.cuda is not None
            if setting == "always" and needed:
                raise
            reason = str(error).splitlines()[0]
            print(f"mistral_kernels: no {device_type} library: {reason}", file=sys.stderr)


class BuildPackage(build_py):
    """Build step that adds csrc, sources and libraries, to the package."""

    def run(self) -> None:
        """Copy csrc into the build folder and build the libraries there."""
        super().run()
        if self.editable_mode:  # csrc is in the checkout; the first use builds it
            return
        folder = Path(self.build_lib, "mistral_kernels", "csrc")
        shutil.rmtree(folder, ignore_errors=True)  # remove an earlier build
        shutil.copytree(CSRC, folder)
        build_libraries(folder)
        if any(folder.glob("*.so")):
            self.distribution.has_ext_modules = lambda: True

    def get_source_files(self) -> list[str]:
        """Return the files of the sdist, csrc included."""
        return [*super().get_source_files(), *(str(x) for x in CSRC.rglob("*") if x.is_file())]


class Wheel(bdist_wheel):
    """Wheel for one platform if it contains libraries, for any platform otherwise."""

    def run(self) -> None:
        """Build first, then mark the wheel as platform-specific if it contains libraries."""
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the wheel; the libraries do not depend on the version of Python."""
        return self.python_tag, "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
