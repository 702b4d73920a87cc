"""What the package's documentation shows of `torch.ops.mistral_kernels` runs, and is right."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mistral_kernels import ops
from mistral_kernels.ops import reference


@pytest.fixture
def shown() -> dict[str, Any]:
    """Return the names that the examples define."""
    names: dict[str, Any] = {}
    (test,) = (t for t in doctest.DocTestFinder().find(ops, "ops") if t.examples)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    test.globs = names
    result = runner.run(test, clear_globs=False)
    assert result.attempted > 15
    assert result.failed == 0
    return names


def test_the_block_is_right(shown: dict[str, Any]) -> None:
    x, norm, qkv_weight, o_weight, cos, sin, positions = (
        y.double() if y.is_floating_point() else y for y in shown["inputs"]
    )
    qkv = F.linear(reference.rms_norm(x, norm), qkv_weight).unflatten(-1, (-1, 16))
    q, k, v = qkv.split((4, 2, 2), dim=-2)
    q, k = reference.apply_rotary(q, k, cos, sin, positions)
    out, _ = reference.attention(q, k, v, causal=True, window_size=(19, 0))
    expected = x + F.linear(out.flatten(-2), o_weight)
    actual = shown["attention_block"](*shown["inputs"])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_block_compiles(shown: dict[str, Any]) -> None:
    """As one graph, whatever compiles it."""
    block, inputs = shown["attention_block"], shown["inputs"]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), block(*inputs))
