"""Resolve the name of a model to a folder on this machine; download the model if necessary."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mistral_kernels.checkpoint.foreign import find_foreign
from mistral_kernels.checkpoint.hub_download import download
from mistral_kernels.checkpoint.hub_errors import why_failed
from mistral_kernels.utils.files import CheckpointError, expand_user

_TINY = Path(__file__).parent.parent / "tiny"
# Paths of a tokenizer's files. They are downloaded with the weights, and copied to the folder of
# converted or trained weights.
TOKENIZER_PATTERNS = [
    "tokenizer*",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
]
# Formats of a hub model. A format is a pattern, which the name of at least one file must match, and
# the files to download in addition to those of the tokenizer.
_Formats = Sequence[tuple[str, list[str]]]
_INCOMPLETE = "is incomplete in the cache"
_TOKENIZERS: _Formats = ((r".*\.model(\.v\d+(m\d+)?)?|tekken\.json|tokenizer\.json", []),)
# Formats in order of preference: a pattern of the weight files, and the files to download. Many
# repositories hold the same weights in several formats; the first format found is downloaded.
_WEIGHTS: _Formats = (
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


def resolve(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the folder of a checkpoint; download the checkpoint if it is on the Hugging Face hub.

    The keyword arguments are those of transformers. For a local folder they have no effect.

    Args:
        path_or_hub_id: One of three names. They are tried in this order:

            - a folder on this machine
            - `"tiny"`, the bundled model
            - a hub id such as `"mistralai/Mistral-7B-v0.1"`. huggingface_hub downloads the weights
              in one format into its cache. Without a connection the cached files are used.
        revision: Branch, tag or commit of the hub model; None: "main".
        cache_dir: Folder of the cache; None: that of huggingface_hub (`HF_HOME`).
        token: Access token; None or True: that of `HF_TOKEN` or `hf auth login`; False: no token.
        local_files_only: Use only cached files.
        force_download: Download files again that are in the cache.

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
    return _local_folder(path_or_hub_id) or _download(
        str(path_or_hub_id),
        _WEIGHTS,
        revision,
        cache_dir,
        token,
        local_files_only,
        force_download,
    )


def resolve_tokenizer(path_or_hub_id: str | Path, **options: Any) -> Path:
    """Return the folder of a tokenizer; download only the tokenizer if it is on the hub.

    Args:
        path_or_hub_id: See `resolve`.
        **options: Keyword arguments of `resolve`.

    Raises:
        CheckpointError: See `resolve`.
    """
    return _local_folder(path_or_hub_id) or _download(str(path_or_hub_id), _TOKENIZERS, **options)


def _local_folder(path_or_hub_id: str | Path) -> Path | None:
    """Return the local folder of this name; None if the name is a hub id."""
    name = str(path_or_hub_id)
    path = expand_user(name)
    if name and path.is_dir():
        return path
    is_file = path.suffix.lower() == ".gguf" or path.is_file()
    if is_file and (what := find_foreign([path.name])):
        raise CheckpointError(f"{path} holds {what}")
    if name and path.exists():
        raise CheckpointError(
            f"{path} is a file; give the folder that holds the checkpoint, {path.parent}"
        )
    if name and path.is_symlink():
        raise CheckpointError(f"{path} is a broken symbolic link")
    if name == "tiny":
        return _TINY
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(
            f"no such folder: {name!r}; a hub id must have the form 'owner/model', such as "
            "'mistralai/Mistral-7B-v0.3'"
        )
    return None


def _download(
    repo_id: str,
    formats: _Formats,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Download a hub model in the first of `formats` that it has, and return its folder."""
    try:
        from huggingface_hub import model_info, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"no such folder: {repo_id!r}; to download it from the hub: "
            'pip install "mistral_kernels[hf]"'
        ) from None
    fetch = partial(snapshot_download, repo_id, revision=revision, cache_dir=cache_dir, token=token)
    # The errors of huggingface_hub and of its HTTP library have no common base class in all
    # versions. Therefore any exception is caught.
    with _silent_retries():
        if local_files_only:
            folder, state = _find_cached(fetch, formats)
            if folder is None:
                raise CheckpointError(
                    f"hub model {repo_id!r} {state}; leave out local_files_only to download it"
                )
            return folder
        try:
            # Without a connection, list_repo_files would retry for 20 seconds.
            info = model_info(repo_id, revision=revision, token=token)
        except Exception as error:
            folder, state = None, "must be downloaded again"
            if not force_download:
                folder, state = _find_cached(fetch, formats)
            if folder is None:
                raise CheckpointError(why_failed(repo_id, revision, error, state)) from None
            return folder
        patterns = _choose_files(repo_id, formats, [each.rfilename for each in info.siblings or ()])
        try:
            patterns = patterns + TOKENIZER_PATTERNS
            return Path(download(fetch, allow_patterns=patterns, force_download=force_download))
        except Exception as error:
            raise CheckpointError(why_failed(repo_id, revision, error, _INCOMPLETE)) from None


def _find_cached(fetch: Callable[..., str], formats: _Formats) -> tuple[Path | None, str]:
    """Return the folder of a model in the cache, or None, and what the cache holds of the model."""
    state = "is not in the cache"
    for pattern, patterns in formats:
        try:
            # Some versions raise an error unless all files of these patterns are in the cache.
            patterns = patterns + TOKENIZER_PATTERNS
            folder = Path(fetch(allow_patterns=patterns, local_files_only=True))
        except Exception as error:
            if type(error).__name__ == "IncompleteSnapshotError":
                state = _INCOMPLETE
            continue
        if any(re.fullmatch(pattern, file.name) for file in folder.iterdir()):
            return folder, "is in the cache"
        state = _INCOMPLETE
    return None, state


def _choose_files(repo_id: str, formats: _Formats, files: list[str]) -> list[str]:
    """Return the patterns of the files to download."""
    for pattern, patterns in formats:
        if any(re.fullmatch(pattern, file) for file in files):
            return patterns
    if formats is _TOKENIZERS:
        raise CheckpointError(
            f"hub model {repo_id!r} has no tokenizer: expected tekken.json, tokenizer.model or "
            "tokenizer.json; give the id of the model that it was made from"
        )
    if what := find_foreign(files):
        raise CheckpointError(f"hub model {repo_id!r} holds {what}")
    raise CheckpointError(
        f"hub model {repo_id!r} has no weights: expected model*.safetensors, "
        "consolidated*.safetensors, consolidated.00.pth or pytorch_model*.bin"
    )


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
