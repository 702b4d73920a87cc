"""The update of csrc's library for the CPU; how libraries are found, built and loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.builds import fake_compiler, finish, libraries, needs_compiler, start
from support.helpers import FLOATS
from support.rolling_cache_cases import (
    CASES,
    UPDATES,
    assert_same_bits,
    expected,
    make_arguments,
    update,
)

from mistral_kernels.ops import build_cache, compiler, extension


@pytest.fixture(scope="module")
def operators():
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    yield torch.ops.mistral_kernels
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("case", "rotary"), UPDATES)
def test_same_bits(case, dtype, rotary, operators):
    arguments = make_arguments(dtype, rotary, **CASES[case])
    after = expected(arguments)
    k, v = arguments["k"].clone(), arguments["v"].clone()
    update(operators, arguments)
    assert_same_bits(arguments, {**after, "k": k, "v": v})


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("rotary", [None, "interleaved"])
def test_bits_do_not_depend_on_the_number_of_threads(rotary, threads, operators):
    """All threads have tokens, and the shares of threads end within sequences."""
    torch.set_num_threads(threads)
    arguments = make_arguments(
        torch.bfloat16,
        rotary,
        counts=[0, 301, 2, 0, 150, 1],
        capacity=256,
        head_dim=128,
        heads=(8, 2),
        num_positions=1000,
    )
    after = expected(arguments)
    update(operators, arguments)
    torch.set_num_threads(1)
    assert_same_bits(arguments, after)


def test_update_without_new_tokens(operators):
    arguments = make_arguments(torch.float32, "half-split", counts=[0, 0])
    after = expected(arguments)
    update(operators, arguments)
    assert_same_bits(arguments, after)


@pytest.mark.parametrize(("head_dim", "dtype"), [(12, torch.float32), (16, torch.float64)])
def test_unsupported_arguments_run_in_pytorch(head_dim, dtype, operators):
    arguments = make_arguments(dtype, None, head_dim=head_dim)
    after = expected(arguments)
    update(operators, arguments)
    for name, result in after.items():
        assert torch.equal(arguments[name], result)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="no nm for ELF")
def test_library_uses_no_cpp_streams(operators):
    """Streams crash if the linker puts a second libstdc++ into the library; see csrc/check.h."""
    library = extension.status("cpu").removeprefix("loaded from ").partition(", kernels for ")[0]
    imported = subprocess.check_output(["nm", "-DC", "--undefined-only", library], text=True)
    assert "torch_parallel_for" in imported
    assert re.findall(".*std::.*(?:stream|locale|codecvt).*", imported) == []


def test_missing_compiler(tmp_path):
    loaded, status, error = finish(start(tmp_path, PATH="", CXX=""))
    assert not loaded
    assert status == (
        "not loaded: no compiler: c++ is not on PATH; install a C++ compiler, or set CXX"
    )
    assert error == ""


def test_failing_compiler(tmp_path):
    """The status and stderr contain the first line of the output with an error."""
    broken = fake_compiler(
        tmp_path, "echo in file x", "echo x.h:3: fatal error: no such header", "exit 4"
    )
    loaded, status, error = finish(start(tmp_path, CXX=broken))
    reason = "x.h:3: fatal error: no such header"
    assert not loaded
    assert status == f"not loaded: {reason}"
    compiling, failed = error.splitlines()
    assert "compiling" in compiling
    assert reason in failed
    assert "MISTRAL_KERNELS_BUILD=never" in failed
    assert libraries(tmp_path) == []


def test_build_never(tmp_path):
    loaded, status, error = finish(start(tmp_path, MISTRAL_KERNELS_BUILD="never"))
    assert not loaded
    assert error == ""
    assert status == "not loaded: not compiled, since MISTRAL_KERNELS_BUILD=never"


RAISES = """
from mistral_kernels.ops import build_cache, compiler, extension
try:
    extension.load("cpu")
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, str(error).replace("\\n", "|"))
print(extension.status("cpu"))
"""


@pytest.mark.slow
def test_build_always(tmp_path):
    """The error contains the whole output of the compiler."""
    broken = fake_compiler(tmp_path, "echo one", "echo error: two", "echo three", "exit 1")
    process = start(tmp_path, RAISES, MISTRAL_KERNELS_BUILD="always", CXX=broken)
    raised, status = process.communicate(timeout=120)[0].splitlines()
    assert raised.startswith("RuntimeError no library for cpu, and MISTRAL_KERNELS_BUILD=always")
    assert "one|error: two|three" in raised
    assert status.startswith("not loaded: not compiled yet; ")


def test_bad_build_setting(tmp_path):
    process = start(tmp_path, RAISES, MISTRAL_KERNELS_BUILD="yes")
    raised, status = process.communicate(timeout=120)[0].splitlines()
    message = "MISTRAL_KERNELS_BUILD must be 'auto', 'never' or 'always', got 'yes'"
    assert raised == f"ValueError {message}"
    assert status == f"not loaded: {message}"


def test_devices_without_a_library(monkeypatch):
    monkeypatch.setattr(extension, "_libraries", {})
    assert not extension.load("mps")
    assert extension.status("mps") == "not loaded: csrc has no kernels for mps tensors"
    if torch.version.cuda is None and torch.version.hip is None:
        assert not extension.load("cuda")
        assert extension.status("cuda") == "not loaded: this PyTorch is a CPU build"


def test_installed_library_has_precedence(tmp_path, monkeypatch):
    """An installed library for a GPU is not used by a CPU build of PyTorch."""
    monkeypatch.setattr(extension, "_libraries", {})
    monkeypatch.setattr(extension, "INSTALLED", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    opened = []
    monkeypatch.setattr(
        extension, "_open", lambda *x: opened.append(x) or extension._Library(True, "")
    )
    monkeypatch.setattr(build_cache, "verify_checksum", lambda library: "checksum")
    for device_type in compiler.DEVICE_TYPES:
        (tmp_path / compiler.library_name(device_type)).write_text("")
        extension.load(device_type)
    assert opened == [("cpu", tmp_path / compiler.library_name("cpu"))]
    assert "was built at installation and is not used" in extension.status("cuda")


@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        ("8.0", ["80,code=sm_80"]),
        ("7.5;9.0a 12.1", ["75,code=sm_75", "90a,code=sm_90a", "121,code=sm_121"]),
        ("10.0+PTX;", ["100,code=sm_100", "100,code=compute_100"]),
    ],
)
def test_gencode_flags(listed, codes):
    assert compiler._gencode(listed) == [f"-gencode=arch=compute_{code}" for code in codes]


@pytest.mark.parametrize(
    ("cxx", "options"),
    [("", []), ("g++", ["-ccbin=g++"]), ("ccache '/a b/g++' -m64", ["-ccbin=/a b/g++"])],
)
def test_nvcc_gets_the_host_compiler_without_its_options(cxx, options, monkeypatch):
    monkeypatch.setattr(compiler, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(compiler, "_check_cuda_version", lambda _: None)
    monkeypatch.setenv("CXX", cxx)
    assert compiler.compiler_command("cuda") == ["nvcc", *options]


@needs_compiler
@pytest.mark.slow
def test_wheel_holds_the_library_for_every_instruction_set(tmp_path):
    """The library is loaded without a compiler and without a writable cache."""
    root, source, target = Path(__file__).parents[2], tmp_path / "source", tmp_path / "installed"
    ignored = shutil.ignore_patterns("__pycache__", "*.so*")
    for name in ("mistral_kernels", "csrc"):
        shutil.copytree(root / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", *options, "-w", str(tmp_path), str(source)],
        env={**os.environ, "MISTRAL_KERNELS_BUILD": "always", "TORCH_CUDA_ARCH_LIST": "9.0"},
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-(linux|macosx)_\w+\.whl$", wheel.name)
    subprocess.run([*pip, "install", *options, "--target", str(target), str(wheel)], check=True)
    library = target / "mistral_kernels" / "csrc" / compiler.library_name("cpu")
    supported = compiler.supported_instruction_sets()
    for setting in ({}, *({extension.CPU_VARIABLE: name} for name in supported)):
        environment = {**setting, "PYTHONPATH": str(target), "PATH": ""}
        process = start(tmp_path / "no cache", cwd=tmp_path, **environment)
        loaded, status, error = finish(process)
        assert loaded
        assert status == f"loaded from {library}"
        assert error == ""
