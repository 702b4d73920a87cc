"""Text generation over (model, engine, cache, sampler): prefill the prompts, then step.

`generate` -> `stream` -> `Engine.step`. The functions are methods of `MistralForCausalLM` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.decoder import CausalLM
from mistral_kernels.model.engine import engine_for
from mistral_kernels.model.sampling import NextTokens, Sampler
from mistral_kernels.utils.ranges import Range

# Bounds of the default number of tokens per sequence in one prefill pass.
_SMALLEST_CHUNK, _LARGEST_CHUNK = 512, 4096

_NEW_TOKENS, _CHUNK = Range(int, 0), Range(int, 1)
_PADDING = Range(int, -(2**31), 2**31 - 1)  # the range of int32 `input_ids`


def prefill(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    cache: RollingCache,
    chunk_size: int | None = None,
) -> Tensor:
    """Append each prompt to its sequence of the cache; return the logits after each prompt.

    A pass takes up to `chunk_size` tokens of every prompt (None: the largest window, bounded to
    512 to 4096). The result, (batch, vocab_size), does not depend on it.
    """
    if chunk_size is None:
        widest = max(window or _LARGEST_CHUNK for window in model.config.layer_windows)
        chunk_size = min(max(widest, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    chunk_size = _CHUNK.check("chunk_size", chunk_size)
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
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
    logits: Tensor = model.lm_head(last)
    return logits


def decode(model: CausalLM, token_ids: Tensor, cache: RollingCache) -> Tensor:
    """Append one token (batch,) per sequence; return the next token's logits (batch, vocab_size).

    A loop over steps should call `engine_for` once instead.

    Raises `ValueError` for a cache that was made for another model, dtype or device.
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
) -> Iterator[list[int | None]]:
    """Generate token by token: yield one id per prompt, None for a text that has ended.

    Each text ends after its first token of `eos_token_ids` (which is yielded), all end after
    `max_new_tokens`. An ended text stays a row of the batch until all have ended, so that the
    others keep their bits. With a `cache` that has seen earlier text, the prompts continue it.
    Afterwards the cache holds everything except the last token yielded (and, of a text that ended
    before the others, tokens that were not yielded). `context`, the tokens of that earlier text, is
    used by a repetition penalty only.

    Raises:
        TypeError: a token id is not an integer.
        ValueError: an empty prompt, an argument out of range, or logits that are not finite.
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
    newest.choose(prefill(model, prompts, cache, chunk_size))
    ended = [False] * batch
    for remaining in reversed(range(max_new_tokens)):
        newest.begin_read()
        # Queue the next step before the host waits for this step's tokens.
        ahead = engine.asynchronous and remaining > 0
        if ahead:
            engine.step(newest.token_ids)
        wanted = False
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
            wanted = remaining > 0 and not all(ended)
        finally:
            if ahead and not wanted:
                cache.drop()
        if not wanted:
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
    """Return prompts and new tokens, as transformers' `generate` does.

    Args:
        input_ids: (batch, seqlen), int64 or int32, or a list of prompts of any lengths: no
            padding is needed.
        attention_mask: (batch, seqlen); tokens where it is 0 are padding, left or right, and are
            ignored.
        max_new_tokens: upper bound of new tokens per text.
        do_sample: draw from the distribution that `temperature`, `top_k`, `top_p`, `min_p` and
            `repetition_penalty` shape (see `Sampler`); otherwise take the likeliest token.
        eos_token_id: ends a text; "config": the model's own; None: never stop early.
        pad_token_id: fills the rows that end early (default: the first eos token, else 0).
        generator: source of randomness.
        prefill_chunk_size: tokens of a prompt in one pass; changes memory, not results.

    Returns:
        (batch, seqlen + new) for a tensor, a list of lists of ids for a list.

    Raises:
        TypeError: naming the argument that is no integer or number; `input_ids` of another dtype.
        ValueError: naming the argument that is out of range; an empty prompt; logits that are not
            finite.
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
        raise ValueError("do_sample needs a temperature above 0; without it, decoding is greedy")
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
        raise ValueError("every prompt needs at least one token")
    for extreme in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= extreme < model.config.vocab_size:
            raise ValueError(
                f"token id {extreme} is not in the model's vocabulary of "
                f"{model.config.vocab_size}: is this its tokenizer?"
            )


def _seen(model: CausalLM, *texts: Sequence[Sequence[int]]) -> Tensor:
    """Return booleans (batch, vocab_size): the tokens of each row's texts."""
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
    """Return the plain ints in a list, a tensor or an array of token ids (n,).

    Raises TypeError, naming the part, for anything that is not an integer: a float, a bool, a text.
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
            raise ValueError("attention_mask belongs to a padded tensor; a list needs no padding")
        if isinstance(input_ids, (str, bytes)):
            raise TypeError("input_ids must be token ids, got a text; encode it with the tokenizer")
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
