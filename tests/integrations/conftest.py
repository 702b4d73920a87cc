"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the softmax of eager attention in the model's dtype instead of float32.

    In float64 the probabilities of two tokens are never so close that rounding decides between
    them. Generated texts can therefore be compared.
    """
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim)
    )


@pytest.fixture(scope="package")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that maps a hub id to a folder with its tokenizer and random weights."""
    from support.model_folders import FAMILIES, make_folder

    folders: dict[str, Path] = {}

    def folder(hub_id: str) -> Path:
        if hub_id not in folders:
            parent = tmp_path_factory.mktemp("card")
            folders[hub_id] = make_folder(parent / "model", FAMILIES[hub_id])
        return folders[hub_id]

    return folder
