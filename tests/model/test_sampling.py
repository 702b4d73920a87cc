"""Sampling, compared with transformers' logits processors, formulas and expected frequencies."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mistral_kernels import Sampler

transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is absent")


def oracle(logits: Tensor, **settings: Any) -> Tensor:
    """Return the probabilities that transformers' warpers compute in float64, in its order."""
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores = logits.double()
    for name, warper in warpers.items():
        if name in settings:
            scores = warper(settings[name])(None, scores)
    return scores.softmax(dim=-1)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.93},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.9, "min_p": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_equal_transformers(settings: dict[str, Any]) -> None:
    logits = torch.randn(40, 97) * 3
    actual, expected = Sampler(**settings).probabilities(logits), oracle(logits, **settings)
    # If a probability is within rounding of its threshold, keeping and dropping the token are both
    # correct. Such rows are found with slightly changed thresholds, and are not compared.
    clear = torch.ones(len(logits), dtype=torch.bool)
    for name in settings.keys() & {"top_p", "min_p"}:
        for nudge in (1 - 1e-5, 1 + 1e-5):
            moved = oracle(logits, **{**settings, name: min(1.0, settings[name] * nudge)})
            clear &= ((moved > 0) == (expected > 0)).all(dim=-1)
    assert clear.sum() >= 30
    actual, expected = actual[clear].double(), expected[clear]
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_number_of_kept_ties_equals_transformers(settings: dict[str, Any]) -> None:
    """Top-p keeps as many equally likely tokens as transformers; top-k keeps all of them."""
    logits = torch.randint(-3, 4, (40, 97)) / 2.0 + 0.1 * torch.arange(40)[:, None]
    actual, expected = Sampler(**settings).probabilities(logits), oracle(logits, **settings)
    if "top_p" in settings:
        actual, expected = actual.sort().values, expected.sort().values
    kept, expected_kept = (actual > 0).sum(dim=-1), (expected > 0).sum(dim=-1)
    # The sum of equal probabilities may equal top_p within rounding: one more or one less is kept.
    assert ((kept - expected_kept).abs() <= ("top_p" in settings)).all()
    same = kept == expected_kept
    assert same.sum() >= 30
    torch.testing.assert_close(actual[same].double(), expected[same], rtol=1e-5, atol=1e-7)


def test_greedy_chooses_the_first_of_the_most_likely_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0, 3.0], [2.0, 2.0, 1.0, 0.0], [-5.0, -7.0, -6.0, -4.0]])
    assert Sampler(temperature=0)(logits).tolist() == [1, 0, 3]
    assert Sampler(temperature=0)(logits.bfloat16()).tolist() == [1, 0, 3]


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(8, 50).sort(dim=-1).values * 20 + torch.arange(50.0)
    assert Sampler(temperature=temperature)(logits).tolist() == [49] * 8


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e308},
    {"temperature": 5e-324},
    {"top_p": 5e-324},
    {"min_p": 5e-324},
    {"top_k": 10**30},
    {"repetition_penalty": 1e-6},
    {"repetition_penalty": 1e6, "temperature": 1e-300, "top_p": 1e-46, "min_p": 1e-46},
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_extreme_settings_give_valid_probabilities(settings: dict[str, Any]) -> None:
    """Probabilities sum to 1, and a token with a logit of -inf is never chosen."""
    logits = torch.randn(40, 97) * random.choice([1, 100])
    logits[:, ::3] = -torch.inf
    seen = torch.rand(40, 97) < 0.3
    sampler = Sampler(**settings)
    probabilities = sampler.probabilities(logits, seen)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(40))
    assert not probabilities[:, ::3].any()
    assert (probabilities >= 0).all()
    chosen = sampler(logits, seen)
    assert logits.gather(1, chosen[:, None]).isfinite().all()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, *SETTINGS, *EXTREMES], ids=str)
