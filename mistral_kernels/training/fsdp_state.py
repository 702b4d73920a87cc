"""A sharded run's state in a folder, to which each rank writes its share.

    OUTPUT.partial/step-400/__0_0.distcp, ...   torch.distributed.checkpoint's files, one a rank
                            .metadata           which part of which tensor lies where
                            run.pt              the rest of the state, and the files' checksums

`run.pt` comes last: a folder without it is what a save that was cut short has left behind. Only
then the folder before is removed. Any number of ranks reads it again.
"""

from __future__ import annotations

import pickle
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.checkpoint.writing import sync_folder
from mistral_kernels.distributed.process_group import World
from mistral_kernels.training.state import (
    Check,
    Saving,
    check_identity,
    check_like,
    naming_damage,
    not_whole,
    read_state,
)
from mistral_kernels.utils.files import check_regular

T = TypeVar("T")
_Sums = dict[str, tuple[int, int]]  # by file: its size and CRC-32

_REST, _METADATA, _STEP = "run.pt", ".metadata", "step-"
_BLOCK = 1 << 24


@dataclass(frozen=True)
class ShardedSaving(Saving):
    """`Saving`, into the folder `path`, for all ranks together: what fails on one, fails on all."""

    world: World

    def save(self, state: dict[str, Any]) -> None:
        """Write a folder for this step, then remove the one before: one of them is always whole."""
        rest = {name: value for name, value in state.items() if name != "tensors"}
        folder = self.path / f"{_STEP}{state['step']}"
        self.world.from_main(lambda: self._begin(folder))
        try:
            dcp.save(state["tensors"], storage_writer=dcp.FileSystemWriter(folder))
        except CheckpointException as error:
            raise self._cannot_save(_reason(error)) from None
        own = [f"__{self.world.rank}_*", *([_METADATA] if self.world.is_main else [])]
        files = [path for pattern in own for path in folder.glob(pattern)]
        sums: _Sums = {}
        for of_rank in self._on_all(lambda: {path.name: _sum(path) for path in files}):
            sums |= of_rank
        self.world.from_main(lambda: self._commit(folder, {**rest, "files": sums}))

    def load(self, state: Mapping[str, Any], check: Check) -> dict[str, Any] | None:
        """Return the newest whole state, None if there is none; no code in it is ever run.

        Its tensors are copied to those of `state`. Raises as `Saving.load` does.
        """
        found = self.world.from_main(lambda: self._find(state.keys() - {"tensors"}, check))
        if found is None:
            return None
        folder, saved = found
        files = sorted(saved["files"].items())
        reader = _Reader(folder)

        def check_own() -> None:
            _check_sums(folder, dict(files[self.world.rank :: self.world.size]))
            reader.open(state["tensors"])

        self._on_all(check_own)
        try:
            dcp.load(state["tensors"], storage_reader=reader)
        except CheckpointException as error:
            raise not_whole(folder, _reason(error)) from None
        self._on_all(lambda: _check_finite(folder, state["tensors"]))
        return {**saved, "tensors": state["tensors"]}

    def exists(self) -> bool:
        return bool(self._whole())

    def discard(self) -> None:
        """Remove what was saved, and nothing else."""
        self.world.from_main(self._remove_all)

    def _begin(self, folder: Path) -> None:
        try:
            for left in set(self._steps()) - set(self._whole()):
                shutil.rmtree(left)
            folder.mkdir(parents=True)
        except OSError as error:
            raise self._cannot_save(error) from error

    def _commit(self, folder: Path, rest: dict[str, Any]) -> None:
        """The main rank's: `rest` makes the folder whole."""
        for name, (size, _) in rest["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != size:
                raise self._cannot_save(
                    f"rank 0 does not see {path}, which another rank wrote; name an output on a "
                    "file system that all ranks share"
                )
        Saving(folder / _REST, self.every, self.identity).save(rest)
        sync_folder(self.path)
        for older in self._steps():
            if older != folder:
                shutil.rmtree(older)

    def _find(self, parts: Iterable[str], check: Check) -> tuple[Path, dict[str, Any]] | None:
        """The main rank's: the newest whole folder, and what is no tensor of it."""
        if self.path.is_file():
            raise CheckpointError(
                f"{self.path} is the state of a run without torchrun; go on without it, remove "
                "the file, or name another output"
            )
        whole = self._whole()
        if not whole:
            if self.path.exists() and set(self.path.iterdir()) - set(self._steps()):
                raise CheckpointError(f"{self.path} holds something else; name another output")
            return None
        folder = whole[-1]
        saved = read_state(folder / _REST, ("identity", "files", *parts))
        check_identity(folder, saved["identity"], self.identity)
        with naming_damage(folder / _REST):
            check(saved)
            _check_files(saved["files"])
        return folder, saved

    def _remove_all(self) -> None:
        for folder in self._steps():
            shutil.rmtree(folder)
        if self.path.exists() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _steps(self) -> list[Path]:
        """The folders of steps, the newest last."""
        numbers = ((path.name.removeprefix(_STEP), path) for path in self.path.glob(f"{_STEP}*"))
        steps = ((int(n), path) for n, path in numbers if re.fullmatch("[0-9]{1,10}", n))
        return [path for _, path in sorted(steps)]

    def _whole(self) -> list[Path]:
        return [folder for folder in self._steps() if (folder / _REST).exists()]

    def _cannot_save(self, reason: Any) -> CheckpointError:
        return CheckpointError(f"cannot save to {self.path}: {reason}")

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """The result of each rank's `action`, or on all ranks the error of the first that fails."""
        mine: tuple[Any, str | None]
        try:
            mine = action(), None
        except ValueError as error:
            mine = None, str(error)
        except OSError as error:
            mine = None, f"{error}" if error.filename else f"{self.path}: {error}"
        results: list[tuple[Any, str | None]] = [mine] * self.world.size
        dist.all_gather_object(results, mine)
        for _, failure in results:
            if failure is not None:
                raise CheckpointError(failure)
        return [result for result, _ in results]


def _reason(error: CheckpointException) -> str:
    """Why the first rank that failed did; an interrupt goes on as one."""
    first, _ = error.failures[min(error.failures)]
    if isinstance(first, (KeyboardInterrupt, SystemExit)):
        raise first from None
    return str(first).partition("\n")[0]


def _sum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    check_regular(path)
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _check_files(files: Any) -> None:
    """Raise ValueError unless `files` gives names of files and their sums."""
    if type(files) is not dict or _METADATA not in files:
        raise ValueError("files must be a dict that has .metadata")
    for name, sums in files.items():
        check_like("a name in files", name, "")
        if Path(name).name != name:
            raise ValueError(f"files has {name!r}, which is not in this folder")
        check_like(f"files[{name!r}]", sums, (0, 0))


def _check_finite(folder: Path, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not tensor.to_local().isfinite().all():
            raise not_whole(folder, f"{name} is not finite")


def _check_sums(folder: Path, sums: _Sums) -> None:
    for name, expected in sums.items():
        if not (folder / name).exists():
            raise not_whole(folder, f"{name} is missing")
        if _sum(folder / name) != tuple(expected):
            raise not_whole(folder, f"{name} is damaged")


class _Reader(dcp.FileSystemReader):
    """Reads the metadata, a pickle, without running what may be in it."""

    def open(self, tensors: Mapping[str, Any]) -> None:
        """Read the metadata; it must describe `tensors`.

        Raises `CheckpointError` for metadata of other tensors, or that holds anything else.
        """
        folder = Path(self.path)
        check_regular(folder / _METADATA)  # its checksum may be another rank's to check
        with naming_damage(folder), open(folder / _METADATA, "rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except MemoryError:  # what a damaged length asks for
                raise ValueError(f"{_METADATA} is damaged") from None
            if type(metadata) is not Metadata or type(metadata.state_dict_metadata) is not dict:
                raise ValueError(f"{_METADATA} does not describe tensors")
            for name, tensor in tensors.items():
                stored: Any = metadata.state_dict_metadata.get(name)
                if type(stored) is not TensorStorageMetadata:
                    raise ValueError(f"{_METADATA} lacks {name}")
                if (stored.size, stored.properties.dtype) != (tensor.size(), tensor.dtype):
                    raise ValueError(f"{name} has another shape or dtype")
            self._metadata: Metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the types of a checkpoint of tensors alone: other objects would be unpickled freely."""

    _KNOWN = {
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
        "torch": {"Size", "bfloat16", "float32"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._KNOWN.get(module, ()):
            raise pickle.UnpicklingError("it holds more than plain tensors")
        return super().find_class(module, name)
