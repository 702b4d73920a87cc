"""A run's saved state: its checks, and the file in which a single process keeps it."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.checkpoint.writing import sync_folder
from mistral_kernels.utils.errors import is_out_of_memory
from mistral_kernels.utils.files import check_regular, create_anew, is_taken

# Raises ValueError for a state that the run cannot have saved.
Check = Callable[[Mapping[str, Any]], None]


def not_whole(path: Path, reason: str) -> CheckpointError:
    """Return the error that names a damaged state."""
    return CheckpointError(
        f"{path} is not the whole state of a run ({reason}); remove it to begin anew"
    )


class Saving(Protocol):
    """The place of a run's state: `FileSaving`, or `fsdp_state.FolderSaving` for several ranks.

    `every`: the number of steps between saves; 0: never. `identity`: the values that two runs must
    have in common for one to resume from the state of the other.
    """

    @property
    def path(self) -> Path: ...

    @property
    def every(self) -> int: ...

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state. Whatever happens, this state or the one before is complete."""

    def load(self, state: Mapping[str, Any], check: Check) -> dict[str, Any] | None:
        """Return the parts of the saved state; None if there is none. No code in it is ever run.

        It must have the parts of `state`, the run's own before it resumes, and pass `check`. Its
        tensors are copied to those of `state`.

        Raises `CheckpointError`, naming the file, for one that is damaged or of another run.
        """

    def exists(self) -> bool:
        """Return whether there is a state to resume from."""

    def discard(self) -> None:
        """Remove the saved state and the incomplete ones that killed runs left; nothing else."""


@dataclass(frozen=True)
class FileSaving:
    """`Saving` into the file `path`."""

    path: Path
    every: int
    identity: Mapping[str, Any]

    def save(self, state: Mapping[str, Any]) -> None:
        fresh = self._incomplete
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = create_anew(fresh)
            try:
                with file:
                    torch.save({"identity": dict(self.identity), **state}, file)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(self.path)
            finally:
                fresh.unlink(missing_ok=True)
            sync_folder(self.path.parent)
        except (OSError, RuntimeError) as error:
            # torch.save replaces the original exception (disk full, Ctrl-C) by its own; the
            # original is its __context__.
            reason = error.__context__ or error
            if isinstance(reason, (KeyboardInterrupt, SystemExit)):
                raise reason from None
            raise CheckpointError(f"cannot save to {self.path}: {reason}") from error

    def load(self, state: Mapping[str, Any], check: Check) -> dict[str, Any] | None:
        if self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is the state of a run under torchrun; go on with torchrun "
                "(--nproc-per-node 1 will do), remove it, or name another output"
            )
        if not self.exists():
            return None
        saved = read_state(self.path, ("identity", *state))
        check_identity(self.path, saved["identity"], self.identity)
        with naming_damage(self.path):
            check(saved)
            check_like("tensors", saved["tensors"], state["tensors"])
        for name, tensor in state["tensors"].items():
            tensor.copy_(saved["tensors"][name])
        return saved

    def exists(self) -> bool:
        return is_taken(self.path)

    def discard(self) -> None:
        for path in (self.path, self._incomplete):
            if not path.is_dir():  # which is not ours
                path.unlink(missing_ok=True)

    @property
    def _incomplete(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn errors into a `CheckpointError` about the state at `path`.

    A damaged file raises errors of every type. Errors of the system name their file, and too little
    memory is not a damage.
    """
    try:
        yield
    except (OSError, CheckpointError):
        raise  # they name the file themselves
    except UnpicklingError:
        raise not_whole(path, "it holds more than plain tensors") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise not_whole(path, reason) from None


def check_archive(file: IO[bytes]) -> None:
    """Raise ValueError unless a file of `torch.save` has the checksums of its records."""
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            # A compressed record can expand to any size.
            raise ValueError("it is compressed")
        if damaged := archive.testzip():  # torch.load does not check the checksums
            raise ValueError(f"{damaged} is damaged")


def read_state(path: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Return what `FileSaving.save` wrote. Raise CheckpointError unless it has `parts`."""
    check_regular(path)
    with naming_damage(path):
        with path.open("rb") as file:
            check_archive(file)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(parts):
            raise ValueError("it lacks parts of one")
    return state


def check_identity(path: Path, saved: Any, wanted: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the state at `path` has the identity `wanted`."""
    with naming_damage(path):
        if not isinstance(saved, dict):
            raise ValueError(f"identity must be a dict, got {type(saved).__name__}")
        for name, value in saved.items():
            if not isinstance(value, (type(None), bool, int, float, str)):
                raise ValueError(f"identity has a {type(value).__name__} for {name!r}")
    differences = [
        f"{name} was {saved.get(name)}, is {value}"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{path} is the state of another run ({'; '.join(differences)}); run that "
            "again, remove it, or name another output"
        )


def check_like(name: str, value: Any, like: Any) -> None:
    """Raise ValueError, naming the part, unless `value` has the structure of `like`.

    Compared are types, keys and lengths of dicts, lists and tuples, dtypes and shapes of tensors.
    Floats, those of tensors included, must be finite.
    """
    of_tensors = isinstance(value, Tensor) and isinstance(like, Tensor)  # or Parameters
    if type(value) is not type(like) and not of_tensors:
        raise ValueError(f"{name} must be {type(like).__name__}, got {type(value).__name__}")
    if isinstance(like, dict):
        if value.keys() != like.keys():
            raise ValueError(f"{name} must have {len(like)} keys of this run, got others")
        for key in like:
            check_like(f"{name}[{key!r}]", value[key], like[key])
    elif isinstance(like, (list, tuple)):
        if len(value) != len(like):
            raise ValueError(f"{name} must have {len(like)} items, got {len(value)}")
        for i, (item, expected) in enumerate(zip(value, like, strict=True)):
            check_like(f"{name}[{i}]", item, expected)
    elif isinstance(like, Tensor):
        if (value.dtype, value.shape, value.layout) != (like.dtype, like.shape, torch.strided):
            raise ValueError(
                f"{name} must be {like.dtype} of shape {tuple(like.shape)}, got {value.dtype} of "
                f"shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    elif isinstance(like, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
