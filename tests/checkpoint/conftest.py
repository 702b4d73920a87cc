"""Fixtures that write small random checkpoints in both formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_checkpoints import SMALL, State, random_state

from mistral_kernels.checkpoint import save_hf, save_raw
from mistral_kernels.model.config import MistralConfig


@pytest.fixture
def small() -> MistralConfig:
    return SMALL


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, State]]:
    """Return a function that writes a checkpoint and returns its folder and its state by HF names.

    `changes`: changed fields of the configuration.
    """

    def make(
        format: str, dtype: torch.dtype = torch.float32, **changes: object
    ) -> tuple[Path, State]:
        config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
        state = random_state(config, dtype)
        folder = tmp_path / format
        save = save_raw if format == "raw" else save_hf
        save(state.items(), config, folder, dtype=dtype)
        return folder, state

    return make
