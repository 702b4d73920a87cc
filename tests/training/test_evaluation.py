"""Loss of a checkpoint on a text, in sequences and in pieces of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import random

import pytest
import torch
from support.small_checkpoints import SMALL, varied_model

from mistral_kernels import MistralForCausalLM
from mistral_kernels.training import evaluation
from mistral_kernels.training.corpus import Corpus, train_tokenizer
from mistral_kernels.training.evaluation import bits_per_byte, perplexity, text_loss
from mistral_kernels.training.loop import held_out_loss


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    chosen = random.Random(0)
    words = ["".join(chosen.choices("abcdefghi", k=chosen.randint(2, 9))) for _ in range(60)]
    lines = (" ".join(chosen.choices(words, k=chosen.randint(3, 30))) for _ in range(40))
    text = "".join(f"{line}\n" for line in lines)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(text, 300, path)
    return Corpus(text, path)


def part_of(corpus: Corpus, tokens: int) -> Corpus:
    part = copy.copy(corpus)
    part.tokens = corpus.tokens[:tokens]
    assert len(part.tokens) == tokens
    return part


def model_with(window: int | None) -> MistralForCausalLM:
    return varied_model(dataclasses.replace(SMALL, vocab_size=300, sliding_window=window))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("pieces", [1, 7, 64, 10_000])
def test_the_loss_does_not_depend_on_the_size_of_the_pieces(
    pieces: int, window: int | None, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece is the tokens of one forward pass."""
    monkeypatch.setattr(evaluation, "_TOKENS", pieces)
    model, part = model_with(window), part_of(corpus, 200)
    expected = held_out_loss(model, corpus, part.tokens)
    assert text_loss(model, part, 1000) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seqlen", [1, 2, 33, 400, 500])
def test_sequences_are_independent(seqlen: int, corpus: Corpus) -> None:
    """Each sequence begins with BOS; several sequences share a forward pass."""
    model, part = model_with(9), part_of(corpus, 400)
    sequences = part.tokens.split(seqlen)
    sums = [held_out_loss(model, corpus, each) * len(each) for each in sequences]
    assert text_loss(model, part, seqlen) == pytest.approx(sum(sums) / 400, rel=1e-5)


def test_memory_is_bounded(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass has at most 2048 tokens, and the cache at most the sequence."""
    model, passes, capacities = model_with(None), [], []
    forward, new_cache = model.model.forward, model.new_cache

    def counted(ids, packing, cache):
        passes.append(len(ids))
        return forward(ids, packing, cache)

    def recorded(batch: int, max_length: int):
        capacities.append(batch * max_length)
        return new_cache(batch, max_length)

    monkeypatch.setattr(model.model, "forward", counted)
    monkeypatch.setattr(model, "new_cache", recorded)
    long = copy.copy(corpus)
    long.tokens = torch.randint(300, (7000,))
    text_loss(model, long, 3000)
    assert passes == [2048, 952, 2048, 952, 1000]
    assert capacities == [3000, 3000, 1000]
    passes.clear()
    text_loss(model, long, 1000)
    assert passes == [2000, 2000, 2000, 1000]


def test_perplexity_and_bits_per_byte_equal_their_definitions() -> None:
    loss = random.uniform(1, 5)
    assert perplexity(loss) == pytest.approx(math.exp(loss))
    assert perplexity(1e4) == math.inf
    text = "a\u00e9\u4f60"  # 6 bytes
    assert bits_per_byte(loss, torch.zeros(4), text) == pytest.approx(loss * 4 / math.log(2) / 6)
