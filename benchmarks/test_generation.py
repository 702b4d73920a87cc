"""Prefill and decoding on the CPU, beside transformers with its fastest attention there (sdpa).

    python -m pytest benchmarks/test_generation.py

A random checkpoint of 160 M parameters with Mistral's head layout and a window of 1024 tokens. Both
models hold the same weights, and nothing is timed before their logits agree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from mistral_kernels import MistralForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Pair  # noqa: E402  # beside this file, which is no package
from make_checkpoint import CONFIGS, random_tensors  # noqa: E402

Models = tuple[MistralForCausalLM, transformers.MistralForCausalLM]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def models(request: pytest.FixtureRequest) -> Iterator[Models]:
    dtype = getattr(torch, request.param)
    config = CONFIGS["160M"]
    weights = dict(random_tensors(config, dtype))
    ours = MistralForCausalLM(config).to(dtype).eval()
    ours.load_state_dict(weights)
    fields = config.to_hf(request.param)
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(**fields, attn_implementation="sdpa")
    )
    theirs = theirs.to(dtype).eval()
    theirs.load_state_dict(weights)
    with torch.inference_mode():
        ids = torch.randint(config.vocab_size, (1, 64))
        difference = (ours(ids) - theirs(ids).logits).norm() / ours(ids).norm()
        assert difference < (1e-4 if dtype == torch.float32 else 5e-2), "the logits differ"
        yield ours, theirs


@pytest.mark.parametrize("batch", [1, 8])
@torch.inference_mode()
def test_decode_step(models: Models, against: Pair, batch: int) -> None:
    """One token for each sequence, 512 tokens into the text."""
    ours, theirs = models
    ids = torch.randint(ours.config.vocab_size, (batch, 512))
    cache = ours.new_cache(batch, 1024)
    ours.prefill(ids.tolist(), cache)
    past = transformers.DynamicCache(config=theirs.config)
    theirs(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    tokens = ids[:, 0]
    against(
        "transformers",
        lambda: ours.decode(tokens, cache),
        lambda: theirs(tokens[:, None], past_key_values=past, use_cache=True),
        rounds=40,
    )


@pytest.mark.parametrize("tokens", [512, 4096])
@torch.inference_mode()
def test_prefill(models: Models, against: Pair, tokens: int) -> None:
    """A prompt into an empty cache, and the logits after it."""
    ours, theirs = models
    ids = torch.randint(ours.config.vocab_size, (1, tokens))
    prompt = ids.tolist()
    against(
        "transformers",
        lambda: ours.prefill(prompt, ours.new_cache(1, tokens)),
        lambda: theirs(ids, use_cache=True, logits_to_keep=1),
        rounds=10 if tokens == 512 else 3,
    )
