"""Test that checkpoints are read back bit by bit: by this package, safetensors and transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_checkpoints import SMALL, State, random_state

from mistral_kernels.checkpoint import Checkpoint, open_checkpoint, save_hf, save_raw
from mistral_kernels.checkpoint.names import hf_names, interleaved_to_half
from mistral_kernels.checkpoint.stored import StoredTensor
from mistral_kernels.model.config import MistralConfig

Make = Callable[..., tuple[Path, State]]


def read(checkpoint: Checkpoint) -> State:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["raw", "hf"])
def test_saved_checkpoint_is_read_back(
    make: Make, format: str, tied: bool, dtype: torch.dtype
) -> None:
    folder, state = make(format, dtype, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.path, checkpoint.format) == (folder, format)
    assert checkpoint.config == dataclasses.replace(SMALL, tie_word_embeddings=tied)
    assert checkpoint.dtype == dtype
    assert checkpoint.num_parameters == sum(tensor.numel() for tensor in state.values())
    assert checkpoint.num_bytes == checkpoint.num_parameters * dtype.itemsize
    assert_same(read(checkpoint), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_to_hf_to_raw_is_bit_exact(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    first, _ = make("raw", dtype)
    hf, back = tmp_path / "converted", tmp_path / "back"
    checkpoint = open_checkpoint(first)
    save_hf(checkpoint.tensors(), checkpoint.config, hf, dtype=dtype)
    checkpoint = open_checkpoint(hf)
    save_raw(checkpoint.tensors(), checkpoint.config, back, dtype=dtype)
    assert_same(
        load_file(back / "consolidated.safetensors"), load_file(first / "consolidated.safetensors")
    )
    assert json.loads((back / "params.json").read_text()) == json.loads(
        (first / "params.json").read_text()
    )


def test_hf_to_raw_to_hf_is_bit_exact(make: Make, tmp_path: Path) -> None:
    first, _ = make("hf", torch.bfloat16)
    raw, back = tmp_path / "converted", tmp_path / "back"
    checkpoint = open_checkpoint(first)
    save_raw(checkpoint.tensors(), checkpoint.config, raw, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(raw)
    save_hf(checkpoint.tensors(), checkpoint.config, back, dtype=torch.bfloat16)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (first / name).read_bytes(), name


def test_raw_rows_are_interleaved(make: Make) -> None:
    folder, state = make("raw")
    stored = load_file(folder / "consolidated.safetensors")
    for raw, hf in hf_names(SMALL).items():
        heads = {"wq": 4, "wk": 2}.get(raw.split(".")[-2])
        tensor = interleaved_to_half(stored[raw], heads) if heads else stored[raw]
        assert torch.equal(tensor, state[hf]), raw


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"sliding_window": None, "rope_theta": 1e6},
        {"sliding_window": (None, 7)},
        {"num_attention_heads": 2, "eos_token_id": (2, 5)},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_transformers_loads_saved_checkpoints(make: Make, changes: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, state = make("hf", **changes)
    config = open_checkpoint(folder).config
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mixed = isinstance(config.sliding_window, tuple)
    assert type(loaded).__name__ == ("MinistralForCausalLM" if mixed else "MistralForCausalLM")
    assert loaded.config.rope_parameters["rope_theta"] == config.rope_theta
    assert loaded.generation_config.eos_token_id == config.to_hf("float32")["eos_token_id"]
    if mixed:
        assert loaded.config.layer_types == [
            "full_attention" if window is None else "sliding_attention"
            for window in config.layer_windows
        ]
    # A second model gets the same weights from `state`, not from the files.
    made = type(loaded)(loaded.config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made.load_state_dict(state)
    tokens = torch.randint(config.vocab_size, (2, 19))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made(tokens).logits)


def test_checkpoints_of_transformers_are_read(tmp_path: Path, small: MistralConfig) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.MistralConfig(**small.to_hf("float32"))
    model = transformers.MistralForCausalLM(settings)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(tmp_path / "theirs")
    assert checkpoint.config == small
    assert_same(read(checkpoint), dict(model.state_dict()))


def test_shards_have_limited_size_and_are_read_back(make: Make, tmp_path: Path) -> None:
    _, state = make("hf")
    folder = tmp_path / "sharded"
    save_hf(iter(state.items()), SMALL, folder, dtype=torch.float32, max_shard_bytes=20_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    stored = {file: load_file(folder / file) for file in files}
    assert {name: file for file in files for name in stored[file]} == index["weight_map"]
    for tensors in stored.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert_same(read(open_checkpoint(folder)), state)
    (folder / "model.safetensors.index.json").unlink()  # the names of the files are sufficient
    assert_same(read(open_checkpoint(folder)), state)


def test_raw_shards_and_pickles_are_read(make: Make, tmp_path: Path) -> None:
    folder, state = make("raw")
    stored = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    torch.save(stored, folder / "consolidated.00.pth")
    assert_same(read(open_checkpoint(folder)), state)
    (folder / "consolidated.00.pth").unlink()
    halves = list(stored.items())[:9], list(stored.items())[9:]
    for i, half in enumerate(halves, 1):
        save_file(dict(half), folder / f"consolidated-0000{i}-of-00002.safetensors")
    assert_same(read(open_checkpoint(folder)), state)

    hf = tmp_path / "bin"
    hf.mkdir()
    shutil.copy(make("hf")[0] / "config.json", hf)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, hf / "pytorch_model.bin")
    del state["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert_same(read(open_checkpoint(hf)), state)


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    state = random_state(SMALL, torch.bfloat16)
    state["model.norm.weight"] = torch.randn(SMALL.hidden_size)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    save_raw(state.items(), SMALL, tmp_path / "raw", dtype=dtypes)
    checkpoint = open_checkpoint(tmp_path / "raw")
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.dtypes == dtypes
    assert_same(read(checkpoint), state)


def test_saving_casts_to_dtype(make: Make, tmp_path: Path) -> None:
    _, state = make("hf")
    save_hf(state.items(), SMALL, tmp_path / "bf16", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert_same(load_file(tmp_path / "bf16" / "model.safetensors"), expected)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_head_of_tied_model_is_not_stored(tmp_path: Path) -> None:
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    state = random_state(tied)
    head = {"lm_head.weight": state["model.embed_tokens.weight"]}
    save_hf((state | head).items(), tied, tmp_path / "hf", dtype=torch.float32)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), state)
    save_file(
        state | {name: x.clone() for name, x in head.items()},
        tmp_path / "hf" / "model.safetensors",
    )
    assert_same(read(open_checkpoint(tmp_path / "hf")), state)


def test_folder_with_both_formats_is_opened_as_hf(make: Make) -> None:
    raw, _state = make("raw")
    hf, hf_state = make("hf")
    shutil.copy(hf / "config.json", raw)  # weights in the raw format only
    assert open_checkpoint(raw).format == "raw"
    shutil.copy(hf / "model.safetensors", raw)
    both = open_checkpoint(raw)
    assert both.format == "hf"
    assert_same(read(both), hf_state)


def test_generation_config_overrides_eos_token(make: Make) -> None:
    folder, _ = make("hf")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4, 28]}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 4, 28)


def test_saving_holds_one_tensor_at_a_time(make: Make, tmp_path: Path) -> None:
    """Check that each tensor is freed before the next one is requested."""
    import weakref

    state = random_state(SMALL)
    for save in (save_hf, save_raw):
        alive: list[weakref.ref[torch.Tensor]] = []

        def one_by_one() -> object:
            for name in state:
                assert [ref for ref in alive if ref() is not None] == []  # noqa: B023
                tensor = state[name].clone()
                alive.append(weakref.ref(tensor))  # noqa: B023
                yield name, tensor
                del tensor

        save(one_by_one(), SMALL, tmp_path / save.__name__, dtype=torch.float32)  # type: ignore[arg-type]
        assert len(alive) == len(state)


@pytest.mark.parametrize("format", ["raw", "hf"])
def test_mapped_pages_never_exceed_the_largest_tensor(
    make: Make, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Check the number of bytes that are read between two mappings of a file."""
    from mistral_kernels.checkpoint import reading

    checkpoint = open_checkpoint(make(format)[0])
    groups: list[int] = []
    really_map, really_read = reading.map_file, StoredTensor.read

    def counting_map(file: Path) -> torch.Tensor:
        groups.append(0)
        return really_map(file)

    def counting_read(stored: StoredTensor, contents: torch.Tensor) -> torch.Tensor:
        groups[-1] += stored.num_bytes
        return really_read(stored, contents)

    monkeypatch.setattr(reading, "map_file", counting_map)
    monkeypatch.setattr(StoredTensor, "read", counting_read)
    for _, tensor in checkpoint.tensors():
        del tensor
    largest = max(stored.num_bytes for stored in checkpoint.stored.values())
    assert sum(groups) == checkpoint.num_bytes
    assert max(groups) <= largest
