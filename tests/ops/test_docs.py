"""The examples in the docstring of `mistral_kernels.ops`: they run and give correct results."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mistral_kernels import ops
from mistral_kernels.ops import reference


@pytest.fixture
def example_names() -> dict[str, Any]:
    """Run the examples and return the names that they define."""
    names: dict[str, Any] = {}
    (test,) = (t for t in doctest.DocTestFinder().find(ops, "ops") if t.examples)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    test.globs = names
    result = runner.run(test, clear_globs=False)
    assert result.attempted > 15
    assert result.failed == 0
    return names


def test_attention_block_matches_the_reference(example_names: dict[str, Any]) -> None:
    x, norm, qkv_weight, o_weight, cos, sin, positions = (
        y.double() if y.is_floating_point() else y for y in example_names["inputs"]
    )
    qkv = F.linear(reference.rms_norm(x, norm), qkv_weight).unflatten(-1, (-1, 16))
    q, k, v = qkv.split((4, 2, 2), dim=-2)
    q, k = reference.apply_rotary(q, k, cos, sin, positions)
    out, _ = reference.attention(q, k, v, causal=True, window_size=(19, 0))
    expected = x + F.linear(out.flatten(-2), o_weight)
    actual = example_names["attention_block"](*example_names["inputs"])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_attention_block_compiles_as_one_graph(example_names: dict[str, Any]) -> None:
    block, inputs = example_names["attention_block"], example_names["inputs"]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), block(*inputs))
