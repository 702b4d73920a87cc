"""Resolve the name of a model to a folder on this machine; download the model if necessary."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_kernels.utils.files import CheckpointError, expand_user

_TINY = Path(__file__).parent.parent / "tiny"
# Files of a tokenizer. They are downloaded with the weights, and copied to the folder of converted
# or trained weights.
TOKENIZER_PATTERNS = [
    "tokenizer*",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
]
# Formats in order of preference: a pattern of the weight files, and the files to download. Many
# repositories hold the same weights in several formats; the first format found is downloaded.
_FORMATS = (
    (
        r"model(-\d+-of-\d+)?\.safetensors",
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model-*-of-*.safetensors",
            "model.safetensors.index.json",
        ],
    ),
    (r"consolidated(-\d+-of-\d+)?\.safetensors", ["params.json", "consolidated*.safetensors*"]),
    (r"consolidated\.\d\d\.pth", ["params.json", "consolidated.*.pth"]),
    (
        r"pytorch_model(-\d+-of-\d+)?\.bin",
        ["config.json", "generation_config.json", "pytorch_model*.bin*"],
    ),
)


def resolve(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a checkpoint; download the checkpoint if it is on the Hugging Face hub.

    Args:
        path_or_hub_id: One of three names. They are tried in this order:

            - a folder on this machine
            - `"tiny"`, the bundled model
            - a hub id such as `"mistralai/Mistral-7B-v0.1"`. huggingface_hub downloads the weights
              in one format into its cache. Without a connection the cached files are used.

    Returns:
        The folder.

    Raises:
        CheckpointError: There is no such folder and no such hub model, the name is that of a file,
            or the download failed.

    Example:
        >>> from mistral_kernels.checkpoint import resolve
        >>> folder = resolve("tiny")
        >>> folder.name, (folder / "config.json").exists()
        ('tiny', True)
    """
    name = str(path_or_hub_id)
    path = expand_user(name)
    if name and path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{path}: GGUF is not supported; give a folder with config.json and model.safetensors "
            "(Hugging Face), or params.json and consolidated.safetensors (Mistral)"
        )
    if name and path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds the checkpoint")
    if name and path.is_symlink():
        raise CheckpointError(f"{path} is a broken symbolic link")
    if name == "tiny":
        return _TINY
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(
            f"no such folder: {name!r}; a hub id must have the form 'owner/model'"
        )
    return _download(name)


def _download(repo_id: str) -> Path:
    """Download a hub model in the first of `_FORMATS` that it has, and return its folder."""
    try:
        from huggingface_hub import list_repo_files, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"no such folder: {repo_id!r}; to download it from the hub: "
            "pip install 'mistral_kernels[hf]'"
        ) from None
    # The errors of huggingface_hub and of its HTTP library have no common base class in all
    # versions. Therefore any exception is caught.
    try:
        with _silent_retries():
            files = list_repo_files(repo_id)
    except Exception as error:
        try:
            with _silent_retries():
                return Path(snapshot_download(repo_id, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"no such folder: {repo_id!r}, and the request to the hub failed: "
                f"{_one_line(error)}"
            ) from None
    supported = (
        patterns
        for weights, patterns in _FORMATS
        if any(re.fullmatch(weights, file) for file in files)
    )
    if (patterns := next(supported, None)) is None:
        raise CheckpointError(f"hub model {repo_id!r} has no weights in a supported format")
    try:
        with _silent_retries():
            return Path(snapshot_download(repo_id, allow_patterns=patterns + TOKENIZER_PATTERNS))
    except Exception as error:
        raise CheckpointError(f"download of {repo_id!r} failed: {_one_line(error)}") from None


@contextmanager
def _silent_retries() -> Iterator[None]:
    """Hide the warnings of huggingface_hub, which logs each attempt to reach the hub."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """Return the type and message of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
