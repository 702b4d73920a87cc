"""A run's state in one file, from which the run goes on."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.checkpoint.writing import sync_folder


def not_whole(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not the whole state of a run ({reason}); remove it to begin anew"
    )


@dataclass(frozen=True)
class Saving:
    """Where a run keeps the state to go on from, and after how many steps (0: never).

    `identity`: what two runs must have in common for one to go on where the other was.
    """

    path: Path
    every: int
    identity: Mapping[str, Any]

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file at once: whatever happens, it holds this state or the one before."""
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                torch.save({"identity": dict(self.identity), **state}, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
            sync_folder(self.path.parent)
        except (OSError, RuntimeError) as error:
            # torch.save covers what stopped it, a full disk or Ctrl-C, with an error of its own.
            reason = error.__context__ or error
            if isinstance(reason, KeyboardInterrupt):
                raise reason from None
            raise CheckpointError(f"cannot save to {self.path}: {reason}") from error
        finally:
            fresh.unlink(missing_ok=True)

    def load(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state in the file, None if there is none; no code in it is ever run.

        It has to have the parts of `state`, the run's own before it goes on.

        Raises `CheckpointError`, naming the file, for one that is damaged or of another run.
        """
        if self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is the state of a run under torchrun; go on with torchrun "
                "(--nproc-per-node 1 will do), remove it, or name another output"
            )
        if not self.path.exists():
            return None
        saved = read_state(self.path, ("identity", *state))
        check_identity(self.path, saved["identity"], self.identity)
        return saved

    def exists(self) -> bool:
        """Is there a state to go on from?"""
        return self.path.exists()

    def discard(self) -> None:
        """Remove what was saved."""
        self.path.unlink(missing_ok=True)


def read_state(path: Path, parts: Iterable[str]) -> dict[str, Any]:
    """What `Saving.save` wrote to a file; `CheckpointError` unless it is whole and has `parts`."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(parts):
            raise ValueError("it lacks parts of one")
    except OSError:
        raise  # it names the file itself
    except Exception as error:  # out of a damaged file comes anything
        plain = not isinstance(error, UnpicklingError)
        reason = str(error).partition("\n")[0] if plain else "it holds more than plain tensors"
        raise not_whole(path, reason) from None
    return state


def check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the state at `path` is of the run that is wanted."""
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
