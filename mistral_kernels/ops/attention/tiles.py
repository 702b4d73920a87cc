"""Launch parameters of the attention kernels: a rule and a table of exceptions, without autotuning.

A program keeps the accumulators of its rows in registers and loops over blocks. In the forward, dq
and decode kernels, rows are queries and blocks are keys. In the dk/dv kernel, rows are keys and
blocks are queries. The rule divides the number of elements that fit on a family of GPUs by the head
dimension. A float32 product consists of three tf32 products: it needs four times the registers, and
its operands need twice the shared memory. The backward kernels hold two products per pair of tiles
at the same time, so their tiles are half as large.

On Turing, Triton uses no matrix instructions: products are multiply-adds, and tiles are small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from mistral_kernels.ops.dispatch import (
    DeviceProperties,
    device_guard,
    device_properties,
    with_workspace,
)
from mistral_kernels.ops.launch_configs import LaunchConfig, launch_config


class Tile(NamedTuple):
    """Tile of BLOCK_M queries (times query heads) by BLOCK_N keys, and its launch parameters."""

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False


class _Family(NamedTuple):
    """Tile sizes of a family of GPUs, before division by the head dimension."""

    accumulators: int  # accumulator elements of a forward program
    block: int  # elements of a block of keys in the forward kernel
    cached: int  # bytes of a block of cached keys in the decode kernel
    stages: int
    decode_stages: int
    wide_head_dim: int  # from this head_dim on, a tile of 16 rows needs 8 warps


_FAMILIES = {
    "sm_75": _Family(2048, 1024, 4 << 10, 1, 1, 256),
    "sm_80": _Family(16384, 8192, 16 << 10, 2, 3, 256),
    "cdna": _Family(16384, 8192, 16 << 10, 1, 2, 256),
    "rdna": _Family(4096, 2048, 8 << 10, 1, 1, 128),
}

_Exceptions = dict[str, dict[tuple[int, int], Tile]]

# Keys: kernel, architecture, (bytes per element, padded head_dim). An architecture inherits entries
# from the architectures before it. Entries with descriptors apply only to tensors that descriptors
# can read. Tiles marked "measured" were the fastest on an H200. The other tiles were chosen from
# machine code, where the rule's tile spills in the main loop, or needs more instructions besides
# matrix products.
_AMD_FORWARD: _Exceptions = {
    "cdna": {
        (2, 64): Tile(128, 64, 4, 1),
        (2, 256): Tile(64, 32, 8, 1),
        (4, 256): Tile(32, 16, 4, 1),
    },
    "rdna": {(2, 128): Tile(64, 16, 8, 1)},
    "rdna4": {
        (2, 64): Tile(64, 64, 4, 1),
        (2, 128): Tile(64, 32, 8, 1),
        (2, 256): Tile(32, 16, 8, 1),
    },
}
EXCEPTIONS: dict[str, _Exceptions] = {
    "attention_forward": {
        "sm_75": {(4, 64): Tile(32, 16, 4, 1)},
        "sm_80": {(2, 64): Tile(128, 64, 4, 3)},
        "sm_90": {
            (2, 64): Tile(128, 64, 4, 3, True),
            (2, 128): Tile(64, 64, 4, 3, True),  # measured
            (2, 256): Tile(128, 64, 8, 2, True),
        },
        "sm_100": {(2, 128): Tile(128, 64, 4, 2, True)},
        "sm_120": {(2, 64): Tile(128, 32, 4, 3)},
        **_AMD_FORWARD,
    },
    # This kernel uses no descriptors, and needs more registers for addresses than the forward
    # kernel. The sm_80 tile at (2, 128) was also the fastest on an H200.
    "attention_chunk": {
        "sm_75": {(4, 64): Tile(32, 16, 4, 1)},
        "sm_80": {
            (2, 64): Tile(128, 64, 4, 2),
            (2, 128): Tile(128, 64, 8, 2),
            (2, 256): Tile(64, 32, 8, 2),
            (4, 128): Tile(32, 32, 8, 2),
        },
        "sm_90": {(2, 256): Tile(64, 32, 4, 2), (4, 64): Tile(64, 32, 8, 2)},
        "sm_100": {(2, 64): Tile(128, 64, 8, 2)},
        "sm_120": {(2, 128): Tile(128, 32, 8, 2), (2, 256): Tile(64, 32, 8, 2)},
        **_AMD_FORWARD,
        "cdna": {**_AMD_FORWARD["cdna"], (2, 256): Tile(32, 32, 4, 1)},
    },
    # On sm_90 at (2, 128) the rule's tile was measured: it is the fastest on an H200.
    "attention_decode": {
        "sm_90": {(4, 256): Tile(16, 16, 8, 3)},
        "sm_100": {(2, 128): Tile(16, 64, 2, 3)},  # limited by shared memory, not HBM
        "cdna": {(2, 64): Tile(16, 64, 4, 2), (4, 64): Tile(16, 32, 4, 2)},
        "rdna": {(2, 64): Tile(16, 64, 4, 1)},
    },
    "attention_dkdv": {
        "sm_75": {(2, 64): Tile(32, 16, 4, 1)},
        "sm_80": {(2, 128): Tile(64, 64, 4, 2), (2, 256): Tile(32, 64, 8, 1)},
        "sm_86": {(2, 256): Tile(32, 32, 4, 1)},
        "sm_90": {
            (2, 64): Tile(64, 128, 8, 2, True),
            (2, 128): Tile(64, 64, 4, 2, True),  # measured
            (2, 256): Tile(32, 32, 8, 1),
        },
        "sm_100": {(2, 128): Tile(64, 128, 4, 2, True)},
        "sm_120": {(2, 256): Tile(16, 64, 8, 1)},
        "cdna": {(2, 128): Tile(32, 32, 4, 1), (4, 128): Tile(16, 32, 4, 1)},
        "rdna": {(2, 128): Tile(16, 16, 8, 2)},
        "rdna4": {(2, 64): Tile(32, 64, 8, 1), (2, 128): Tile(16, 64, 8, 1)},
    },
    "attention_dq": {
        "sm_75": {(2, 64): Tile(32, 16, 4, 1)},
        "sm_80": {
            (2, 128): Tile(64, 64, 4, 2),
            (2, 256): Tile(64, 32, 8, 1),
            (4, 128): Tile(32, 32, 8, 1),
        },
        "sm_90": {
            (2, 64): Tile(128, 64, 8, 2, True),
            (2, 128): Tile(128, 64, 8, 3, True),  # measured
            (2, 256): Tile(64, 32, 4, 1, True),
        },
        "cdna": {(2, 256): Tile(32, 32, 4, 1), (4, 128): Tile(32, 16, 4, 1)},
        "rdna": {(2, 64): Tile(64, 32, 8, 1)},
        "rdna4": {(2, 128): Tile(32, 32, 8, 2)},
    },
}
KERNELS = tuple(EXCEPTIONS)


def choose_tile(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> Tile:
    """Return the exception for these arguments, or else the rule's tile.

    `descriptors` is whether tensor descriptors can read the tensors.
    """
    lineage = _lineage(device, EXCEPTIONS[kernel])
    allowed = descriptors and has_descriptors(device)
    key = element_bytes, max(64, block_d)
    for arch in reversed(lineage):
        tile = EXCEPTIONS[kernel].get(arch, {}).get(key)
        if tile is not None and (allowed or not tile.descriptors):
            return tile
    return _rule(kernel, lineage[0], *key)


def _rule(kernel: str, family: str, element_bytes: int, head_dim: int) -> Tile:
    """Compute a tile from `_FAMILIES[family]`; the module's docstring describes the rule."""
    limits = _FAMILIES[family]
    if kernel == "attention_decode":  # memory bound: few rows, many bytes in flight
        n = max(16, limits.cached // (head_dim * element_bytes))
        warps = 8 if limits.wide_head_dim <= 128 else 4
        return Tile(16, n, warps, limits.decode_stages)
    backward = kernel in ("attention_dkdv", "attention_dq")
    products = 1 + backward
    words = element_bytes // 2  # 16-bit words per element
    rows = min(limits.accumulators // (head_dim * products * words**2), 64 if backward else 128)
    block = min(limits.block // (head_dim * products * words), 64 if backward else 32)
    rows, block = max(rows, 16), max(block, 16)
    staged = head_dim * element_bytes**2 <= (512 if backward else 2048)
    warps = 8 if rows == 16 and head_dim >= limits.wide_head_dim else 4
    m, n = (block, rows) if kernel == "attention_dkdv" else (rows, block)
    return Tile(m, n, warps, limits.stages if staged else 1)


def _lineage(device: DeviceProperties, exceptions: _Exceptions) -> list[str]:
    """Return the device's family, then all architectures with exceptions up to the device's own."""
    if device.platform == "hip":
        generation = str(device.arch)[:-2]  # gfx942, gfx1100, gfx1201
        return {"gfx9": ["cdna"], "gfx12": ["rdna", "rdna4"]}.get(generation, ["rdna"])
    if int(device.arch) < 80:
        return ["sm_75"]
    names = (name for name in exceptions if name.startswith("sm_") and name != "sm_80")
    return ["sm_80", *(x for x in names if 80 < int(x[3:]) <= int(device.arch))]


def architecture(device: DeviceProperties) -> str:
    """Return the name of the device's architecture in `EXCEPTIONS`."""
    return _lineage(device, {})[-1] if device.platform == "hip" else f"sm_{device.arch}"


def has_descriptors(device: DeviceProperties) -> bool:
    """Return whether kernels should use a tensor memory accelerator, and the device has one."""
    return device.platform == "cuda" and 90 <= int(device.arch) < 120


def smaller_tiles(tile: Tile) -> Iterator[Tile]:
    """Yield tiles in decreasing order of shared memory, all smaller than `tile`."""
    while True:
        if tile.stages > 1:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.n > 16:
            tile = tile._replace(n=tile.n // 2)
        elif tile.m > 16:
            tile = tile._replace(m=tile.m // 2)
        else:
            return
        yield tile


def tile_config(tile: Tile, block_d: int) -> LaunchConfig:
    """Return the meta-parameters of a kernel with this tile."""
    return launch_config(
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=block_d,
        DESCRIPTORS=tile.descriptors,
        NUM_STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@functools.cache
def configs(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> tuple[LaunchConfig, ...]:
    """Return the chosen configuration, then smaller ones in case shared memory does not suffice."""
    tile = choose_tile(kernel, block_d, element_bytes, device, descriptors)
    return tuple(tile_config(t, block_d) for t in (tile, *smaller_tiles(tile)))


@functools.cache
def delta_config(block_d: int) -> LaunchConfig:
    """Return the meta-parameters of the delta kernel: 4096 elements of each input per program."""
    return launch_config(BLOCK_M=max(16, 4096 // block_d), BLOCK_D=block_d, num_warps=4)


# Keys: arguments of a launch. Values: number of leading configurations that do not fit the device.
_misfits: dict[tuple[object, ...], int] = {}


def launch_first_that_fits(
    kernel: str, q: Tensor, block_d: int, descriptors: bool, launch: Callable[[LaunchConfig], None]
) -> None:
    """Call `launch` with the first configuration that fits the device's shared memory.

    Triton raises OutOfResources before it launches a configuration that does not fit.
    """
    import triton

    arguments = kernel, block_d, q.element_size(), device_properties(q), descriptors
    candidates = configs(*arguments)
    with device_guard(q):
        for i in range(_misfits.get(arguments, 0), len(candidates)):
            try:
                if candidates[i]["DESCRIPTORS"]:
                    with_workspace(q, functools.partial(launch, candidates[i]))
                else:
                    launch(candidates[i])
                return
            except triton.runtime.errors.OutOfResources:
                if i == len(candidates) - 1:
                    raise
                _misfits[arguments] = i + 1
