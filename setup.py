"""Compiles csrc into the wheel where that can be done; the package itself is in pyproject.toml.

With PyTorch at hand, as in `pip install --no-build-isolation .`, the wheel gets a library for the
CPU if there is a C++ compiler and one for CUDA if there is nvcc. It always has the sources, from
which the first use builds what is missing. MISTRAL_KERNELS_BUILD=never leaves all to the first use,
MISTRAL_KERNELS_BUILD=always makes a library that cannot be built an error.
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
    """mistral_kernels.ops.compiler without the package around it."""
    spec = importlib.util.spec_from_file_location("compiler", "mistral_kernels/ops/compiler.py")
    compiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiler)
    return compiler


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or of the usual GPUs those that this nvcc knows, and PTX for later."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    return ";".join(a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known) + "+PTX"


def build_libraries(folder: Path) -> None:
    """Fill `folder` with the libraries that can be built; a line for each that cannot."""
    if (setting := os.environ.get("MISTRAL_KERNELS_BUILD")) == "never":
        return
    try:
        compiler = load_compiler()
    except Exception as error:  # no PyTorch, as in an isolated build, or a broken one
        if setting == "always":
            raise
        print(f"mistral_kernels: csrc is left to the first use: {error}", file=sys.stderr)
        return
    compiler.build_setting()  # raises if it is no such thing
    for device_type in compiler.DEVICE_TYPES:
        nvcc = compiler.nvcc() if device_type == "cuda" else None
        try:
            library = folder / compiler.library_name(device_type)
            compiler.build(device_type, library, architectures(nvcc) if nvcc else "")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            needed = device_type == "cpu" or compiler.torch.version.cuda is not None
            if setting == "always" and needed:
                raise
            reason = str(error).splitlines()[0]
            print(f"mistral_kernels: no library for {device_type}: {reason}", file=sys.stderr)


class BuildPackage(build_py):
    """The package, and in it csrc with the libraries beside the sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout has csrc, and the first use builds
            return
        folder = Path(self.build_lib, "mistral_kernels", "csrc")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        shutil.copytree(CSRC, folder)
        build_libraries(folder)
        if any(folder.glob("*.so")):
            self.distribution.has_ext_modules = lambda: True

    def get_source_files(self) -> list[str]:  # of the sdist
        return [*super().get_source_files(), *(str(x) for x in CSRC.rglob("*") if x.is_file())]


class Wheel(bdist_wheel):
    """For one platform if it has libraries, which know nothing of Python; else for any."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return self.python_tag, "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
