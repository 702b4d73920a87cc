"""Launch parameters of attention's kernels: a rule, and exceptions to it. Nothing is timed.

A kernel holds the accumulators of the rows it owns in registers and walks along blocks: queries
and keys in forward, dq and decode; keys and queries in dk/dv. The rule divides what a family of
GPUs holds per block by the head dimension. float32 products, made of three tf32 ones, take four
times the registers, and their operands twice the shared memory. Backward holds two products of a
pair of tiles at once, and gets half.

Turing has no matrix instructions that Triton uses: products are multiply-adds, and tiles small.
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
from mistral_kernels.ops.launch_configs import Config, config


class Tile(NamedTuple):
    """BLOCK_M queries (times heads of a group) by BLOCK_N keys, and how they are processed."""

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False


class _Family(NamedTuple):
    accumulators: int  # numbers of the rows that a forward program owns
    block: int  # numbers of a block that it walks along
    cached: int  # bytes of a block of cached keys
    stages: int
    decode_stages: int
    wide: int  # from this head_dim, 16 rows need 8 warps


_FAMILIES = {
    "sm_75": _Family(2048, 1024, 4 << 10, 1, 1, 256),
    "sm_80": _Family(16384, 8192, 16 << 10, 2, 3, 256),
    "cdna": _Family(16384, 8192, 16 << 10, 1, 2, 256),
    "rdna": _Family(4096, 2048, 8 << 10, 1, 1, 128),
}

_Exceptions = dict[str, dict[tuple[int, int], Tile]]

# By kernel, architecture, bytes per element and padded head_dim. An architecture takes what it
# does not list from the ones before it, and a tile with descriptors only where there are some.
# "Measured" tiles were the fastest on an H200. The others were chosen from machine code: the rule's
# tile spills in the main loop, or takes more instructions that are not matrix products.
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
    # Without descriptors, and with more registers spent on addresses, than forward. The sm_80 tile
    # at (2, 128) is also measured on sm_90.
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
    # The rule's tile at (2, 128) is also measured on sm_90.
    "attention_decode": {
        "sm_90": {(4, 256): Tile(16, 16, 8, 3)},
        "sm_100": {(2, 128): Tile(16, 64, 2, 3)},  # memory so fast that shared memory is next
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
    """Return the exception for these arguments, or the rule's tile.

    `descriptors`: the tensors can be read through tensor descriptors.
    """
    lineage = _lineage(device, EXCEPTIONS[kernel])
    able = descriptors and has_descriptors(device)
    key = element_bytes, max(64, block_d)
    for arch in reversed(lineage):
        tile = EXCEPTIONS[kernel].get(arch, {}).get(key)
        if tile is not None and (able or not tile.descriptors):
            return tile
    return _rule(kernel, lineage[0], *key)


def _rule(kernel: str, family: str, element_bytes: int, head_dim: int) -> Tile:
    of = _FAMILIES[family]
    if kernel == "attention_decode":  # the fewest rows; what counts is bytes in flight
        n = max(16, of.cached // (head_dim * element_bytes))
        warps = 8 if of.wide <= 128 else 4
        return Tile(16, n, warps, of.decode_stages)
    backward = kernel in ("attention_dkdv", "attention_dq")
    halves = 1 + backward
    wide = element_bytes // 2
    rows = min(of.accumulators // (head_dim * halves * wide**2), 64 if backward else 128)
    block = min(of.block // (head_dim * halves * wide), 64 if backward else 32)
    rows, block = max(rows, 16), max(block, 16)
    staged = head_dim * element_bytes**2 <= (512 if backward else 2048)
    warps = 8 if rows == 16 and head_dim >= of.wide else 4
    m, n = (block, rows) if kernel == "attention_dkdv" else (rows, block)
    return Tile(m, n, warps, of.stages if staged else 1)


def _lineage(device: DeviceProperties, exceptions: _Exceptions) -> list[str]:
    """Return the device's family, then the architectures with exceptions up to its own."""
    if device.platform == "hip":
        generation = str(device.arch)[:-2]  # gfx942, gfx1100, gfx1201
        return {"gfx9": ["cdna"], "gfx12": ["rdna", "rdna4"]}.get(generation, ["rdna"])
    if int(device.arch) < 80:
        return ["sm_75"]
    names = (name for name in exceptions if name.startswith("sm_") and name != "sm_80")
    return ["sm_80", *(x for x in names if 80 < int(x[3:]) <= int(device.arch))]


def architecture(device: DeviceProperties) -> str:
    """Return the name of the device's own entries in `EXCEPTIONS`."""
    return _lineage(device, {})[-1] if device.platform == "hip" else f"sm_{device.arch}"


def has_descriptors(device: DeviceProperties) -> bool:
    """Return whether the device has a tensor memory accelerator that kernels should use."""
    return device.platform == "cuda" and 90 <= int(device.arch) < 120


def smaller(tile: Tile) -> Iterator[Tile]:
    """Yield tiles that need less and less shared memory."""
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


def tile_config(tile: Tile, block_d: int) -> Config:
    """Return a tile as a kernel's meta-parameters."""
    return config(
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
) -> tuple[Config, ...]:
    """Return the chosen configuration, then smaller ones, for a device with less shared memory."""
    tile = choose_tile(kernel, block_d, element_bytes, device, descriptors)
    return tuple(tile_config(t, block_d) for t in (tile, *smaller(tile)))


@functools.cache
def delta_config(block_d: int) -> Config:
    """Return the delta kernel's parameters: about 8 elements of each input per thread."""
    return config(BLOCK_M=max(16, 4096 // block_d), BLOCK_D=block_d, num_warps=4)


# How many of the configurations for some arguments, from the first, do not fit.
_misfits: dict[tuple[object, ...], int] = {}


def launch_first_that_fits(
    kernel: str, q: Tensor, block_d: int, descriptors: bool, launch: Callable[[Config], None]
) -> None:
    """Call `launch` with the first configuration whose shared memory the device has.

    Triton raises before anything runs where there is less than a configuration needs.
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
