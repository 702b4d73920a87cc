"""Small random checkpoints for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels import MistralConfig, MistralForCausalLM
from mistral_kernels.checkpoint.names import expected_shapes

# heads * head_dim != hidden_size, and no two sizes are equal.
SMALL = MistralConfig(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=7,
    max_position_embeddings=512,
)

State = dict[str, Tensor]


def random_state(config: MistralConfig, dtype: torch.dtype = torch.float32) -> State:
    return {
        name: (torch.randn(shape) * 0.2).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def varied_model(config: MistralConfig) -> MistralForCausalLM:
    """Return a random model with weights large enough for varied greedy text."""
    model = MistralForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return model.eval()
