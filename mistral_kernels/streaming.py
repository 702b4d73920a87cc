"""From prompts to text: tokens are decoded and stop strings found as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.tokenizer import MistralTokenizer


@dataclass(frozen=True)
class TextDelta:
    """The next piece of one text; `finish_reason` ("eos", "stop" or "length") comes with the last.

    `text` may be empty: a character, or what may become a stop string, is held until it is whole.
    """

    index: int
    text: str
    token_id: int
    finish_reason: str | None = None


@dataclass
class Completion:
    """A generated text, without its prompt and its stop string."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.token_ids.append(delta.token_id)
        self.finish_reason = delta.finish_reason or ""


class _StopText:
    """Passes text on until a stop string appears, holding back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.found = False

    def push(self, text: str, final: bool = False) -> str:
        self.held += text
        ends = [self.held.find(stop) for stop in self.stop]
        if any(end >= 0 for end in ends):
            self.found = True
            keep = min(end for end in ends if end >= 0)
            text, self.held = self.held[:keep], ""
            return text
        longest = 0
        if not final:
            for stop in self.stop:
                overlaps = (n for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
                longest = max(longest, *overlaps, 0)
        cut = len(self.held) - longest
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def stream_generate(
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    cache: RollingCache | None = None,
    context: Sequence[Sequence[int]] | None = None,
    prefill_chunk: int | None = None,
    standalone: bool = False,
) -> Iterator[TextDelta]:
    """Generate a text for each prompt, yielding the pieces as their tokens come.

    Args:
        prompts: texts (with BOS in front where the tokenizer adds it), or token ids. Lengths may
            differ; nothing is padded.
        max_tokens: at most so many new tokens each.
        sampler: None: greedy.
        stop: a text ends before the first of these strings.
        ignore_eos: do not end a text at the model's end-of-text token.
        cache: of earlier text, which the prompts continue; see `MistralForCausalLM.stream`.
        context: the tokens of that text, for a repetition penalty to count.
        prefill_chunk: tokens of a prompt in one pass.
        standalone: the texts are answers, not continuations: a space that a tokenizer puts before
            a first word is not part of them.

    Raises:
        ValueError: for an empty prompt, an empty stop string, or a setting out of range.
    """
    if not all(stop):
        raise ValueError("a stop string must not be empty")
    ids = []
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("the prompt is empty")
        if isinstance(prompt, str):  # without EOS, even if the tokenizer adds it: the text goes on
            ids.append(tokenizer.encode(prompt, eos=False))
        else:
            ids.append(list(prompt))
    eos = () if ignore_eos else model.config.eos_token_ids
    decoders = [tokenizer.stream(() if standalone else prompt) for prompt in ids]
    filters = [_StopText(stop) for _ in ids]
    counts = [0] * len(ids)
    steps = model.stream(
        ids,
        max_new_tokens=max_tokens,
        sampler=sampler,
        eos_token_ids=eos,
        cache=cache,
        context=context,
        chunk_size=prefill_chunk,
    )
    for step in steps:
        for index, token in enumerate(step):
            texts = filters[index]
            if token is None or texts.found:
                continue
            counts[index] += 1
            ended = token in eos
            final = ended or counts[index] == max_tokens
            text = "" if ended else decoders[index].push(token)
            text = texts.push(text + (decoders[index].flush() if final else ""), final)
            reason = "stop" if texts.found else "eos" if ended else "length" if final else None
            yield TextDelta(index, text, token, reason)
        if all(texts.found for texts in filters):
            return


def generate(
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: Sequence[str | Sequence[int]],
    **options: Any,
) -> list[Completion]:
    """The whole texts of `stream_generate`, which see for the options."""
    completions = [Completion(finish_reason="length") for _ in prompts]
    for delta in stream_generate(model, tokenizer, prompts, **options):
        completions[delta.index].add(delta)
    return completions
