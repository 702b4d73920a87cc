"""Inputs and comparisons of tests of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_kernels import MistralForCausalLM
from support.small_checkpoints import SMALL

VOCAB, WIDTH, NEW, PAD = 331, 13, 14, 3
CONFIG = replace(SMALL, vocab_size=VOCAB)
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def transformers_model(model: MistralForCausalLM) -> Any:
    """Return transformers' model with the weights of `model`."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is absent")
    config = transformers.MistralConfig(
        **model.config.to_hf("float32"), attn_implementation="eager"
    )
    theirs = transformers.MistralForCausalLM(config).eval()
    loaded = theirs.load_state_dict(model.state_dict())
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    return theirs


def batch() -> dict[str, Tensor]:
    """Return three prompts of 9, 13 and 4 random tokens, padded on the left."""
    ids, mask = torch.randint(PAD + 1, VOCAB, (3, WIDTH)), torch.ones(3, WIDTH, dtype=torch.long)
    for row, padding in enumerate((4, 0, 9)):
        ids[row, :padding] = PAD
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def penalize_last(ids: Tensor, scores: Tensor) -> Tensor:
    """Lower the scores of every fifth token, from a token that depends on the last token on."""
    scores = scores.clone()
    for row, last in enumerate(ids[:, -1].tolist()):
        scores[row, last % 5 :: 5] -= 4.0
    return scores


def theirs_generate(theirs: Any, **options: Any) -> Any:
    """Call transformers' `generate`, which requires lists of transformers' own classes."""
    import transformers

    for name, kind in (("logits_processor", "Logits"), ("stopping_criteria", "Stopping")):
        if options.get(name) is not None:
            listed = {"Logits": "LogitsProcessorList", "Stopping": "StoppingCriteriaList"}[kind]
            functions = [as_object(each) for each in options[name]]
            options[name] = getattr(transformers, listed)(functions)
    return theirs.generate(**options)


def as_object(function: Callable[..., Any]) -> Any:
    """Return an object whose `__call__` has a plain signature, which transformers inspects."""

    class Function:
        def __call__(self, input_ids: Tensor, scores: Any) -> Any:
            return function(input_ids, scores)

    return Function()


def assert_same_output(ours: Any, theirs: Any) -> None:
    """Check tokens, scores and logits, up to the first near tie between two scores.

    Rounding may swap two tokens whose scores are nearly equal; the texts differ from there on.
    """
    columns = min(ours.sequences.shape[1], theirs.sequences.shape[1])
    differ = (ours.sequences[:, :columns] != theirs.sequences[:, :columns]).any(dim=0).tolist()
    steps = min(len(ours.scores), len(theirs.scores))
    if True in differ or ours.sequences.shape != theirs.sequences.shape:
        column = differ.index(True) if True in differ else columns - 1
        steps = column - (columns - steps) + 1
        top = theirs.scores[steps - 1].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() < 1e-3, (ours.sequences, theirs.sequences)
    else:
        assert len(ours.scores) == len(theirs.scores) == len(ours.logits)
    for a, b in zip(ours.scores[:steps], theirs.scores[:steps], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    for a, b in zip(ours.logits[:steps], theirs.logits[:steps], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
