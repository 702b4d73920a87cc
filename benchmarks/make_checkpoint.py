"""Write a checkpoint of random weights for measurements.

    python benchmarks/make_checkpoint.py 1.2B /tmp/random-1.2B --format raw

The weights are generated and written one at a time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mistral_kernels.checkpoint import save_hf, save_raw
from mistral_kernels.checkpoint.names import expected_shapes
from mistral_kernels.model.config import MistralConfig

# Mistral's proportions: head_dim 128, four query heads per kv head, a sliding window.
CONFIGS = {
    "10M": MistralConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        sliding_window=256,
    ),
    "160M": MistralConfig(
        hidden_size=768,
        intermediate_size=2688,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=1024,
    ),
    "1.2B": MistralConfig(
        hidden_size=2048,
        intermediate_size=7168,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "7B": MistralConfig(),
}


def random_tensors(
    config: MistralConfig,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """Yield initial weights one at a time: norms near 1, matrices with variance 1 / columns."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in expected_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if len(shape) == 1:
            yield name, tensor.normal_(1.0, 0.1, generator=generator)
        else:
            yield name, tensor.normal_(0.0, 1 / math.sqrt(shape[1]), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=CONFIGS)
    parser.add_argument("directory")
    parser.add_argument("--format", choices=("hf", "raw"), default="hf")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config, dtype = CONFIGS[args.size], getattr(torch, args.dtype)
    save = save_hf if args.format == "hf" else save_raw
    save(random_tensors(config, dtype, args.seed), config, args.directory, dtype=dtype)


if __name__ == "__main__":
    main()
