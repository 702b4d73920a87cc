"""Mistral's own folders: `params.json` and `consolidated*.safetensors` or `consolidated.NN.pth`."""

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
    """Return the weight files of a raw folder, safetensors before pickles; empty if none."""
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

    Arguments and errors are those of `save_hf`; `tensors` and `dtype` go by HF's names too.
    """
    raw_names = {hf: raw for raw, hf in hf_names(config).items()}
    specs = make_specs(expected_shapes(config), dtype)
    stored = {raw_names[name]: spec for name, spec in specs.items()}

    def to_raw() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in without_tied_head(tensors, config):
            if name not in specs:
                raise CheckpointError(f"tensor {name!r} is not one of this configuration")
            heads = num_rotary_heads(name, config)
            # A wrong shape is the writer's to report, and cannot always be permuted.
            if heads and tuple(tensor.shape) == specs[name][0]:
                tensor = half_to_interleaved(tensor, heads)
            yield raw_names[name], tensor
            del tensor

    with new_folder(directory, sum(map(num_bytes, specs.values())), extra_files) as folder:
        write_files(folder, {"consolidated.safetensors": stored}, to_raw())
        write_json(folder / CONFIG_FILE, config.to_raw())
