"""Test the tensor names of wrapped modules and of base models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_checkpoints import SMALL, State

from mistral_kernels.checkpoint import CheckpointError, open_checkpoint
from mistral_kernels.checkpoint.names import unwrap_name

Make = Callable[..., tuple[Path, State]]


def read(folder: Path) -> State:
    return {name: tensor.clone() for name, tensor in open_checkpoint(folder).tensors()}


def same(found: State, expected: State) -> bool:
    equal = (torch.equal(found[name], tensor) for name, tensor in expected.items())
    return found.keys() == expected.keys() and all(equal)


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.model.norm.weight",
        "module.model.norm.weight",
        "module._orig_mod.model.norm.weight",
        "_orig_mod.module.model._orig_mod.norm.weight",
        "_orig_mod.model._orig_mod.norm._orig_mod.weight",  # compiled module in a compiled module
        "_fsdp_wrapped_module.model._checkpoint_wrapped_module.norm.weight",
    ],
)
def test_unwrap_name_removes_parts_of_wrappers(name: str) -> None:
    assert unwrap_name(name) == "model.norm.weight"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("format", ["hf", "raw"])
def test_state_dicts_of_wrapped_modules_are_read(make: Make, format: str, prefix: str) -> None:
    folder, state = make(format)
    file = next(folder.glob("*.safetensors"))
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert same(read(folder), state)


def test_two_names_of_one_tensor_are_refused(make: Make) -> None:
    folder, state = make("hf")
    again = {"_orig_mod.lm_head.weight": state["lm_head.weight"].clone()}
    save_file(state | again, folder / "model.safetensors")
    message = r"'_?\w*\.?lm_head.weight' and '_?\w*\.?lm_head.weight' are the same tensor"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_base_models_are_read_if_they_have_a_head(make: Make, tmp_path: Path) -> None:
    """Check tensors without the prefix "model."; only a tied head may be absent."""
    folder, state = make("hf")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, folder / "model.safetensors")
    assert same(read(folder), state)
    del bare["lm_head.weight"]
    save_file(bare, folder / "model.safetensors")
    message = (
        r"no tensor 'lm_head.weight' \(1 of 30 tensors are missing\); "
        "this is a base model without an output head"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_tied_base_models_of_transformers_are_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = SMALL.to_hf("float32") | {"tie_word_embeddings": True}
    base = transformers.MistralModel(transformers.MistralConfig(**settings))
    base.save_pretrained(tmp_path / "base")
    assert "norm.weight" in load_file(tmp_path / "base" / "model.safetensors")
    expected = {f"model.{name}": tensor for name, tensor in base.state_dict().items()}
    assert same(read(tmp_path / "base"), expected)
