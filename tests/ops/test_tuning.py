"""Measured launch parameters: kept on disk, asked for by one variable, never needed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.helpers import TARGETS, compile_only

from mistral_kernels.ops import launch_configs, tuning
from mistral_kernels.ops.attention import attention, tile_table
from mistral_kernels.ops.attention import launch as attention_launch
from mistral_kernels.ops.dispatch import DeviceProperties

DEVICE = DeviceProperties("cuda", 80, 108, 163 << 10)
CANDIDATES = tuple(launch_configs.config(BLOCK_M=m) for m in (128, 64, 32))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._kept.cache_clear()
    yield tmp_path
    tuning._kept.cache_clear()


@pytest.fixture
def timed(monkeypatch):
    """Every configuration that was measured; 64 rows are the fastest."""
    seen = []

    def seconds(run, config):
        seen.append(config["BLOCK_M"])
        run(config)
        return abs(config["BLOCK_M"] - 64)

    monkeypatch.setattr(tuning, "_seconds", seconds)
    return seen


def test_measured_once_and_kept(timed, cache):
    runs = []
    for _ in range(3):
        tuning._kept.cache_clear()  # as in another process
        assert tuning.fastest(("op", 128), DEVICE, CANDIDATES, runs.append)["BLOCK_M"] == 64
    assert timed == [128, 64, 32]
    assert len(runs) == 3
    assert tuning.path().is_relative_to(cache)
    assert [x.name for x in tuning.path().parent.iterdir()] == ["tuned.json"]


def test_other_devices_and_calls_are_measured_anew(timed):
    tuning.fastest(("op", 128), DEVICE, CANDIDATES, lambda _: None)
    tuning.fastest(("op", 64), DEVICE, CANDIDATES, lambda _: None)
    tuning.fastest(("op", 128), DEVICE._replace(arch=90), CANDIDATES, lambda _: None)
    assert len(timed) == 9
    assert len(json.loads(tuning.path().read_text())) == 3


def test_an_answer_that_is_no_candidate_any_more(timed):
    tuning.fastest(("op",), DEVICE, CANDIDATES, lambda _: None)
    best = tuning.fastest(("op",), DEVICE, CANDIDATES[::2], lambda _: None)
    assert best["BLOCK_M"] == 32
    assert len(timed) == 5


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ("{", " must be JSON: "),
        ("[]", " must be a JSON object, got list"),
        ('{"op": 3}', ": op must be an object, got 3"),
        (None, " must be a regular file, got a FIFO"),
    ],
)
def test_a_damaged_file_is_named(contents, problem, timed):
    file = tuning.path()
    file.parent.mkdir()
    os.mkfifo(file) if contents is None else file.write_text(contents)
    with pytest.raises(ValueError, match=f"^{file}{problem}.*; delete the file to measure again$"):
        tuning.fastest(("op",), DEVICE, CANDIDATES, lambda _: None)


def test_a_relative_folder_is_none(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert tuning.path() == Path.home() / ".cache" / "mistral_kernels" / "tuned.json"


@pytest.mark.parametrize(("setting", "expected"), [(None, False), ("0", False), ("1", True)])
def test_enabled(setting, expected, monkeypatch):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(tuning.VARIABLE, setting)
    assert tuning.enabled() is expected


def test_a_setting_that_means_nothing(monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "yes")
    with pytest.raises(ValueError, match="MISTRAL_KERNELS_AUTOTUNE is 'yes'; expected '0' or '1'"):
        tuning.enabled()


@pytest.mark.kernels
def test_attention_tuned(timed, triton_backend, device, monkeypatch):
    """Each kernel is measured on the call itself, and the result is right with what was chosen."""
    monkeypatch.setattr(
        tile_table,
        "candidates",
        lambda *arguments: tile_table.configs(*arguments)[-2:],
    )
    monkeypatch.setenv(tuning.VARIABLE, "1")
    q, k, v = (torch.randn(1, 40, h, 16, device=device).half() for h in (2, 1, 1))
    q.requires_grad_()
    out = attention(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q)
    kernels = {name.split(", ")[3] for name in json.loads(tuning.path().read_text())}
    assert kernels == {"attention_forward", "attention_dq"}
    assert len(timed) == 4
    monkeypatch.delenv(tuning.VARIABLE)
    expected = attention(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.001)
    (expected_dq,) = torch.autograd.grad(expected.sum(), q)
    torch.testing.assert_close(dq, expected_dq, rtol=0.01, atol=0.01)


def test_the_next_smaller_configuration_where_the_first_does_not_fit(monkeypatch, set_backend):
    """A device with less shared memory than its kin launches all the same, and remembers."""
    set_backend("triton")
    monkeypatch.setitem(TARGETS, "small", TARGETS["sm_80"]._replace(shared_memory=20 << 10))
    monkeypatch.setattr(attention_launch, "_misfits", {})
    q, k, v = (torch.randn(1, 40, h, 64).half() for h in (2, 1, 1))
    with compile_only("small") as kernels:
        attention(q, k, v)
        (misfits,) = attention_launch._misfits.values()
        attention(q, k, v)
    assert len(kernels) == 2
    assert misfits > 0
    assert [misfits] == list(attention_launch._misfits.values())


@pytest.mark.parametrize("kernel", tile_table.TILES)
def test_every_device_has_a_tile_for_every_size(kernel):
    devices = [DeviceProperties(t.backend, t.arch, 100, t.shared_memory) for t in TARGETS.values()]
    for device in (*devices, DEVICE._replace(arch=87), DEVICE._replace(arch=103)):
        for size in (16, 64, 128, 256):
            for element_bytes in (2, 4):
                for descriptors in (False, True):
                    arguments = kernel, size, element_bytes, device, descriptors
                    configs = tile_table.configs(*arguments)
                    assert configs[-1]["BLOCK_M"] == configs[-1]["BLOCK_N"] == 16
                    has_them = device.platform == "cuda" and 90 <= device.arch < 120
                    assert not configs[0]["DESCRIPTORS"] or (descriptors and has_them)
                    assert configs[0] in tile_table.candidates(*arguments)
