"""The product of a few rows, which is split over the threads, is that of many."""

from __future__ import annotations

import pytest
import torch
from helpers import FLOATS, assert_matches_reference

from mistral_kernels.ops.linear import linear


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 32, 33, 513])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 48), (8, 1), (67, 19), (1, 5)])
def test_values_and_gradients(rows, out_features, in_features, dtype, device):
    inputs = {
        "x": torch.randn(rows, in_features, device=device).to(dtype).requires_grad_(),
        "weight": torch.randn(out_features, in_features, device=device).to(dtype).requires_grad_(),
    }
    assert_matches_reference(
        linear, lambda x, weight: torch.nn.functional.linear(x, weight), inputs
    )


@pytest.mark.usefixtures("two_threads")
def test_any_strides():
    x, weight = torch.randn(3, 40)[:, ::2], torch.randn(20, 16).T
    assert torch.allclose(linear(x, weight), x @ weight.T, atol=1e-5)
