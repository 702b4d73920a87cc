"""Write checkpoints tensor by tensor, into a folder that appears only when it is complete."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.checkpoint.stored import ALIGNMENT, FLOAT_TYPES, check_cast
from mistral_kernels.checkpoint.tokenizer_files import path_in_folder
from mistral_kernels.utils.files import CheckpointError, check_regular, expand_user, is_taken
from mistral_kernels.utils.signals import unwinding_when_terminated

# Shape and dtype of a tensor to be written.
Spec = tuple[tuple[int, ...], torch.dtype]

_log = logging.getLogger("mistral_kernels")

# Names of folders that are being written; see `new_folder`.
_PARTIAL_NAME = re.compile(r"\..+\.partial-[0-9a-f]{16}", re.DOTALL)

_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


class SafetensorsWriter:
    """Write one safetensors file tensor by tensor, in any order.

    `save_file` of the safetensors library needs all tensors at once. Here the shapes and dtypes are
    given in advance. The header is written first; then `write` writes each tensor at its offset.

    The file contains the length of the header (8 bytes, little-endian), the header (JSON) and the
    tensors without gaps. Tensors whose size is a multiple of the page size come first, in the order
    of `specs`. Each of them is therefore page-aligned, and tensors that the model fuses are
    adjacent.

    Args:
        path: File to write.
        specs: Shape and dtype of each tensor by name.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(specs, key=lambda name: num_bytes(specs[name]) % ALIGNMENT > 0):
            shape, dtype = specs[name]
            start, end = end, end + num_bytes(specs[name])
            header[name] = {
                "dtype": _TYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # align the first tensor
        self.path = path
        self._specs = specs
        # File offsets of the tensors that are not yet written.
        self._offsets = {name: 8 + len(encoded) + header[name]["data_offsets"][0] for name in specs}
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Cast a tensor to the dtype of its spec and write it at its offset.

        Raises:
            CheckpointError: The tensor was written before, its shape is not that of its spec, or
                the cast makes a finite value infinite.
        """
        shape, dtype = self._specs[name]
        if name not in self._offsets:
            raise CheckpointError(f"tensor {name!r} was given twice")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {name!r} must have shape {shape}, got {tuple(tensor.shape)}"
            )
        tensor = tensor.detach().cpu()
        data = tensor.to(dtype).contiguous()
        check_cast(name, tensor, data)
        self._file.seek(self._offsets.pop(name))
        self._file.write(data.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Check that no tensor is missing, and flush the file to the disk."""
        if self._offsets:
            raise CheckpointError(f"tensor {next(iter(self._offsets))!r} was not given")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def num_bytes(spec: Spec) -> int:
    """Return the size of a tensor in bytes."""
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def make_specs(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | Mapping[str, torch.dtype]
) -> dict[str, Spec]:
    """Return the shape and dtype of each tensor; `dtype` is one dtype, or a mapping by name."""
    common = dtype if isinstance(dtype, torch.dtype) else None
    specs = {name: (shape, common or dtype[name]) for name, shape in shapes.items()}  # type: ignore[index]
    for name, (_, each) in specs.items():
        if each not in _TYPE_NAMES:
            raise CheckpointError(
                f"dtype of {name!r} must be bfloat16, float16, float32 or float64, got {each}"
            )
    return specs


def write_files(
    folder: Path, files: Mapping[str, Mapping[str, Spec]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write safetensors files from an iterable of all their tensors, in any order.

    Args:
        folder: Folder of the files.
        files: Specs of the tensors of each file, by the name of the file.
        tensors: Pairs of a name and a tensor.

    Raises:
        CheckpointError: A tensor is unexpected, missing, duplicated or of a wrong shape, or does
            not fit into its dtype.
    """
    with ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        opened = []
        for file, specs in files.items():
            opened.append(stack.enter_context(SafetensorsWriter(folder / file, specs)))
            writers |= dict.fromkeys(specs, opened[-1])
        for name, tensor in tensors:
            if name not in writers:
                raise CheckpointError(f"tensor {name!r} is not part of this configuration")
            writers[name].write(name, tensor)
            del tensor  # a mapped tensor keeps its pages in memory until it is released
        for writer in opened:
            writer.finish()


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a JSON file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(contents, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(
    target: str | Path, needed_bytes: int, extra_files: Iterable[Path] = ()
) -> Iterator[Path]:
    """Create a temporary folder beside `target`; rename it to `target` if the block succeeds.

    On an exception, including an interrupt or SIGTERM, the temporary folder is removed and `target`
    is unchanged. A process that is killed leaves its temporary folder behind. The next `new_folder`
    in the same parent folder removes it and logs a warning.

    Args:
        target: Folder to create. It must not exist, or must be empty.
        needed_bytes: Free disk space to require before anything is written.
        extra_files: Files to copy into the folder; those of `TEMPLATES` into that subfolder.

    Yields:
        The temporary folder.

    Raises:
        CheckpointError: `target` is not free, the disk has too little space, or writing failed.
    """
    target = Path(os.path.realpath(expand_user(target)))  # resolve() raises for a loop of links
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise CheckpointError(
                f"not enough space for {target}: {needed_bytes / 1e9:.2f} GB are needed, "
                f"{free / 1e9:.2f} GB are free"
            )
        with unwinding_when_terminated():
            partial, lock = _make_partial(target)
            try:
                for extra in extra_files:
                    copy = partial / path_in_folder(extra)
                    copy.parent.mkdir(exist_ok=True)
                    _copy(extra, copy)
                yield partial
                sync_folder(partial)
                check_target(target)
                partial.replace(target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}, nothing was kept: {error}") from error


def _new_partial(target: Path) -> Path:
    return target.parent / f".{target.name}.partial-{secrets.token_hex(8)}"


def _make_partial(target: Path) -> tuple[Path, int]:
    """Create a folder beside `target`. Return the folder and a descriptor.

    The folder is locked while the descriptor is open.
    """
    while True:
        partial = _new_partial(target)
        partial.mkdir()
        # Until the folder is locked, another process may remove it as abandoned. In that case, try
        # again.
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = partial.exists()
        except BlockingIOError:
            is_ours = False
        except OSError:
            is_ours = True  # without locks in the file system, no process removes the folder
        if is_ours:
            return partial, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders in `parent` that a killed process has left."""
    try:
        entries = list(parent.iterdir())
    except OSError:  # listing the folder may be forbidden where writing is allowed
        return
    for partial in entries:
        if not _PARTIAL_NAME.fullmatch(partial.name) or partial.is_symlink():
            continue
        with suppress(OSError), ExitStack() as stack:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its creator is running
            shutil.rmtree(partial)
            _log.warning("removed %s, which an interrupted run had left", partial)


def _copy(source: Path, target: Path) -> None:
    """Copy a regular file and flush the copy to the disk."""
    check_regular(source)
    with source.open("rb") as contents, target.open("wb") as file:
        shutil.copyfileobj(contents, file)
        file.flush()
        os.fsync(file.fileno())


def check_target(target: Path) -> None:
    """Raise CheckpointError unless `target` can be created or is an empty folder."""
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; name a new folder")
        if target.is_mount():
            raise CheckpointError(f"{target} is a mount point; name a new folder inside it")
    elif is_taken(target):
        what = "file" if target.exists() else "broken symbolic link"
        raise CheckpointError(f"{target} is a {what}; name a new folder")
    try:
        os.lstat(_new_partial(target))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # now, not after hours of training
            reason = f"the name of {target} is too long; name another folder"
            raise CheckpointError(reason) from None


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk: a rename in it then survives a power failure."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
