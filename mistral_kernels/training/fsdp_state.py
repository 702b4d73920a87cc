"""Saved state of a run on several ranks: a folder to which each rank writes its share.

    OUTPUT.partial/step-400/__0_0.distcp, ...   torch.distributed.checkpoint's files, per rank
                            .metadata           the file and offset of each part of each tensor
                            run.pt              the rest of the state

`run.pt` is written last: a folder without it is an incomplete save. Then the previous folder is
removed. Any number of ranks can resume from the state.

torch.distributed.checkpoint (DCP) reads shares with `weights_only=True`, but it does not verify
checksums, and it unpickles `.metadata` without restrictions. `_Reader` verifies the checksums, and
`_read_metadata` restricts the unpickling.
"""

from __future__ import annotations

import io
import pickle
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.checkpoint.writing import sync_folder
from mistral_kernels.distributed.process_group import World
from mistral_kernels.training.state import (
    Check,
    FileSaving,
    check_archive,
    check_identity,
    check_structure,
    read_state,
    reporting_damage,
)
from mistral_kernels.utils.files import check_regular

_REST, _METADATA, _STEP = "run.pt", ".metadata", "step-"


@dataclass(frozen=True)
class FolderSaving:
    """`Saving` into the folder `path` by all ranks. An error on one rank is raised on all ranks."""

    path: Path
    every: int
    identity: Mapping[str, Any]
    world: World

    def save(self, state: Mapping[str, Any]) -> None:
        """Save the state in a new folder and remove the previous one."""
        rest = {name: value for name, value in state.items() if name != "tensors"}
        folder = self.path / f"{_STEP}{state['step']}"
        self.world.from_main(lambda: self._begin(folder))
        try:
            saved = dcp.save(dict(state["tensors"]), storage_writer=dcp.FileSystemWriter(folder))
        except CheckpointException as error:
            raise self._cannot_save(str(_first_of(error)).partition("\n")[0]) from None
        self.world.from_main(lambda: self._commit(folder, rest, saved))

    def load(self, state: Mapping[str, Any], check: Check) -> dict[str, Any] | None:
        """Return the saved state and copy its tensors to those of `state`; None: no saved state."""
        found = self.world.from_main(lambda: self._find(state.keys() - {"tensors"}, check))
        if found is None:
            return None
        folder, saved, metadata = found
        try:
            dcp.load(state["tensors"], storage_reader=_Reader(folder, metadata))
        except CheckpointException as error:
            with reporting_damage(folder):
                raise _first_of(error) from None
        return saved

    def exists(self) -> bool:
        """Return whether there is a complete state."""
        return bool(self._complete())

    def discard(self) -> None:
        """Remove all states, complete or not."""
        self.world.from_main(self._remove_all)

    def _begin(self, folder: Path) -> None:
        try:
            for left in set(self._steps()) - set(self._complete()):
                shutil.rmtree(left)
            folder.mkdir(parents=True)
        except OSError as error:
            raise self._cannot_save(error) from error

    def _commit(self, folder: Path, rest: dict[str, Any], saved: Metadata) -> None:
        """Complete the folder with `rest`. Called on rank 0."""
        for name in sorted({each.relative_path for each in saved.storage_data.values()}):
            if not (folder / name).exists():
                raise self._cannot_save(
                    f"rank 0 cannot find {folder / name}, which another rank wrote; name an "
                    "output on a file system that all ranks share"
                )
        # Only .metadata needs a checksum here: the other files contain their own.
        files = {_METADATA: _size_and_checksum((folder / _METADATA).read_bytes())}
        FileSaving(folder / _REST, self.every, self.identity).save({**rest, "files": files})
        sync_folder(self.path)
        for older in self._steps():
            if older != folder:
                shutil.rmtree(older)

    def _find(
        self, parts: Iterable[str], check: Check
    ) -> tuple[Path, dict[str, Any], Metadata] | None:
        """Return the newest complete folder, its `run.pt` and its metadata. Called on rank 0."""
        if self.path.is_file():
            raise CheckpointError(
                f"{self.path} is the state of a run without torchrun; resume without torchrun, "
                "remove the file, or name another output"
            )
        complete = self._complete()
        if not complete:
            if self.path.exists() and set(self.path.iterdir()) - set(self._steps()):
                raise CheckpointError(
                    f"{self.path} must contain nothing except the state of a run, got other files; "
                    "name another output"
                )
            return None
        folder = complete[-1]
        saved = read_state(folder / _REST, ("identity", "files", *parts))
        check_identity(folder, saved["identity"], self.identity)
        with reporting_damage(folder / _REST):
            check(saved)
            # States of earlier versions have checksums of other files, too.
            check_structure("files", saved["files"], {**saved["files"], _METADATA: (0, 0)})
        with reporting_damage(folder):
            return folder, saved, _read_metadata(folder, saved["files"][_METADATA])

    def _remove_all(self) -> None:
        for folder in self._steps():
            shutil.rmtree(folder)
        if self.path.exists() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _steps(self) -> list[Path]:
        """Return the folders of all steps, the newest last."""
        numbers = ((path.name.removeprefix(_STEP), path) for path in self.path.glob(f"{_STEP}*"))
        steps = ((int(n), path) for n, path in numbers if re.fullmatch("[0-9]{1,10}", n))
        return [path for _, path in sorted(steps)]

    def _complete(self) -> list[Path]:
        return [folder for folder in self._steps() if (folder / _REST).exists()]

    def _cannot_save(self, reason: Any) -> CheckpointError:
        return CheckpointError(f"cannot save to {self.path}: {reason}")


def _first_of(error: CheckpointException) -> BaseException:
    """Return the error of the lowest rank that failed. Raise the error if it is an interrupt."""
    first, _ = error.failures[min(error.failures)]
    if isinstance(first, (KeyboardInterrupt, SystemExit)):
        raise first from None
    return first


def _size_and_checksum(data: bytes) -> tuple[int, int]:
    return len(data), zlib.crc32(data)


def _existing(path: Path) -> Path:
    """Return `path`. Raise ValueError if it is missing, CheckpointError if it is not regular."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    check_regular(path)
    return path


def _read_metadata(folder: Path, expected: tuple[int, int]) -> Metadata:
    """Unpickle `.metadata` without running code from it; `expected` is its size and CRC-32."""
    data = _existing(folder / _METADATA).read_bytes()
    if _size_and_checksum(data) != expected:
        raise ValueError(f"{_METADATA} is damaged")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except MemoryError:  # raised for a length that is far too large
        raise ValueError(f"{_METADATA} is damaged") from None
    if type(metadata) is not Metadata or type(metadata.state_dict_metadata) is not dict:
        raise ValueError(f"{_METADATA} does not describe tensors")
    return metadata


class _Reader(dcp.FileSystemReader):
    """Reader of a folder whose metadata is already read; it checks the tensors that it reads."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder, self._metadata = folder, metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            with _existing(self._folder / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                check_archive(io.BytesIO(file.read(stored.length)))
        done = super().read_data(plan, planner)
        for item in plan.items:
            if not planner.resolve_tensor(item).isfinite().all():
                raise ValueError(f"{item.dest_index.fqn} must be finite, got inf or nan")
        return done


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that accepts only the types of a checkpoint of tensors.

    Other types could run code. Also, DCP unpickles an object without restrictions if the metadata
    does not describe it as a tensor.
    """

    _ALLOWED: ClassVar = {
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
        """Return the type `name` of `module`; raise UnpicklingError if it is not allowed."""
        if name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError("it holds more than plain tensors")
        return super().find_class(module, name)
