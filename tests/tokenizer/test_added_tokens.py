"""Test tokens that a fine-tuned model adds to tokenizer.model, without a tokenizer.json."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_cases import (
    DATA,
    SENTENCEPIECE,
    USER,
    chat_ids,
    make_tekken,
    refused,
    streamed,
    write,
)

from mistral_kernels.tokenizer import MistralTokenizer

START, END = "<|im_start|>", "<|im_end|>"
ADDED = {END: 32000, START: 32001}
NAMES = {"bos_token": "<s>", "eos_token": END, "unk_token": "<unk>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RENDERED = f"{START}user\nHi there{END}\n{START}assistant\n"
# Ids of RENDERED according to LlamaTokenizer of transformers 4.56.
RENDERED_IDS = [32001, 2188, 13, 23809, 736, 32000, 28705, 13, 32001, 13892, 13]


def described(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """Return the JSON object that describes an added token."""
    all_flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": special, **all_flags, **flags}


# The same tokens in the three forms in which a folder can describe them.
FORMS: dict[str, dict[str, Any]] = {
    "added_tokens": {"added_tokens": ADDED, "tokenizer_config": NAMES},
    "map": {
        "added_tokens": ADDED,
        "tokenizer_config": NAMES | {"eos_token": "</s>"},
        "special_tokens_map": NAMES | {"eos_token": described(END)},
    },
    "decoder": {
        "added_tokens": {"ignored": 5},
        "special_tokens_map": {"eos_token": "</s>"},
        "tokenizer_config": NAMES
        | {
            "added_tokens_decoder": {
                "32001": described(START, special=False),
                "32000": described(END),
                "1": described("<s>"),
            }
        },
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_added_tokens_are_encoded_and_decoded(tmp_path: Path, form: str) -> None:
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", **FORMS[form]))
    assert tokenizer.path.name == "tokenizer.model"
    assert len(tokenizer) == 32002
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 32000)
    assert tokenizer.encode(RENDERED) == [1, *RENDERED_IDS]
    # END is special and skipped; START is not special, so it is part of the text.
    text = f"{START} user\nHi there \n{START} assistant\n"
    assert tokenizer.decode(RENDERED_IDS, skip_special_tokens=True) == text
    assert tokenizer.decode([1, *RENDERED_IDS]) == f"<s>{text}".replace("there ", f"there{END} ")
    for skip in (True, False):
        assert streamed(tokenizer, RENDERED_IDS, skip) == tokenizer.decode(RENDERED_IDS, skip)
    assert tokenizer.decode([32002, 40000]) == ""


def test_texts_between_added_tokens_are_encoded_separately(tmp_path: Path) -> None:
    """Check that a space precedes each text ("legacy"), as in slow tokenizers of transformers."""
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", **FORMS["decoder"]))
    plain = MistralTokenizer.from_pretrained(DATA / SENTENCEPIECE["v1"])
    ids = {"<s>": 1, "<unk>": 0, START: 32001, END: 32000}
    words = [*ids, "<|im_", "start|", "</s>", " ", "  ", "\n", "user", "Hi there", "漢", "<"]
    for _ in range(300):
        parts = random.choices(words, k=random.randrange(12))
        expected, text = [], ""
        for part in [*parts, "<s>"]:
            if part in ids:
                expected += plain.encode(text, bos=False) if text else []
                expected.append(ids[part])
                text = ""
            else:
                text += part
        actual = tokenizer.encode("".join(parts), bos=False)
        assert [*actual, 1] == expected, parts
        assert streamed(tokenizer, actual) == tokenizer.decode(actual, skip_special_tokens=True)


def test_space_precedes_only_the_first_text_without_legacy(tmp_path: Path) -> None:
    """Check `"legacy": false`; the expected ids are those of transformers 4.56."""
    files = {"added_tokens": ADDED, "tokenizer_config": NAMES | {"legacy": False}}
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", **files))
    assert tokenizer.encode(f"x{END}y z{END} w{END}", bos=False) == (
        [1318, 32000, 28724, 686, 32000, 275, 32000]
    )
    assert tokenizer.encode(RENDERED)[:4] == [1, 32001, 1838, 13]
    assert tokenizer.encode("x") == [1, 1318]


def test_lstrip_and_rstrip_remove_white_space(tmp_path: Path) -> None:
    decoder = {"32000": described(END, lstrip=True), "32001": described(START, rstrip=True)}
    config = NAMES | {"added_tokens_decoder": decoder}
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", tokenizer_config=config))
    assert tokenizer.encode(f"x \n{END} y") == tokenizer.encode(f"x{END} y")
    assert tokenizer.encode(f"x {START}\t y") == tokenizer.encode(f"x {START}y")
    assert tokenizer.encode(f"{START} {END}") == [1, 32001, 32000]


def test_named_tokens_without_id_are_added_at_the_end(tmp_path: Path) -> None:
    config = {"pad_token": "[PAD]", "additional_special_tokens": [START, described("<call>")]}
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", tokenizer_config=config))
    assert tokenizer.pad_token_id == 32000
    assert len(tokenizer) == 32003
    assert tokenizer.encode(f"[PAD]{START}<call>") == [1, 32000, 32001, 32002]
    assert tokenizer.all_special_ids == {0, 1, 2, 32000, 32001, 32002}


def test_descriptions_of_mistrals_own_tokens_add_no_token(tmp_path: Path) -> None:
    """Mistral's own folders describe <s> and </s>, but these remain plain text in a prompt."""
    decoder = {str(i): described(name) for i, name in enumerate(("<unk>", "<s>", "</s>"))}
    config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": decoder}
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", tokenizer_config=config))
    plain = MistralTokenizer.from_pretrained(DATA / SENTENCEPIECE["v1"])
    text = "<s>[INST] Hi</s>"
    assert tokenizer.encode(text) == plain.encode(text)
    assert len(tokenizer) == 32000


