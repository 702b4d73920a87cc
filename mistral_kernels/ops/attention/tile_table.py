"""Tiles of attention's kernels by architecture, dtype and head_dim: a table, nothing is timed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from mistral_kernels.ops.dispatch import DeviceProperties
from mistral_kernels.ops.launch_configs import Config, config


class Tile(NamedTuple):
    """BLOCK_M queries (times heads of a group) by BLOCK_N keys, and how they are worked on."""

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False


# By kernel, architecture, bytes of an element and padded head_dim. An architecture takes what its
# own entry leaves out from those before it; without descriptors, also where its entry wants them.
# Chosen by time on an H200 (sm_90 at head_dim 128), else from machine code: no spill in the main
# loop, then the least of everything that is not a matrix product. Triton has no matrix instructions
# for Turing; there the products are multiply-adds, and tiles as small as they go.
TILES: dict[str, dict[str, dict[tuple[int, int], Tile]]] = {
    "attention_forward": {
        "sm_75": {
            (2, 64): Tile(32, 16, 4, 1),
            (2, 128): Tile(16, 16, 4, 1),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(32, 16, 4, 1),
            (4, 128): Tile(16, 16, 4, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "sm_80": {
            (2, 64): Tile(128, 64, 4, 3),
            (2, 128): Tile(128, 32, 4, 2),
            (2, 256): Tile(64, 32, 4, 2),
            (4, 64): Tile(64, 32, 4, 2),
            (4, 128): Tile(32, 32, 4, 2),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "sm_90": {
            (2, 64): Tile(128, 64, 4, 3, True),
            (2, 128): Tile(64, 64, 4, 3, True),
            (2, 256): Tile(128, 64, 8, 2, True),
        },
        "sm_100": {(2, 128): Tile(128, 64, 4, 2, True)},
        "sm_120": {(2, 64): Tile(128, 32, 4, 3)},
        "cdna": {
            (2, 64): Tile(128, 64, 4, 1),
            (2, 128): Tile(128, 32, 4, 1),
            (2, 256): Tile(64, 32, 8, 1),
            (4, 64): Tile(64, 32, 4, 1),
            (4, 128): Tile(32, 32, 4, 1),
            (4, 256): Tile(32, 16, 4, 1),
        },
        "rdna": {
            (2, 64): Tile(64, 32, 4, 1),
            (2, 128): Tile(64, 16, 8, 1),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(16, 16, 4, 1),
            (4, 128): Tile(16, 16, 8, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "rdna4": {
            (2, 64): Tile(64, 64, 4, 1),
            (2, 128): Tile(64, 32, 8, 1),
            (2, 256): Tile(32, 16, 8, 1),
        },
    },
    # A tile of 16 rows, the fewest there are: what counts is bytes on their way, in stages times
    # blocks in one multiprocessor.
    "attention_decode": {
        "sm_75": {
            (2, 64): Tile(16, 32, 4, 1),
            (2, 128): Tile(16, 16, 4, 1),
            (2, 256): Tile(16, 16, 4, 1),
            (4, 64): Tile(16, 16, 4, 1),
            (4, 128): Tile(16, 16, 4, 1),
            (4, 256): Tile(16, 16, 4, 1),
        },
        "sm_80": {
            (2, 64): Tile(16, 128, 4, 3),
            (2, 128): Tile(16, 64, 4, 3),
            (2, 256): Tile(16, 32, 4, 3),
            (4, 64): Tile(16, 64, 4, 3),
            (4, 128): Tile(16, 32, 4, 3),
            (4, 256): Tile(16, 16, 4, 3),
        },
        "sm_90": {(4, 256): Tile(16, 16, 8, 3)},
        "sm_100": {(2, 128): Tile(16, 64, 2, 3)},  # memory so fast that shared memory is next
        "cdna": {
            (2, 64): Tile(16, 64, 4, 2),
            (2, 128): Tile(16, 64, 4, 2),
            (2, 256): Tile(16, 32, 4, 2),
            (4, 64): Tile(16, 32, 4, 2),
            (4, 128): Tile(16, 32, 4, 2),
            (4, 256): Tile(16, 16, 4, 2),
        },
        "rdna": {
            (2, 64): Tile(16, 64, 4, 1),
            (2, 128): Tile(16, 32, 8, 1),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(16, 32, 8, 1),
            (4, 128): Tile(16, 16, 8, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
    },
    "attention_dkdv": {
        "sm_75": {
            (2, 64): Tile(32, 16, 4, 1),
            (2, 128): Tile(16, 16, 4, 1),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(16, 16, 4, 1),
            (4, 128): Tile(16, 16, 4, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "sm_80": {
            (2, 64): Tile(64, 64, 4, 2),
            (2, 128): Tile(64, 64, 4, 2),
            (2, 256): Tile(32, 64, 8, 1),
            (4, 64): Tile(32, 32, 4, 1),
            (4, 128): Tile(16, 16, 4, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "sm_86": {(2, 256): Tile(32, 32, 4, 1)},
        "sm_90": {
            (2, 64): Tile(64, 128, 8, 2, True),
            (2, 128): Tile(64, 64, 4, 2, True),
            (2, 256): Tile(32, 32, 8, 1),
        },
        "sm_100": {(2, 128): Tile(64, 128, 4, 2, True)},
        "sm_120": {(2, 256): Tile(16, 64, 8, 1)},
        "cdna": {
            (2, 64): Tile(64, 64, 4, 1),
            (2, 128): Tile(32, 32, 4, 1),
            (2, 256): Tile(16, 32, 4, 1),
            (4, 64): Tile(32, 32, 4, 1),
            (4, 128): Tile(16, 32, 4, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "rdna": {
            (2, 64): Tile(16, 32, 4, 1),
            (2, 128): Tile(16, 16, 8, 2),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(16, 16, 4, 1),
            (4, 128): Tile(16, 16, 8, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "rdna4": {
            (2, 64): Tile(32, 64, 8, 1),
            (2, 128): Tile(16, 64, 8, 1),
        },
    },
    "attention_dq": {
        "sm_75": {
            (2, 64): Tile(32, 16, 4, 1),
            (2, 128): Tile(16, 16, 4, 1),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(16, 16, 4, 1),
            (4, 128): Tile(16, 16, 4, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "sm_80": {
            (2, 64): Tile(64, 64, 4, 2),
            (2, 128): Tile(64, 64, 4, 2),
            (2, 256): Tile(64, 32, 8, 1),
            (4, 64): Tile(32, 32, 4, 1),
            (4, 128): Tile(32, 32, 8, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "sm_90": {
            (2, 64): Tile(128, 64, 8, 2, True),
            (2, 128): Tile(128, 64, 8, 3, True),
            (2, 256): Tile(64, 32, 4, 1, True),
        },
        "sm_100": {},
        "sm_120": {},
        "cdna": {
            (2, 64): Tile(64, 64, 4, 1),
            (2, 128): Tile(64, 32, 4, 1),
            (2, 256): Tile(32, 32, 4, 1),
            (4, 64): Tile(32, 32, 4, 1),
            (4, 128): Tile(32, 16, 4, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "rdna": {
            (2, 64): Tile(64, 32, 8, 1),
            (2, 128): Tile(16, 16, 8, 1),
            (2, 256): Tile(16, 16, 8, 1),
            (4, 64): Tile(16, 16, 4, 1),
            (4, 128): Tile(16, 16, 8, 1),
            (4, 256): Tile(16, 16, 8, 1),
        },
        "rdna4": {(2, 128): Tile(32, 32, 8, 2)},
    },
}
# More rows than a decode step's, over a cache: as over keys in one piece, without descriptors, and
# with more registers spent on addresses.
TILES["attention_chunk"] = {
    **TILES["attention_forward"],
    "sm_80": {
        (2, 64): Tile(128, 64, 4, 2),
        (2, 128): Tile(128, 64, 8, 2),
        (2, 256): Tile(64, 32, 8, 2),
        (4, 64): Tile(64, 32, 4, 2),
        (4, 128): Tile(32, 32, 8, 2),
        (4, 256): Tile(16, 16, 8, 1),
    },
    "sm_90": {(2, 256): Tile(64, 32, 4, 2), (4, 64): Tile(64, 32, 8, 2)},
    "sm_100": {(2, 64): Tile(128, 64, 8, 2)},
    "sm_120": {(2, 128): Tile(128, 32, 8, 2), (2, 256): Tile(64, 32, 8, 2)},
    "cdna": {**TILES["attention_forward"]["cdna"], (2, 256): Tile(32, 32, 4, 1)},
}


@functools.cache
def configs(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> tuple[Config, ...]:
    """The table's choice, then smaller ones, for a device with less shared memory than its kin.

    `descriptors`: the tensors can be read through tensor descriptors.
    """
    tile = _look_up(kernel, block_d, element_bytes, device, descriptors)
    return tuple(_config(t, block_d) for t in (tile, *_smaller(tile)))


@functools.cache
def candidates(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> tuple[Config, ...]:
    """What a tuner should try: the table's choice, and its choices for other architectures."""
    tile = _look_up(kernel, block_d, element_bytes, device, descriptors)
    able = descriptors and _has_descriptors(device)
    key = element_bytes, max(64, block_d)
    others = [t[key] for t in TILES[kernel].values() if key in t]
    tiles = [tile, *(t for t in others if able or not t.descriptors), *_smaller(tile)]
    return tuple(_config(t, block_d) for t in dict.fromkeys(tiles))


