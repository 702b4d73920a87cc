"""Resolve a model's name to a folder on this machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_kernels.utils.files import CheckpointError, expand_user

_TINY = Path(__file__).parent.parent / "tiny"
# Files of a tokenizer: to download, and to copy beside converted or trained weights.
TOKENIZER_PATTERNS = [
    "tokenizer*",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
]
# In order of preference: the weights that decide, and what is downloaded with them. Repositories
# often hold the same weights in several formats; only one is taken.
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
    """Return the folder of a checkpoint: a folder here, `"tiny"` (the bundled model), or a hub id.

    A hub id (`"mistralai/Mistral-7B-v0.1"`) is downloaded in one format only, by huggingface_hub
    and into its cache; without a connection, what the cache holds is used. Raises
    `CheckpointError` if there is no such thing.
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
        raise CheckpointError(f"{path} is a symbolic link that leads nowhere")
    if name == "tiny":
        return _TINY
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(
            f"no such folder: {name!r} (nor is it a hub id, which has the form 'owner/model')"
        )
    return _download(name)


def _download(repo_id: str) -> Path:
    try:
        from huggingface_hub import list_repo_files, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"no such folder: {repo_id!r}; to download it from the hub: "
            "pip install 'mistral_kernels[hf]'"
        ) from None
    # huggingface_hub's errors, and those of the HTTP library below it, have no common base that is
    # the same in all versions.
    try:
        with _silent_retries():
            files = list_repo_files(repo_id)
    except Exception as error:
        try:
            with _silent_retries():
                return Path(snapshot_download(repo_id, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"no such folder: {repo_id!r}, and the hub has no answer: {_one_line(error)}"
            ) from None
    known = (
        patterns
        for weights, patterns in _FORMATS
        if any(re.fullmatch(weights, file) for file in files)
    )
    if (patterns := next(known, None)) is None:
        raise CheckpointError(f"hub model {repo_id!r} has no weights in a format known here")
    try:
        with _silent_retries():
            return Path(snapshot_download(repo_id, allow_patterns=patterns + TOKENIZER_PATTERNS))
    except Exception as error:
        raise CheckpointError(f"download of {repo_id!r} failed: {_one_line(error)}") from None


@contextmanager
def _silent_retries() -> Iterator[None]:
    """Hide the warnings of huggingface_hub: it logs each attempt to reach a hub that is away."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
