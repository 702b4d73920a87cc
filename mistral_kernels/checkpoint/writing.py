"""Writing checkpoints: tensor by tensor, into a folder that appears only when it is whole."""

from __future__ import annotations

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
from mistral_kernels.utils.files import CheckpointError, check_regular, expand_user, is_taken
from mistral_kernels.utils.signals import unwinding_when_terminated

# Shape and type of a tensor to be written.
Spec = tuple[tuple[int, ...], torch.dtype]

_log = logging.getLogger("mistral_kernels")

# Folders that are being written; see `new_folder`.
_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{16}", re.DOTALL)

_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


class SafetensorsWriter:
    """Write one safetensors file tensor by tensor, in any order.

    safetensors' own `save_file` needs all tensors at once. Since every shape and type is known
    beforehand, the header can go first, and each tensor to its place when it comes. The format:
    the header's length (8 bytes, little-endian), the header (JSON), the tensors without gaps. Those
    of whole pages are put first, in the order of `specs`, so that each begins with one and those
    that a model fuses stay side by side.
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
        encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)  # where the data begins
        self.path = path
        self._specs = specs
        self._places = {name: 8 + len(encoded) + header[name]["data_offsets"][0] for name in specs}
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, cast to its announced type, to its place."""
        shape, dtype = self._specs[name]
        if name not in self._places:
            raise CheckpointError(f"tensor {name!r} was given twice")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the configuration asks for "
                f"{shape}"
            )
        tensor = tensor.detach().cpu()
        data = tensor.to(dtype).contiguous()
        check_cast(name, tensor, data)
        self._file.seek(self._places.pop(name))
        self._file.write(data.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Check that no tensor is missing, and put the file safely on the disk."""
        if self._places:
            raise CheckpointError(f"tensor {next(iter(self._places))!r} was not given")
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
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def make_specs(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | Mapping[str, torch.dtype]
) -> dict[str, Spec]:
    """Pair each shape with its type: one for all, or each tensor's own."""
    one = dtype if isinstance(dtype, torch.dtype) else None
    specs = {name: (shape, one or dtype[name]) for name, shape in shapes.items()}  # type: ignore[index]
    for name, (_, each) in specs.items():
        if each not in _TYPE_NAMES:
            raise CheckpointError(
                f"dtype of {name!r} must be bfloat16, float16, float32 or float64, got {each}"
            )
    return specs


def write_files(
    folder: Path, files: Mapping[str, Mapping[str, Spec]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the safetensors `files` (name to contents) from a stream of all their tensors."""
    with ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        opened = []
        for file, specs in files.items():
            opened.append(stack.enter_context(SafetensorsWriter(folder / file, specs)))
            writers |= dict.fromkeys(specs, opened[-1])
        for name, tensor in tensors:
            if name not in writers:
                raise CheckpointError(f"tensor {name!r} is not one of this configuration")
            writers[name].write(name, tensor)
            del tensor  # a mapped one keeps its pages until it is dropped
        for writer in opened:
            writer.finish()


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(contents, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(
    target: str | Path, needed_bytes: int, extra_files: Iterable[Path] = ()
) -> Iterator[Path]:
    """Create a temporary folder and rename it to `target` if the block succeeds.

    The folder, beside `target`, begins with copies of `extra_files`. On any error, an interrupt or
    SIGTERM included, it is removed and `target` is as it was before. What a killed process has left
    is removed by the next `new_folder` in the same parent, with a line in the log. A target that
    holds something, and a disk without `needed_bytes`, are refused before anything is written.
    """
    target = Path(os.path.realpath(expand_user(target)))  # resolve() raises at a loop of links
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
                    _copy(extra, partial / extra.name)
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


def _make_partial(target: Path) -> tuple[Path, int]:
    """Make a folder beside `target`; return it and a descriptor that locks it while it is open."""
    while True:
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(8)}")
        partial.mkdir()
        # Before it is locked, another process may take it for abandoned and remove it.
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
            is_ours = True  # on a file system without locks nothing is ever taken for abandoned
        if is_ours:
            return partial, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders that `new_folder` made in `parent` for processes that are dead."""
    try:
        entries = list(parent.iterdir())
    except OSError:  # a folder that may be written to, but not listed
        return
    for partial in entries:
        if not _PARTIAL.fullmatch(partial.name) or partial.is_symlink():
            continue
        with suppress(OSError), ExitStack() as stack:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its maker lives
            shutil.rmtree(partial)
            _log.warning("removed %s, which an interrupted run had left", partial)


def _copy(source: Path, target: Path) -> None:
    check_regular(source)
    with source.open("rb") as contents, target.open("wb") as file:
        shutil.copyfileobj(contents, file)
        file.flush()
        os.fsync(file.fileno())


def check_target(target: Path) -> None:
    """Raise unless `target` is free to be written: absent, or an empty folder."""
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; name a new folder")
        if target.is_mount():
            raise CheckpointError(f"{target} is a mount point; name a new folder inside it")
    elif is_taken(target):
        what = "file" if target.exists() else "symbolic link that leads nowhere"
        raise CheckpointError(f"{target} is a {what}; name a new folder")


def sync_folder(path: Path) -> None:
    """Make what was renamed in a folder outlast a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
