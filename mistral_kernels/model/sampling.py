"""Sampling: choice of the next token from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mistral_kernels.utils.ranges import Range

RANGES = {
    "temperature": Range(float, 0),
    "top_k": Range(int, 0),
    "top_p": Range(float, 0, 1, above=True),
    "min_p": Range(float, 0, 1),
    # These bounds are far outside the useful range. They keep the product with a logit finite.
    "repetition_penalty": Range(float, 1e-6, 10**6),
}
_TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass
class Sampler:
    """Rule that chooses the next token from the logits.

    The settings are applied in the order of transformers: repetition penalty, temperature, top-k,
    top-p, min-p. Then one token is drawn from the remaining distribution.

    Attributes:
        temperature: divisor of the logits, >= 0. 0 chooses the most likely token.
        top_k: number of most likely tokens to keep, >= 0. 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose total probability is at least
            top_p, in (0, 1] (arXiv:1904.09751). 1 keeps all.
        min_p: keep the tokens whose probability is at least min_p times the largest, in [0, 1]
            (arXiv:2407.01082). 0 keeps all.
        repetition_penalty: divide positive logits of tokens that are already in the text by this
            factor, and multiply negative ones, in [1e-6, 1e6] (arXiv:1909.05858). 1 is no penalty.
        generator: source of random numbers, on the device of the logits; None: PyTorch's default.

    Raises:
        TypeError: a setting is not a number.
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from mistral_kernels import Sampler
        >>> logits = torch.tensor([[1.0, 3.0, 2.0, -4.0]])  # (batch, vocab_size)
        >>> Sampler(temperature=0)(logits)  # greedy
        tensor([1])
        >>> Sampler(top_k=2).probabilities(logits)
        tensor([[0.0000, 0.7311, 0.2689, 0.0000]])
        >>> sampler = Sampler(0.7, top_p=0.9, generator=torch.Generator().manual_seed(0))
        >>> sampler(logits.expand(1000, -1)).unique()  # token ids of 1000 draws
        tensor([1, 2])
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    # Whether `scores` only runs operators on tensors, so that a CUDA graph can contain it.
    recordable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            setattr(self, name, allowed.check(name, getattr(self, name)))

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return one token id per row of the logits, without a synchronization with the host.

        Args:
            logits: (batch, vocab_size).
            seen: (batch, vocab_size) booleans that mark the tokens already in each text. Required
                for a repetition penalty.

        Returns:
            (batch,) int64.

        Raises:
            ValueError: `seen` is None, and `repetition_penalty` is not 1.
        """
        return self.scores(logits, seen).argmax(dim=-1)

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return float32 scores (batch, vocab_size). The chosen token is the argmax of its row.

        The largest score of a row is finite if and only if the largest logit of the row is finite
        and no logit is NaN. A row without a finite largest score has no token to choose.
        """
        if self.temperature == 0:
            return self._penalize(logits, seen)
        return self._draw(self.probabilities(logits, seen))

    def _draw(self, probabilities: Tensor) -> Tensor:
        # The argmax of p / e, with e ~ Exponential(1), is a sample from p. torch.multinomial does
        # the same, but also checks p, which synchronizes with the host.
        exponential = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return probabilities.div_(exponential)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the float32 probabilities (batch, vocab_size) of the tokens.

        The temperature must be above 0. For `seen`, see `__call__`.
        """
        return self._warp(self._penalize(logits, seen)).softmax(dim=-1)

    def _warp(self, logits: Tensor) -> Tensor:
        # Subtract the largest logit, so that the division by a tiny temperature does not overflow.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        temperature = min(max(self.temperature, _TINY), HUGE)
        return self._truncate(logits / temperature)

    def _penalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        logits = logits.float()
        if self.repetition_penalty == 1.0:
            return logits
        if seen is None:
            raise ValueError("seen must be a tensor if repetition_penalty is not 1, got None")
        penalized = torch.where(
            logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
        )
        return torch.where(seen, penalized, logits)

    def _truncate(self, logits: Tensor) -> Tensor:
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            # Drop a token if the more likely tokens already reach top_p. The first token is kept.
            dropped = probabilities.cumsum(dim=-1) - probabilities >= max(self.top_p, _TINY)
            logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        if self.min_p > 0:
            # The logarithm of p >= min_p * p_max; the normalization cancels.
            bound = logits.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < bound, -torch.inf)
        return logits


class NextTokens:
    """Newest token of each sequence: chosen on the device, then copied to the host.

    `choose` and `begin_read` do not synchronize. The next step can therefore be queued before
    `finish_read` waits for the copy.

    Attributes:
        token_ids: (batch,) int64, on the device.
    """

    def __init__(
        self, sampler: Sampler, batch: int, device: torch.device, seen: Tensor | None = None
    ) -> None:
        """Make a chooser for `batch` sequences.

        `seen`, (batch, vocab_size) booleans, marks the tokens of each text. `choose` also marks the
        tokens that it chooses.
        """
        self.sampler, self.seen = sampler, seen
        on_gpu = device.type == "cuda"
        # The token ids and the scores are in one tensor, so that one copy transfers both.
        self._chosen = torch.zeros(2 * batch, dtype=torch.long, device=device)
        self._host = torch.zeros(2 * batch, dtype=torch.long, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self.token_ids, self._scores = _ids_and_scores(self._chosen)

    def choose(self, logits: Tensor) -> None:
        """Choose the next tokens from the logits, (batch, vocab_size)."""
        scores = self.sampler.scores(logits, self.seen)
        torch.max(scores.detach(), dim=-1, out=(self._scores, self.token_ids))
        if self.seen is not None:
            self.seen.scatter_(1, self.token_ids.unsqueeze(1), True)

    def begin_read(self) -> None:
        """Start to copy the newest tokens to the host."""
        self._host.copy_(self._chosen, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def finish_read(self) -> list[int | None]:
        """Wait for the last `begin_read` and return its tokens; None for a row with no token."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, scores = (part.tolist() for part in _ids_and_scores(self._host))
        return [
            token if math.isfinite(score) else None
            for token, score in zip(token_ids, scores, strict=True)
        ]


def _ids_and_scores(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of a (2 * batch,) int64 tensor: token ids, and float32 scores, (batch,) each."""
    token_ids, scores = chosen.chunk(2)
    return token_ids, scores.view(torch.float32)[: len(token_ids)]
