"""A small random model and transformers' MistralForCausalLM with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mistral_kernels import MistralConfig, MistralForCausalLM
from support.generating import transformers_model

pytest.importorskip("transformers", reason="transformers, the oracle, is absent")

VOCAB = 331
# (query heads, kv heads, head_dim, hidden_size); heads * head_dim is not always hidden_size.
HEADS = {
    "8/2x64": (8, 2, 64, 128),
    "8/8x64": (8, 8, 64, 512),
    "4/1x128": (4, 1, 128, 96),
}


def make_pair(
    heads: str = "8/2x64", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[MistralForCausalLM, Any]:
    """Return a model of this package and one of transformers with the same random weights."""
    query_heads, kv_heads, head_dim, hidden_size = HEADS[heads]
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=173,
        num_hidden_layers=2,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        **options,
    )
    ours = MistralForCausalLM(config)
    with torch.no_grad():
        for weight in ours.parameters():
            # Large weights, so that attention is far from uniform; norm weights differ from 1.
            weight.copy_(torch.randn_like(weight) * (0.1 if weight.ndim == 2 else 0.3) + 0.02)
    return ours.to(dtype).eval(), transformers_model(ours).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
