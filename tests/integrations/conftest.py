"""Fixtures of the tests beside transformers."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute eager attention's softmax in the model's dtype: exact in float64.

    There no two tokens are so nearly equally likely that rounding chooses between them, and texts
    can be compared.
    """
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim)
    )
