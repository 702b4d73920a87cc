"""Test chat templates in a folder, which transformers renders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_cases import ANSWER, SYSTEM, USER, chat_ids, transformers, write

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
# Each template uses a feature that a renderer other than that of transformers may lack.
TEMPLATES = [
    "{% if tools is not none %}TOOLS{{ tools | tojson }}{% endif %}{{ messages | length }}",
    "{% if documents is none %}{{ messages[0]['content'] }}{% else %}{{ documents }}{% endif %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}\n   {% if add_generation_prompt %}\n<go>\n{% endif %}\n",
    "{{ bos_token }}|{{ cls_token }}|{{ sep_token }}|{{ mask_token }}|{{ pad_token }}|{{ none }}",
    "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = a.n + 2 %}{% endfor %}{{a.n}}",
    "{{ messages[0].content | trim | upper }}{{ undefined_variable }}{{ [1, 2] | join(',') }}",
]


@pytest.fixture
def folder(json_folder: Path) -> Path:
    """Return a folder without a template, with additional named tokens."""
    path = json_folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"image_token": "<image>", "mask_token": "<mask>"}
    del config["chat_template"]
    path.write_text(json.dumps(config))
    named = {"cls_token": "<cls>", "sep_token": {"content": "<sep>", "lstrip": False}}
    return write(json_folder, special_tokens_map=named)


def open_with(folder: Path, template: str) -> MistralTokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return MistralTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_equal_transformers(folder: Path, template: str) -> None:
    ours = open_with(folder, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    options: list[dict[str, Any]] = [{}, {"tools": [TOOL]}, {"documents": [{"title": "t"}]}]
    for messages in ([USER], [SYSTEM, USER, ANSWER]):
        for option in options:
            for prompt in (True, False):
                given = {"tokenize": False, "add_generation_prompt": prompt, **option}
                text = theirs.apply_chat_template(messages, **given)
                assert ours.apply_chat_template(messages, **given) == text
    if "tools" in template:
        assert "TOOLS" not in ours.apply_chat_template([USER], tokenize=False)


def test_model_specific_token_is_a_template_variable(folder: Path) -> None:
    """Check the result of transformers 5; earlier versions render an empty text."""
    tokenizer = open_with(folder, "{{ image_token }}")
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "<image>"


def test_none_values_in_messages_are_absent(folder: Path) -> None:
    """Clients send content=None with tool calls; the text "None" must not be rendered."""
    tokenizer = open_with(folder, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    messages = [USER, {"role": "assistant", "content": None}, {"role": "assistant"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[Hi][][]"
    assert messages[1] == {"role": "assistant", "content": None}


def test_rendered_names_of_special_tokens_are_encoded_as_tokens(folder: Path) -> None:
    tokenizer = open_with(folder, "{{ bos_token }}{{ messages[0].content }}{{ sep_token }}")
    ids = chat_ids(tokenizer, [USER])
    middle = tokenizer.encode("Hi", bos=False)
    assert ids == [1, *middle, *tokenizer.encode("<sep>", bos=False)]
    assert len(ids) > len(middle) + 1
    out = tokenizer.apply_chat_template([USER])
    assert out == {"input_ids": ids, "attention_mask": [1] * len(ids)}


@pytest.mark.parametrize("form", ["files", "list", "object"])
def test_template_is_chosen_by_name_or_tools(folder: Path, form: str) -> None:
    texts = {"default": "D{{ messages | length }}", "tool_use": "T", "rag": "R{{ documents[0] }}"}
    if form == "files":
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(texts[name])
        (folder / "chat_template.jinja").write_text(texts["default"])
    else:
        pairs = [{"name": name, "template": text} for name, text in texts.items()]
        write(folder, tokenizer_config={"chat_template": pairs if form == "list" else texts})
    tokenizer = MistralTokenizer.from_pretrained(folder)

    def render(**options: Any) -> str:
        return tokenizer.apply_chat_template([USER], tokenize=False, **options)

    assert render() == "D1"
    assert render(tools=[TOOL]) == "T"
    assert render(chat_template="rag", documents=[{"a": 1}]) == "R{'a': 1}"
    assert render(chat_template="given {{ messages[0].role }}") == "given user"
    if form != "list":
        return
    write(folder, tokenizer_config={"chat_template": pairs[1:]})
    tokenizer = MistralTokenizer.from_pretrained(folder)
    assert render(chat_template="rag", documents=[{}]) == "R{}"
    with pytest.raises(
        TokenizerError, match="but none is the default; chat_template must be one of"
    ):
        render()


def test_template_errors_are_one_line(folder: Path) -> None:
    cases = {
        "{{ raise_exception('no role\\n' + messages[0].role) }}": "messages: no role user$",
        "{{ messages[0].__class__.__mro__ }}": "messages: access to attribute '__class__'.*unsafe",
        "{% for m in messages %}": "messages: Unexpected end of template",
        "{{ 1 / 0 }}": "messages: division by zero$",
        "{{ messages[7].content }}": "messages: list object has no element 7$",
        "{{ '\\ud800' }}": "the rendered conversation has a lone surrogate, '\\\\ud800'",
        "{% for i in range(1000000000) %}{% endfor %}": "messages: Range too big",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "messages: maximum recursion depth",
    }
    for template, message in cases.items():
        tokenizer = open_with(folder, template)
        with pytest.raises(TokenizerError, match=f"^{message}") as caught:
            tokenizer.apply_chat_template([USER])
        assert "\n" not in str(caught.value)
    tokenizer = open_with(folder, "{{ messages }}")
    for wrong, message in (
        ({"conversation": []}, "conversation must hold at least one message, got none"),
        (
            {"tools": ["f"]},
            "messages: Tools should either be a JSON schema",
        ),
        ({"documents": ["d"]}, "messages: Documents should be a list of dicts"),
        ({"chat_template": 3}, "chat_template must be a str, got int"),
        ({"chat_template": "\ud800"}, "chat_template has a lone surrogate"),
    ):
        with pytest.raises(TokenizerError, match=f"^{message}"):
            tokenizer.apply_chat_template(**({"conversation": [USER]} | wrong))


def test_folder_without_template_requires_one_as_argument(json_folder: Path) -> None:
    write(json_folder, tokenizer_config={})
    base = MistralTokenizer.from_pretrained(json_folder)
    assert base.chat_version is None
    assert not base.has_chat_template
    with pytest.raises(TokenizerError, match=r"no chat template, neither .* is it a base model"):
        base.apply_chat_template([USER])
    assert base.apply_chat_template([USER], chat_template="x", tokenize=False) == "x"


def test_missing_transformers_raises_install_command(
    json_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = MistralTokenizer.from_pretrained(json_folder)
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_template_utils", None)
    with pytest.raises(TokenizerError) as caught:
        tokenizer.apply_chat_template([USER])
    file = json_folder / "tokenizer.json"
    expected = f'the chat template of {file} needs transformers: pip install "mistral_kernels[hf]"'
    assert str(caught.value) == expected
