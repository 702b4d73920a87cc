"""Test the errors of opening and writing checkpoints, and their messages."""

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


def check_refused(folder: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """Check that opening fails with an error of one line that matches `message`."""
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def edit(path: Path, **changes: object) -> None:
    """Change fields in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_with_missing_files_are_refused(make: Make, tmp_path: Path) -> None:
    check_refused(tmp_path / "none", "no such folder: '.*none'")
    folder, _ = make("hf")
    check_refused(folder / "config.json", "not a folder: '.*config.json'")
    (tmp_path / "empty").mkdir()
    needed = r"config.json and model\*.safetensors \(Hugging Face\), or params.json and consolid"
    check_refused(tmp_path / "empty", f"is empty: a checkpoint has {needed}")
    (tmp_path / "empty" / "README.md").touch()
    check_refused(tmp_path / "empty", f"has no configuration: a checkpoint has {needed}")
    (folder / "model.safetensors").unlink()
    check_refused(folder, "has config.json but no weights: expected model")
    raw, _ = make("raw")
    (raw / "consolidated.safetensors").unlink()
    check_refused(raw, "has params.json but no weights: expected consolidated")


@pytest.mark.parametrize(("format", "config"), [("hf", "config.json"), ("raw", "params.json")])
def test_configurations_that_are_not_a_json_object_are_refused(
    make: Make, format: str, config: str
) -> None:
    folder, _ = make(format)
    (folder / config).write_text('{"dim": ')
    check_refused(folder, f"{config} must be JSON")
    (folder / config).write_text("[1, 2]")
    check_refused(folder, f"{config} must be a JSON object, got list")
    (folder / config).write_bytes(b"\xff\xfe\x00")
    check_refused(folder, f"{config} must be UTF-8")


def test_missing_shards_are_refused(make: Make, tmp_path: Path) -> None:
    _, state = make("hf")
    folder = tmp_path / "sharded"
    save_hf(state.items(), SMALL, folder, dtype=torch.float32, max_shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    check_refused(
        folder, rf"{shards[1].name} is missing: .*index.json lists {len(shards)} shards, 1 "
    )
    (folder / "model.safetensors.index.json").unlink()
    check_refused(folder, rf"{shards[1].name} is missing: .* lists {len(shards)} shards")
    index = {"weight_map": {"lm_head.weight": "../hf/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(folder, "points outside its folder: '../hf/model.safetensors'")
    (folder / "model.safetensors.index.json").write_text("{}")
    check_refused(folder, "index.json has no 'weight_map'")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_safetensors_are_refused(make: Make, kept: int) -> None:
    folder, _ = make("hf")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    check_refused(folder, r"model.safetensors is not a valid safetensors file \(.*copy it again")


def test_truncated_and_old_pickles_are_refused(make: Make) -> None:
    folder, _ = make("raw")
    stored = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    path = folder / "consolidated.00.pth"
    torch.save(stored, path)
    path.write_bytes(path.read_bytes()[:-100])
    check_refused(folder, r"consolidated.00.pth is incomplete or damaged \(.*copy it again")
    torch.save(stored, path, _use_new_zipfile_serialization=False)
    check_refused(folder, "consolidated.00.pth is not in the format that torch.save writes since")
    torch.save([torch.ones(1)], path)
    check_refused(folder, "consolidated.00.pth must hold a dict of tensors, got list")
    torch.save({"model": stored}, path)
    check_refused(
        folder, "consolidated.00.pth must map names to tensors, but the entry 'model' has type"
    )


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_refused_and_not_executed(make: Make, tmp_path: Path) -> None:
    folder, _ = make("raw")
    (folder / "consolidated.safetensors").unlink()
    torch.save({"norm.weight": Malicious(tmp_path / "hacked")}, folder / "consolidated.00.pth")
    check_refused(folder, r"consolidated.00.pth was refused: it would call \w+.mkdir when loaded")
    assert not (tmp_path / "hacked").exists()


def test_tensors_of_wrong_shape_or_name_are_refused(make: Make) -> None:
    folder, state = make("hf")
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(3, 40)}, path)
    check_refused(
        folder, rf"{path.name}: tensor '{name}' must have shape \(72, 40\), got \(3, 40\)"
    )
    save_file(state | {"model.layers.1.mlp.foo": torch.zeros(1)}, path)
    check_refused(folder, f"{path.name}: unexpected tensor 'model.layers.1.mlp.foo'")
    save_file(state | {"model.layers.3.input_layernorm.weight": torch.zeros(40)}, path)
    check_refused(folder, "unexpected tensor 'model.layers.3.input_layernorm.weight'")
    del state[name], state["model.norm.weight"]
    save_file(state, path)
    check_refused(folder, rf"{path.name}: no tensor '{name}' \(2 of 30 tensors are missing\)")


def test_errors_of_raw_checkpoints_contain_raw_names(make: Make) -> None:
    folder, _ = make("raw")
    path = folder / "consolidated.safetensors"
    stored = load_file(path)
    save_file(stored | {"layers.0.attention.wk.weight": torch.zeros(32, 41)}, path)
    check_refused(
        folder, r"'layers.0.attention.wk.weight' must have shape \(32, 40\), got \(32, 41\)"
    )
    del stored["output.weight"]
    save_file(stored, path)
    check_refused(folder, r"no tensor 'output.weight' \(1 of 30")


def test_tensor_parallel_shards_are_refused(make: Make) -> None:
    folder, _ = make("raw")
    stored = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    for i in range(2):
        torch.save(stored, folder / f"consolidated.0{i}.pth")
    check_refused(folder, "consolidated.01.pth: tensor .* is also in consolidated.00.pth; .* merge")


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
def test_tensor_names_of_other_architectures_are_refused(make: Make, name: str, what: str) -> None:
    folder, state = make("hf")
    save_file(state | {name: torch.zeros(1)}, folder / "model.safetensors")
    check_refused(folder, f"the checkpoint has {what} \\(tensor '{name}'\\)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_tensors_of_quantized_dtypes_are_refused(make: Make, dtype: torch.dtype) -> None:
    folder, state = make("hf")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(72, 40).to(dtype)}, folder / "model.safetensors")
    check_refused(
        folder,
        rf"the checkpoint has quantized weights \(tensor '{name}' is stored as \w+\); .*; give the "
        "original, unquantized checkpoint$",
    )


def test_configurations_of_other_architectures_are_refused(make: Make) -> None:
    folder, _ = make("raw")
    for section, what in [("moe", "a mixture of experts"), ("vision_encoder", "a vision encoder")]:
        path = folder / "params.json"
        before = path.read_text()
        edit(path, **{section: {"size": 1}})
        check_refused(
            folder, rf"params.json: the checkpoint has {what} \(section '{section}'", ConfigError
        )
        path.write_text(before)
    folder, _ = make("hf")
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    check_refused(folder, "config.json: the checkpoint has quantized weights", ConfigError)


SAVERS = pytest.mark.parametrize("save", [save_hf, save_raw])


@SAVERS
def test_tensors_that_do_not_match_the_configuration_are_not_saved(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    state = random_state(SMALL)
    name = "model.layers.0.self_attn.q_proj.weight"
    for change, message in [
        ({name: torch.zeros(2, 40)}, r"must have shape \(64, 40\), got \(2, 40\)"),
        ({"model.foo": torch.zeros(1)}, "tensor 'model.foo' is not part of this configuration"),
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
def test_values_beyond_the_range_of_float16_are_not_saved(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    state = random_state(SMALL)
    state["model.norm.weight"][3] = 1e6
    with pytest.raises(CheckpointError, match="beyond float16's range; use bfloat16 or float32"):
        save(state.items(), SMALL, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CASTS = [  # source dtype, target dtype, value, whether the cast makes it infinite
    *((F32, BF16, 3.4028e38, True), (F64, BF16, -1e300, True), (F64, F32, 1e300, True)),
    *((F64, F16, -7e4, True), (BF16, F16, 7e4, True), (F64, F64, 1e300, False)),
    *((F32, BF16, 3.38e38, False), (F32, F16, 65519.0, False), (F64, F32, 3.4e38, False)),
    *((source, to, math.inf, False) for source in (F32, F64) for to in (F16, BF16, F32)),
]


@SAVERS
@pytest.mark.parametrize(("source", "to", "value", "lost"), CASTS)
def test_casts_of_finite_values_to_infinity_are_refused(
    tmp_path: Path, save: Callable[..., None],
    source: torch.dtype, to: torch.dtype, value: float, lost: bool,
) -> None:  # fmt: skip
    """Check saving and loading; values that are infinite before the cast are accepted."""
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


def test_int8_quantization_of_values_beyond_float32_is_refused(tmp_path: Path) -> None:
    state = random_state(SMALL, F64)
    state["model.layers.1.mlp.down_proj.weight"][2, 1] = 1e300
    save_hf(state.items(), SMALL, tmp_path / "out", dtype=F64)
    with pytest.raises(CheckpointError, match=r"down_proj.weight' has values beyond float32's ran"):
        MistralForCausalLM.from_pretrained(tmp_path / "out", dtype=F32, quantize="int8")


@SAVERS
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_interrupted_saving_leaves_no_files(
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
def test_full_disk_raises_and_leaves_no_files(
    tmp_path: Path, save: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a full disk: by a limit on the file size, then by `shutil.disk_usage`."""
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
def test_targets_must_be_new_or_empty(tmp_path: Path, save: Callable[..., None]) -> None:
    state = random_state(SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="full is not empty; name a new folder"):
        save(state.items(), SMALL, tmp_path / "full", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="note is a file; name a new folder"):
        save(state.items(), SMALL, tmp_path / "full" / "note", dtype=torch.float32)
    assert (tmp_path / "full" / "note").read_text() == "mine"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop is a broken symbolic link; name"):
        save(state.items(), SMALL, tmp_path / "loop", dtype=torch.float32)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new/deeper"):
        save(state.items(), SMALL, tmp_path / folder, dtype=torch.float32)
        assert open_checkpoint(tmp_path / folder).config == SMALL


def test_window_patterns_without_hf_equivalent_are_not_saved(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, sliding_window=(7, 9))
    with pytest.raises(ConfigError, match=r"^sliding_window must have one size .*, got \[7, 9\]"):
        save_hf(random_state(config).items(), config, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
