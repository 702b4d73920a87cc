"""Test which weights are memory-mapped and which are copied.

Weights that need no change are mapped.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistral_kernels import MistralConfig, MistralForCausalLM
from mistral_kernels.checkpoint.stored import ALIGNMENT
from mistral_kernels.checkpoint.writing import SafetensorsWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a checkpoint in which every weight except the norms takes at least 1 MiB."""
    config = MistralConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def mapped_names(model: MistralForCausalLM) -> set[str]:
    """Return the names of the parameters that are mapped from a safetensors file."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ".safetensors" in line:
            first, last = line.split()[0].split("-")
            spans.append(range(int(first, 16), int(last, 16)))
    return {
        name
        for name, parameter in model.named_parameters()
        if any(parameter.data_ptr() in span for span in spans)
    }


def test_weights_except_norms_are_mapped(folder: Path) -> None:
    """Fused projections are mapped as well: their parts are adjacent in the written files."""
    model = MistralForCausalLM.from_pretrained(folder)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert len(norms) == 3
    assert mapped_names(model) == dict(model.named_parameters()).keys() - norms
    assert all(x.data_ptr() % ALIGNMENT == 0 for x in model.parameters())
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_fused_parts_that_are_not_adjacent_are_copied(folder: Path) -> None:
    """Check parts in another order, with a gap between them, and in two files."""
    file = folder / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    q, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv")
    rest = [name for name in tensors if name not in (up, gate, q, v)]
    fused = {"model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.self_attn.qkv_proj.weight"}
    usual = MistralForCausalLM.from_pretrained(folder)
    assert fused < mapped_names(usual)
    for orders in ([up, gate, v, *rest, q],), ([gate, q, *rest], [up, v]):
        file.unlink(missing_ok=True)
        for i, order in enumerate(orders, start=1):
            if len(orders) > 1:
                file = folder / f"model-0000{i}-of-00002.safetensors"
            specs = {name: (tuple(tensors[name].shape), torch.bfloat16) for name in order}
            with SafetensorsWriter(file, specs) as writer:
                for name in order:
                    writer.write(name, tensors[name])
                writer.finish()
        model = MistralForCausalLM.from_pretrained(folder)
        assert mapped_names(model) == mapped_names(usual) - fused
        assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"quantize": "int8"}], ids=str)
def test_converted_weights_are_copied(options: dict, folder: Path) -> None:
    names = mapped_names(MistralForCausalLM.from_pretrained(folder, **options))
    assert names == ({"model.embed_tokens.weight"} if "quantize" in options else set())


def test_large_tensors_are_page_aligned(tmp_path: Path) -> None:
    """Check large tensors that follow a norm of 1536 bytes in the specs."""
    shapes = {"norm": (768,), "a": (128, 768), "odd": (3, 7), "b": (256, 768)}
    specs = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    file = tmp_path / "model.safetensors"
    with SafetensorsWriter(file, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    with safe_open(file, framework="pt") as stored:
        for name in ("a", "b"):
            assert stored.get_tensor(name).data_ptr() % ALIGNMENT == 0, name
        for name, tensor in tensors.items():
            assert torch.equal(stored.get_tensor(name), tensor), name


def test_unaligned_weights_are_copied(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    exact = {name: x.clone() for name, x in tensors.items()}
    for padding in range(2):  # the metadata determine the length of the header
        save_file(exact, file, {"format": "pt", "padding": "x" * 8 * padding})
        if (8 + int.from_bytes(file.read_bytes()[:8], "little")) % ALIGNMENT:
            break
    model = MistralForCausalLM.from_pretrained(folder)
    assert not mapped_names(model)
    assert all(torch.equal(x, exact[name]) for name, x in model.state_dict().items())


def test_writes_to_mapped_weights_do_not_change_the_file(folder: Path) -> None:
    model = MistralForCausalLM.from_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_mapped_weights_survive_removal_of_the_folder(folder: Path) -> None:
    expected = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = MistralForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    for (name, x), y in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(x.float(), y), name
