"""Tests of benchmarks.tune: tiles that it tries, output and errors. No GPU is needed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import pytest
import torch
from support.helpers import compile_only

from benchmarks import tune
from mistral_kernels.ops.attention import tiles
from mistral_kernels.ops.attention.tiles import Tile
from mistral_kernels.ops.dispatch import DeviceProperties

HOPPER = DeviceProperties("cuda", 90, 132, 227 << 10)
AMPERE = DeviceProperties("cuda", 80, 108, 163 << 10)


def test_neighbors_differ_in_one_parameter() -> None:
    tile = Tile(64, 128, 4, 1)
    for device, kernel, count in (
        (HOPPER, "attention_forward", 8),
        (AMPERE, "attention_forward", 7),
        (HOPPER, "attention_chunk", 7),
    ):
        found = list(tune.neighbors(kernel, tile, device))
        assert len(found) == len(set(found)) == count
        for other in found:
            assert sum(a != b for a, b in zip(tile, other, strict=True)) == 1
    assert {t.m for t in tune.neighbors("attention_decode", Tile(16, 64, 4, 3), HOPPER)} == {16}


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_every_chosen_tile_has_neighbors(kernel: str) -> None:
    for device in (HOPPER, AMPERE, DeviceProperties("hip", "gfx942", 304, 64 << 10)):
        for head_dim in (64, 128, 256):
            for element_bytes in (2, 4):
                tile = tiles.choose_tile(kernel, head_dim, element_bytes, device, True)
                assert list(tune.neighbors(kernel, tile, device))


def test_search_ends_at_the_fastest_tile() -> None:
    """Search tiles with known times, of which some are infinite because they do not fit."""
    best = Tile(32, 32, 8, 2)

    def seconds(tile: Tile) -> float:
        if tile.m * tile.n >= 128 * 128:
            return math.inf
        return 1.0 + sum(abs(math.log2(a / b)) for a, b in zip(tile[:4], best[:4], strict=True))

    times = tune.search(
        Tile(128, 64, 4, 3), lambda t: tune.neighbors("attention_forward", t, AMPERE), seconds
    )
    assert min(times, key=lambda tile: times[tile]) == best
    assert math.inf in times.values()


def test_entry_is_python_source_of_an_exception() -> None:
    tile = Tile(64, 64, 4, 3, True)
    line = tune.entry(HOPPER, 2, 96, tile)
    assert line == '"sm_90": {(2, 128): Tile(64, 64, 4, 3, True)},  # measured'
    assert eval(f"{{{line}\n}}", {"Tile": Tile}) == {"sm_90": {(2, 128): tile}}
    amd = DeviceProperties("hip", "gfx1201", 32, 64 << 10)
    assert tune.entry(
        amd, 4, 16, Tile(16, 16, 8, 1)
    ) == '"rdna4": {(4, 64): Tile(16, 16, 8, 1)},' + ("  # measured")


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_call_runs_with_the_given_tile(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the launched tile, and that the table of tiles is restored after the call."""
    triton = pytest.importorskip("triton")

    def once(call: Callable[[], object], **_: object) -> float:
        call()
        return 2.0

    monkeypatch.setattr(triton.testing, "do_bench", once)
    monkeypatch.setattr(tune, "CHUNK", 40)
    args = argparse.Namespace(head_dim=16, heads=2, kv_heads=1, dtype="float16", sliding_window=9)
    names = {
        "attention_forward": "_forward_kernel",
        "attention_decode": "_decode_kernel",
        "attention_chunk": "_decode_kernel",
        "attention_dkdv": "_dkdv_kernel",
        "attention_dq": "_dq_kernel",
    }
    before = tiles.configs
    with compile_only("sm_80") as kernels:
        call = tune.make_call(kernel, 1, 40, args, torch.device("cpu"))
        assert tune.seconds_with(kernel, Tile(16, 32, 2, 1), call) == 2e-3
    assert tiles.configs is before
    (warps,) = (
        json.loads(k.files["json"].read_text())["num_warps"]
        for k in kernels
        if k.name == names[kernel]
    )
    assert warps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "4096"], "--shapes must be like 4x4096,1x16384, got 4096"),
        (["--shapes", "4xa"], "--shapes must be like 4x4096,1x16384, got 4xa"),
        ([], "tiles can be timed only on a GPU that runs Triton kernels; none was found"),
    ],
)
def test_errors(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MISTRAL_KERNELS_BACKEND", "auto")
    with pytest.raises(SystemExit):
        tune.main(["--kernel", "attention_forward", "--head-dim", "128", *options])
    assert message in capsys.readouterr().err
