"""The step that generation repeats: one more token for each sequence, chosen on the device.

Nothing in a step has a shape that depends on the position, and nothing is read back from the
device. So on CUDA the first step runs as it is, the second is recorded in a CUDA graph, and all
later ones replay it, through the cache's wrap and beyond. Elsewhere the same step simply runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.sampling import Sampler

if TYPE_CHECKING:
    from mistral_kernels.model.generation import Generation


def can_capture(device: torch.device) -> bool:
    """Are steps on this device recorded and replayed?"""
    return device.type == "cuda"


def capture(step: Callable[[], None], generator: torch.Generator | None) -> Callable[[], None]:
    """Record what `step` does on the device, without doing it; calling the result does it."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _parts(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of a step's choice (2 batch,): token ids, and scores in float32, (batch,)."""
    token_ids, scores = chosen.chunk(2)
    return token_ids, scores.view(torch.float32)[: len(token_ids)]


class DecodeStep:
    """Called, appends each sequence's newest token to the cache and chooses the next.

    It runs what the model consisted of when it was made: recorded, or in one call on the CPU.
    `seen` (batch, vocab_size), booleans, marks the tokens of each text for a repetition penalty;
    chosen ones are added.
    """

    def __init__(
        self,
        model: Generation,
        cache: RollingCache,
        sampler: Sampler,
        seen: Tensor | None = None,
    ) -> None:
        self.model, self.cache, self.sampler, self.seen = model, cache, sampler, seen
        self.captures = can_capture(model.device)
        model.model.check(cache)
        # Tokens and, behind them, the scores by which they were chosen: one copy reads both.
        self._chosen = torch.zeros(2 * cache.batch, dtype=torch.long, device=model.device)
        self.token_ids, self._scores = _parts(self._chosen)
        self._decoder = model.decoder(self.token_ids)
        on_gpu = model.device.type == "cuda"
        self._host = torch.zeros(2 * cache.batch, dtype=torch.long, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._replay: Callable[[], None] | None = None
        self._warm = False
        self._reach = 0  # positions that the recorded step's rotary tables hold

    def choose(self, logits: Tensor) -> None:
        """Take the next tokens from logits (batch, vocab_size)."""
        scores = self.sampler.scores(logits, self.seen)
        torch.max(scores.detach(), dim=-1, out=(self._scores, self.token_ids))
        if self.seen is not None:
            self.seen.scatter_(1, self.token_ids.unsqueeze(1), True)

    def begin_read(self) -> None:
        """Start copying the newest tokens to the host; the next step may follow at once."""
        self._host.copy_(self._chosen, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def finish_read(self) -> list[int | None]:
        """Return the tokens of the last `begin_read`, waiting for them alone.

        None stands where the logits are not finite, so that no token can be chosen.
        """
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, scores = (part.tolist() for part in _parts(self._host))
        return [
            token if math.isfinite(score) else None
            for token, score in zip(token_ids, scores, strict=True)
        ]

    def __call__(self) -> None:
        if not self.captures:
            return self._run()
        cache = self.cache
        # The first step compiles what is not yet compiled; longer tables lie elsewhere.
        new = [1] * cache.batch
        if not self._warm or cache.end_of(new) > self._reach:
            self._run()
            self._warm, self._replay = True, None
            self._reach = self.model.model.num_positions
            return None
        if self._replay is None:
            counts = cache.host_lengths
            self._replay = capture(self._run, self.sampler.generator)
            cache.host_lengths = counts  # recorded, not done
        self._replay()
        cache.advance_host(new)
        return None

    def _run(self) -> None:
        self.choose(self.model.decode_with(self._decoder, self.token_ids, self.cache))
