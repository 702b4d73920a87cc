"""Comparison of `pipeline` with that of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mistral_kernels
from mistral_kernels.text.pipeline import TextGenerationPipeline

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

INSTRUCT = "mistralai/Mistral-Nemo-Instruct-2407"
TEXT, OTHER = "the quick brown fox", "d'accord, ça va: the lazy dog"
USER, ASSISTANT = {"role": "user", "content": TEXT}, {"role": "assistant", "content": "It is"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
# Inputs and options of the calls whose results are compared.
CALLS: list[tuple[Any, dict[str, Any]]] = [
    (TEXT, {}),
    (TEXT, {"return_full_text": False}),
    (TEXT, {"return_full_text": True, "skip_special_tokens": False}),
    (TEXT, {"return_tensors": True}),
    (TEXT, {"return_text": True}),
    (TEXT, {"add_special_tokens": False}),
    (TEXT, {"prefix": "over the "}),
    (TEXT, {"prefix": "over the ", "max_new_tokens": None, "max_length": 12}),
    (TEXT, {"max_new_tokens": None, "max_length": 12, "truncation": True}),
    (TEXT, {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 3}}),
    (TEXT, {"clean_up_tokenization_spaces": True}),
    (TEXT, {"stop_sequence": "p"}),
    (TEXT, {"stop_sequence": ["W", "Q"], "batch_size": 3}),
    (TEXT, {"repetition_penalty": 1.3, "num_workers": 2}),
    (TEXT, {"generation_config": transformers.GenerationConfig(max_new_tokens=4, do_sample=False)}),
    ([TEXT], {}),
    ([TEXT, OTHER], {}),
    ([TEXT, OTHER, "a"], {"batch_size": 2}),
    ([USER], {}),
    ([USER], {"return_full_text": False}),
    ([SYSTEM, USER, ASSISTANT, USER], {}),
    ([USER, ASSISTANT], {}),
    ([USER, ASSISTANT], {"return_full_text": False}),
    ([USER], {"continue_final_message": True}),
    ([USER], {"tools": [TOOL]}),
    ([[USER]], {}),
    ([[USER], [SYSTEM, USER]], {}),
]


@pytest.fixture(scope="module")
def pipes(folder_of: Callable[[str], Path]) -> tuple[Any, Any]:
    """Return the pipelines of both packages for the same folder."""
    folder = folder_of(INSTRUCT)
    ours = mistral_kernels.pipeline("text-generation", model=folder, device="cpu")
    theirs = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    return ours, theirs


@pytest.mark.parametrize("i", range(len(CALLS)))
def test_greedy_results_equal_transformers(pipes: tuple[Any, Any], i: int) -> None:
    inputs, options = CALLS[i]
    options = GREEDY | options
    if "generation_config" in options:
        options = CALLS[i][1]
    ours, theirs = pipes
    theirs.tokenizer.pad_token_id = 2
    assert ours(inputs, **options) == theirs(inputs, **options)


def test_options_of_the_pipeline_apply_to_every_call(folder_of: Callable[[str], Path]) -> None:
    """The options of a call replace them. A generation_config replaces those of `generate`."""
    folder = str(folder_of(INSTRUCT))
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    options = GREEDY | {"return_full_text": False, "repetition_penalty": 1.2}
    ours, theirs = (
        package.pipeline("text-generation", folder, device="cpu", **options)
        for package in (mistral_kernels, transformers)
    )
    for call in ({}, {"max_new_tokens": 4}, {"generation_config": config}):
        assert ours(TEXT, **call) == theirs(TEXT, **call)


@pytest.mark.parametrize(
    ("saved", "options", "expected"),
    [
        ({}, {}, {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}),
        ({}, {"do_sample": False}, {"max_new_tokens": 256, "do_sample": False}),
        ({"do_sample": False}, {}, {"max_new_tokens": 256}),
        ({"temperature": 0.3}, {"max_length": 7}, {"do_sample": True, "max_length": 7}),
        ({"max_length": 30}, {"top_p": 0.5}, {"do_sample": True, "temperature": 0.7, "top_p": 0.5}),
    ],
)
def test_defaults_equal_transformers(
    folder_of: Callable[[str], Path],
    saved: dict[str, Any],
    options: dict[str, Any],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare the arguments that `generate` receives."""
    folder = folder_of(INSTRUCT)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **saved}))
    for package in (mistral_kernels, transformers):
        pipe = package.pipeline("text-generation", str(folder), device="cpu")
        pipe.tokenizer.pad_token_id = 2
        received: dict[str, Any] = {}

        def generate(_: Any = None, received: dict[str, Any] = received, **arguments: Any) -> Any:
            received |= arguments
            raise InterruptedError

        monkeypatch.setattr(pipe.model, "generate", generate)
        with pytest.raises(InterruptedError):
            pipe(TEXT, **options)
        for name in ("input_ids", "attention_mask", "pad_token_id", "tokenizer"):
            received.pop(name, None)
        assert received == expected, package


def test_samples_continue_their_prompts(pipes: tuple[Any, Any]) -> None:
    pipe, _ = pipes
    texts = pipe([TEXT, OTHER], num_return_sequences=3, max_new_tokens=5, batch_size=2)
    assert [len(records) for records in texts] == [3, 3]
    for prompt, records in zip((TEXT, OTHER), texts, strict=True):
        assert all(record["generated_text"].startswith(prompt) for record in records)
        assert len({record["generated_text"] for record in records}) > 1


