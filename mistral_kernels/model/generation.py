"""Token generation: prefill the prompts, then decode one token per sequence in each step.

`stream` calls `Engine.step`. The public functions are also the methods of `MistralForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.decoder import CausalLM, without_autocast
from mistral_kernels.model.engine import engine_for
from mistral_kernels.model.sampling import NextTokens, Sampler
from mistral_kernels.utils.ranges import Range

# Bounds of the default number of tokens per prompt in one forward pass.
_SMALLEST_CHUNK, _LARGEST_CHUNK = 512, 4096

_NEW_TOKENS, _CHUNK = Range(int, 0), Range(int, 1)


def prefill(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    cache: RollingCache,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Append each prompt to its sequence of the cache, and return the logits after each prompt.

    Args:
        model: the model.
        prompts: token ids of one prompt per sequence, of any lengths from 1 on.
        cache: the cache, which may hold earlier tokens.
        chunk_size: maximum number of tokens per prompt in one forward pass; None: the largest
            sliding window, clamped to [512, 4096]. It affects memory, not the result.
        progress: function that is called with the number of new tokens after each forward pass.

    Returns:
        (batch, vocab_size), in the model's dtype.

    Raises:
        TypeError: `chunk_size` is not an integer.
        ValueError: a prompt is empty, `chunk_size` is less than 1, or the cache was made for
            another model, dtype, device or batch size, or is too small.
    """
    if chunk_size is None:
        widest = max(window or _LARGEST_CHUNK for window in model.config.layer_windows)
        chunk_size = min(max(widest, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    chunk_size = _CHUNK.check("chunk_size", chunk_size)
    if not all(prompts):
        raise ValueError("every prompt must have at least one token")
    last = torch.empty(
        len(prompts), model.config.hidden_size, dtype=model.dtype, device=model.device
    )
    for start in range(0, max(map(len, prompts)), chunk_size):
        chunks = [prompt[start : start + chunk_size] for prompt in prompts]
        packing = cache.packing([len(chunk) for chunk in chunks])
        ids = torch.tensor([token for chunk in chunks for token in chunk], device=model.device)
        with without_autocast(model.device):
            hidden = model.model(ids, packing, cache)
        ended = [i for i, p in enumerate(prompts) if start < len(p) <= start + chunk_size]
        last[ended] = hidden[packing.last_tokens[ended]]
        if progress is not None:
            progress(len(ids))
    with without_autocast(model.device):
        logits: Tensor = model.lm_head(last)
    return logits


def decode(model: CausalLM, token_ids: Tensor, cache: RollingCache) -> Tensor:
    """Append one token per sequence to the cache, and return the logits of the next token.

    A loop over many steps is faster if it calls `engine_for` once and then the engine's `step`.

    Args:
        model: the model.
        token_ids: (batch,) int64 or int32, on the model's device.
        cache: the cache.

    Returns:
        (batch, vocab_size), in the model's dtype.

    Raises:
        ValueError: the cache was made for another model, dtype, device or batch size, or is full.
    """
    return engine_for(model, cache).step(token_ids)


@torch.inference_mode()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_token_ids: Sequence[int] = (),
    cache: RollingCache | None = None,
    context: Sequence[Sequence[int]] | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    stopping: Callable[[list[int | None]], Sequence[bool]] | None = None,
) -> Iterator[list[int | None]]:
    """Generate texts, and yield the new tokens of each step.

    A text that has ended stays in the batch until all texts have ended. Therefore the end of one
    text does not change the bits of the others.

    Args:
        model: the model.
        prompts: token ids of the prompts, of any lengths from 1 on.
        max_new_tokens: maximum number of new tokens per text.
        sampler: choice of each token; None: greedy.
        eos_token_ids: tokens that end a text. The token itself is still yielded.
        cache: cache of earlier texts that the prompts continue; None: a new cache. Afterwards the
            cache holds all tokens except the last one yielded. For a text that ended before the
            others, the cache also holds tokens that were not yielded.
        context: token ids of those earlier texts, for the repetition penalty only.
        chunk_size: maximum number of tokens per prompt in one forward pass; see `prefill`.
        progress: function that is called during the prefill; see `prefill`.
        stopping: function that is called with the tokens of each step after they are yielded, and
            that returns for each text whether it ends there; None: no such function.

    Yields:
        A list with one token id per prompt; None for a text that has ended.

    Raises:
        TypeError: a token id is not an integer.
        ValueError: a prompt is empty, an argument is out of range, or logits are not finite.

    Example:
        >>> from mistral_kernels import MistralForCausalLM, MistralTokenizer
        >>> model = MistralForCausalLM.from_pretrained("tiny")
        >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
        >>> prompt = tokenizer.encode("He was not at all")
        >>> text = tokenizer.stream(prompt)  # holds back incomplete characters
        >>> for (token,) in model.stream([prompt], max_new_tokens=4):
        ...     print(repr(text.push(token)))
        ' in'
        ' the'
        ' way'
        ' to'
    """
    max_new_tokens = _NEW_TOKENS.check("max_new_tokens", max_new_tokens)
    prompts = [token_ids_of(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
    eos_token_ids = token_ids_of("eos_token_ids", eos_token_ids)
    _check_vocabulary(model, prompts)
    if max_new_tokens == 0:
        return
    sampler = sampler or Sampler(temperature=0)
    batch = len(prompts)
    if cache is None:
        cache = model.new_cache(batch, max(map(len, prompts)) + max_new_tokens)
    seen = None
    if sampler.repetition_penalty != 1.0:
        seen = _seen(model, prompts, context or [()] * batch)
    newest = NextTokens(sampler, batch, model.device, seen)
    # A CUDA graph contains the choice of the tokens only if it can contain the sampler.
    recordable = sampler.recordable
    engine = engine_for(model, cache, newest if recordable else None)
    newest.choose(prefill(model, prompts, cache, chunk_size, progress))
    ended = [False] * batch
    for remaining in reversed(range(max_new_tokens)):
        newest.begin_read()
        # Queue the next step before the host waits for this step's tokens.
        ahead = engine.asynchronous and recordable and remaining > 0
        if ahead:
            engine.step(newest.token_ids)
        unfinished = False
        try:
            chosen = newest.finish_read()
            for row, (token, done) in enumerate(zip(chosen, ended, strict=True)):
                if token is None and not done:
                    raise ValueError(
                        f"the logits of text {row} are not finite after "
                        f"{max_new_tokens - 1 - remaining} new tokens; load the model in "
                        "another dtype, or check its weights"
                    )
            tokens = [None if done else token for token, done in zip(chosen, ended, strict=True)]
            yield tokens
            ended = [
                done or token in eos_token_ids for token, done in zip(tokens, ended, strict=True)
            ]
            if stopping is not None:
                ended = [a or b for a, b in zip(ended, stopping(tokens), strict=True)]
            unfinished = remaining > 0 and not all(ended)
        finally:
            if ahead and not unfinished:
                cache.drop()
        if not unfinished:
            return
        if not ahead:
            logits = engine.step(newest.token_ids)
            if not recordable:
                newest.choose(logits)


def _check_vocabulary(model: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("every prompt must have at least one token")
    for extreme in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= extreme < model.config.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {model.config.vocab_size}), the model's vocabulary, got "
                f"{extreme}; check that the tokenizer belongs to the model"
            )


def _seen(model: CausalLM, *texts: Sequence[Sequence[int]]) -> Tensor:
    """Return (batch, vocab_size) booleans; row i marks the tokens of row i of all `texts`."""
    shape = len(texts[0]), model.config.vocab_size
    seen = torch.zeros(shape, dtype=torch.bool, device=model.device)
    for batch in texts:
        for row, text in zip(seen, batch, strict=True):
            row[torch.tensor(text, dtype=torch.long, device=model.device)] = True
    return seen


def token_ids_of(name: str, ids: Any) -> list[int]:
    """Convert a list, a tensor or an array of token ids, (n,), to a list of ints.

    Raises:
        TypeError: `ids` or one of its elements has another type, such as float, bool or str.
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        remedy = "; encode it with the tokenizer" if isinstance(ids, (str, bytes)) else ""
        raise TypeError(f"{name} must be a list of token ids, got {type(ids).__name__}{remedy}")
    plain = [x.tolist() if hasattr(x, "tolist") else x for x in ids]
    for i, token in enumerate(plain):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name}[{i}] must be a token id, an int, got {type(token).__name__}")
    return plain
