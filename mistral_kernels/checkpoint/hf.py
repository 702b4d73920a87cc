"""Read and write Hugging Face folders: `config.json` with safetensors files or pickles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.checkpoint.names import expected_shapes, hf_names, without_tied_head
from mistral_kernels.checkpoint.reading import (
    CONFIG_LIMIT,
    Checkpoint,
    find_weights,
    match_tensors,
    name_file_in_errors,
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

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_TOKENS_SCHEMA = {"bos_token_id": (int, None), "eos_token_id": (int, None, [int])}


def find_hf_weights(folder: Path) -> list[Path]:
    """Return the weight files of an HF folder; an empty list if the folder has none.

    Safetensors files are preferred to pickles.
    """
    return find_weights(folder, "model", ".safetensors") or find_weights(
        folder, "pytorch_model", ".bin"
    )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's generation_config.json. Only BOS and EOS are checked."""
    return read_json(folder / GENERATION_FILE, _TOKENS_SCHEMA, CONFIG_LIMIT)


def open_hf(folder: Path) -> Checkpoint:
    """Open an HF folder; see `open_checkpoint`."""
    config_file = folder / CONFIG_FILE
    config = read_config(config_file, MistralConfig.from_hf)
    generation = {}
    if is_taken(folder / GENERATION_FILE):
        # As in transformers, these tokens override those of config.json when text is generated.
        generation = read_generation_config(folder)
        tokens = {key: generation[key] for key in _TOKENS_SCHEMA if generation.get(key) is not None}
        with name_file_in_errors(folder / GENERATION_FILE):
            config = replace(config, **tokens)
    untied = replace(config, tie_word_embeddings=False)
    names = {name: name for name in hf_names(untied).values()}
    # MistralModel, the base model of transformers, saves its tensors without this prefix.
    names |= {name.removeprefix("model."): name for name in names}
    config, stored = match_tensors(find_hf_weights(folder), names, config)
    return Checkpoint(folder, "hf", config, stored, generation)


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    config: MistralConfig,
    directory: str | Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    extra_files: Iterable[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    The folder appears only when it is complete. After an error nothing is left behind.

    Args:
        tensors: Pairs of an HF name and a tensor, in any order, as returned by `Checkpoint.tensors`
            or the `state_dict().items()` of a model. Each tensor is written when the iterator
            yields it, so a generator needs memory for one tensor only.
        config: Configuration of the model. It determines the names and shapes of the tensors.
        directory: Folder to write. It must not exist, or must be empty.
        dtype: Dtype in which all tensors are stored, or a mapping from each HF name to a dtype:
            float64, float32, float16 or bfloat16.
        extra_files: Files to copy into the folder, for example those of a tokenizer.
        max_shard_bytes: Maximum size of a weight file in bytes. A tensor is never split: a larger
            tensor has its own file.
        generation: Contents of generation_config.json. Token ids that it lacks, and all of them if
            it is None, are those of `config`.

    Raises:
        CheckpointError: `directory` is a file or is not empty, the disk is full, the names or
            shapes of the tensors are not those of `config`, or a finite value exceeds the range of
            `dtype`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mistral_kernels import MistralConfig, MistralForCausalLM
        >>> from mistral_kernels.checkpoint import open_checkpoint, save_hf
        >>> config = MistralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        ... )
        >>> state = MistralForCausalLM(config).state_dict()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_hf(state.items(), config, folder, dtype=torch.bfloat16)
        ...     checkpoint = open_checkpoint(folder)
        >>> checkpoint.format, checkpoint.dtype, checkpoint.config == config
        ('hf', torch.bfloat16, True)
    """
    specs = make_specs(expected_shapes(config), dtype)
    total = sum(map(num_bytes, specs.values()))
    files = _shard(specs, max_shard_bytes)
    types = [each for _, each in specs.values()]
    # config.json has one dtype for all tensors: write the dtype of the embedding, usually the
    # largest tensor.
    contents = config.to_hf(str(types[0]).removeprefix("torch."))
    with new_folder(directory, total, extra_files) as folder:
        write_files(folder, files, without_tied_head(tensors, config))
        if len(files) > 1:
            weight_map = {name: file for file, part in files.items() for name in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        tokens = {key: contents[key] for key in ("bos_token_id", "eos_token_id")}
        settings = {**tokens, **(generation or {})}
        if settings == tokens:
            settings = {"_from_model_config": True, **tokens}
        write_json(folder / GENERATION_FILE, settings)
        write_json(folder / CONFIG_FILE, contents)


def _shard(specs: Mapping[str, Spec], limit: int) -> dict[str, dict[str, Spec]]:
    """Split `specs` into files of at most `limit` bytes; a larger tensor has its own file.

    The order of `specs` is kept.
    """
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
