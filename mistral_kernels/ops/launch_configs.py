"""Launch parameters of every kernel by operator, size, dtype and device: rules, nothing is timed.

Each function returns the meta-parameters of one kernel, ready for ``kernel[grid](..., **config)``,
and is cached: in a loop it costs one dictionary look-up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mistral_kernels.ops.dispatch import DeviceProperties

Config = Mapping[str, Any]


def config(**parameters: Any) -> Config:
    """Read-only, since shared. Floating-point fusion: Triton 3.10 changes the default."""
    return MappingProxyType({"enable_fp_fusion": True, **parameters})


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def rms_norm_forward(hidden: int) -> Config:
    """Whole rows in registers, 16 elements a thread; short rows share a program."""
    block_cols = next_power_of_2(hidden)
    block_rows = max(1, 2048 // block_cols)
    num_warps = min(16, max(1, block_rows * block_cols // 512))
    return config(BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, num_warps=num_warps)


@functools.cache
def rms_norm_backward(hidden: int, element_bytes: int, device: DeviceProperties) -> Config:
    """As forward, with the next rows on their way to shared memory while there is room for them.

    ``element_bytes``: one element of every input that is read by rows.
    """
    forward = rms_norm_forward(hidden)
    stage_bytes = forward["BLOCK_ROWS"] * forward["BLOCK_COLS"] * element_bytes
    num_stages = max(1, min(3, device.shared_memory // stage_bytes))
    # Fewer elements a thread where registers run out: long float32 rows, and any on AMD.
    crowded = device.platform == "hip" or (element_bytes >= 8 and forward["BLOCK_ROWS"] == 1)
    num_warps = min(16, forward["num_warps"] * (2 if crowded else 1))
    return config(**{**forward, "num_warps": num_warps}, NUM_STAGES=num_stages)


def rms_norm_partial_sums(rows: int, device: DeviceProperties) -> int:
    """How many programs share the rows of backward, each leaving fp32 partial sums of dweight.

    At 32 rows a program, writing and reading the partial sums is under 5 % of the traffic in bf16.
    With fewer rows, half the multiprocessors still keep the memory busy: each has rows in flight.
    """
    return min(4 * device.multiprocessors, max(device.multiprocessors // 2, cdiv(rows, 32)))


@functools.cache
def rms_norm_sum_partials() -> Config:
    return config(BLOCK_ROWS=32, BLOCK_COLS=32, num_warps=4)


@functools.cache
def swiglu(cols: int) -> Config:
    """2048 elements a program, 16 of each tensor a thread; short rows share a program.

    Wider blocks would leave lanes idle: 14336 columns are 7 times 2048.
    """
    block_cols = min(2048, next_power_of_2(cols))
    return config(BLOCK_ROWS=2048 // block_cols, BLOCK_COLS=block_cols, num_warps=4)


@functools.cache
def rotary(half: int) -> Config:
    """2048 pairs of channels a turn of the loop over heads, 16 a thread."""
    block_i = next_power_of_2(half)
    block_h = 8
    block_t = max(1, 2048 // (block_h * block_i))
    return config(BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_I=block_i, num_warps=4)


@functools.cache
def cross_entropy(vocab: int) -> Config:
    """One program a row of logits, 16 of them a thread at a time."""
    block = min(4096, max(64, next_power_of_2(vocab)))
    return config(BLOCK=block, num_warps=max(1, block // 512))


class _Tile(NamedTuple):
    """BLOCK_M queries (times heads of a group) by BLOCK_N keys, and how they are worked on."""

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False


# By kernel, architecture, bytes of an element and padded head_dim. An architecture takes what its
# own entry leaves out from those before it; without descriptors, also where its entry wants them.
# Chosen from machine code: no spill in the main loop, then the least of everything that is not a
# matrix product. Triton has no matrix instructions for Turing; there the products are
# multiply-adds, and tiles as small as they go.
_ATTENTION: dict[str, dict[str, dict[tuple[int, int], _Tile]]] = {
    "attention_forward": {
        "sm_75": {
            (2, 64): _Tile(32, 16, 4, 1),
            (2, 128): _Tile(16, 16, 4, 1),
            (2, 256): _Tile(16, 16, 8, 1),
            (4, 64): _Tile(32, 16, 4, 1),
            (4, 128): _Tile(16, 16, 4, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "sm_80": {
            (2, 64): _Tile(128, 64, 4, 3),
            (2, 128): _Tile(128, 32, 4, 2),
            (2, 256): _Tile(64, 32, 4, 2),
            (4, 64): _Tile(64, 32, 4, 2),
            (4, 128): _Tile(32, 32, 4, 2),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "sm_90": {
            (2, 64): _Tile(128, 64, 4, 3, True),
            (2, 128): _Tile(128, 128, 8, 2, True),
            (2, 256): _Tile(128, 64, 8, 2, True),
        },
        "sm_100": {(2, 128): _Tile(128, 64, 4, 2, True)},
        "sm_120": {(2, 64): _Tile(128, 32, 4, 3)},
        "cdna": {
            (2, 64): _Tile(128, 64, 4, 1),
            (2, 128): _Tile(128, 32, 4, 1),
            (2, 256): _Tile(64, 32, 8, 1),
            (4, 64): _Tile(64, 32, 4, 1),
            (4, 128): _Tile(32, 32, 4, 1),
            (4, 256): _Tile(32, 16, 4, 1),
        },
        "rdna": {
            (2, 64): _Tile(64, 32, 4, 1),
            (2, 128): _Tile(64, 16, 8, 1),
            (2, 256): _Tile(16, 16, 8, 1),
            (4, 64): _Tile(16, 16, 4, 1),
            (4, 128): _Tile(16, 16, 8, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "rdna4": {
            (2, 64): _Tile(64, 64, 4, 1),
            (2, 128): _Tile(64, 32, 8, 1),
            (2, 256): _Tile(32, 16, 8, 1),
        },
    },
    "attention_dkdv": {
        "sm_75": {
            (2, 64): _Tile(32, 16, 4, 1),
            (2, 128): _Tile(16, 16, 4, 1),
            (2, 256): _Tile(16, 16, 8, 1),
            (4, 64): _Tile(16, 16, 4, 1),
            (4, 128): _Tile(16, 16, 4, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "sm_80": {
            (2, 64): _Tile(64, 64, 4, 2),
            (2, 128): _Tile(64, 64, 4, 2),
            (2, 256): _Tile(32, 64, 8, 1),
            (4, 64): _Tile(32, 32, 4, 1),
            (4, 128): _Tile(16, 16, 4, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "sm_86": {(2, 256): _Tile(32, 32, 4, 1)},
        "sm_90": {
            (2, 64): _Tile(64, 128, 8, 2, True),
            (2, 128): _Tile(64, 128, 8, 2, True),
            (2, 256): _Tile(32, 32, 8, 1),
        },
        "sm_100": {(2, 128): _Tile(64, 128, 4, 2, True)},
        "sm_120": {(2, 256): _Tile(16, 64, 8, 1)},
        "cdna": {
            (2, 64): _Tile(64, 64, 4, 1),
            (2, 128): _Tile(32, 32, 4, 1),
            (2, 256): _Tile(16, 32, 4, 1),
            (4, 64): _Tile(32, 32, 4, 1),
            (4, 128): _Tile(16, 32, 4, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "rdna": {
            (2, 64): _Tile(16, 32, 4, 1),
            (2, 128): _Tile(16, 16, 8, 2),
            (2, 256): _Tile(16, 16, 8, 1),
            (4, 64): _Tile(16, 16, 4, 1),
            (4, 128): _Tile(16, 16, 8, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "rdna4": {
            (2, 64): _Tile(32, 64, 8, 1),
            (2, 128): _Tile(16, 64, 8, 1),
        },
    },
    "attention_dq": {
        "sm_75": {
            (2, 64): _Tile(32, 16, 4, 1),
            (2, 128): _Tile(16, 16, 4, 1),
            (2, 256): _Tile(16, 16, 8, 1),
            (4, 64): _Tile(16, 16, 4, 1),
            (4, 128): _Tile(16, 16, 4, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "sm_80": {
            (2, 64): _Tile(64, 64, 4, 2),
            (2, 128): _Tile(64, 64, 4, 2),
            (2, 256): _Tile(64, 32, 8, 1),
            (4, 64): _Tile(32, 32, 4, 1),
            (4, 128): _Tile(32, 32, 8, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "sm_90": {
            (2, 64): _Tile(128, 64, 8, 2, True),
            (2, 128): _Tile(128, 64, 8, 2, True),
            (2, 256): _Tile(64, 32, 4, 1, True),
        },
        "sm_100": {},
        "sm_120": {},
        "cdna": {
            (2, 64): _Tile(64, 64, 4, 1),
            (2, 128): _Tile(64, 32, 4, 1),
            (2, 256): _Tile(32, 32, 4, 1),
            (4, 64): _Tile(32, 32, 4, 1),
            (4, 128): _Tile(32, 16, 4, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "rdna": {
            (2, 64): _Tile(64, 32, 8, 1),
            (2, 128): _Tile(16, 16, 8, 1),
            (2, 256): _Tile(16, 16, 8, 1),
            (4, 64): _Tile(16, 16, 4, 1),
            (4, 128): _Tile(16, 16, 8, 1),
            (4, 256): _Tile(16, 16, 8, 1),
        },
        "rdna4": {(2, 128): _Tile(32, 32, 8, 2)},
    },
}


@functools.cache
def attention(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> tuple[Config, ...]:
    """The table's choice, then smaller ones, for a device with less shared memory than its kin.

    `descriptors`: the tensors can be read through tensor descriptors.
    """
    tile = _look_up(kernel, block_d, element_bytes, device, descriptors)
    return tuple(_attention_config(t, block_d) for t in (tile, *_smaller(tile)))


@functools.cache
def attention_candidates(
    kernel: str, block_d: int, element_bytes: int, device: DeviceProperties, descriptors: bool
) -> tuple[Config, ...]:
    """What a tuner should try: the table's choice, and its choices for other architectures."""
    tile = _look_up(kernel, block_d, element_bytes, device, descriptors)
    able = descriptors and _has_descriptors(device)
    key = element_bytes, max(64, block_d)
    others = [t[key] for t in _ATTENTION[kernel].values() if key in t]
    tiles = [tile, *(t for t in others if able or not t.descriptors), *_smaller(tile)]
    return tuple(_attention_config(t, block_d) for t in dict.fromkeys(tiles))


@functools.cache
def attention_delta(block_d: int) -> Config:
    """Some 8 elements of each input a thread."""
    return config(BLOCK_M=max(16, 4096 // block_d), BLOCK_D=block_d, num_warps=4)


def _attention_config(tile: _Tile, block_d: int) -> Config:
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
) -> _Tile:
    key = element_bytes, max(64, block_d)
    able = descriptors and _has_descriptors(device)
    tiles = [
        tile[key]
        for name, tile in _ATTENTION[kernel].items()
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


def _smaller(tile: _Tile) -> Iterator[_Tile]:
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
