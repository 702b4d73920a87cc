"""Functions that `generate` calls in each step: logits processors and stopping criteria."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mistral_kernels.model.sampling import HUGE, Sampler

# Receives token ids, (batch, length) int64, and scores, (batch, vocab_size) float32; returns scores
# of the same shape.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
# Receives token ids, (batch, length) int64, and the scores of all steps, or None if they are not
# kept; returns a bool or booleans, (batch,): whether each text ends.
StoppingCriterion = Callable[[Tensor, Any], Any]


class Texts:
    """Prompts and generated tokens of a batch, padded as in transformers.

    Args:
        prompts: padded prompts, (batch, width) int64, on the model's device.
        eos_token_ids: tokens that end a text.
        pad_token_id: token after the end of a text.
        criteria: functions that end texts.

    Attributes:
        width: number of tokens per prompt, with padding.
        ended: for each text, whether it has ended.
        scores: scores of each step, (batch, vocab_size) float32; None: not kept.
        logits: logits of each step, (batch, vocab_size) float32; None: not kept.
    """

    def __init__(
        self,
        prompts: Tensor,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        criteria: Sequence[StoppingCriterion],
    ) -> None:
        self._ids, self.width = prompts, prompts.shape[1]
        self._columns: list[Tensor] = []  # not yet in `_ids`
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        self.criteria = criteria
        self.ended = [False] * len(prompts)
        self.scores: list[Tensor] | None = None
        self.logits: list[Tensor] | None = None
        self._stopped = self.ended

    @property
    def ids(self) -> Tensor:
        """Tokens of all texts, (batch, length) int64, on the model's device."""
        if self._columns:  # a copy to a GPU waits for the GPU: copy only if the ids are read
            with torch.inference_mode(False):  # users may keep the tensor
                newest = torch.stack(self._columns, dim=1).to(self._ids.device)
                self._ids = torch.cat((self._ids, newest), dim=1)
            self._columns = []
        return self._ids

    def append(self, tokens: Sequence[int | None]) -> Tensor:
        """Append the tokens of a step, None as padding; return them, (batch,) int64 on the CPU."""
        padded = [self.pad_token_id if token is None else token for token in tokens]
        self._columns.append(torch.tensor(padded))
        return self._columns[-1]

    def stopping(self, tokens: Sequence[int | None]) -> list[bool]:
        """Return which texts have ended after these tokens; see `stream`.

        As in transformers, without EOS tokens a text continues until criteria have ended all texts.

        Raises:
            TypeError: a criterion returns neither a bool nor one value per text.
        """
        stopped = [token in self.eos_token_ids for token in tokens]
        kept = None if self.scores is None else tuple(self.scores)
        for i, criterion in enumerate(self.criteria):
            found = criterion(self.ids, kept)
            try:
                ends = torch.as_tensor(found).bool().flatten().expand(len(tokens)).tolist()
            except (TypeError, RuntimeError):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(
                    f"stopping_criteria[{i}] must return a bool or a tensor ({len(tokens)},), "
                    f"got {got}"
                ) from None
            stopped = [a or b for a, b in zip(stopped, ends, strict=True)]
        self._stopped = [a or b for a, b in zip(self._stopped, stopped, strict=True)]
        every = all(self._stopped)
        self.ended = self._stopped if self.eos_token_ids else [every] * len(tokens)
        return self.ended


