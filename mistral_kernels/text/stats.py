"""Statistics that `python -m mistral_kernels.generate` prints at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops import extension
from mistral_kernels.ops.dispatch import choose_backend
from mistral_kernels.text.streaming import TextDelta


@dataclass
class GenerationStats:
    """Statistics of one run of the command; with several ranks, those of rank 0."""

    ranks: int = 1
    load_seconds: float = 0.0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    first_tokens: int = 0
    later_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    cache_bytes: int = 0

    def time(
        self, deltas: Iterator[TextDelta], prompt_tokens: int
    ) -> Generator[TextDelta, None, None]:
        """Yield `deltas` unchanged and measure their time.

        The time until the first token counts as prefill, the time after it as decoding.
        """
        self.prompt_tokens += prompt_tokens
        seen: dict[int, int] = {}
        steps = 0
        started = time.perf_counter()
        for delta in deltas:  # update per token, so that the counts are right after an interrupt
            now = time.perf_counter()
            if seen:
                self.decode_seconds += now - started
            else:
                self.prefill_seconds += now - started
            started = now
            count = seen[delta.index] = seen.get(delta.index, 0) + 1
            if count == 1:
                self.first_tokens += 1
            else:
                self.later_tokens += 1
            if count > max(steps, 1):
                self.decode_steps += 1
            steps = max(steps, count)
            yield delta

    def lines(self, model: MistralForCausalLM) -> Iterator[str]:
        """Yield the lines of the printed statistics."""
        weights = read = model.nbytes
        embedding = model.model.embed_tokens.weight
        if model.lm_head.weight is not embedding:  # a step reads one row of it per token
            read -= embedding.nbytes
        dtype = str(model.dtype).removeprefix("torch.")
        if model.lm_head.scales is not None:
            dtype = f"int8 and {dtype}"
        where = f" on rank 0 of {self.ranks}" if self.ranks > 1 else ""
        yield f"load      {self.load_seconds:.2f} s, {weights / 1e6:,.1f} MB of {dtype}{where}"
        if self.prefill_seconds:
            yield (
                f"prompt    {self.prompt_tokens} tokens, "
                f"{self.prompt_tokens / self.prefill_seconds:,.1f} tokens/s, "
                f"first token after {self.prefill_seconds:.3f} s"
            )
        if self.decode_steps:
            yield (
                f"generate  {self.first_tokens + self.later_tokens} tokens, "
                f"{self.later_tokens / self.decode_seconds:,.1f} tokens/s, weights read at "
                f"{self.decode_steps * read / self.decode_seconds / 1e9:,.1f} GB/s"
            )
        peak = _peak_memory(model.device)
        cache = f"{self.cache_bytes / 1e6:,.1f} MB"
        yield f"memory    {peak / 1e6:,.0f} MB at the peak, cache {cache}{where}"
        backend = choose_backend(model.device)
        yield f"backend   {backend.name} on {model.device} ({backend.reason})"
        csrc = extension.status(model.device.type)
        if model.device.type == "cpu" and not csrc.startswith("loaded "):
            yield f"csrc      {csrc}"  # the reason why decoding is slow


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Unix only

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
