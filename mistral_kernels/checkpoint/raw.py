"""Read and write Mistral's own folders: `params.json` and `consolidated*` weight files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mistral_kernels.checkpoint.names import (
    expected_shapes,
    half_to_interleaved,
    hf_names,
    num_rotary_heads,
    without_tied_head,
)
from mistral_kernels.checkpoint.reading import (
    Checkpoint,
    find_weights,
    match_tensors,
    read_config,
)
from mistral_kernels.checkpoint.writing import (
    make_specs,
    new_folder,
    num_bytes,
    write_files,
    write_json,
)
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.utils.files import CheckpointError

CONFIG_FILE = "params.json"


def find_raw_weights(folder: Path) -> list[Path]:
    """Return the weight files of a raw folder; an empty list if the folder has none.

    The files are `consolidated*.safetensors`, or else `consolidated.NN.pth`.
    """
    files = find_weights(folder, "consolidated", ".safetensors")
    return files or sorted(folder.glob("consolidated.[0-9][0-9].pth"))


def open_raw(folder: Path) -> Checkpoint:
    """Open a raw folder; see `open_checkpoint`."""
    config_file = folder / CONFIG_FILE
    config = read_config(config_file, MistralConfig.from_raw)
    names = hf_names(replace(config, tie_word_embeddings=False))
    config, stored = match_tensors(find_raw_weights(folder), names, config)
    return Checkpoint(folder, "raw", config, stored)


def save_raw(
    tensors: Iterable[tuple[str, Tensor]],
    config: MistralConfig,
    directory: str | Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    extra_files: Iterable[Path] = (),
) -> None:
    """Write a folder in Mistral's own format: `params.json` and `consolidated.safetensors`.

    The folder appears only when it is complete. After an error nothing is left behind.

    Args:
        tensors: Pairs of an HF name and a tensor in HF layout, in any order; see `save_hf`. They
            are converted to raw names and raw layout.
        config: Configuration of the model. It determines the names and shapes of the tensors.
        directory: Folder to write. It must not exist, or must be empty.
        dtype: Dtype in which all tensors are stored, or a mapping from each HF name to a dtype.
        extra_files: Files to copy into the folder, for example those of a tokenizer.

    Raises:
        CheckpointError: See `save_hf`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mistral_kernels import MistralConfig, MistralForCausalLM
        >>> from mistral_kernels.checkpoint import open_checkpoint, save_raw
        >>> config = MistralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        ... )
        >>> state = MistralForCausalLM(config).state_dict()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_raw(state.items(), config, folder, dtype=torch.float32)
        ...     checkpoint = open_checkpoint(folder)
        ...     copies = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
        >>> checkpoint.format, checkpoint.stored["model.norm.weight"].name
        ('raw', 'norm.weight')
        >>> all(torch.equal(copies[name], state[name]) for name in state)
        True
    """
    raw_names = {hf: raw for raw, hf in hf_names(config).items()}
    specs = make_specs(expected_shapes(config), dtype)
    stored = {raw_names[name]: spec for name, spec in specs.items()}

    def to_raw() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in without_tied_head(tensors, config):
            if name not in specs:
                raise CheckpointError(f"tensor {name!r} is not part of this configuration")
            heads = num_rotary_heads(name, config)
            # A tensor of a wrong shape may be impossible to permute. `SafetensorsWriter` raises the
            # error for such a tensor.
            if heads and tuple(tensor.shape) == specs[name][0]:
                tensor = half_to_interleaved(tensor, heads)
            yield raw_names[name], tensor
            del tensor

    with new_folder(directory, sum(map(num_bytes, specs.values())), extra_files) as folder:
        write_files(folder, {"consolidated.safetensors": stored}, to_raw())
        write_json(folder / CONFIG_FILE, config.to_raw())
