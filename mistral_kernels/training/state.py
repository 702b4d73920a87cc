"""Saved state of a run: its checks, and the file to which a single process saves it."""

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

# A function that raises ValueError for a state that the run cannot have saved.
Check = Callable[[Mapping[str, Any]], None]


def damaged_state_error(path: Path, reason: str) -> CheckpointError:
    """Return the error for a damaged state at `path`."""
    return CheckpointError(
        f"{path} is not a complete state of a run ({reason}); remove it to start again"
    )


class Saving(Protocol):
    """Storage of a run's state: `FileSaving`, or `fsdp_state.FolderSaving` for several ranks.

    The attribute `identity` of both describes the run. A run can resume from a saved state only if
    it has the same identity as the run that saved the state.
    """

    @property
    def path(self) -> Path:
        """File or folder of the state."""

    @property
    def every(self) -> int:
        """Number of steps between two saves; 0: never save."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state. If interrupted, the previous state remains complete."""

    def load(self, state: Mapping[str, Any], check: Check) -> dict[str, Any] | None:
        """Return the saved state without running code from it; None if there is no state.

        Args:
            state: state of the run before it resumes. The saved state must have the same parts. Its
                tensors are copied to the tensors of `state`.
            check: function that raises ValueError for an invalid state.

        Raises:
            CheckpointError: the state is damaged or belongs to another run.
        """

    def exists(self) -> bool:
        """Return whether there is a state to resume from."""

    def discard(self) -> None:
        """Remove the saved state and incomplete states of killed runs, and no other file."""


@dataclass(frozen=True)
class FileSaving:
    """`Saving` into the file `path`."""

    path: Path
    every: int
    identity: Mapping[str, Any]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state to a new file and rename the file to `path`."""
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
            # torch.save replaces the original exception (disk full, Ctrl-C) by its own, whose
            # __context__ is the original.
            reason = error.__context__ or error
            if isinstance(reason, (KeyboardInterrupt, SystemExit)):
                raise reason from None
            raise CheckpointError(f"cannot save to {self.path}: {reason}") from error

    def load(self, state: Mapping[str, Any], check: Check) -> dict[str, Any] | None:
        """Return the saved state and copy its tensors to those of `state`; None: no saved state."""
        if self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is the state of a run under torchrun; resume with torchrun "
                "(--nproc-per-node 1 is enough), remove it, or name another output"
            )
        if not self.exists():
            return None
        saved = read_state(self.path, ("identity", *state))
        check_identity(self.path, saved["identity"], self.identity)
        with reporting_damage(self.path):
            check(saved)
            check_structure("tensors", saved["tensors"], state["tensors"])
        for name, tensor in state["tensors"].items():
            tensor.copy_(saved["tensors"][name])
        return saved

    def exists(self) -> bool:
        """Return whether there is a file at `path`."""
        return is_taken(self.path)

    def discard(self) -> None:
        """Remove the state and an incomplete state."""
        for path in (self.path, self._incomplete):
            if not path.is_dir():  # a folder was not created by `save`
                path.unlink(missing_ok=True)

    @property
    def _incomplete(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")


@contextmanager
def reporting_damage(path: Path) -> Iterator[None]:
    """Replace errors by a `CheckpointError` about the state at `path`.

    Reading a damaged file can raise errors of any type. Errors of the operating system, which name
    the file themselves, and out-of-memory errors are not replaced.
    """
    try:
        yield
    except (OSError, CheckpointError):
        raise  # these errors name the file
    except UnpicklingError:
        raise damaged_state_error(path, "it holds more than plain tensors") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise damaged_state_error(path, reason) from None


def check_archive(file: IO[bytes]) -> None:
    """Raise ValueError if the records of a `torch.save` file do not match their checksums."""
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            # A compressed record can expand to an arbitrary size.
            raise ValueError("it is compressed")
        if damaged := archive.testzip():  # torch.load does not verify the checksums
            raise ValueError(f"record {damaged} is damaged")


def read_state(path: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Read a file of `FileSaving.save`. Raise CheckpointError if one of `parts` is missing."""
    check_regular(path)
    with reporting_damage(path):
        with path.open("rb") as file:
            check_archive(file)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(parts):
            raise ValueError("parts of it are missing")
    return state


def check_identity(path: Path, saved: Any, expected: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the state at `path` has the identity `expected`."""
    with reporting_damage(path):
        if not isinstance(saved, dict):
            raise ValueError(f"identity must be a dict, got {type(saved).__name__}")
        for name, value in saved.items():
            if not isinstance(value, (type(None), bool, int, float, str)):
                raise ValueError(
                    f"identity[{name!r}] must be None, bool, int, float or str, got "
                    f"{type(value).__name__}"
                )
    differences = [
        f"{name} was {saved.get(name)}, is {value}"
        for name, value in expected.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{path} is the state of another run ({'; '.join(differences)}); repeat that run, "
            "remove the state, or name another output"
        )


def check_structure(name: str, value: Any, like: Any) -> None:
    """Raise ValueError, naming the part, unless `value` has the structure of `like`.

    The comparison covers types, the keys of dicts, the lengths of lists and tuples, and the dtypes
    and shapes of tensors. All floats, including those in tensors, must be finite.
    """
    # A Parameter may be compared with a Tensor.
    both_tensors = isinstance(value, Tensor) and isinstance(like, Tensor)
    if type(value) is not type(like) and not both_tensors:
        raise ValueError(f"{name} must be {type(like).__name__}, got {type(value).__name__}")
    if isinstance(like, dict):
        if value.keys() != like.keys():
            raise ValueError(f"{name} must have the {len(like)} keys of this run, got others")
        for key in like:
            check_structure(f"{name}[{key!r}]", value[key], like[key])
    elif isinstance(like, (list, tuple)):
        if len(value) != len(like):
            raise ValueError(f"{name} must have {len(like)} items, got {len(value)}")
        for i, (item, expected) in enumerate(zip(value, like, strict=True)):
            check_structure(f"{name}[{i}]", item, expected)
    elif isinstance(like, Tensor):
        if (value.dtype, value.shape, value.layout) != (like.dtype, like.shape, torch.strided):
            raise ValueError(
                f"{name} must be {like.dtype} of shape {tuple(like.shape)}, got {value.dtype} of "
                f"shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got inf or nan")
    elif isinstance(like, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
