"""csrc/cuda/rolling_cache.cu: compiled by nvcc, its PTX executed on CPU tensors, bit for bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from typing import Any, NamedTuple

import ptxrun
import pytest
import torch
from support.helpers import FLOATS, TARGETS
from support.rolling_cache_cases import (
    CASES,
    UPDATES,
    assert_same_bits,
    expected,
    make_arguments,
    update,
)

from mistral_kernels.ops import compiler, rolling_cache

ROTARY = [None, "half-split", "interleaved"]
KERNELS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}

# Replaces the launch of the kernel: captures the kernel's argument and the launch parameters.
CAPTURE = """
#include "cuda/rolling_cache.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
namespace kernels {
bool kernels_enabled = true;
Update captured;
const char* update(const Update& u, void*) { captured = u; return nullptr; }
EXPORTED int size() { return sizeof(Update); }
EXPORTED const Update* arguments() { return &captured; }
EXPORTED void set_q_out(void* data) { captured.q_out.data = data; }
EXPORTED int bytes() { return access_bytes(captured); }
EXPORTED void shape(uint32_t* to) {
  const Launch launch = launch_shape(captured);
  to[0] = launch.grid_x, to[1] = launch.grid_y, to[2] = kBlock;
}
}
"""
CAPTURED = "rolling_cache_capture"  # namespace of the operators that capture and do not launch


def tensors_of(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in arguments.values() if isinstance(x, torch.Tensor)]


class Launch(NamedTuple):
    grid: tuple[int, int]
    block: int
    access_bytes: int


class CudaUpdate:
    """The update operators, with the CUDA kernel executed by ptxrun on CPU tensors."""

    def __init__(self, folder: Any) -> None:
        self.module = ptxrun.compile_cuda(
            compiler.SOURCES / "cuda" / "rolling_cache.cu", options=["-std=c++17"]
        )
        source, library = folder / "capture.cpp", folder / "rolling_cache_capture.so"
        source.write_text(CAPTURE)
        options = compiler._units("cpu", ["plain"])[-1].options
        options[options.index("-DKERNELS_NAMESPACE=mistral_kernels")] = (
            f"-DKERNELS_NAMESPACE={CAPTURED}"
        )
        command = [*compiler.compiler_command("cpu"), "-shared", *options]
        command += ["rolling_cache.cpp", str(source)]
        command += [*compiler._link_flags("cpu"), "-o", str(library)]
        subprocess.run(command, cwd=compiler.SOURCES, check=True)
        for operator in (rolling_cache.update_op, rolling_cache._rotary_update_op):
            name, schema = (
                str(operator.overload._schema).removeprefix("mistral_kernels::").split("(", 1)
            )
            torch.library.define(f"{CAPTURED}::{name}", f"({schema}")
        torch.ops.load_library(str(library))
        self.operators = getattr(torch.ops, CAPTURED)
        self.header = ctypes.CDLL(str(library))
        self.header.arguments.restype = ctypes.c_void_p

    def __call__(self, arguments: dict[str, Any], grid: tuple[int, int] | None = None) -> Launch:
        q_out = arguments["q_out"]
        update(self.operators, {**arguments, "q_out": None if q_out is None else q_out.clone()})
        if q_out is not None:
            self.header.set_q_out(ctypes.c_void_p(q_out.data_ptr()))
        for x in tensors_of(arguments):
            ptxrun.register(x)
        shape = (ctypes.c_uint32 * 3)()
        self.header.shape(shape)
        launch = Launch((shape[0], shape[1]), shape[2], self.header.bytes())
        name = f"update_kernel<{KERNELS[arguments['k'].dtype]}, {launch.access_bytes}>"
        struct = ctypes.string_at(self.header.arguments(), self.header.size())
        self.module.kernel(name).launch(grid or launch.grid, launch.block, [struct])
        return launch


@pytest.fixture(scope="module")
def cuda_update(tmp_path_factory: pytest.TempPathFactory) -> CudaUpdate:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return CudaUpdate(tmp_path_factory.mktemp("capture"))


@pytest.mark.parametrize(
    ("case", "dtype", "rotary"),
    [
        pytest.param(case, dtype, rotary, marks=() if dtype == torch.bfloat16 else pytest.mark.slow)
        for i, (case, rotary) in enumerate(UPDATES)
        for k, dtype in enumerate(FLOATS)
        # Half of the combinations of the other dtypes: all pairs of values occur.
        if dtype == torch.bfloat16 or (i + k) % 2
    ],
    ids=str,
)
def test_kernel_has_the_bits_of_pytorch(case, dtype, rotary, cuda_update):
    arguments = make_arguments(dtype, rotary, **CASES[case])
    after = expected(arguments)
    cuda_update(arguments)
    assert_same_bits(arguments, after)


@pytest.mark.parametrize(
    ("case", "rotary"),
    [x for x in UPDATES if x[0] in ("longer-than-the-ring", "fused-qkv", "paged", "misaligned")],
)
def test_no_races(case, rotary, cuda_update):
    """No block writes a byte that another block reads or writes."""
    arguments = make_arguments(torch.bfloat16, rotary, **CASES[case])
    after = expected(arguments)
    with ptxrun.options(racecheck=True):
        cuda_update(arguments)
    assert_same_bits(arguments, after)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_width_of_accesses(dtype, cuda_update):
    """Accesses are as wide as pointers, strides and half a head allow, up to 16 bytes."""
    element = dtype.itemsize
    widths = {
        "decode": 16,
        "head-dim-8": 16 if element == 4 else 8,
        "head-dim-24": 16 if element == 4 else 8,
        "fused-qkv": 16,
        "half-aligned": 8,
        "misaligned": element,
        "padded": element,
        "paged": 16,
    }
    for case, width in widths.items():
        arguments = make_arguments(dtype, None if case == "paged" else "half-split", **CASES[case])
        assert cuda_update(arguments).access_bytes == width, case
    for sin in (
        torch.randn(200, 33)[:, :32],
        torch.randn(200 * 32 + 1)[1:].view(200, 32),
    ):  # the stride or the pointer of sin alone is unaligned
        arguments = {**make_arguments(dtype, "half-split"), "sin": sin}
        assert cuda_update(arguments).access_bytes == element


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("batch", [1, 4])
def test_bytes_moved(batch, tokens, rotary, cuda_update):
    """At Mistral-7B's size each byte is moved once, in accesses of 16 bytes per thread.

    cos and sin are read once per position.
    """
    arguments = make_arguments(
        torch.bfloat16,
        rotary,
        counts=[tokens] * batch,
        capacity=600,
        head_dim=128,
        heads=(32, 8),
        lengths=[100 + 600 * i for i in range(batch)],  # all positions differ
        num_positions=100 + 600 * batch,
    )
    # One allocation for all tensors: the kernel reads their pointers from memory, and ptxrun then
    # counts the bytes of an allocation together.
    room, start = (
        torch.empty(sum(x.nbytes + 64 for x in tensors_of(arguments)), dtype=torch.int8),
        0,
    )
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            part = room[start : start + x.nbytes].view(x.dtype).view(x.shape)
            arguments[name] = part.copy_(x)
            start += -(-x.nbytes // 64) * 64
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        cuda_update(arguments)
        (profile,) = ptxrun.profiles()
    heads = 48 if rotary else 16
    minimum = batch * tokens * (2 * heads * 128 * 2 + (2 * 64 * 4 if rotary else 0))
    assert profile.dram_bytes <= 1.02 * minimum
    # Each thread reads 2 vectors, writes 2, reads at most 4 vectors of angles, and 3 scalars.
    warps = batch * tokens * heads * 8 / 32
    assert profile.global_requests <= (11 if rotary else 7) * warps


def test_grid_smaller_than_the_work(cuda_update):
    arguments = make_arguments(torch.bfloat16, "half-split", counts=[40, 3, 17], capacity=30)
    after = expected(arguments)
    cuda_update(arguments, grid=(1, 2))
    assert_same_bits(arguments, after)


@pytest.mark.slow
def test_library_compiles_for_every_architecture(tmp_path):
    """Bindings and kernels compile and link with any build of PyTorch."""
    if compiler.nvcc() is None:
        pytest.skip("nvcc is not installed")
    numbers = [str(target.arch) for target in TARGETS.values() if target.backend == "cuda"]
    library = tmp_path / compiler.library_name("cuda")
    architectures = ";".join(f"{n[:-1]}.{n[-1]}" for n in numbers)
    compiler.build("cuda", library, architectures=architectures)
    assert b"rolling_cache_update" in library.read_bytes()
