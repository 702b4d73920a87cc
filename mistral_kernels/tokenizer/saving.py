"""Write the files of a tokenizer to a folder, which may hold a model already."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.checkpoint.tokenizer_files import (
    TEMPLATES,
    find_tokenizer_files,
    path_in_folder,
)
from mistral_kernels.tokenizer.errors import TokenizerError, one_line
from mistral_kernels.utils.files import CheckpointError, create_anew, read_bytes, read_json
from mistral_kernels.utils.signals import unwinding_when_terminated
from mistral_kernels.utils.unsupported import ANY_FLAG, Unsupported, check_unsupported

if TYPE_CHECKING:
    from mistral_kernels.tokenizer.base import MistralTokenizer

_CONFIG, _NAMES = "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_UNSUPPORTED = {
    "legacy_format": Unsupported((None, False), "leave it out: the files keep their format"),
    "filename_prefix": Unsupported(remedy="rename the files"),
    "push_to_hub": Unsupported((None, False), "upload the folder with huggingface_hub"),
    "save_jinja_files": Unsupported((None, True), "leave it out"),
    "safe_serialization": ANY_FLAG,  # an option of saving models
}


def save_tokenizer(
    tokenizer: MistralTokenizer, folder: Path, options: Mapping[str, Any]
) -> tuple[str, ...]:
    """Write the files of a tokenizer; see `MistralTokenizer.save_pretrained`."""
    check_unsupported("save_pretrained", options, _UNSUPPORTED)
    folder = Path(os.path.expanduser(folder))
    try:
        contents = _contents(tokenizer)
        others = [*find_tokenizer_files(folder), *folder.glob("*.model*")]
        rest = set(map(path_in_folder, others)) - contents.keys()
        if rest:
            raise TokenizerError(
                f"{folder} must not hold files of another tokenizer, got {min(rest)}; name another "
                "folder"
            )
        _write(folder, contents)
    except (CheckpointError, OSError) as error:
        raise TokenizerError(f"{folder}: nothing was saved: {one_line(error)}") from error
    return tuple(str(folder / name) for name in contents)


def _contents(tokenizer: MistralTokenizer) -> dict[str, bytes]:
    """Return the contents of the files to write, by path in the folder."""
    source, changes = tokenizer.path.parent, tokenizer._changes
    paths = {tokenizer._file_name: tokenizer.path}
    is_file = Path(os.path.expanduser(tokenizer.name_or_path)).is_file()
    for path in find_tokenizer_files(source):
        # A tokenizer that was opened by the name of its file is saved without other tokenizers of
        # the folder.
        shared = path.name in (_CONFIG, _NAMES, "added_tokens.json") or path.suffix == ".jinja"
        if shared or not is_file:
            paths.setdefault(path_in_folder(path), path)
    contents = {name: read_bytes(path) for name, path in paths.items()}
    if not changes:
        return contents
    config = read_json(source / _CONFIG) if _CONFIG in paths else {}
    config |= {key: value for key, value in changes.items() if key != "chat_template"}
    if "chat_template" in changes:
        config.pop("chat_template", None)
        for name in [name for name in contents if name.endswith(".jinja")]:
            del contents[name]
        for name, text in tokenizer._templates.items():
            path_name = _TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja"
            contents[path_name] = text.encode()
    contents[_CONFIG] = _json(config)
    if _NAMES in paths:  # it may override tokenizer_config.json
        flags = ("add_bos_token", "add_eos_token")
        named = {k: v for k, v in changes.items() if k.endswith("_token") and k not in flags}
        contents[_NAMES] = _json(read_json(source / _NAMES) | named)
    contents |= tokenizer._changed_vocabulary()
    return contents


def _json(contents: Mapping[str, Any]) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder; after an error, the folder is as before.

    All files are first written to a temporary folder inside `folder`, then renamed one by one.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for name in contents:
        if (folder / name).is_dir():
            raise CheckpointError(f"{folder / name} must be a file, got a folder")
    with unwinding_when_terminated():
        stage = Path(tempfile.mkdtemp(prefix=".tokenizer.partial-", dir=folder))
        replaced: list[str] = []
        try:
            for name, data in contents.items():
                (stage / "new" / name).parent.mkdir(parents=True, exist_ok=True)
                (stage / "old" / name).parent.mkdir(parents=True, exist_ok=True)
                with create_anew(stage / "new" / name) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for name in contents:
                (folder / name).parent.mkdir(exist_ok=True)
                replaced.append(name)
                with suppress(FileNotFoundError):
                    os.replace(folder / name, stage / "old" / name)
                os.replace(stage / "new" / name, folder / name)
        except BaseException:
            for name in replaced:
                if os.path.lexists(stage / "old" / name):
                    os.replace(stage / "old" / name, folder / name)
                elif not os.path.lexists(stage / "new" / name):
                    os.unlink(folder / name)
            shutil.rmtree(stage, ignore_errors=True)
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(stage, ignore_errors=True)
