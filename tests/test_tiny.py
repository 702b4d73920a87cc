"""The bundled model: its size, its recorded loss and its generated words."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import torch

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.checkpoint import resolve
from mistral_kernels.generate import generate
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.training.corpus import Corpus
from mistral_kernels.training.loop import held_out_loss
from mistral_kernels.training.on_texts import HELD_OUT

FOLDER = resolve("tiny")
PROMPTS = ["She was", "It is a truth universally", "Mr. Darcy", "The next morning"]


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained("tiny")


def test_files_are_smaller_than_6_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000


def test_held_out_loss_equals_the_recorded_loss(model: MistralForCausalLM) -> None:
    report = json.loads((FOLDER / "training.json").read_text())
    text = (FOLDER / HELD_OUT).read_text(encoding="utf-8")
    corpus = Corpus(text, FOLDER / "tokenizer.model")
    # Weights and arithmetic are bfloat16: the loss depends slightly on the machine.
    loss = held_out_loss(model, corpus, corpus.tokens)
    assert loss == pytest.approx(report["held_out_loss"], rel=2e-3)
    exact = held_out_loss(model.float(), corpus, corpus.tokens)
    model.to(torch.bfloat16)
    assert exact == pytest.approx(report["held_out_loss"], rel=5e-3)
    assert report["held_out_bits_per_byte"] < 2.0


def test_model_has_a_window_and_grouped_queries(model: MistralForCausalLM) -> None:
    config = model.config
    assert config.sliding_window == 128
    assert config.num_attention_heads > config.num_key_value_heads > 1


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generated_text_consists_of_words(model: MistralForCausalLM, temperature: float) -> None:
    """Over 70 % of the words occur in the held-out text, also far past the window."""
    tokenizer = MistralTokenizer.from_pretrained("tiny")
    vocabulary = set(words((FOLDER / HELD_OUT).read_text(encoding="utf-8")))
    sampler = Sampler(temperature, generator=torch.Generator().manual_seed(1))
    texts = generate(model, tokenizer, PROMPTS, max_tokens=300, sampler=sampler)
    # The first and the last word of a text may be incomplete.
    written = [word for text in texts for word in words(text.text)[1:-1]]
    assert len(written) > 400
    assert sum(word in vocabulary for word in written) > 0.7 * len(written)
    assert len(set(written)) > (15 if temperature == 0 else 150)
    assert sum(len(re.findall(r"[.!?]", text.text)) for text in texts) >= 4


@pytest.mark.slow
@torch.inference_mode()
def test_a_prompt_of_100_000_tokens_takes_constant_memory(model: MistralForCausalLM) -> None:
    """A long prompt needs no more cache than a short one, and only its last tokens matter.

    The logits depend on the last `reach` tokens: per layer, the window without the token itself.
    """
    prompt = torch.randint(3, model.config.vocab_size, (100_000,)).tolist()
    reach = model.config.num_hidden_layers * (128 - 1) + 1
    exact = model.float()
    cache, short = exact.new_cache(1, 200_000), exact.new_cache(1, reach)
    size = cache.nbytes
    far, near = exact.prefill([prompt], cache, 1024), exact.prefill([prompt[-reach:]], short)
    assert cache.nbytes == short.nbytes == size == 6 * 2 * 128 * 2 * 32 * 4
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)
    model.to(torch.bfloat16)


def resident() -> int:
    """Return the bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@torch.inference_mode()
def test_a_text_of_50_000_tokens_takes_constant_memory(model: MistralForCausalLM) -> None:
    """Decode 50,000 tokens past a window of 128 tokens.

    From 10 % of the text to its end, a growing cache would need 150 MB. The limit of 30 MB allows
    for the rotary tables, which grow by 8 MB.
    """
    total = 50_000
    exact = model.float()
    cache = exact.new_cache(1, total)
    size, text = cache.nbytes, [1]
    sampler = Sampler(1.0, generator=torch.Generator().manual_seed(3))
    options = {"sampler": sampler, "max_new_tokens": total, "cache": cache}
    for (token,) in exact.stream([[1]], eos_token_ids=(), **options):
        text.append(token)
        if len(text) == total // 10:
            early = resident()
    assert len(text) == total + 1
    assert len(set(text)) > 500
    assert cache.nbytes == size
    assert cache.host_lengths == [total]
    assert resident() - early < 30e6
    stepped = exact.decode(torch.tensor(text[-1:]), cache)
    whole = exact.prefill([text], exact.new_cache(1, total + 1), 1024)
    torch.testing.assert_close(stepped, whole, rtol=1e-3, atol=1e-3)
    model.to(torch.bfloat16)
