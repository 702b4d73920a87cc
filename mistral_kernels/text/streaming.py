"""From prompts to text: tokens are decoded and stop strings found as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.generation import token_ids_of
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.tokenizer.base import check_text
from mistral_kernels.utils.ranges import Range

DEFAULT_MAX_TOKENS = 256
_MAX_TOKENS = Range(int, 0)


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
    """Passes text on until a stop string appears, holding back what may be the start of one.

    The stop string that begins earliest in the text counts, wherever the text was cut into pieces:
    "bc" in the text ends it only when no earlier "abcd" can still become complete.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.found = False

    def push(self, text: str, final: bool = False) -> str:
        self.held += text
        end = len(self.held)
        complete = min((at for at in map(self.held.find, self.stop) if at >= 0), default=end)
        cut = complete if final else self._first_incomplete(complete)
        self.found = cut == complete < end
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def _first_incomplete(self, before: int) -> int:
        """Return where the held text ends in the beginning of a stop string; `before` if later."""
        longest = max(map(len, self.stop), default=0)
        for start in range(max(0, len(self.held) - longest + 1), before):
            if any(stop.startswith(self.held[start:]) for stop in self.stop):
                return start
        return before


Prompts = str | Sequence[str | Sequence[int]]


def _checked_prompts(prompts: Prompts) -> list[str | Sequence[int]]:
    """Return a list of prompts; a text alone is one prompt."""
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be texts or lists of ids, got {type(prompts).__name__}")
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _checked_stop(stop: str | Sequence[str]) -> list[str]:
    """Return a list of stop strings; a text alone is one."""
    strings = [stop] if isinstance(stop, str) else list(stop)
    for each in strings:
        if not isinstance(each, str):
            raise TypeError(f"stop must be a string or a list of them, got {type(each).__name__}")
        if not each:
            raise ValueError("a stop string must not be empty")
        check_text("a stop string", each)
    return strings


def stream_generate(
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: Prompts,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampler: Sampler | None = None,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    cache: RollingCache | None = None,
    context: Sequence[Sequence[int]] | None = None,
    prefill_chunk: int | None = None,
    standalone: bool = False,
) -> Iterator[TextDelta]:
    """Generate a text for each prompt, yielding the pieces as their tokens come.

    Args:
        prompts: a text, or a list of texts (BOS is put in front where the tokenizer adds it) and of
            lists of token ids. Lengths may differ; nothing is padded.
        max_tokens: at most so many new tokens each.
        sampler: None: greedy.
        stop: a string, or several; a text ends before the one that begins first in it.
        ignore_eos: do not end a text at the model's end-of-text token.
        cache: of earlier text, which the prompts continue; see `MistralForCausalLM.stream`.
        context: the tokens of that text, for a repetition penalty to count.
        prefill_chunk: tokens of a prompt in one pass.
        standalone: the texts are answers, not continuations: a space that a tokenizer puts before
            a first word is not part of them.

    Raises:
        TypeError: a prompt is neither a text nor token ids; a stop string is not a string.
        ValueError: an empty prompt or stop string, a lone surrogate in one, a setting out of range,
            or logits that are not finite.
    """
    max_tokens = _MAX_TOKENS.check("max_tokens", max_tokens)
    stop = _checked_stop(stop)
    ids = []
    for i, prompt in enumerate(_checked_prompts(prompts)):
        if not isinstance(prompt, str):
            prompt = token_ids_of(f"prompts[{i}]", prompt)
        if not prompt:
            raise ValueError("the prompt is empty")
        # Without EOS, even if the tokenizer adds it: the text goes on.
        ids.append(tokenizer.encode(prompt, eos=False) if isinstance(prompt, str) else prompt)
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
    prompts: Prompts,
    **options: Any,
) -> list[Completion]:
    """Return the whole texts of `stream_generate`, whose options these are."""
    prompts = _checked_prompts(prompts)
    completions = [Completion(finish_reason="length") for _ in prompts]
    for delta in stream_generate(model, tokenizer, prompts, **options):
        completions[delta.index].add(delta)
    return completions
