"""Test folders with special files, broken links, false counts and unusual names."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_checkpoints import SMALL, State

from mistral_kernels import MistralForCausalLM
from mistral_kernels.checkpoint import CheckpointError, check_folder, open_checkpoint, resolve
from mistral_kernels.checkpoint.stored import HEADER_LIMIT, map_file
from mistral_kernels.model.config import ConfigError

Make = Callable[..., tuple[Path, State]]


def check_refused(folder: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """Check that opening fails with an error of one printable line that contains `message`."""
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert message in text, text
    assert text.isprintable(), text


def write_safetensors(path: Path, header: bytes, body: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder"])
@pytest.mark.parametrize(
    "name",
    [
        *("hf/config.json", "hf/generation_config.json", "hf/model.safetensors"),
        *("raw/params.json", "raw/consolidated.safetensors"),
        *("hf/model.safetensors.index.json", "hf/pytorch_model.bin", "raw/consolidated.00.pth"),
    ],
)
def test_special_files_are_refused(make: Make, tmp_path: Path, name: str, kind: str) -> None:
    """Reading a FIFO would block, and reading a device might never end."""
    file = tmp_path / name
    make(file.parent.name)
    if file.suffix in (".bin", ".pth") or "index" in name:
        next(file.parent.glob("*.safetensors")).unlink()
    file.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    check_refused(file.parent, f"{file} must be a regular file, got {kind}")


@pytest.mark.parametrize("kind", ["dangling", "loop"])
@pytest.mark.parametrize(
    "name",
    [
        *("hf/config.json", "hf/generation_config.json", "hf/model.safetensors"),
        *("raw/params.json", "raw/consolidated.safetensors", "raw/consolidated.00.pth"),
        *("hf/model.safetensors.index.json", "hf/model-00001-of-00001.safetensors"),
    ],
)
def test_broken_links_are_refused(make: Make, tmp_path: Path, name: str, kind: str) -> None:
    """Check that a broken link is neither skipped nor reported as a missing file."""
    file = tmp_path / name
    make(file.parent.name)
    if file.suffix == ".pth" or "index" in name or "-of-" in name:
        next(file.parent.glob("*.safetensors")).unlink()
    file.unlink(missing_ok=True)
    file.symlink_to(file if kind == "loop" else "nowhere")
    check_refused(file.parent, f"{file} must be a regular file, got a broken symbolic link")


def test_broken_links_to_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    for name in ("tiny", "owner/model"):
        (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(CheckpointError, match=f"^{name} is a broken symbolic link"):
            resolve(name)


def test_links_as_in_the_cache_of_the_hub_are_followed(make: Make, tmp_path: Path) -> None:
    folder, state = make("hf")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    found = dict(open_checkpoint(snapshot).tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    (folder / "model.safetensors").unlink()
    check_refused(
        snapshot, "main/model.safetensors must be a regular file, got a broken symbolic link"
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("model-1-of-9999999999.safetensors", 9999999999),
        ("model-00001-of-00003.safetensors", 3),
        (f"model-1-of-{'9' * 90}.safetensors", int("9" * 90)),
    ],
)
def test_shard_counts_in_names_allocate_no_list(make: Make, name: str, count: int) -> None:
    folder, _ = make("hf")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=f"lists {count} shards, {count - 1} are absent"):
        open_checkpoint(folder)


def test_shards_of_another_count_are_ignored(make: Make, tmp_path: Path) -> None:
    folder, state = make("hf")
    names = list(state)
    for i, part in enumerate((names[:9], names[9:]), start=1):
        file = folder / f"model-{i}-of-2.safetensors"
        save_file({name: state[name] for name in part}, file)
    (folder / "model.safetensors").unlink()
    (folder / "model-7-of-9.safetensors").touch()
    assert open_checkpoint(folder).stored.keys() == state.keys()
    (folder / "model-2-of-2.safetensors").unlink()
    check_refused(
        folder, "model-2-of-2.safetensors is missing: model-1-of-2.safetensors lists 2 shards"
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "weight_map must be an object, got []"),
        ({"a": 3}, "weight_map.a must be a string, got 3"),
        ({"a": "../x"}, "points outside its folder: '../x'"),
        ({"a": "/etc/passwd"}, "points outside its folder: '/etc/passwd'"),
        ({"a": "x\ny"}, "hf/x\\ny is missing"),
        ({"a": "x" * 300}, "File name too long"),
        ({"a": "\0"}, "hf/\\x00 is missing"),
        ({"a": ".."}, "hf/.. must be a regular file, got a folder"),
        ({"a": ""}, "hf must be a regular file, got a folder"),
        ({"a": "config.json"}, "is not in the format that torch.save writes"),
    ],
)
def test_bad_indices_are_refused(make: Make, weight_map: object, message: str) -> None:
    folder, _ = make("hf")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check_refused(folder, message)


def test_bad_safetensors_headers_are_refused(make: Make) -> None:
    folder, _ = make("hf")
    file = folder / "model.safetensors"
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    write_safetensors(file, b'{"a":' + entry + b"}", bytes(4), HEADER_LIMIT + 1)
    check_refused(folder, f"a header of {HEADER_LIMIT + 1} bytes, more than {HEADER_LIMIT}")
    write_safetensors(file, b'{"a":' + entry.replace(b"0,4", b"0,8") + b"}", bytes(4))
    check_refused(folder, "is not a valid safetensors file (Error while deserializing header")
    write_safetensors(file, b"[" * 200_000, b"")
    check_refused(folder, "is not a valid safetensors file (Error while deserializing header")
    write_safetensors(file, b'{"a\\n\\u001b[2J":' + entry + b"}", bytes(4))
    check_refused(folder, r"unexpected tensor 'a\n\x1b[2J'")
    overflowing = b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'
    write_safetensors(file, overflowing, b"")
    check_refused(folder, "is not a valid safetensors file (Error while deserializing header")
    empty = b'{"lm_head.weight":{"dtype":"F32","shape":[0,40],"data_offsets":[0,0]}}'
    write_safetensors(file, empty, b"")
    check_refused(folder, "tensor 'lm_head.weight' must have shape (61, 40), got (0, 40)")


def test_last_of_two_header_entries_is_used(make: Make) -> None:
    """Check for the same result as that of the safetensors library."""
    folder, state = make("hf")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wrong = b'{"model.norm.weight": {"dtype": "I32", "shape": [40], "data_offsets": [0, 160]}, '
    header = data[8 : 8 + length].replace(b"{", wrong, 1)
    write_safetensors(file, header, data[8 + length :])
    assert load_file(file)["model.norm.weight"].dtype == torch.float32
    found = dict(open_checkpoint(folder).tensors())
    assert torch.equal(found["model.norm.weight"], state["model.norm.weight"])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int64, "tensor 'model.norm.weight' must be stored as BF16, F16, F32, F64, got I64"),
        (torch.bool, "tensor 'model.norm.weight' must be stored as BF16, F16, F32, F64, got BOOL"),
        (torch.complex64, "must be stored as BF16, F16, F32, F64, got C64"),
        (torch.uint8, "has quantized weights (tensor 'model.norm.weight' is stored as U8)"),
        (torch.float8_e5m2, "quantized weights (tensor 'model.norm.weight' is stored as F8_E5M2)"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(make: Make, dtype: torch.dtype, message: str) -> None:
    """Dtypes of at most 8 bits are reported as quantized weights; others by their name."""
    folder, state = make("hf")
    file = folder / "model.safetensors"
    save_file(state | {"model.norm.weight": torch.zeros(40).to(dtype)}, file)
    check_refused(folder, message)
    save_file(state | {"model.position_ids": torch.zeros(40).to(dtype)}, file)
    check_refused(folder, "unexpected tensor 'model.position_ids'")


def test_files_truncated_after_opening_are_refused(make: Make) -> None:
    for format, name in (("hf", "model.safetensors"), ("raw", "consolidated.safetensors")):
        folder, _ = make(format)
        checkpoint = open_checkpoint(folder)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match=f"{name} has become shorter since it was opened"):
            collections.deque(checkpoint.tensors(), maxlen=0)
        with pytest.raises(CheckpointError, match=f"{name} has become shorter since it was opened"):
            map_file(folder / name, len(data))


def test_line_breaks_in_paths_are_escaped_in_errors(make: Make, tmp_path: Path) -> None:
    folder, _ = make("hf")
    odd = tmp_path / "a\nb\x1b[2J"
    folder.rename(odd)
    assert open_checkpoint(odd).path == odd
    (odd / "config.json").write_text('{"vocab_size": "x"}')
    check_refused(odd, r"a\nb\x1b[2J/config.json: vocab_size must be", ConfigError)
    (odd / "config.json").write_text("{")
    check_refused(odd, r"a\nb\x1b[2J/config.json must be JSON")


def test_error_messages_have_at_most_1000_characters(make: Make) -> None:
    folder, state = make("hf")
    save_file(state | {"x" * 5000: torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) == 1000
    assert str(caught.value).endswith("...")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("name", ["hf/config.json", "hf/generation_config.json", "raw/params.json"])
def test_deeply_nested_json_is_refused(make: Make, tmp_path: Path, name: str, opening: str) -> None:
    make(name.partition("/")[0])
    (tmp_path / name).write_text(opening * 200_000)
    check_refused(
        (tmp_path / name).parent, f"{name} must be JSON of moderate depth: nested too deeply"
    )


def test_huge_sizes_are_refused(make: Make) -> None:
    """Check that a huge number of layers is refused before a list of layers is allocated."""
    folder, _ = make("hf")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2**62}))
    message = f"{config}: num_hidden_layers must be an integer from 1 to 4096, got {2**62}"
    check_refused(folder, message, ConfigError)


def test_gguf_is_refused(tmp_path: Path, make: Make) -> None:
    file = tmp_path / "mistral-7b.Q4_0.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    what = (
        "holds GGUF weights, which are not supported; give the folder or hub id of the original "
        "model, with *.safetensors files"
    )
    for path in (file, tmp_path / "none.GGUF"):
        with pytest.raises(CheckpointError, match=re.escape(f"{path} {what}")):
            resolve(path)
    check_refused(tmp_path, f"{tmp_path} {what}")
    folder, _ = make("hf")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    check_refused(folder, f"{folder} {what}")


def test_folders_of_other_kinds_are_named(make: Make, tmp_path: Path) -> None:
    kinds = {
        "adapter_config.json": "holds a PEFT adapter without its base model; merge the two first, "
        "with merge_and_unload() and save_pretrained() of PEFT",
        "model_index.json": "holds a diffusers pipeline; give a checkpoint of a Mistral language ",
        "model.onnx": "holds weights of ONNX, TensorFlow or Flax, which are not supported; give ",
        "__0_0.distcp": "holds a sharded training state; give the folder that the training wrote",
    }
    for name, message in kinds.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).touch()
        check_refused(folder, f"{folder} {message}")
        with pytest.raises(CheckpointError, match=re.escape(str(folder / name))):
            resolve(folder / name)
    folder, _ = make("hf")
    (folder / "adapter_config.json").touch()
    open_checkpoint(folder)  # the checkpoint beside the adapter


@pytest.mark.parametrize(
    "names", [("checkpoint-500", "checkpoint-1000"), ("snapshots/a", "snapshots/b")]
)
def test_checkpoints_in_subfolders_are_named(
    names: tuple[str, ...], make: Make, tmp_path: Path
) -> None:
    folder, _ = make("hf")
    for name in names:
        shutil.copytree(folder, tmp_path / "run" / name)
    last = tmp_path / "run" / names[-1]
    message = f"holds checkpoints in subfolders; give one of them, such as {last}"
    check_refused(tmp_path / "run", message)


def test_pointers_of_git_lfs_are_named(make: Make, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\nsize 14483464192\n"
    hf, _ = make("hf")
    raw, _ = make("raw")
    (raw / "consolidated.safetensors").unlink()
    for file in (hf / "model.safetensors", raw / "consolidated.00.pth"):
        file.write_text(pointer)
        message = f"{file} is a Git LFS pointer, not the file; run `git lfs pull` in its folder"
        check_refused(file.parent, message)


def test_check_folder_returns_the_format(make: Make, tmp_path: Path) -> None:
    assert [check_folder(make(format)[0]) for format in ("hf", "raw")] == ["hf", "raw"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is empty: a checkpoint has"):
        check_folder(tmp_path / "empty")


def test_home_folder_of_unknown_user_is_refused() -> None:
    for read in (resolve, open_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"no such user: '~no.such.user'; name the folder"
        ):
            read("~no.such.user")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_from_pretrained_replaces_only_fields_without_weights(
    make: Make, quantize: str | None
) -> None:
    """Check the configuration fields and the options of `from_pretrained`."""
    folder, _ = make("hf", torch.float32)
    model = MistralForCausalLM.from_pretrained(
        folder, quantize=quantize, sliding_window=None, vocab_size=61
    )
    assert model.config.sliding_window is None
    assert model.config.vocab_size == SMALL.vocab_size
    for name, own, value in (("num_hidden_layers", 3, 2), ("vocab_size", 61, 10)):
        message = (
            f"^{name} must be {own}, which the checkpoint's weights determine, got {value}; fields"
        )
        with pytest.raises(ConfigError, match=message):
            MistralForCausalLM.from_pretrained(folder, quantize=quantize, **{name: value})
    for name in ("head", "torch_types"):
        options = (
            "dtype, device, device_map and quantize, and the fields sliding_window, rope_theta, "
        )
        message = f"^unexpected keyword '{name}'; options are {options}"
        with pytest.raises(TypeError, match=message):
            MistralForCausalLM.from_pretrained(folder, **{name: 1})
