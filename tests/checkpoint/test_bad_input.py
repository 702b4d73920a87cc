"""Errors of opening and writing checkpoints, and their messages."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_checkpoints import SMALL, State, random_state

from mistral_kernels import MistralForCausalLM
from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, save_hf, save_raw, writing
from mistral_kernels.model.config import ConfigError

Make = Callable[..., tuple[Path, State]]


def refused(folder: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """Check that opening fails with one line that matches `message`."""
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_without_its_parts(make: Make, tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder: '.*none'")
    folder, _ = make("hf")
    refused(folder / "config.json", "not a folder: '.*config.json'")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no configuration: expected config.json .* or params.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "has config.json but no weights: expected model")
    raw, _ = make("raw")
    (raw / "consolidated.safetensors").unlink()
    refused(raw, "has params.json but no weights: expected consolidated")


@pytest.mark.parametrize(("format", "config"), [("hf", "config.json"), ("raw", "params.json")])
def test_configuration_that_is_no_object(make: Make, format: str, config: str) -> None:
    folder, _ = make(format)
    (folder / config).write_text('{"dim": ')
    refused(folder, f"{config} must be JSON")
    (folder / config).write_text("[1, 2]")
    refused(folder, f"{config} must be a JSON object, got list")
    (folder / config).write_bytes(b"\xff\xfe\x00")
    refused(folder, f"{config} must be UTF-8")


def test_missing_shards(make: Make, tmp_path: Path) -> None:
    _, state = make("hf")
    folder = tmp_path / "sharded"
    save_hf(state.items(), SMALL, folder, dtype=torch.float32, max_shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    refused(folder, rf"{shards[1].name} is missing: .*index.json lists {len(shards)} shards, 1 ")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, rf"{shards[1].name} is missing: .* lists {len(shards)} shards")
    index = {"weight_map": {"lm_head.weight": "../hf/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "points outside its folder: '../hf/model.safetensors'")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "index.json has no 'weight_map'")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_safetensors(make: Make, kept: int) -> None:
    folder, _ = make("hf")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, r"model.safetensors is not a whole safetensors file \(.*copy it again")


def test_truncated_and_old_pickles(make: Make) -> None:
    folder, _ = make("raw")
    stored = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    path = folder / "consolidated.00.pth"
    torch.save(stored, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"consolidated.00.pth is not whole \(.*copy it again")
    torch.save(stored, path, _use_new_zipfile_serialization=False)
    refused(folder, "consolidated.00.pth is not in the format that torch.save writes since")
    torch.save([torch.ones(1)], path)
    refused(folder, "consolidated.00.pth must hold a dict of tensors, not list")
    torch.save({"model": stored}, path)
    refused(folder, "consolidated.00.pth must hold tensors by name, but 'model' is a dict")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_pickle_that_wants_to_run_code(make: Make, tmp_path: Path) -> None:
    folder, _ = make("raw")
    (folder / "consolidated.safetensors").unlink()
    torch.save({"norm.weight": Malicious(tmp_path / "hacked")}, folder / "consolidated.00.pth")
    refused(folder, r"consolidated.00.pth refused: it would call \w+.mkdir when loaded")
    assert not (tmp_path / "hacked").exists()


def test_wrong_shape_and_name(make: Make) -> None:
    folder, state = make("hf")
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(3, 40)}, path)
    refused(folder, rf"{path.name}: tensor '{name}' has shape \(3, 40\), .* asks for \(72, 40\)")
    save_file(state | {"model.layers.1.mlp.foo": torch.zeros(1)}, path)
    refused(folder, f"{path.name}: unexpected tensor 'model.layers.1.mlp.foo'")
    save_file(state | {"model.layers.3.input_layernorm.weight": torch.zeros(40)}, path)
    refused(folder, "unexpected tensor 'model.layers.3.input_layernorm.weight'")
    del state[name], state["model.norm.weight"]
    save_file(state, path)
    refused(folder, rf"{path.name}: no tensor '{name}' \(2 of 30 tensors are missing\)")


def test_raw_names_in_errors_are_raw(make: Make) -> None:
    folder, _ = make("raw")
    path = folder / "consolidated.safetensors"
    stored = load_file(path)
    save_file(stored | {"layers.0.attention.wk.weight": torch.zeros(32, 41)}, path)
    refused(folder, r"'layers.0.attention.wk.weight' has shape \(32, 41\), .* \(32, 40\)")
    del stored["output.weight"]
    save_file(stored, path)
    refused(folder, r"no tensor 'output.weight' \(1 of 30")


def test_tensor_parallel_shards(make: Make) -> None:
    folder, _ = make("raw")
    stored = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    for i in range(2):
        torch.save(stored, folder / f"consolidated.0{i}.pth")
    refused(folder, "consolidated.01.pth: tensor .* is in consolidated.00.pth as well; .* merge")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.block_sparse_moe.gate.weight", "a mixture of experts"),
        ("layers.0.feed_forward.experts.0.w1.weight", "a mixture of experts"),
        ("vision_encoder.patch_conv.weight", "a vision encoder"),
        ("model.vision_tower.patch_conv.weight", "a vision encoder"),
        ("model.layers.0.mlp.up_proj.qweight", "quantized weights"),
        ("layers.0.attention.wq.qscale_act", "quantized weights"),
        ("model.layers.0.mlp.up_proj.weight_scale", "quantized weights"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA adapters"),
    ],
)
def test_other_architectures_by_tensor_name(make: Make, name: str, what: str) -> None:
    folder, state = make("hf")
    save_file(state | {name: torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, f"the checkpoint has {what} \\(tensor '{name}'\\)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_types(make: Make, dtype: torch.dtype) -> None:
    folder, state = make("hf")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(72, 40).to(dtype)}, folder / "model.safetensors")
    refused(folder, rf"the checkpoint has quantized weights \(tensor '{name}' is stored as \w+\)")


def test_other_architectures_by_configuration(make: Make) -> None:
    folder, _ = make("raw")
    for section, what in [("moe", "a mixture of experts"), ("vision_encoder", "a vision encoder")]:
        path = folder / "params.json"
        before = path.read_text()
        edit(path, **{section: {"size": 1}})
        refused(
            folder, rf"params.json: the checkpoint has {what} \(section '{section}'", ConfigError
        )
        path.write_text(before)
    folder, _ = make("hf")
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, "config.json: the checkpoint has quantized weights", ConfigError)


SAVERS = pytest.mark.parametrize("save", [save_hf, save_raw])


@SAVERS
def test_state_that_does_not_fit(tmp_path: Path, save: Callable[..., None]) -> None:
    state = random_state(SMALL)
    name = "model.layers.0.self_attn.q_proj.weight"
    for change, message in [
        ({name: torch.zeros(2, 40)}, r"has shape \(2, 40\), the configuration asks for \(64, 40\)"),
        ({"model.foo": torch.zeros(1)}, "tensor 'model.foo' is not one of this configuration"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            save((state | change).items(), SMALL, tmp_path / "out", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="was given twice"):
        save([*state.items()] * 2, SMALL, tmp_path / "out", dtype=torch.float32)
    del state[name]
    with pytest.raises(CheckpointError, match=r"tensor '.*w?q.*weight' was not given"):
        save(state.items(), SMALL, tmp_path / "out", dtype=torch.float32)
    with pytest.raises(
        CheckpointError, match=r"dtype of 'model.embed_tokens.weight' must be bfloat"
    ):
        save(state.items(), SMALL, tmp_path / "out", dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


@SAVERS
def test_values_beyond_float16(tmp_path: Path, save: Callable[..., None]) -> None:
    state = random_state(SMALL)
    state["model.norm.weight"][3] = 1e6
    with pytest.raises(CheckpointError, match="beyond float16's range; use bfloat16 or float32"):
        save(state.items(), SMALL, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CASTS = [  # from, to, value, whether it becomes infinite
    *((F32, BF16, 3.4028e38, True), (F64, BF16, -1e300, True), (F64, F32, 1e300, True)),
    *((F64, F16, -7e4, True), (BF16, F16, 7e4, True), (F64, F64, 1e300, False)),
    *((F32, BF16, 3.38e38, False), (F32, F16, 65519.0, False), (F64, F32, 3.4e38, False)),
    *((source, to, math.inf, False) for source in (F32, F64) for to in (F16, BF16, F32)),
]


@SAVERS
@pytest.mark.parametrize(("source", "to", "value", "lost"), CASTS)
def test_casts_that_lose_values(
    tmp_path: Path, save: Callable[..., None],
    source: torch.dtype, to: torch.dtype, value: float, lost: bool,
) -> None:  # fmt: skip
    """Casts are refused when saving and when loading; infinite values stay so."""
    state = random_state(SMALL, source)
    name = "model.layers.1.mlp.down_proj.weight"
    state[name][2, 1], state[name][0, 0] = value, math.nan
    message = f"w2.weight|{name}' has values beyond {str(to)[6:]}'s range; use "
    with pytest.raises(CheckpointError, match=message) if lost else nullcontext():
        save(state.items(), SMALL, tmp_path / "cast", dtype=to)
    assert lost != (tmp_path / "cast").exists()
    save(state.items(), SMALL, tmp_path / "out", dtype=source)
    with pytest.raises(CheckpointError, match=message) if lost else nullcontext():
        MistralForCausalLM.from_pretrained(tmp_path / "out", dtype=to)


def test_int8_scales_that_are_lost(tmp_path: Path) -> None:
    state = random_state(SMALL, F64)
    state["model.layers.1.mlp.down_proj.weight"][2, 1] = 1e300
    save_hf(state.items(), SMALL, tmp_path / "out", dtype=F64)
    with pytest.raises(CheckpointError, match=r"down_proj.weight' has values beyond float32's ran"):
        MistralForCausalLM.from_pretrained(tmp_path / "out", dtype=F32, quantize="int8")


@SAVERS
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_nothing(
    tmp_path: Path, save: Callable[..., None], error: BaseException
) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(random_state(SMALL).items()):
            if i == 11:
                raise error
            yield item

    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    (tmp_path / "out").mkdir()
    with pytest.raises(expected):
        save(failing(), SMALL, tmp_path / "out", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


@SAVERS
def test_full_disk(
    tmp_path: Path, save: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill a real disk, by the limit that the system sets on a file's size."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*out, nothing was kept: .*"):
            save(random_state(SMALL).items(), SMALL, tmp_path / "out", dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"not enough space for .*out: 0.00 GB are needed"):
        save(random_state(SMALL).items(), SMALL, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


@SAVERS
def test_targets(tmp_path: Path, save: Callable[..., None]) -> None:
    state = random_state(SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="full is not empty; name a new folder"):
        save(state.items(), SMALL, tmp_path / "full", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="note is a file; name a new folder"):
        save(state.items(), SMALL, tmp_path / "full" / "note", dtype=torch.float32)
    assert (tmp_path / "full" / "note").read_text() == "mine"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop is a symbolic link that leads nowhere; name"):
        save(state.items(), SMALL, tmp_path / "loop", dtype=torch.float32)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new/deeper"):
        save(state.items(), SMALL, tmp_path / folder, dtype=torch.float32)
        assert open_checkpoint(tmp_path / folder).config == SMALL


def test_a_window_pattern_that_hf_cannot_write(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, sliding_window=(7, 9))
    with pytest.raises(ConfigError, match=r"room for one window size, this model has \[7, 9\]"):
        save_hf(random_state(config).items(), config, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