def test_the_largest_score_is_finite_if_the_logits_are(settings: dict[str, Any]) -> None:
    logits = torch.randn(60, 97) * 10
    seen = torch.rand(60, 97) < 0.3
    rows = torch.arange(60)
    logits[rows % 5 == 1, rows[rows % 5 == 1] % 97] = torch.nan
    logits[rows % 5 == 2, rows[rows % 5 == 2] % 97] = torch.inf
    logits[rows % 5 == 3] = -torch.inf
    logits[rows % 5 == 4, 5:] = -torch.inf
    scores = Sampler(**settings).scores(logits, seen)
    assert scores.dtype == torch.float32
    finite = scores.max(dim=-1).values.isfinite()
    assert torch.equal(finite, (rows % 5 == 0) | (rows % 5 == 4))


def test_truncation_keeps_at_least_one_token() -> None:
    logits = torch.randn(16, 1000) * 10
    for sampler in (Sampler(top_p=1e-9), Sampler(min_p=1.0), Sampler(top_k=1)):
        assert torch.equal(sampler(logits), logits.argmax(dim=-1))


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = torch.randn(5, 31)
    texts = [torch.randint(31, (n,)).tolist() for n in (1, 4, 9, 40, 2)]
    seen = torch.zeros(5, 31, dtype=torch.bool)
    expected = logits.double().clone()
    for row, text in enumerate(texts):
        for token in set(text):
            seen[row, token] = True
            value = expected[row, token]
            expected[row, token] = value / penalty if value > 0 else value * penalty
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([text]), logits[row : row + 1].double()
        )
        torch.testing.assert_close(theirs[0], expected[row])
    actual = Sampler(repetition_penalty=penalty).probabilities(logits, seen)
    torch.testing.assert_close(actual.double(), expected.softmax(dim=-1), rtol=1e-5, atol=1e-7)
    greedy = Sampler(temperature=0, repetition_penalty=penalty)(logits, seen)
    assert torch.equal(greedy, expected.argmax(dim=-1))
    with pytest.raises(ValueError, match="seen must be a tensor if repetition_penalty is not 1"):
        Sampler(repetition_penalty=penalty)(logits)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    """Chi-square of 20,000 draws over 12 tokens; 80 is exceeded once in 10^12 runs."""
    logits, draws = torch.randn(12), 20_000
    expected = draws * (logits.double() / temperature).softmax(dim=-1)
    drawn = Sampler(temperature)(logits.expand(draws, -1))
    counts = torch.bincount(drawn, minlength=12)
    likely = expected > 5
    assert likely.sum() >= 3
    chi_square = ((counts - expected).square() / expected)[likely].sum()
    assert chi_square < 80


def test_draws_depend_only_on_the_given_generator() -> None:
    logits = torch.randn(64, 100)

    def draw(seed: int) -> list[int]:
        return Sampler(generator=torch.Generator().manual_seed(seed))(logits).tolist()

    state = torch.get_rng_state()
    assert draw(7) == draw(7) != draw(8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be >= 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be >= 0, got inf"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"min_p": -0.5}, r"min_p must be in \[0, 1\], got -0.5"),
        ({"min_p": 1.01}, r"min_p must be in \[0, 1\], got 1.01"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \[1e-06, 1000000\], got 0.0"),
    ],
)
def test_settings_out_of_range_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


def test_settings_may_be_numpy_numbers() -> None:
    """They are converted to Python numbers, which all PyTorch functions accept."""
    sampler = Sampler(np.float32(0.5), np.int64(3), np.float64(1), np.int8(0), np.float16(2))
    values = (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)
    assert [(type(x), x) for x in values] == [(float, 0.5), (int, 3), (float, 1.0), (float, 0.0)]
    with pytest.raises(TypeError, match="top_k must be an integer >= 0, got float"):
        Sampler(top_k=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temperature must be a number >= 0, got NoneType"):
        Sampler(temperature=None)  # type: ignore[arg-type]
