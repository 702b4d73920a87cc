"""Test the mapping of names and the rotary permutation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mistral_kernels.checkpoint.names import (
    expected_shapes,
    half_to_interleaved,
    hf_names,
    interleaved_to_half,
    num_rotary_heads,
)
from mistral_kernels.model.config import MistralConfig


def rotate(x: torch.Tensor, position: int, interleaved: bool) -> torch.Tensor:
    """Rotate `x` `(heads, head_dim)` pair by pair."""
    dim = x.shape[1]
    out = torch.empty_like(x)
    for i in range(dim // 2):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        angle = torch.tensor(position * 10000.0 ** (-2 * i / dim), dtype=x.dtype)
        out[:, first] = x[:, first] * angle.cos() - x[:, second] * angle.sin()
        out[:, second] = x[:, second] * angle.cos() + x[:, first] * angle.sin()
    return out


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 10), (4, 16)])
def test_permutation_keeps_attention_scores(heads: int, dim: int) -> None:
    wq, wk = torch.randn(2, heads * dim, 5, dtype=torch.float64)
    x, y = torch.randn(2, 5, dtype=torch.float64)

    def scores(wq: torch.Tensor, wk: torch.Tensor, interleaved: bool) -> torch.Tensor:
        q = rotate((wq @ x).view(heads, dim), 11, interleaved)
        k = rotate((wk @ y).view(heads, dim), 4, interleaved)
        return (q * k).sum(1)

    raw = scores(wq, wk, interleaved=True)
    hf = scores(interleaved_to_half(wq, heads), interleaved_to_half(wk, heads), interleaved=False)
    torch.testing.assert_close(hf, raw, rtol=1e-12, atol=1e-12)


def test_permutations_are_inverse_and_write_to_out() -> None:
    weight = torch.randn(4 * 6, 7, dtype=torch.bfloat16)
    half = interleaved_to_half(weight, 4)
    assert not torch.equal(half, weight)
    assert torch.equal(half_to_interleaved(half, 4), weight)
    out = torch.empty_like(weight)
    assert interleaved_to_half(weight, 4, out=out) is out
    assert torch.equal(out, half)


def test_names_and_shapes_equal_transformers(small: MistralConfig) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(
            transformers.MistralConfig(**small.to_hf("float32"))
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_shapes(small) == theirs
    assert set(hf_names(small).values()) == set(theirs)


def test_raw_names(small: MistralConfig) -> None:
    names = hf_names(dataclasses.replace(small, num_hidden_layers=1))
    assert list(names) == [
        "tok_embeddings.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "layers.0.ffn_norm.weight",
        "layers.0.feed_forward.w1.weight",
        "layers.0.feed_forward.w3.weight",
        "layers.0.feed_forward.w2.weight",
        "norm.weight",
        "output.weight",
    ]


def test_tied_embeddings_have_no_head(small: MistralConfig) -> None:
    tied = dataclasses.replace(small, tie_word_embeddings=True)
    assert "lm_head.weight" in expected_shapes(small)
    assert "lm_head.weight" not in expected_shapes(tied)
    assert "output.weight" not in hf_names(tied)


def test_only_query_and_key_projections_have_rotary_heads(small: MistralConfig) -> None:
    rotated = {
        name.split(".")[-2]: num_rotary_heads(name, small)
        for name in expected_shapes(small)
        if num_rotary_heads(name, small)
    }
    assert rotated == {"q_proj": 4, "k_proj": 2}