def test_an_iterable_is_read_one_batch_at_a_time(pipes: tuple[Any, Any]) -> None:
    pipe, _ = pipes
    read: list[str] = []

    def prompts():
        for text in (TEXT, OTHER, "a", "b"):
            read.append(text)
            yield text

    results = pipe(prompts(), batch_size=2, **GREEDY)
    assert not read
    first = next(results)
    assert read == [TEXT, OTHER]
    assert [first, *results] == pipe([TEXT, OTHER, "a", "b"], **GREEDY)


def test_streamer_of_transformers_receives_prompt_and_text(
    pipes: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, _ = pipes
    streamer = transformers.TextStreamer(pipe.tokenizer, skip_special_tokens=True)
    (record,) = pipe(TEXT, streamer=streamer, **GREEDY)
    out = capsys.readouterr().out
    assert (
        out
        == pipe.tokenizer.decode(
            pipe(TEXT, return_tensors=True, **GREEDY)[0]["generated_token_ids"],
            skip_special_tokens=True,
        )
        + "\n"
    )
    assert record["generated_text"].startswith(TEXT)


def test_model_and_tokenizer_objects_are_used_as_they_are(pipes: tuple[Any, Any]) -> None:
    pipe, _ = pipes
    again = mistral_kernels.pipeline(model=pipe.model, tokenizer=pipe.tokenizer, device=-1)
    assert isinstance(again, TextGenerationPipeline)
    assert again.model is pipe.model
    assert again.tokenizer is pipe.tokenizer
    assert again.device == torch.device("cpu")
    assert again(TEXT, **GREEDY) == pipe(TEXT, **GREEDY)
    path = mistral_kernels.pipeline(model=pipe.model, tokenizer=pipe.tokenizer.path.parent)
    assert path(TEXT, **GREEDY) == pipe(TEXT, **GREEDY)


def test_arguments_of_loading_set_dtype_and_device(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(INSTRUCT)
    for arguments in (
        {"torch_dtype": torch.bfloat16, "device_map": "cpu", "trust_remote_code": True},
        {"dtype": "bfloat16", "device": "cpu", "use_fast": True, "framework": "pt"},
        {"model_kwargs": {"torch_dtype": torch.bfloat16, "device_map": "cpu"}},
    ):
        pipe = mistral_kernels.pipeline("text-generation", folder, **arguments)
        assert (pipe.model.dtype, pipe.device.type) == (torch.bfloat16, "cpu")


NO_MODEL = "model must be a folder, a hub id or a MistralForCausalLM, got {}; for another model, "
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"task": "fill-mask"},
        NotImplementedError,
        "task must be 'text-generation', got 'fill-mask'; call transformers.pipeline",
    ),
    ({"model": None}, TypeError, NO_MODEL.format("NoneType") + "call transformers.pipeline"),
    ({"model": 3}, TypeError, NO_MODEL.format("int") + "call transformers.pipeline"),
    (
        {"dtype": "auto", "model_kwargs": {"dtype": "float32"}},
        ValueError,
        "dtype must not be in model_kwargs as well, got 'auto'",
    ),
    (
        {"image_processor": "x"},
        NotImplementedError,
        "image_processor must be None, got 'x'; leave it out: text generation needs only a "
        "tokenizer",
    ),
    (
        {"tokenizer": 3},
        TypeError,
        "tokenizer must be a folder, a hub id or a MistralTokenizer, got int; open it with "
        "AutoTokenizer of this package",
    ),
    ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments_raise_one_line(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        mistral_kernels.pipeline(**({"model": "tiny", "device": "cpu"} | arguments))
    assert str(caught.value) == message


def test_model_object_requires_a_tokenizer(pipes: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer must be given with a model object"):
        mistral_kernels.pipeline(model=pipes[0].model)


INPUTS = "text_inputs must be a string, a chat or a list of them, got "
BAD_CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (3, {}, TypeError, f"{INPUTS}int"),
    (USER, {}, TypeError, f"{INPUTS}dict"),
    ([TEXT, 3], {}, TypeError, f"{INPUTS}int as an item"),
    ([USER, TEXT], {}, TypeError, f"{INPUTS}list as an item"),
    ([], {}, ValueError, "text_inputs must have at least one prompt, got none"),
    ([{"role": "user"}], {}, ValueError, "a message must have a role and content, got ['role']"),
    (TEXT, {"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
    (
        TEXT,
        {"return_tensors": True, "return_full_text": True},
        ValueError,
        "return_tensors must be None with return_full_text, got True",
    ),
    (
        TEXT,
        {"handle_long_generation": "hole"},
        NotImplementedError,
        "handle_long_generation must be None, got 'hole'; shorten the prompt",
    ),
    (TEXT, {"top_q": 1}, TypeError, "generate() got an unexpected argument 'top_q'"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "message"), BAD_CALLS)
def test_bad_calls_raise_one_line(
    pipes: tuple[Any, Any],
    inputs: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        pipes[0](inputs, **GREEDY, **options)
    assert str(caught.value) == message
