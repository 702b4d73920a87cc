"""Streaming text generation: decode each token, and search for stop strings, as it is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.generation import token_ids_of
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.tokenizer.arguments import check_text
from mistral_kernels.utils.ranges import Range

DEFAULT_MAX_TOKENS = 256
_MAX_TOKENS = Range(int, 0)


@dataclass(frozen=True)
class TextDelta:
    """Piece of a generated text, one per generated token.

    Attributes:
        index: index of the prompt that the text continues.
        text: the new characters, or "": an incomplete character, and the possible start of a stop
            string, are held back until a later piece.
        token_id: the generated token.
        finish_reason: None, except in the last piece of a text: "eos", "stop" or "length".
    """

    index: int
    text: str
    token_id: int
    finish_reason: str | None = None


@dataclass
class Completion:
    """Whole generated text.

    Attributes:
        text: the text, without its prompt and without its stop string.
        token_ids: the generated tokens.
        finish_reason: the reason why the text ended: "eos", "stop" or "length".
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, delta: TextDelta) -> None:
        """Append a piece of the text."""
        self.text += delta.text
        self.token_ids.append(delta.token_id)
        self.finish_reason = delta.finish_reason or ""


class _StopText:
    """Filter that passes a text, piece by piece, up to the first stop string.

    The stop string that begins first in the text ends it, regardless of how the text is cut into
    pieces. With the stop strings "bc" and "abcd", the text "abc" is therefore held back: the next
    piece may complete "abcd".
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.found = False

    def push(self, text: str, final: bool = False) -> str:
        """Add a piece and return the text that cannot belong to a stop string; set `found`.

        With `final`, no more text follows, and no possible start of a stop string is held back.
        """
        self.held += text
        end = len(self.held)
        complete = min((at for at in map(self.held.find, self.stop) if at >= 0), default=end)
        cut = complete if final else self._first_incomplete(complete)
        self.found = cut == complete < end
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def _first_incomplete(self, before: int) -> int:
        """Return the index where an incomplete stop string begins in the held text.

        If none begins before the index `before`, return `before`.
        """
        longest = max(map(len, self.stop), default=0)
        for start in range(max(0, len(self.held) - longest + 1), before):
            if any(stop.startswith(self.held[start:]) for stop in self.stop):
                return start
        return before


Prompts = str | Sequence[str | Sequence[int]]


def _checked_prompts(prompts: Prompts) -> list[str | Sequence[int]]:
    """Return a list of prompts. A single string is one prompt."""
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        got = type(prompts).__name__
        raise TypeError(f"prompts must be strings or lists of token ids, got {got}")
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _checked_stop(stop: str | Sequence[str]) -> list[str]:
    """Return a list of stop strings. A single string is one stop string."""
    strings = [stop] if isinstance(stop, str) else list(stop)
    for each in strings:
        if not isinstance(each, str):
            raise TypeError(f"stop must be a string or list of strings, got {type(each).__name__}")
        if not each:
            raise ValueError("stop must not contain an empty string")
        check_text("stop", each)
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
    progress: Callable[[int], object] | None = None,
) -> Iterator[TextDelta]:
    """Generate one text per prompt, and yield one piece of text per generated token.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: one string, or a list whose elements are strings or lists of token ids. A string
            gets a BOS token if the tokenizer adds it. Lengths may differ; no padding is added.
        max_tokens: maximum number of new tokens per text.
        sampler: choice of each token; None: greedy.
        stop: one or several strings. A text ends before the stop string that begins first in it.
        ignore_eos: do not end a text at the model's end-of-text tokens.
        cache: cache of earlier texts that the prompts continue; see `MistralForCausalLM.stream`.
        context: token ids of those earlier texts, for the repetition penalty.
        prefill_chunk: maximum number of tokens per prompt in one forward pass; None: the largest
            sliding window, clamped to [512, 4096].
        standalone: the texts are answers, not continuations: remove the space that the tokenizer
            puts before the first word.
        progress: function that is called with the number of new prompt tokens after each forward
            pass of the prefill.

    Yields:
        The pieces, interleaved in the order of the decode steps.

    Raises:
        TypeError: a prompt is neither a string nor token ids, or a stop string is not a string.
        ValueError: a prompt or a stop string is empty or has a lone surrogate, a setting is out of
            range, or logits are not finite.
    """
    max_tokens = _MAX_TOKENS.check("max_tokens", max_tokens)
    stop = _checked_stop(stop)
    ids = []
    for i, prompt in enumerate(_checked_prompts(prompts)):
        if not isinstance(prompt, str):
            prompt = token_ids_of(f"prompts[{i}]", prompt)
        if not prompt:
            raise ValueError(f"prompts[{i}] must not be empty")
        # No EOS, even if the tokenizer adds one: the generated text continues the prompt.
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
        progress=progress,
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
    """Return one whole text per prompt.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: one string, or a list whose elements are strings or lists of token ids.
        **options: options of `stream_generate`, such as `max_tokens` and `sampler`.

    Raises:
        TypeError, ValueError: see `stream_generate`.
    """
    prompts = _checked_prompts(prompts)
    completions = [Completion(finish_reason="length") for _ in prompts]
    for delta in stream_generate(model, tokenizer, prompts, **options):
        completions[delta.index].add(delta)
    return completions
