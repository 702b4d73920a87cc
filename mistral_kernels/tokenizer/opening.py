"""Find the tokenizer in a folder and open it with the library for its format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mistral_kernels.checkpoint.hub import resolve_tokenizer
from mistral_kernels.checkpoint.stored import check_content
from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles, read_tokenizer_files
from mistral_kernels.tokenizer.base import MistralTokenizer
from mistral_kernels.tokenizer.errors import TokenizerError
from mistral_kernels.tokenizer.huggingface import HuggingFace
from mistral_kernels.tokenizer.sentencepiece import FILE_NAME, SentencePiece
from mistral_kernels.tokenizer.tekken import Tekken
from mistral_kernels.tokenizer.vendor import Vendor
from mistral_kernels.utils.files import read_bytes, read_json

_FILE_NAMES = "tekken.json, tokenizer.model, tokenizer.model.v* or tokenizer.json"
# Schemas of the values that this package reads. The libraries check the rest.
_TEKKEN = {"config": {"default_num_special_tokens": int}}
_TOKENIZER_JSON = {"added_tokens": ([{"id": int, "content": str}], None)}


def open_tokenizer(
    name: str | Path, *, prefer_json: bool = False, **hub_options: Any
) -> MistralTokenizer:
    """Open the tokenizer of a file, a folder, `"tiny"` or a hub id.

    Args:
        name: The path or the name.
        prefer_json: Whether to open a tokenizer.json if a folder also holds other tokenizers.
        **hub_options: Keyword arguments of `checkpoint.resolve`, for a hub id.

    Raises:
        TokenizerError: There is no tokenizer, or it is invalid.
        CheckpointError: The name cannot be resolved, or a file is invalid.
        OSError: A file cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if not path.exists():
        path = resolve_tokenizer(name, **hub_options)
    if path.is_dir():
        return _open_folder(path, prefer_json)
    if path.suffix == ".json" and "tekken" not in path.name:
        return _open_huggingface(path, read_tokenizer_files(path.parent))
    return _open_vendor(path, read_tokenizer_files(path.parent))


def _open_folder(folder: Path, prefer_json: bool) -> MistralTokenizer:
    """Open the tokenizer in a folder; see `MistralTokenizer.from_pretrained` for the order."""

    def version(path: Path) -> tuple[int, str]:
        match = FILE_NAME.search(path.name)
        return int(match["version"] or 0) if match else -1, path.name

    # A FIFO or device of such a name is not skipped: reading it raises an error.
    models = [p for p in folder.iterdir() if FILE_NAME.search(p.name) and not p.is_dir()]
    vendor, fast = folder / "tekken.json", folder / "tokenizer.json"
    if not os.path.lexists(vendor) and models:
        vendor = max(models, key=version)
    files = read_tokenizer_files(folder)
    if prefer_json and os.path.lexists(fast):
        return _open_huggingface(fast, files)
    if not os.path.lexists(vendor):
        if not os.path.lexists(fast):
            raise TokenizerError(
                f"{folder}: no tokenizer found; looked for {_FILE_NAMES}; copy the file of "
                "the original model into the folder"
            )
        return _open_huggingface(fast, files)
    tokenizer = _open_vendor(vendor, files)
    if not os.path.lexists(fast):
        if max(files.added, default=-1) >= tokenizer.vocab_size:
            raise TokenizerError(
                f"{folder}: tokens cannot be added to tekken.json; a tokenizer.json is required"
            )
        return tokenizer
    added = read_json(fast, _TOKENIZER_JSON).get("added_tokens") or []
    ids = {*files.added, *(token.get("id", -1) for token in added)}
    if max(ids, default=-1) >= tokenizer._vendor_size or not files.has_vendor_template:
        return _open_huggingface(fast, files)
    return tokenizer


def _open_vendor(path: Path, files: TokenizerFiles) -> Vendor:
    if path.suffix == ".json":
        check_content(path)
        return Tekken(path, read_json(path, _TEKKEN), files)
    if not FILE_NAME.search(path.name):
        raise TokenizerError(
            f"{path}: not a tokenizer's file name; expected {_FILE_NAMES}, or their folder"
        )
    check_content(path)
    return SentencePiece(path, read_bytes(path), files)


def _open_huggingface(path: Path, files: TokenizerFiles) -> HuggingFace:
    check_content(path)
    return HuggingFace(path, read_json(path, _TOKENIZER_JSON), files)
