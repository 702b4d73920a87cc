"""Choice of the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_kernels.utils.ranges import Range

RANGES = {
    "temperature": Range(float, 0),
    "top_k": Range(int, 0),
    "top_p": Range(float, 0, 1, above=True),
    "min_p": Range(float, 0, 1),
    # Far beyond its use. Without bounds the product with a logit may not be finite.
    "repetition_penalty": Range(float, 1e-6, 10**6),
}
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


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
            the text (arXiv:1909.05858); 1 for none. From 1e-6 to 1e6.
        generator: source of randomness, on the logits' device; None: PyTorch's default one.

    Raises, naming the setting, TypeError unless it is a number and ValueError out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            setattr(self, name, allowed.check(name, getattr(self, name)))

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return token ids (batch,) for logits (batch, vocab_size), without reading on the host.

        `seen`, (batch, vocab_size) booleans, marks the tokens of each text so far; it is required
        when there is a repetition penalty.
        """
        return self.scores(logits, seen).argmax(dim=-1)

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return float32 (batch, vocab_size), whose largest element in each row is the choice.

        The largest element of a row is finite if and only if that of its logits is, and no logit
        is NaN: every other row has no token to choose.
        """
        if self.temperature == 0:
            return self._penalise(logits, seen)
        probabilities = self.probabilities(logits, seen)
        # As torch.multinomial draws, less its checks on the host: of exponential clocks, each as
        # fast as its token is likely, the first to ring.
        clocks = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return probabilities.div_(clocks)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the float32 (batch, vocab_size) probabilities at a temperature above 0."""
        logits = self._penalise(logits, seen)
        # From the largest down, so that no temperature, however small, overflows.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        temperature = min(max(self.temperature, _TINY), _HUGE)
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
            dropped = probabilities.cumsum(dim=-1) - probabilities >= max(self.top_p, _TINY)
            logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        if self.min_p > 0:
            # p >= min_p * p_max, with the normalisation cancelled.
            bound = logits.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < bound, -torch.inf)
        return logits


class NextTokens:
    """The newest token of each sequence: chosen on the device, then copied to the host.

    `choose` and `begin_read` wait for nothing, so that the next step can be queued before
    `finish_read` waits for the copy.

    Attributes:
        token_ids: (batch,) int64, on the device.
    """

    def __init__(
        self, sampler: Sampler, batch: int, device: torch.device, seen: Tensor | None = None
    ) -> None:
        """`seen` (batch, vocab_size), booleans, marks each text's tokens; `choose` adds its own."""
        self.sampler, self.seen = sampler, seen
        on_gpu = device.type == "cuda"
        # The scores follow the token ids, so that one copy reads both.
        self._chosen = torch.zeros(2 * batch, dtype=torch.long, device=device)
        self._host = torch.zeros(2 * batch, dtype=torch.long, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self.token_ids, self._scores = _ids_and_scores(self._chosen)

    def choose(self, logits: Tensor) -> None:
        """Choose the next tokens from logits (batch, vocab_size)."""
        scores = self.sampler.scores(logits, self.seen)
        torch.max(scores.detach(), dim=-1, out=(self._scores, self.token_ids))
        if self.seen is not None:
            self.seen.scatter_(1, self.token_ids.unsqueeze(1), True)

    def begin_read(self) -> None:
        """Start the copy of the newest tokens to the host."""
        self._host.copy_(self._chosen, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def finish_read(self) -> list[int | None]:
        """Return the tokens of the last `begin_read`; None for a row without finite logits."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, scores = (part.tolist() for part in _ids_and_scores(self._host))
        return [
            token if math.isfinite(score) else None
            for token, score in zip(token_ids, scores, strict=True)
        ]


def _ids_and_scores(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Split (2 batch,) int64 into views: token ids, and scores as float32, (batch,) each."""
    token_ids, scores = chosen.chunk(2)
    return token_ids, scores.view(torch.float32)[: len(token_ids)]
