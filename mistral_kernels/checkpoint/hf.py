"""Hugging Face folders: `config.json` and `model*.safetensors` or `pytorch_model*.bin`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mistral_kernels.checkpoint.names import expected_shapes, hf_names, without_tied_head
from mistral_kernels.checkpoint.reading import (
    CONFIG_LIMIT,
    Checkpoint,
    find_weights,
    match_tensors,
    naming,
    read_config,
)
from mistral_kernels.checkpoint.writing import (
    Spec,
    make_specs,
    new_folder,
    num_bytes,
    write_files,
    write_json,
)
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.utils.files import is_taken, read_json

CONFIG_FILE = "config.json"
_TOKENS_SCHEMA = {"bos_token_id": (int, None), "eos_token_id": (int, None, [int])}


def find_hf_weights(folder: Path) -> list[Path]:
    """Return the weight files of an HF folder, safetensors before pickles; empty if none."""
    return find_weights(folder, "model", ".safetensors") or find_weights(
        folder, "pytorch_model", ".bin"
    )


def open_hf(folder: Path) -> Checkpoint:
    """Open an HF folder; see `open_checkpoint`."""
    config_file = folder / CONFIG_FILE
    config = read_config(config_file, MistralConfig.from_hf)
    generation_file = folder / "generation_config.json"
    if is_taken(generation_file):
        # As in transformers, these tokens overrule config.json's when text is generated.
        tokens = read_json(generation_file, _TOKENS_SCHEMA, CONFIG_LIMIT)
        tokens = {key: tokens[key] for key in _TOKENS_SCHEMA if tokens.get(key) is not None}
        with naming(generation_file):
            config = replace(config, **tokens)
    untied = replace(config, tie_word_embeddings=False)
    names = {name: name for name in hf_names(untied).values()}
    # transformers' base model, MistralModel, saves its tensors without this prefix.
    names |= {name.removeprefix("model."): name for name in names}
    config, stored = match_tensors(find_hf_weights(folder), names, config)
    return Checkpoint(folder, "hf", config, stored)


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    config: MistralConfig,
    directory: str | Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    extra_files: Iterable[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    `tensors`: names and tensors as `Checkpoint.tensors` or a model's `state_dict` gives them, in
    any order; each is written as it comes, so a generator needs memory for one. `dtype`: the type
    to store them in, one for all or by name. `extra_files`, a tokenizer's for instance, are copied
    along. Weights above `max_shard_bytes` are split over several files.

    Raises `CheckpointError`, and leaves nothing behind, for a `directory` that holds something, a
    full disk, and tensors that are not exactly those of `config`.
    """
    specs = make_specs(expected_shapes(config), dtype)
    total = sum(map(num_bytes, specs.values()))
    files = _shard(specs, max_shard_bytes)
    types = [each for _, each in specs.values()]
    # The embedding's type, by far the largest tensor's, stands for all.
    contents = config.to_hf(str(types[0]).removeprefix("torch."))
    with new_folder(directory, total, extra_files) as folder:
        write_files(folder, files, without_tied_head(tensors, config))
        if len(files) > 1:
            weight_map = {name: file for file, part in files.items() for name in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        tokens = {key: contents[key] for key in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
        write_json(folder / CONFIG_FILE, contents)


def _shard(specs: Mapping[str, Spec], limit: int) -> dict[str, dict[str, Spec]]:
    """Split `specs`, in their order, into files of at most `limit` bytes (or one tensor)."""
    parts: list[dict[str, Spec]] = [{}]
    used = 0
    for name, spec in specs.items():
        if parts[-1] and used + num_bytes(spec) > limit:
            parts.append({})
            used = 0
        parts[-1][name] = spec
        used += num_bytes(spec)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}
