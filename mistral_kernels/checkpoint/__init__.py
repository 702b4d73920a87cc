"""Read and write checkpoints in both formats: Mistral's own ("raw") and Hugging Face's ("hf")."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mistral_kernels.checkpoint import hf, raw
from mistral_kernels.checkpoint.foreign import find_foreign
from mistral_kernels.checkpoint.hf import save_hf
from mistral_kernels.checkpoint.hub import resolve
from mistral_kernels.checkpoint.raw import save_raw
from mistral_kernels.checkpoint.reading import Checkpoint, Part, whole
from mistral_kernels.utils.files import CheckpointError, expand_user, is_taken

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Part",
    "check_folder",
    "open_checkpoint",
    "resolve",
    "save_hf",
    "save_raw",
    "whole",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder and check the name, shape and dtype of every tensor.

    Only the configuration and the headers of the weight files are read. No weight is read.

    Args:
        path: Folder of the checkpoint. A folder that holds both formats is opened as "hf".

    Returns:
        The checkpoint: its configuration, and the file and offset of every tensor.

    Raises:
        CheckpointError: The folder or one of its files is missing or damaged, or a tensor does not
            match the configuration.
        ConfigError: The configuration is invalid, or the model is not a dense Mistral.

    Example:
        >>> from mistral_kernels.checkpoint import open_checkpoint, resolve
        >>> checkpoint = open_checkpoint(resolve("tiny"))
        >>> checkpoint.format, checkpoint.dtype, checkpoint.num_parameters
        ('hf', torch.bfloat16, 2755008)
        >>> checkpoint.stored["model.norm.weight"].shape
        (192,)
    """
    folder = expand_user(path)
    try:
        return hf.open_hf(folder) if check_folder(folder) == "hf" else raw.open_raw(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def check_folder(folder: Path) -> Literal["raw", "hf"]:
    """Return the format of the checkpoint in a folder, judged by the names of its files.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        "hf" for a folder with `config.json` and weights in Hugging Face's format, else "raw" for a
        folder with `params.json` and weights in Mistral's own format.

    Raises:
        CheckpointError: The path is not a folder, or the folder has no configuration or no weights.

    Example:
        >>> from mistral_kernels.checkpoint import check_folder, resolve
        >>> check_folder(resolve("tiny"))
        'hf'
    """
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{what}: {str(folder)!r}; give the folder of a checkpoint")
    has_hf, has_raw = (is_taken(folder / each.CONFIG_FILE) for each in (hf, raw))
    if has_hf and hf.find_hf_weights(folder):
        return "hf"
    if has_raw and raw.find_raw_weights(folder):
        return "raw"
    raise CheckpointError(_why_no_checkpoint(folder, has_hf, has_raw))


def _why_no_checkpoint(folder: Path, has_hf: bool, has_raw: bool) -> str:
    """Return what a folder lacks, and what to do, for the message of an error."""
    names = sorted(path.name for path in folder.iterdir())
    if what := find_foreign(names):
        return f"{folder} holds {what}"
    if has_hf or has_raw:
        config = hf.CONFIG_FILE if has_hf else raw.CONFIG_FILE
        weights = (
            "model*.safetensors or pytorch_model*.bin"
            if has_hf
            else "consolidated*.safetensors or consolidated.00.pth"
        )
        return f"{folder} has {config} but no weights: expected {weights}; download them"
    nested = [
        path.parent
        for pattern in ("*", "snapshots/*")  # steps of a training; the cache of huggingface_hub
        for config in (hf.CONFIG_FILE, raw.CONFIG_FILE)
        for path in folder.glob(f"{pattern}/{config}")
    ]
    if nested:
        last = max(nested, key=lambda path: (len(path.name), path))  # checkpoint-1000 of a training
        return f"{folder} holds checkpoints in subfolders; give one of them, such as {last}"
    return (
        f"{folder} {'has no configuration' if names else 'is empty'}: a checkpoint has config.json "
        "and model*.safetensors (Hugging Face), or params.json and consolidated*.safetensors "
        "(Mistral)"
    )
