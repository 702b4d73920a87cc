"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampler:
    """Temperature, repetition penalty and the usual truncations, applied in transformers' order.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p
            (arXiv:1904.09751); 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the likeliest (arXiv:2407.01082).
        repetition_penalty: divide the positive, multiply the negative logits of tokens already in
            the text (arXiv:1909.05858); 1 for none.
        generator: source of randomness, on the logits' device; None: PyTorch's default one.

    Raises `ValueError` naming the setting that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """(batch,) token ids for logits (batch, vocab_size), without a look at the host.

        `seen`, (batch, vocab_size) booleans, marks the tokens of each text so far; it is needed
        when there is a repetition penalty.
        """
        if self.temperature == 0:
            return self._penalise(logits, seen).argmax(dim=-1)
        probabilities = self.probabilities(logits, seen)
        # As torch.multinomial draws, less its checks on the host: of exponential clocks, each as
        # fast as its token is likely, the first to ring.
        clocks = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return probabilities.div_(clocks).argmax(dim=-1)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """What is drawn from, float32 (batch, vocab_size), at a temperature above 0."""
        logits = self._penalise(logits, seen)
        # From the largest down, so that no temperature, however small, overflows.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        return self._truncate(logits / temperature).softmax(dim=-1)

    def _penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        logits = logits.float()
        if self.repetition_penalty == 1.0:
            return logits
        if seen is None:
            raise ValueError("seen is needed for a repetition_penalty")
        penalised = torch.where(
            logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
        )
        return torch.where(seen, penalised, logits)

    def _truncate(self, logits: Tensor) -> Tensor:
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            # A token falls out when those before it already reach top_p; the first never does.
            dropped = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
            logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        if self.min_p > 0:
            # p >= min_p * p_max, with the normalisation cancelled.
            bound = logits.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < bound, -torch.inf)
        return logits
