"""Fixtures of opened tokenizers and of folders with a tokenizer.

The modules that use them are skipped if the tokenizer libraries are not installed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from mistral_kernels.tokenizer import MistralTokenizer


@pytest.fixture(scope="session")
def open_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that opens a tokenizer of mistral-common, or a trained tokenizer.json."""
    from support.tokenizer_cases import DATA, JSON, train_json

    @functools.cache
    def open_(name: str) -> MistralTokenizer:
        if name not in JSON:
            return MistralTokenizer.from_pretrained(DATA / name)
        folder = tmp_path_factory.mktemp(name)
        train_json(folder / "tokenizer.json", byte_level=name == "byte_level")
        return MistralTokenizer.from_pretrained(folder)

    return open_


@pytest.fixture(params=["byte_fallback", "byte_level"])
def json_folder(request: Any, tmp_path: Path) -> Path:
    """Write a tokenizer.json with a tokenizer_config.json that has a chat template."""
    from support.tokenizer_cases import train_json

    train_json(tmp_path / "tokenizer.json", byte_level=request.param == "byte_level")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == "system" %}{{ raise_exception("no role " + m.role) }}{% endif %}
    <|{{ m["role"] }}|>{{ m["content"] | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