@functools.cache
def delta(block_d: int) -> Config:
    """Some 8 elements of each input a thread."""
    return config(BLOCK_M=max(16, 4096 // block_d), BLOCK_D=block_d, num_warps=4)


def _config(tile: Tile, block_d: int) -> Config:
    return config(
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=block_d,
        DESCRIPTORS=tile.descriptors,
        NUM_STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _look_up(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> Tile:
    key = element_bytes, max(64, block_d)
    able = descriptors and _has_descriptors(device)
    tiles = [
        tile[key]
        for name, tile in TILES[kernel].items()
        if key in tile and _serves(name, device) and (able or not tile[key].descriptors)
    ]
    return tiles[-1]


def _serves(name: str, device: DeviceProperties) -> bool:
    """Is the architecture the device's own, or one before it?"""
    if device.platform == "hip":
        generation = str(device.arch)[:-2]  # gfx942, gfx1100, gfx1201
        return name in {"gfx9": ("cdna",), "gfx12": ("rdna", "rdna4")}.get(generation, ("rdna",))
    return name == "sm_75" or (name[:3] == "sm_" and int(name[3:]) <= int(device.arch))


def _has_descriptors(device: DeviceProperties) -> bool:
    return device.platform == "cuda" and 90 <= int(device.arch) < 120


def _smaller(tile: Tile) -> Iterator[Tile]:
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
