"""`pipeline`: continue strings and answer chats in one call, as in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mistral_kernels.model.generation_config import settings_of
from mistral_kernels.model.pretrained_arguments import HUB_ARGUMENTS
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.tokenizer import AutoTokenizer, MistralTokenizer
from mistral_kernels.utils.ranges import Range
from mistral_kernels.utils.unsupported import Unsupported, check_unsupported

# Settings of `generate` that are used if neither the caller nor the model's generation_config sets
# them. The values are those of transformers.
_DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

_BATCH = Range(int, 1)
_TEXT_ONLY = Unsupported(remedy="leave it out: text generation needs only a tokenizer")
_LOADING = {
    "config": Unsupported(remedy="give the fields to replace in model_kwargs"),
    "feature_extractor": _TEXT_ONLY,
    "image_processor": _TEXT_ONLY,
    "video_processor": _TEXT_ONLY,
    "processor": _TEXT_ONLY,
    "framework": Unsupported((None, "pt")),
    "pipeline_class": Unsupported(),
    "code_revision": Unsupported(remedy="leave it out: no code of a checkpoint is run"),
    "binary_output": Unsupported((None, False)),
}
_CALLING = {
    "return_type": Unsupported(remedy="give return_full_text or return_tensors"),
    "return_dict_in_generate": Unsupported((None, False), "call generate of the model"),
    "handle_long_generation": Unsupported(remedy="shorten the prompt"),
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options of a pipeline that are not those of `generate`; see `TextGenerationPipeline`."""

    return_full_text: bool | None = None
    return_tensors: bool | None = None
    return_text: bool | None = None
    batch_size: int | None = None
    num_workers: int | None = None
    prefix: str | None = None
    stop_sequence: str | list[str] | None = None
    continue_final_message: bool | None = None
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    add_special_tokens: bool | None = None
    truncation: bool | str | None = None
    padding: bool | str | None = None
    tokenizer_encode_kwargs: Mapping[str, Any] | None = None
    skip_special_tokens: bool | None = None
    clean_up_tokenization_spaces: bool | None = None

    def __post_init__(self) -> None:
        if self.return_tensors and (self.return_full_text is not None or self.return_text):
            other = "return_text" if self.return_full_text is None else "return_full_text"
            raise ValueError(f"return_tensors must be None with {other}, got True")
        if self.batch_size is not None:
            _BATCH.check("batch_size", self.batch_size)


_NAMES = frozenset(field.name for field in dataclasses.fields(_Options))


