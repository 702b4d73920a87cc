"""Comparison of `AutoTokenizer` with that of transformers, in folders of Mistral's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.model_folders import FAMILIES, write_tokenizer
from support.tokenizer_cases import ANSWER, SYSTEM, TEXTS, USER, transformers, write

from mistral_kernels.tokenizer import AutoTokenizer, MistralTokenizer

INSTRUCT = "mistralai/Mistral-7B-Instruct-v0.3"


@pytest.fixture(params=[INSTRUCT, "mistralai/Mistral-7B-Instruct-v0.1"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with Mistral's own tokenizer.model and a tokenizer.json."""
    write_tokenizer(tmp_path, FAMILIES[request.param])
    # Otherwise transformers replaces parts of the tokenizer.json by those of its LlamaTokenizer.
    return write(tmp_path, config={"model_type": "mistral"})


def current_weather(location: str) -> None:
    """Get the current weather.

    Args:
        location: The city.
    """


def test_results_equal_transformers(folder: Path) -> None:
    """Names of special tokens in a text are tokens; tools may be functions."""
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, MistralTokenizer)
    for text in (*TEXTS, "<s>[INST] Hi [/INST] a</s> b"):
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip)
    conversation = [USER, ANSWER, USER]
    options: dict[str, Any] = {"add_generation_prompt": True}
    if "tools" in ours.chat_template:
        conversation = [SYSTEM, *conversation]
        options["tools"] = [current_weather]
    for tokenize in (False, True):
        actual, expected = (
            tokenizer.apply_chat_template(conversation, tokenize=tokenize, **options)
            for tokenizer in (ours, theirs)
        )
        if tokenize:
            actual, expected = actual["input_ids"], expected["input_ids"]
        assert actual == expected


def test_tokenizer_json_is_opened_first(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    assert (tokenizer.path.name, tokenizer.padding_side) == ("tokenizer.json", "right")
    assert MistralTokenizer.from_pretrained(folder).path.name == "tokenizer.model"
    assert AutoTokenizer.from_pretrained(folder / "tokenizer.model").chat_version != "jinja"
    (folder / "tokenizer.json").unlink()
    assert AutoTokenizer.from_pretrained(folder).path.name == "tokenizer.model"


def test_bad_tokenizer_json_is_an_error(folder: Path) -> None:
    """Another file of the folder does not replace it."""
    write(folder, tokenizer="{")
    with pytest.raises(ValueError, match=r"tokenizer.json must be JSON"):
        AutoTokenizer.from_pretrained(folder)