@dataclass
class ProcessingSampler(Sampler):
    """Sampler that calls logits processors, and keeps the scores and logits of each step.

    The host calls the processors between two steps: after the repetition penalty and before the
    temperature, as in transformers.

    Attributes:
        texts: the texts so far. The scores and logits are appended to its lists.
        processors: functions that replace the scores.
    """

    recordable: ClassVar[bool] = False

    texts: Texts = field(kw_only=True)
    processors: Sequence[LogitsProcessor] = field(kw_only=True)

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the processed scores as `Sampler.scores` does.

        A text that has ended gets the padding token.

        Raises:
            ValueError: the processors leave no token to choose.
        """
        texts, logits = self.texts, logits.float()
        _keep(texts.logits, logits)
        # A copy: the processors may change it in place.
        scores = self._penalize(logits.clone(), seen)
        for processor in self.processors:
            scores = processor(texts.ids, scores)
        # A processor may force a token with an infinite score. NaN and infinite logits are errors.
        scores = scores.to(logits).clamp(max=HUGE)
        finite = logits.amax(dim=-1, keepdim=True).isfinite()
        ended = torch.tensor(texts.ended, device=logits.device)
        lost = finite[:, 0] & ~scores.amax(dim=-1).isfinite() & ~ended
        if lost.any():
            raise ValueError(
                "logits_processor must leave a token with a finite score, got none in text "
                f"{int(lost.int().argmax())} after {texts.ids.shape[1] - texts.width} new tokens"
            )
        scores = scores.masked_fill(~finite, torch.nan)
        if self.temperature == 0:
            _keep(texts.scores, scores)
        else:
            offset = scores.amax(dim=-1, keepdim=True) / self.temperature
            scores = self._warp(scores)
            _keep(texts.scores, scores + offset)
            scores = self._draw(scores.softmax(dim=-1))
        if 0 <= texts.pad_token_id < logits.shape[-1]:
            scores[ended] = 0
            scores[ended, texts.pad_token_id] = 1
        return scores


def _keep(kept: list[Tensor] | None, values: Tensor) -> None:
    if kept is not None:
        with torch.inference_mode(False):  # users may change the tensors, or use them in training
            kept.append(values.clone())


def checked(name: str, processor: LogitsProcessor) -> LogitsProcessor:
    """Return a processor that calls `processor` and checks the result.

    The returned processor raises a TypeError if the result is not a tensor, and a ValueError if the
    result has another shape than the scores.

    Args:
        name: name of the processor in messages.
        processor: processor of the user.
    """

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        shape, result = scores.shape, processor(ids, scores)
        if not isinstance(result, Tensor):
            raise TypeError(f"{name} must return a tensor, got {type(result).__name__}")
        if result.shape != shape:
            raise ValueError(
                f"{name} must return scores of shape {tuple(shape)}, got {tuple(result.shape)}"
            )
        return result

    return process


def eos_forbidden(eos_token_ids: Sequence[int], shortest: int) -> LogitsProcessor:
    """Return a processor that forbids EOS tokens in texts of fewer than `shortest` tokens.

    The tokens of the padded prompt are counted.
    """

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] >= shortest:
            return scores
        known = [token for token in eos_token_ids if 0 <= token < scores.shape[1]]
        return scores.index_fill(1, torch.tensor(known, device=scores.device).long(), -torch.inf)

    return process


def time_limit(seconds: float) -> StoppingCriterion:
    """Return a criterion that ends all texts `seconds` after this call."""
    end = time.monotonic() + seconds
    return lambda ids, scores: time.monotonic() > end


def stop_strings_criterion(strings: Sequence[str], tokenizer: Any) -> StoppingCriterion:
    """Return a criterion that ends a text with the token that completes one of the strings.

    A string may begin in the prompt.

    Args:
        strings: the stop strings, none of them empty.
        tokenizer: object whose `decode` returns the text of a list of token ids.
    """
    # A token has at least one byte, so a string of n bytes has at most n tokens. The other 8 tokens
    # are context: tokenizers remove the space before the first word of a text.
    num_tokens = max(len(each.encode()) for each in strings) + 8

    def is_complete(ids: list[int]) -> bool:
        ids = [token for token in ids if token >= 0]  # padding may have any number
        before, text = tokenizer.decode(ids[:-1]), tokenizer.decode(ids)
        # The last token can also replace the end of the text: an incomplete character.
        pairs = enumerate(zip(before, text, strict=False))
        unchanged = next((i for i, (a, b) in pairs if a != b), min(len(before), len(text)))
        return any(text.find(each, max(0, unchanged - len(each) + 1)) >= 0 for each in strings)

    def criterion(ids: Tensor, scores: Any) -> Tensor:
        rows = ids[:, -num_tokens:].tolist()
        return torch.tensor([is_complete(row) for row in rows])

    return criterion
