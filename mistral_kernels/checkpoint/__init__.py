"""Checkpoints in both formats, Mistral's own ("raw") and Hugging Face's ("hf")."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mistral_kernels.checkpoint import hf, raw
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
    """Open the checkpoint in a folder, in whichever format it is; in both, as HF.

    The configuration is read, and the name, shape and type of every tensor is checked against it,
    by the files' headers: no weight is read yet. Raises `CheckpointError` for a folder or file that
    is missing, damaged or does not fit, and `ConfigError` for a model that is not a dense Mistral.
    """
    folder = expand_user(path)
    try:
        return hf.open_hf(folder) if check_folder(folder) == "hf" else raw.open_raw(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def check_folder(folder: Path) -> Literal["raw", "hf"]:
    """Return the format of the checkpoint in a folder, by the names of its files.

    Raises `CheckpointError` for what is no folder, or has no configuration or no weights.
    """
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{what}: {str(folder)!r}")
    has_hf, has_raw = (is_taken(folder / each.CONFIG_FILE) for each in (hf, raw))
    if has_hf and hf.find_hf_weights(folder):
        return "hf"
    if has_raw and raw.find_raw_weights(folder):
        return "raw"
    hint = "; GGUF is not supported" if any(folder.glob("*.gguf")) else ""
    if not (has_hf or has_raw):
        raise CheckpointError(
            f"{folder} has no configuration: expected config.json (Hugging Face) or params.json "
            f"(Mistral){hint}"
        )
    config = hf.CONFIG_FILE if has_hf else raw.CONFIG_FILE
    weights = "model*.safetensors" if has_hf else "consolidated*.safetensors or consolidated.00.pth"
    raise CheckpointError(f"{folder} has {config} but no weights: expected {weights}{hint}")