def test_added_token_replaces_a_token_of_the_vocabulary(tmp_path: Path) -> None:
    files = {"added_tokens": {"<call>": 700, END: 32007}, "tokenizer_config": NAMES}
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", **files))
    assert tokenizer.encode(f"<call>{END}") == [1, 700, 32007]
    assert len(tokenizer) == 32008
    assert tokenizer.decode([700, 32003, 32007]) == f"<call>{END}"


def test_conversations_use_added_tokens(tmp_path: Path) -> None:
    config = NAMES | {"chat_template": CHATML}
    folder = write(tmp_path, "v1", added_tokens=ADDED, tokenizer_config=config)
    tokenizer = MistralTokenizer.from_pretrained(folder)
    assert tokenizer.chat_version == "jinja"
    assert tokenizer.has_chat_template
    message = USER | {"content": "Hi there"}
    prompt = {"add_generation_prompt": True}
    assert tokenizer.apply_chat_template([message], tokenize=False, **prompt) == RENDERED
    assert chat_ids(tokenizer, [message], add_generation_prompt=True) == RENDERED_IDS
    # Without added tokens, START and END in the template are plain text, as in training.
    (folder / "added_tokens.json").unlink()
    write(folder, tokenizer_config={"chat_template": CHATML})
    plain = MistralTokenizer.from_pretrained(folder)
    assert plain.chat_version == "jinja"
    assert len(plain) == 32000
    assert plain.decode(chat_ids(plain, [message], add_generation_prompt=True)) == RENDERED


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"x": -1}, ": the id of 'x' must be in [0, 2147483648), got '-1'"),
        ({"x": 2**40}, ": the id of 'x' must be in [0, 2147483648), got '1099511627776'"),
        ({"x": 1.5}, ": x must be an integer, got 1.5"),
        ({"x": "7"}, ": x must be an integer, got '7'"),
        ({"x": True}, ": x must be an integer, got True"),
        ({"x": 3, "y": 3}, ": the id of 'y' must be unique, got 3, the id of 'x'"),
        ({"": 32000}, ": content of an added token must not be empty, got ''"),
        ('{"\\ud800": 3}', ": content of an added token must be valid Unicode, got '\\ud800'"),
        ([1], " must be a JSON object, got list"),
    ],
)
def test_bad_added_tokens_json_is_refused(tmp_path: Path, added: Any, message: str) -> None:
    refused(write(tmp_path, "v1", added_tokens=added), f"added_tokens.json{message}")


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ([], "added_tokens_decoder must be an object, got []"),
        ({"x": described("a")}, "the id of 'a' must be in [0, 2147483648), got 'x'"),
        ({"-1": described("a")}, "the id of 'a' must be in [0, 2147483648), got '-1'"),
        ({"9" * 5000: described("a")}, "the id of 'a' must be in [0, 2147483648), got '99999"),
        (
            {"7": described("a"), "07": described("b")},
            "the id of 'b' must be unique, got 07, the id of 'a'",
        ),
        ({"7": "a"}, "added_tokens_decoder.7 must be an object, got 'a'"),
        ({"7": {}}, "content of an added token must not be empty, got None"),
        ({"7": {"content": ["a"]}}, "added_tokens_decoder.7.content must be a string, got ["),
        ({"7": {"special": 1}}, "added_tokens_decoder.7.special must be true or false, got 1"),
    ],
)
def test_bad_added_tokens_decoder_is_refused(tmp_path: Path, decoder: Any, message: str) -> None:
    folder = write(tmp_path, "v1", tokenizer_config={"added_tokens_decoder": decoder})
    refused(folder, f"tokenizer_config.json: {message}")


def test_single_word_requires_tokenizer_json(tmp_path: Path) -> None:
    decoder = {"32000": described("a", single_word=True)}
    write(tmp_path, "v1", tokenizer_config={"added_tokens_decoder": decoder})
    refused(
        tmp_path, "tokenizer.model: single_word must be false for the added token 'a'; single_w"
    )


def test_tokens_added_to_tekken_require_tokenizer_json(tmp_path: Path) -> None:
    tekken = make_tekken()
    size = tekken["config"]["default_vocab_size"]
    write(tmp_path, tekken=tekken, added_tokens={START: size})
    refused(tmp_path, "tokens cannot be added to tekken.json; a tokenizer.json is required")
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, added_tokens={START: size - 1}))
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer.encode("the 漢 é"), skip_special_tokens=True) == "the 漢 é"
