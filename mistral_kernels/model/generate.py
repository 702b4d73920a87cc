"""`generate`: token generation with the arguments and the rules of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mistral_kernels.model.decoder import CausalLM
from mistral_kernels.model.generation import stream, token_ids_of
from mistral_kernels.model.generation_config import GenerationConfig, resolve
from mistral_kernels.model.padding import check_input_ids, kept_tokens
from mistral_kernels.model.processing import (
    LogitsProcessor,
    ProcessingSampler,
    StoppingCriterion,
    Texts,
    checked,
    eos_forbidden,
    stop_strings_criterion,
    time_limit,
)
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.utils.ranges import Range

_DEFAULT_NEW_TOKENS = 20  # as in transformers
_LENGTH, _COUNT, _SECONDS = Range(int, 0), Range(int, 1), Range(float, 0)
_PADDING = Range(int, -(2**31), 2**31 - 1)  # the range of int32 `input_ids`


class Streamer(Protocol):
    """Receiver of tokens while they are generated, such as transformers' `TextStreamer`."""

    def put(self, value: Tensor) -> None:
        """Receive the prompts, (batch, seqlen), and then each step's tokens, (batch,)."""

    def end(self) -> None:
        """Finish the output after the last step. `end` is not called after an error."""


@dataclass
class GenerateOutput:
    """Result of `generate` with `return_dict_in_generate=True`.

    A value can also be read by its name, or by its index among the values that are not None.

    Attributes:
        sequences: the return value of `generate` without `return_dict_in_generate`.
        scores: one tensor per step, (batch, vocab_size) float32: the scores from which the new
            tokens were chosen, which are the logits after repetition penalty, processors,
            temperature and truncation. Only with `output_scores=True`.
        logits: one tensor per step, (batch, vocab_size) float32: the logits of the model. Only
            with `output_logits=True`.
    """

    sequences: Tensor | list[list[int]]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: str | int | slice) -> Any:
        return vars(self)[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None."""
        return tuple(value for value in vars(self).values() if value is not None)


def generate(
    model: CausalLM,
    input_ids: Tensor | Sequence[Sequence[int]] | Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs: Tensor | Sequence[Sequence[int]] | Mapping[str, Any] | None = None,
    generation_config: Any = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | None = None,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Tensor | list[list[int]] | GenerateOutput:
    """Return the prompts followed by the generated tokens, as transformers' `generate` does.

    Settings come from `kwargs`, `generation_config` and `model.generation_config`, in this order of
    precedence. As in transformers, `do_sample=True` without further settings samples from the 50
    most likely tokens.

    A GPU waits for the host after each step if there is a logits processor, a stopping criterion,
    `stop_strings`, `max_time`, `min_new_tokens`, `min_length`, `output_scores` or `output_logits`.
    Generation computes in the model's dtype, also under `torch.autocast`.

    Args:
        model: the model; the object itself when this function is called as a method.
        input_ids: (batch, seqlen) int64 or int32, or a list of prompts. The prompts of a list may
            have different lengths and must not be padded. Also the output of a tokenizer, a dict of
            `input_ids` and `attention_mask`, whose mask is read only if `input_ids` is a tensor.
            None: the BOS token.
        attention_mask: (batch, seqlen); 0 for padding tokens, on the left or right. Only if
            `input_ids` is a tensor. None: tokens equal to `pad_token_id` are padding, if it is set
            and is not an EOS token; otherwise there is no padding.
        inputs: another name of `input_ids`.
        generation_config: settings of this call: a `GenerationConfig`, that of transformers, or a
            dict.
        logits_processor: functions, such as transformers' `LogitsProcessor`, that are called in
            each step with the token ids, (batch, length) int64, and scores, (batch, vocab_size)
            float32, and that return new scores. They follow the repetition penalty and
            `min_new_tokens`, and precede the temperature.
        stopping_criteria: functions, such as transformers' `StoppingCriteria`, that are called
            after each step with the token ids and the scores of all steps (None without
            `output_scores`), and that return whether each text ends, a bool or (batch,). Without
            EOS tokens, texts continue until all have ended, as in transformers.
        streamer: object such as transformers' `TextStreamer`, whose `put` receives the prompts,
            (batch, seqlen), then the tokens of each step, (batch,), int64 on the CPU, and whose
            `end` is called after the last step.
        tokenizer: the tokenizer, which `stop_strings` needs.
        generator: source of random numbers; None: PyTorch's default.
        **kwargs: settings by the names of `GenerationConfig`, such as `max_new_tokens`,
            `do_sample`, `temperature` and `eos_token_id`. None disables a setting.

    Returns:
        (batch, seqlen + new tokens) for a tensor, and a list of lists of token ids for a list. With
        `return_dict_in_generate=True`, a `GenerateOutput`.

    Raises:
        TypeError: an argument is unknown or has a wrong type, or `input_ids` has a wrong dtype.
        ValueError: an argument is out of range, a prompt is empty, or logits are not finite.
        NotImplementedError: an argument that is not offered has an effect, such as `num_beams=4`.

    Example:
        >>> from mistral_kernels import MistralForCausalLM, MistralTokenizer
        >>> model = MistralForCausalLM.from_pretrained("tiny")
        >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
        >>> prompt = tokenizer.encode("He was not at all")  # a list of token ids
        >>> (text,) = model.generate([prompt], max_new_tokens=4)
        >>> tokenizer.decode(text[len(prompt) :])
        'in the way to'
        >>> (text,) = model.generate([prompt], stop_strings=["way"], tokenizer=tokenizer)
        >>> tokenizer.decode(text[len(prompt) :])
        'in the way'
    """
    _check_objects(streamer, generator)
    settings = resolve(model.generation_config, generation_config, kwargs)
    eos_token_ids = _eos_token_ids(model, settings.eos_token_id)
    sampler = _sampler(settings, generator)
    input_ids = _given(model, settings, input_ids, inputs)
    # Code for transformers 4 passes the result of apply_chat_template, which is a dict since 5.
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise ValueError(f"input_ids must be a key of the given dict, got {list(input_ids)}")
        mask, input_ids = input_ids.get("attention_mask"), input_ids["input_ids"]
        # A list needs no mask of ones. Zeros are padding, and an error in a list.
        if attention_mask is None and (isinstance(input_ids, Tensor) or _has_zeros(mask)):
            attention_mask = mask
    if attention_mask is None and isinstance(input_ids, Tensor):
        attention_mask = _padding_mask(input_ids, settings.pad_token_id, eos_token_ids)
    prompts = _unpadded(input_ids, attention_mask)
    pad = settings.pad_token_id
    pad = next(iter(eos_token_ids), 0) if pad is None else pad
    copies: int = settings.num_return_sequences or 1
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    if isinstance(input_ids, Tensor):
        padded = input_ids = input_ids.repeat_interleave(copies, dim=0)
    else:
        padded = _left_padded(prompts, pad)
    width = padded.shape[1]
    max_new_tokens = _max_new_tokens(settings, width, model.config.max_position_embeddings)

    criteria = _functions("stopping_criteria", stopping_criteria)
    criteria += _own_criteria(settings, tokenizer)
    processors = [
        checked(f"logits_processor[{i}]", processor)
        for i, processor in enumerate(_functions("logits_processor", logits_processor))
    ]
    shortest = _shortest(settings, width)
    if shortest > width and eos_token_ids:
        processors.insert(0, eos_forbidden(eos_token_ids, shortest))
    texts = Texts(padded.to(model.device, torch.int64), eos_token_ids, pad, criteria)
    if settings.return_dict_in_generate:
        texts.scores = [] if settings.output_scores else None
        texts.logits = [] if settings.output_logits else None
    if processors or texts.scores is not None or texts.logits is not None:
        sampler = ProcessingSampler(**vars(sampler), texts=texts, processors=processors)
    watched = bool(criteria or streamer is not None) or not sampler.recordable

    if streamer is not None:
        streamer.put(padded.cpu())
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_token_ids=eos_token_ids,
        chunk_size=settings.prefill_chunk_size,
        stopping=texts.stopping if watched else None,
    ):
        for text, token in zip(new, tokens, strict=True):
            if token is not None:
                text.append(token)
        if watched:
            newest = texts.append(tokens)
            if streamer is not None:
                streamer.put(newest)
    if streamer is not None:
        streamer.end()

    sequences: Tensor | list[list[int]]
    if isinstance(input_ids, Tensor):
        longest = max(map(len, new))
        rows = [text + [pad] * (longest - len(text)) for text in new]
        added = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
        sequences = torch.cat((input_ids, added.view(len(rows), longest)), dim=1)
    else:
        sequences = [[*prompt, *text] for prompt, text in zip(prompts, new, strict=True)]
    if not settings.return_dict_in_generate:
        return sequences
    scores, logits = (None if x is None else tuple(x) for x in (texts.scores, texts.logits))
    return GenerateOutput(sequences, scores, logits)


def _has_zeros(mask: Any) -> bool:
    rows = () if mask is None else mask
    return any(isinstance(row, Iterable) and 0 in row for row in rows)


def _check_objects(streamer: Any, generator: Any) -> None:
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        got = type(streamer).__name__
        raise TypeError(f"streamer must be an object with put and end, got {got}")
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"generator must be a torch.Generator, got {got}")


def _given(model: CausalLM, settings: GenerationConfig, input_ids: Any, inputs: Any) -> Any:
    """Return the argument that is given; if neither is, the BOS token as the only prompt."""
    if input_ids is not None and inputs is not None:
        raise ValueError("inputs must be None if input_ids is given; give one of them")
    if input_ids is None and inputs is None:
        if settings.bos_token_id is None:
            raise ValueError("input_ids must be given for a model without a BOS token, got None")
        return torch.tensor([[settings.bos_token_id]], device=model.device)
    return input_ids if inputs is None else inputs


def _own_criteria(settings: GenerationConfig, tokenizer: Any) -> list[StoppingCriterion]:
    criteria = []
    if strings := _stop_strings(settings.stop_strings):
        if tokenizer is None:
            raise ValueError("tokenizer must be given with stop_strings, got None")
        if not hasattr(tokenizer, "decode"):
            got = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be an object with decode, got {got}")
        criteria.append(stop_strings_criterion(strings, tokenizer))
    if settings.max_time is not None:
        criteria.append(time_limit(_SECONDS.check("max_time", settings.max_time)))
    return criteria


def _sampler(settings: GenerationConfig, generator: torch.Generator | None) -> Sampler:
    """Check the settings that do not depend on the prompts, and return the sampler."""
    if settings.pad_token_id is not None:
        settings.pad_token_id = _PADDING.check("pad_token_id", settings.pad_token_id)
    copies = _COUNT.check("num_return_sequences", settings.num_return_sequences)
    if copies > 1 and not settings.do_sample:
        raise ValueError(
            f"num_return_sequences must be 1 with do_sample=False, got {copies}; set do_sample=True"
        )
    if settings.do_sample and settings.temperature == 0:
        raise ValueError("temperature must be > 0 with do_sample=True, got 0; set do_sample=False")
    return Sampler(
        settings.temperature if settings.do_sample else 0.0,  # type: ignore[arg-type]
        settings.top_k,  # type: ignore[arg-type]
        settings.top_p,  # type: ignore[arg-type]
        settings.min_p,  # type: ignore[arg-type]
        settings.repetition_penalty,  # type: ignore[arg-type]
        generator,
    )


def _max_new_tokens(settings: GenerationConfig, width: int, max_positions: int) -> int:
    if settings.max_new_tokens is not None:
        return int(_LENGTH.check("max_new_tokens", settings.max_new_tokens))
    if settings.max_length is not None:
        max_length: int = _LENGTH.check("max_length", settings.max_length)
        if max_length <= width:
            raise ValueError(
                f"max_length must be > {width}, the length of the prompt, got {max_length}; "
                "set max_new_tokens"
            )
        return max_length - width
    if width >= max_positions:
        raise ValueError(
            "max_new_tokens must be given for a prompt of max_position_embeddings "
            f"({max_positions}) or more tokens, got None"
        )
    return min(_DEFAULT_NEW_TOKENS, max_positions - width)


def _shortest(settings: GenerationConfig, width: int) -> int:
    """Return the number of tokens, with the padded prompt, below which EOS is forbidden."""
    if settings.min_new_tokens is not None:
        return width + int(_LENGTH.check("min_new_tokens", settings.min_new_tokens))
    return int(_LENGTH.check("min_length", settings.min_length or 0))


def _stop_strings(strings: Any) -> list[str]:
    if strings is None:
        return []
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, Iterable) or not all(isinstance(each, str) for each in strings):
        got = type(strings).__name__
        raise TypeError(f"stop_strings must be a string or a list of strings, got {got}")
    if not all(strings):
        raise ValueError("stop_strings must not contain an empty string")
    return list(strings)


def _functions(name: str, functions: Any) -> list[Callable[..., Any]]:
    if functions is None:
        return []
    if not isinstance(functions, (list, tuple)) or not all(map(callable, functions)):
        raise TypeError(f"{name} must be a list of functions, got {type(functions).__name__}")
    return list(functions)


def _eos_token_ids(model: CausalLM, eos_token_id: Any) -> list[int]:
    if isinstance(eos_token_id, str):
        if eos_token_id != "config":
            raise ValueError(f"eos_token_id must be 'config', ids or None, got {eos_token_id!r}")
        return list(model.config.eos_token_ids)
    if eos_token_id is None:
        return []
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    return token_ids_of("eos_token_id", ids if isinstance(ids, Iterable) else [ids])


def _padding_mask(
    input_ids: Tensor, pad_token_id: int | None, eos_token_ids: Sequence[int]
) -> Tensor | None:
    if pad_token_id is None or pad_token_id in eos_token_ids:
        return None
    mask = input_ids != pad_token_id
    return None if mask.all() else mask


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Return the prompts as a tensor, (batch, length of the longest prompt) int64."""
    width = max(map(len, prompts), default=0)
    rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), width)


def _unpadded(input_ids: Any, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the token ids of each prompt; `input_ids` is a tensor or a list of lists."""
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            got = type(attention_mask).__name__
            raise ValueError(
                "attention_mask must be None if input_ids is a list of token ids, which needs no "
                f"padding, got {got}"
            )
        if isinstance(input_ids, (str, bytes)) or not isinstance(input_ids, Iterable):
            got = type(input_ids).__name__
            raise TypeError(f"input_ids must be token ids, got {got}; encode it with the tokenizer")
        return [token_ids_of(f"input_ids[{i}]", prompt) for i, prompt in enumerate(input_ids)]
    check_input_ids(input_ids)
    if input_ids.is_meta:
        raise ValueError("input_ids must have values, got a tensor on meta")
    if attention_mask is None:
        return input_ids.tolist()
    rows = zip(input_ids.cpu(), kept_tokens(attention_mask, input_ids), strict=True)
    return [row[kept].tolist() for row, kept in rows]
