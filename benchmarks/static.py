"""Static costs of every kernel, without a GPU: registers, spills, shared memory, occupancy.

    python -m benchmarks.static
    python -m benchmarks.static --targets sm_90,gfx942

Prints Markdown. Each operator is called with the shapes of Mistral-7B, in bfloat16 (float16 for
sm_75), and the compiled kernels are read with the tools that Triton ships. "spills" are bytes per
thread for NVIDIA and registers for AMD; "occupancy" is the share of a multiprocessor's warps for
which registers and shared memory suffice. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from support import helpers

from mistral_kernels import (
    apply_rotary,
    attention,
    linear_cross_entropy,
    rms_norm,
    rolling_cache_attention,
    swiglu,
)
from mistral_kernels.ops.rotary import rotary_tables

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
TOKENS = 32
DEFAULT = "sm_75,sm_80,sm_90,sm_100,sm_120,gfx942"


class Limits(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # KiB
    reserved: int  # KiB of it per block


LIMITS = {
    75: Limits(32, 16, 64, 0),
    80: Limits(64, 32, 164, 1),
    86: Limits(48, 16, 100, 1),
    89: Limits(48, 24, 100, 1),
    90: Limits(64, 32, 228, 1),
    100: Limits(64, 32, 228, 1),
    120: Limits(48, 24, 100, 1),
}
REGISTERS = 65536  # per multiprocessor, allocated to warps in units of 256


class Resources(NamedTuple):
    registers: int
    spills: int
    shared: int  # bytes per block
    warps: int  # per block
    occupancy: float | None


def resources(kernel: helpers.CompiledKernel) -> Resources:
    metadata = json.loads(kernel.files["json"].read_text())
    shared, warps = metadata["shared"], metadata["num_warps"]
    if kernel.target.backend == "hip":
        text = kernel.files["amdgcn"].read_text()
        registers, spills = (
            int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(registers, spills, shared, warps, None)
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(kernel.files["cubin"])]
    text = subprocess.check_output(command, text=True)
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    registers, spills = used["REG"], used["STACK"] + used["LOCAL"]
    limits = LIMITS[int(kernel.target.arch)]
    per_warp = -(-registers * 32 // 256) * 256
    room = (limits.shared << 10) // (shared + (limits.reserved << 10) or 1)
    blocks = min(limits.blocks, limits.warps // warps, REGISTERS // per_warp // warps, room)
    return Resources(registers, spills, shared, warps, blocks * warps / limits.warps)


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return per operator a call that launches all its kernels, those of backward included."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def both(*outputs: torch.Tensor) -> None:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    def attend() -> None:
        q, k, v = (normal(1, 64, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
        both(attention(q, k, v, sliding_window=4096))

    def cached(new: int) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            q, k, v = (normal(new, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
            ring = (torch.zeros(1, 4096, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
            lengths = torch.tensor([5000], dtype=torch.int32)
            offsets = torch.tensor([0, new], dtype=torch.int32)
            keys = (None, None) if new == 1 else (k, v)
            return rolling_cache_attention(
                q, *keys, *ring, lengths, offsets, new, sliding_window=4096
            )

        return run

    def rotate() -> None:
        q, k = (normal(TOKENS, n, HEAD_DIM) for n in (HEADS, KV_HEADS))
        tables = rotary_tables(TOKENS, HEAD_DIM, 1e4)
        both(*apply_rotary(q, k, *tables, torch.arange(TOKENS)))

    return {
        "attention": attend,
        "cached attention, decode": cached(1),
        "cached attention, chunk": cached(64),
        "rms_norm": lambda: both(
            *rms_norm(normal(TOKENS, HIDDEN), normal(HIDDEN), residual=normal(TOKENS, HIDDEN))
        ),
        "rotary": rotate,
        "swiglu": lambda: both(swiglu(normal(TOKENS, INTERMEDIATE), normal(TOKENS, INTERMEDIATE))),
        "linear_cross_entropy": lambda: both(
            linear_cross_entropy(
                normal(TOKENS, 64), normal(32000, 64), torch.randint(32000, (TOKENS,))
            )
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--targets", default=DEFAULT, help=f"targets, separated by commas (default: {DEFAULT})"
    )
    names = parser.parse_args(argv).targets.split(",")
    if unknown := set(names) - helpers.TARGETS.keys():
        parser.error(
            f"--targets must be of {', '.join(helpers.TARGETS)}, got {sorted(unknown)[0]!r}"
        )
    os.environ["MISTRAL_KERNELS_BACKEND"] = "triton"
    print("| operator | kernel | target | registers | spills | shared, KiB | warps | occupancy |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for name in names:
        dtype = torch.float16 if name == "sm_75" else torch.bfloat16
        for operator, call in calls(dtype).items():
            with helpers.compile_only(name) as kernels:
                call()
            for kernel in {kernel.name: kernel for kernel in kernels}.values():
                r = resources(kernel)
                share = "-" if r.occupancy is None else f"{r.occupancy:.0%}"
                print(
                    f"| {operator} | `{kernel.name}` | {name} | {r.registers} | {r.spills} "
                    f"| {r.shared / 1024:.1f} | {r.warps} | {share} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