class TextGenerationPipeline:
    """Model and tokenizer that continue strings and answer chats, as `pipeline` returns them.

    Attributes:
        task: "text-generation".
        model: the model.
        tokenizer: the tokenizer.
    """

    task = "text-generation"

    def __init__(
        self, model: MistralForCausalLM, tokenizer: MistralTokenizer, **options: Any
    ) -> None:
        """Create a pipeline.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            **options: defaults of the options of `__call__`.
        """
        self.model, self.tokenizer, self._given = model, tokenizer, options
        self._parse({})

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def __call__(self, text_inputs: Any, **options: Any) -> Any:
        """Generate texts.

        Args:
            text_inputs: a string; a chat, `[{"role": ..., "content": ...}, ...]`; a list of strings
                or of chats; or another iterable of them, such as a generator.
            **options: the options of `generate`, and those of transformers' pipeline:

                - return_full_text: False returns only the new text, also for a chat.
                - return_tensors: True returns the token ids of prompt and text, under the key
                  "generated_token_ids", instead of the text.
                - batch_size: number of prompts that are generated together, 1 by default. It does
                  not affect greedy texts.
                - prefix: text that is put before each string, and is not returned. It has no
                  effect on chats.
                - stop_sequence: a string, or a list of strings, that ends a text.
                - continue_final_message: continue the last message of a chat instead of adding a
                  message; None: if it is a message of the assistant.
                - tools, documents: see `apply_chat_template`.
                - add_special_tokens, truncation, max_length, tokenizer_encode_kwargs: options of
                  the tokenizer. `max_length` is also an option of `generate`.
                - padding, num_workers, return_text: without effect. `return_text` must not be given
                  with `return_tensors`.
                - skip_special_tokens, clean_up_tokenization_spaces: see `decode`.
                  `skip_special_tokens` is True by default.

        Returns:
            For one prompt, a list of `num_return_sequences` dicts. "generated_text" is the string
            with its continuation, or the chat with the answer as its last message. For a list of
            prompts, a list of such lists. For another iterable, an iterator of such lists.
            As in transformers 5, the new tokens are decoded without the prompt. A sentencepiece
            vocabulary therefore drops the space before the first new word. To keep the space, pass
            `return_tensors=True` and `decode` the token ids.

        Raises:
            TypeError: a prompt has another type, or an option is unknown.
            ValueError: an option is out of range, there is no prompt, or a message of a chat lacks
                its role or content.
            NotImplementedError: an option is not offered.
        """
        parsed, settings = self._parse(options)
        if isinstance(text_inputs, str):
            return self._generate([text_inputs], parsed, settings)[0]
        if not isinstance(text_inputs, Iterable) or isinstance(text_inputs, Mapping):
            raise TypeError(f"{_EXPECTED}, got {type(text_inputs).__name__}")
        if not isinstance(text_inputs, Sequence):
            return self._stream(text_inputs, parsed, settings)
        if not text_inputs:
            raise ValueError("text_inputs must have at least one prompt, got none")
        if isinstance(text_inputs[0], Mapping):
            return self._generate([text_inputs], parsed, settings)[0]
        return list(self._stream(text_inputs, parsed, settings))

    def _parse(self, options: Mapping[str, Any]) -> tuple[_Options, dict[str, Any]]:
        """Return the options of the pipeline and the settings of `generate` for a call."""
        given = self._given
        if "generation_config" in options:  # it replaces the settings of the pipeline
            given = {name: value for name, value in given.items() if name in _NAMES}
        options = {**given, **options}
        refused = {name: options.pop(name) for name in _CALLING if name in options}
        check_unsupported("pipeline", refused, _CALLING)
        parsed = _Options(**{name: options.pop(name) for name in _NAMES if name in options})
        if parsed.stop_sequence is not None:
            options["stop_strings"] = parsed.stop_sequence
        if options.get("stop_strings") is not None:
            options["tokenizer"] = self.tokenizer
        return parsed, options

    def _stream(
        self, prompts: Iterable[Any], options: _Options, settings: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        remaining = iter(prompts)
        while batch := list(islice(remaining, options.batch_size or 1)):
            yield from self._generate(batch, options, settings)

    def _generate(
        self, prompts: Sequence[Any], options: _Options, settings: dict[str, Any]
    ) -> list[list[dict[str, Any]]]:
        """Return a list of records per prompt; see `_record`."""
        rows = [self._encode(prompt, options, settings) for prompt in prompts]
        texts: Any = self.model.generate(rows, **settings, **self._defaults(settings))
        each = len(texts) // len(rows)
        return [
            [
                self._record(prompt, text, len(row), options)
                for text in texts[i * each : (i + 1) * each]
            ]
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def _defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default settings that neither the caller nor generation_config sets."""
        known = {
            **settings_of("model.generation_config", self.model.generation_config),
            **settings_of("generation_config", settings.get("generation_config")),
            **settings,
        }
        defaults = {**_DEFAULTS, "pad_token_id": self.tokenizer.pad_token_id}
        if "max_length" in known:
            del defaults["max_new_tokens"]
        if not {**defaults, **known}["do_sample"]:
            del defaults["temperature"]
        return {name: value for name, value in defaults.items() if name not in known}

    def _encode(self, prompt: Any, options: _Options, settings: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a string or a chat."""
        given: dict[str, Any] = {
            "add_special_tokens": options.add_special_tokens,
            "truncation": options.truncation,
            "max_length": settings.get("max_length"),
        }
        if not isinstance(prompt, str):
            del given["add_special_tokens"]  # the chat template contains the special tokens
        given = {name: value for name, value in given.items() if value is not None}
        given |= options.tokenizer_encode_kwargs or {}
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer((options.prefix or "") + prompt, **given)["input_ids"]
        else:
            _check_chat(prompt)
            continued = _continues(prompt, options)
            ids = self.tokenizer.apply_chat_template(
                prompt,
                tools=options.tools,
                documents=options.documents,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                return_dict=False,
                **given,
            )
        return ids

    def _record(
        self, prompt: Any, ids: list[int], length: int, options: _Options
    ) -> dict[str, Any]:
        """Return the dict of results of one text.

        Args:
            prompt: the string or the chat.
            ids: token ids of the prompt and the text.
            length: number of tokens of the prompt.
            options: the options of the call.
        """
        if options.return_tensors:
            return {"generated_token_ids": ids}
        new = self.tokenizer.decode(
            ids[length:],
            skip_special_tokens=options.skip_special_tokens is not False,
            clean_up_tokenization_spaces=options.clean_up_tokenization_spaces,
        )
        if options.return_full_text is False:
            return {"generated_text": new}
        if isinstance(prompt, str):
            return {"generated_text": prompt + new}
        if not _continues(prompt, options):
            return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}
        *before, last = prompt
        return {
            "generated_text": [*before, {"role": last["role"], "content": last["content"] + new}]
        }


_EXPECTED = "text_inputs must be a string, a chat or a list of them"


def _check_chat(prompt: Any) -> None:
    if not isinstance(prompt, Sequence) or not all(isinstance(m, Mapping) for m in prompt):
        raise TypeError(f"{_EXPECTED}, got {type(prompt).__name__} as an item")
    for message in prompt:
        if "role" not in message or "content" not in message:
            raise ValueError(f"a message must have a role and content, got {list(message)}")


def _continues(chat: Sequence[Mapping[str, Any]], options: _Options) -> bool:
    """Return whether the text continues the last message of a chat."""
    if options.continue_final_message is not None:
        return options.continue_final_message
    return bool(chat) and chat[-1]["role"] == "assistant"


def pipeline(
    task: str = "text-generation",
    model: str | Path | MistralForCausalLM | None = None,
    *,
    tokenizer: str | Path | MistralTokenizer | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    trust_remote_code: bool | None = None,
    use_fast: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> TextGenerationPipeline:
    """Load a model and its tokenizer as one function, as transformers' `pipeline` does.

    Texts are sampled at a temperature of 0.7 and have up to 256 new tokens, unless `options` or the
    model's generation_config.json set other values.

    Args:
        task: "text-generation".
        model: a folder, a hub id, "tiny" for the bundled model, or a model object.
        tokenizer: a folder, a hub id, or a tokenizer object; None: the tokenizer in `model`.
        dtype: data type of the weights; None or "auto": that of most stored weights.
        torch_dtype: earlier name of `dtype`.
        device: device of the model; an integer is the index of a GPU, and -1 is the CPU. None: the
            GPU if there is one, else the CPU; a model object stays on its device.
        device_map: see `MistralForCausalLM.from_pretrained`.
        trust_remote_code: without effect, since no code of a checkpoint is run.
        use_fast: without effect.
        model_kwargs: further arguments of `MistralForCausalLM.from_pretrained`.
        **options: options of every call, see `TextGenerationPipeline.__call__`; and `revision`,
            `token`, `cache_dir`, `local_files_only` and `force_download` of a hub id.

    Returns:
        The pipeline. `model` and `tokenizer` are its attributes.

    Raises:
        TypeError: `model` has another type.
        ValueError: an argument is given twice, or a model object is given without a tokenizer.
        NotImplementedError: `task` or an argument is not offered.
        CheckpointError: the model cannot be loaded.
        TokenizerError: the tokenizer cannot be opened.

    Example:
        >>> from mistral_kernels import pipeline
        >>> pipe = pipeline("text-generation", model="tiny", device="cpu")
        >>> pipe("He was not at all", do_sample=False, max_new_tokens=4, return_full_text=False)
        [{'generated_text': 'in the way to'}]
    """
    if task != "text-generation":
        raise NotImplementedError(
            f"task must be 'text-generation', got {task!r}; call transformers.pipeline"
        )
    refused = {name: options.pop(name) for name in _LOADING if name in options}
    check_unsupported("pipeline", refused, _LOADING)
    if not isinstance(model, (str, Path, MistralForCausalLM)):
        raise TypeError(
            "model must be a folder, a hub id or a MistralForCausalLM, got "
            f"{type(model).__name__}; for another model, call transformers.pipeline"
        )
    if tokenizer is None:
        if isinstance(model, MistralForCausalLM):
            raise ValueError("tokenizer must be given with a model object, got None")
        tokenizer = model
    if not isinstance(tokenizer, (str, Path, MistralTokenizer)):
        raise TypeError(
            "tokenizer must be a folder, a hub id or a MistralTokenizer, got "
            f"{type(tokenizer).__name__}; open it with AutoTokenizer of this package"
        )
    if device == -1:
        device = "cpu"
    given = {"dtype": dtype, "torch_dtype": torch_dtype, "device": device, "device_map": device_map}
    given |= {name: options.pop(name) for name in HUB_ARGUMENTS if name in options}
    loading = dict(model_kwargs or {})
    for name, value in given.items():
        if value is not None:
            if name in loading:
                raise ValueError(f"{name} must not be in model_kwargs as well, got {value!r}")
            loading[name] = value
    if isinstance(tokenizer, (str, Path)):
        hub = {name: loading[name] for name in HUB_ARGUMENTS if name in loading}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **hub)
    if isinstance(model, MistralForCausalLM):
        if "device" in loading:
            model.to(loading["device"])
    else:
        if not loading.keys() & {"device", "device_map"}:
            loading["device_map"] = "auto"
        model = MistralForCausalLM.from_pretrained(model, **loading)
    return TextGenerationPipeline(model, tokenizer, **options)
