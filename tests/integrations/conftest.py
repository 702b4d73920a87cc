"""Fixtures of the integration tests."""

from __future__ import annotations

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
