"""Tests of the tiles of attention: the rule, its exceptions, and smaller tiles."""

from __future__ import annotations

import pytest
import torch
from support.helpers import TARGETS, compile_only

from mistral_kernels.ops.attention import attention, tiles
from mistral_kernels.ops.dispatch import DeviceProperties


def device(name):
    target = TARGETS[name]
    return DeviceProperties(target.backend, target.arch, 100, target.shared_memory)


def test_smaller_configuration_is_used_if_the_first_does_not_fit(monkeypatch, set_backend):
    """Check that the number of configurations that do not fit is stored for later calls."""
    set_backend("triton")
    monkeypatch.setitem(TARGETS, "small", TARGETS["sm_80"]._replace(shared_memory=20 << 10))
    monkeypatch.setattr(tiles, "_misfits", {})
    q, k, v = (torch.randn(1, 40, h, 64).half() for h in (2, 1, 1))
    with compile_only("small") as kernels:
        attention(q, k, v)
        (misfits,) = tiles._misfits.values()
        attention(q, k, v)
    assert len(kernels) == 2
    assert misfits > 0
    assert [misfits] == list(tiles._misfits.values())


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_every_device_has_a_tile_for_every_size(kernel):
    devices = [device(name) for name in TARGETS]
    later = [device("sm_80")._replace(arch=arch) for arch in (87, 103)]
    for a_device in (*devices, *later):
        for size in (16, 64, 128, 256):
            for element_bytes in (2, 4):
                for descriptors in (False, True):
                    arguments = kernel, size, element_bytes, a_device, descriptors
                    configs = tiles.configs(*arguments)
                    assert configs[-1]["BLOCK_M"] == configs[-1]["BLOCK_N"] == 16
                    has_tma = a_device.platform == "cuda" and 90 <= a_device.arch < 120
                    assert not configs[0]["DESCRIPTORS"] or (descriptors and has_tma)


MEASURED = {
    "attention_forward": tiles.Tile(64, 64, 4, 3, True),
    "attention_chunk": tiles.Tile(128, 64, 8, 2),
    "attention_decode": tiles.Tile(16, 64, 4, 3),
    "attention_dkdv": tiles.Tile(64, 64, 4, 2, True),
    "attention_dq": tiles.Tile(128, 64, 8, 3, True),
}


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_tiles_measured_on_h200(kernel):
    """Check the fastest tiles at head_dim 128. Only a new measurement may change them."""
    descriptors = kernel not in ("attention_decode", "attention_chunk")
    chosen = tiles.choose_tile(kernel, 128, 2, device("sm_90"), descriptors)
    assert chosen == MEASURED[kernel]


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_every_exception_changes_the_tile(kernel, monkeypatch):
    """Remove each exception and check that another tile is chosen."""
    for arch, entries in tiles.EXCEPTIONS[kernel].items():
        name = {"cdna": "gfx942", "rdna": "gfx1100", "rdna4": "gfx1201"}.get(arch, arch)
        for (element_bytes, head_dim), tile in entries.items():
            arguments = kernel, head_dim, element_bytes, device(name), True
            assert tiles.choose_tile(*arguments) == tile
            rest = {key: t for key, t in entries.items() if key != (element_bytes, head_dim)}
            with monkeypatch.context() as patch:
                patch.setitem(tiles.EXCEPTIONS[kernel], arch, rest)
                assert tiles.choose_tile(*arguments) != tile, (kernel, arch, head_dim)
