"""Token generation: prefill the prompts, then decode one token per sequence in each step.

`generate` calls `stream`, which calls `Engine.step`. The public functions are also the methods of
`MistralForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.decoder import CausalLM
from mistral_kernels.model.engine import engine_for
from mistral_kernels.model.sampling import NextTokens, Sampler
from mistral_kernels.utils.ranges import Range

# Bounds of the default number of tokens per prompt in one forward pass.
_SMALLEST_CHUNK, _LARGEST_CHUNK = 512, 4096

_NEW_TOKENS, _CHUNK = Range(int, 0), Range(int, 1)
_PADDING = Range(int, -(2**31), 2**31 - 1)  # the range of int32 `input_ids`


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
        hidden = model.model(ids, packing, cache)
        ended = [i for i, p in enumerate(prompts) if start < len(p) <= start + chunk_size]
        last[ended] = hidden[packing.last_tokens[ended]]
        if progress is not None:
            progress(len(ids))
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

    Yields:
        A list with one token id per prompt; None for a text that has ended.

    Raises:
        TypeError: a token id is not an integer.
        ValueError: a prompt is empty, an argument is out of range, or logits are not finite.
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
    engine = engine_for(model, cache, newest)
    newest.choose(prefill(model, prompts, cache, chunk_size, progress))
    ended = [False] * batch
    for remaining in reversed(range(max_new_tokens)):
        newest.begin_read()
        # Queue the next step before the host waits for this step's tokens.
        ahead = engine.asynchronous and remaining > 0
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
            unfinished = remaining > 0 and not all(ended)
        finally:
            if ahead and not unfinished:
                cache.drop()
        if not unfinished:
            return
        if not ahead:
            engine.step(newest.token_ids)


def generate(
    model: CausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | str | None = "config",
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk_size: int | None = None,
) -> Tensor | list[list[int]]:
    """Return the prompts followed by the generated tokens, as transformers' `generate` does.

    Args:
        model: the model; the object itself when this function is called as a method.
        input_ids: (batch, seqlen) int64 or int32, or a list of prompts. The prompts of a list may
            have different lengths and need no padding.
        attention_mask: (batch, seqlen); 0 for padding tokens, on the left or right. Only if
            `input_ids` is a tensor; None: no padding.
        max_new_tokens: maximum number of new tokens per text.
        do_sample: sample each token with `temperature`, `top_k`, `top_p` and `min_p`. Otherwise
            choose the most likely token.
        temperature: divisor of the logits, above 0; see `Sampler`.
        top_k: number of most likely tokens to sample from; 0: all.
        top_p: probability of the smallest set of most likely tokens to sample from; 1: all.
        min_p: smallest probability of a token, as a fraction of the largest; 0: all tokens.
        repetition_penalty: factor against tokens that are already in the text, with and without
            `do_sample`; 1: none.
        eos_token_id: token or tokens that end a text; "config": the model's own; None: none.
        pad_token_id: token after the end of a text in the returned tensor; None: the first token
            of `eos_token_id`, or 0 if there is none.
        generator: source of random numbers; None: PyTorch's default.
        prefill_chunk_size: maximum number of tokens per prompt in one forward pass; None: the
            largest sliding window, clamped to [512, 4096]. It affects memory, not the result.

    Returns:
        (batch, seqlen + new tokens) for a tensor, and a list of lists of token ids for a list.

    Raises:
        TypeError: an argument is not an integer or a number as required, or `input_ids` has another
            dtype.
        ValueError: an argument is out of range, a prompt is empty, or logits are not finite.

    Example:
        >>> from mistral_kernels import MistralForCausalLM, MistralTokenizer
        >>> model = MistralForCausalLM.from_pretrained("tiny")
        >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
        >>> prompt = tokenizer.encode("He was not at all")  # a list of token ids
        >>> (text,) = model.generate([prompt], max_new_tokens=4)
        >>> tokenizer.decode(text[len(prompt) :])
        'in the way to'
    """
    eos_token_ids = _eos_token_ids(model, eos_token_id)
    if pad_token_id is not None:
        pad_token_id = _PADDING.check("pad_token_id", pad_token_id)
    sampler = Sampler(
        temperature if do_sample else 0.0,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        generator,
    )
    if do_sample and temperature == 0:
        raise ValueError("temperature must be > 0 with do_sample=True, got 0; set do_sample=False")
    prompts = _unpadded(input_ids, attention_mask)
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_token_ids=eos_token_ids,
        chunk_size=prefill_chunk_size,
    ):
        for text, token in zip(new, tokens, strict=True):
            if token is not None:
                text.append(token)
    if not isinstance(input_ids, Tensor):
        return [list(prompt) + text for prompt, text in zip(prompts, new, strict=True)]
    pad = pad_token_id if pad_token_id is not None else next(iter(eos_token_ids), 0)
    longest = max(map(len, new))
    rows = [text + [pad] * (longest - len(text)) for text in new]
    added = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat((input_ids, added.view(len(rows), longest)), dim=1)


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


def _eos_token_ids(model: CausalLM, eos_token_id: int | Sequence[int] | str | None) -> list[int]:
    if isinstance(eos_token_id, str):
        if eos_token_id != "config":
            raise ValueError(f"eos_token_id must be 'config', ids or None, got {eos_token_id!r}")
        return list(model.config.eos_token_ids)
    if eos_token_id is None:
        return []
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    return token_ids_of("eos_token_id", ids if isinstance(ids, Iterable) else [ids])


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


def _unpadded(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            got = type(attention_mask).__name__
            raise ValueError(
                "attention_mask must be None if input_ids is a list of token ids, which needs no "
                f"padding, got {got}"
            )
        if isinstance(input_ids, (str, bytes)):
            got = type(input_ids).__name__
            raise TypeError(f"input_ids must be token ids, got {got}; encode it with the tokenizer")
        return [token_ids_of(f"input_ids[{i}]", prompt) for i, prompt in enumerate(input_ids)]
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, seqlen), got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return input_ids.tolist()
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} like input_ids, "
            f"got {tuple(attention_mask.shape)}"
        )
    kept = attention_mask.bool()
    return [row[keep].tolist() for row, keep in zip(input_ids, kept, strict=True)]
