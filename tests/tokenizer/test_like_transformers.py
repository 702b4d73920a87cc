"""Compare calls, attributes and chat templates with AutoTokenizer of transformers."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_checkpoints import SMALL, varied_model
from support.tokenizer_cases import (
    ANSWER,
    CHATML,
    CORPUS,
    FOLLOW_UP,
    MARKERS,
    TEXTS,
    TOKENIZERS,
    USER,
    make_folder,
    transformers,
    write,
)

from mistral_kernels import AutoTokenizer, MistralTokenizer
from mistral_kernels.tokenizer import TokenizerError, TokenizerOutput

FAST = TOKENIZERS[:4]


@pytest.fixture(params=TOKENIZERS)
def pair(request: Any, tmp_path: Path) -> tuple[MistralTokenizer, Any]:
    """Return a tokenizer of this package and that of transformers for the same files."""
    folder = make_folder(tmp_path, request.param)
    options = {"add_bos_token": True, "add_eos_token": True}
    options = options if request.param == "bos_and_eos" else {}
    ours = AutoTokenizer.from_pretrained(folder, use_fast=False, trust_remote_code=True, **options)
    opened = transformers.AutoTokenizer
    if request.param == "sentencepiece":  # AutoTokenizer requires protobuf for this folder
        opened = transformers.MistralCommonBackend
    theirs = opened.from_pretrained(folder, **options)
    theirs.pad_token = theirs.eos_token
    ours.pad_token = ours.eos_token
    return ours, theirs


def random_text() -> str:
    words = [*" ".join(CORPUS).split(), *TEXTS, "", " ", "\n"]
    return " ".join(random.choices(words, k=random.randrange(6)))


def plain(output: Any) -> Any:
    """Return the output of a call with lists instead of tensors and arrays."""
    if isinstance(output, (dict, transformers.BatchEncoding)):
        return {name: plain(value) for name, value in output.items()}
    return output.tolist() if hasattr(output, "tolist") else output


def same(call: Any, ours: Any, theirs: Any) -> bool:
    """Compare one call of both tokenizers; return whether both succeeded, else both must raise."""
    try:
        expected = call(theirs)
    except Exception:
        with pytest.raises(TokenizerError) as caught:
            call(ours)
        assert "\n" not in str(caught.value)
        return False
    actual = call(ours)
    assert plain(actual) == plain(expected)
    if hasattr(expected, "keys"):
        types = {type(value) for value in expected.values()}
        assert {type(value) for value in actual.values()} == types
    return True


@pytest.mark.filterwarnings("ignore:.?max_length.? is ignored")
def test_calls_equal_transformers(pair: Any) -> None:
    ours, theirs = pair
    succeeded = 0
    for _ in range(120):
        ours.truncation_side = theirs.truncation_side = random.choice(["left", "right"])
        ours.padding_side = theirs.padding_side = random.choice(["left", "right"])
        if random.random() < 0.2:
            length = random.choice([5, 12, 10**30])
            ours.model_max_length = theirs.model_max_length = length
        choices = {
            "padding": [True, "longest", "max_length", False, "do_not_pad"],
            "truncation": [True, False, None, "longest_first", "do_not_truncate"],
            "max_length": [None, 2, 3, 8, 17],
            "pad_to_multiple_of": [None, 4, 8],
            "padding_side": [None, "left", "right"],
            "return_tensors": [None, "pt", "np"],
            "return_attention_mask": [None, True, False],
            "add_special_tokens": [True, False],
        }
        options = {name: random.choice(values) for name, values in choices.items()}
        options = {name: value for name, value in options.items() if random.random() < 0.6}
        texts: Any = [random_text() for _ in range(random.randint(1, 4))]
        # MistralCommonBackend does not pad an empty text, and torch.tensor([[], [1]]) is empty.
        texts[0] += "x"
        text = random.choice([texts, texts[0], texts[:1], tuple(texts)])
        if options.get("return_tensors") == "np":
            text = texts[0]  # transformers returns an array of arrays for unequal lengths
        succeeded += same(lambda t: t(text, **options), ours, theirs)  # noqa: B023
    assert succeeded > 50


@pytest.mark.parametrize("case", FAST)
def test_lengths_equal_transformers(case: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, case)
    ours = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    for text in ("", "the fox", ["the fox", ""], ["a"]):
        for options in ({}, {"padding": True, "return_tensors": "pt"}):
            given = {"return_length": True, **options}
            assert same(lambda t: t(text, **given), ours, theirs)  # noqa: B023


def test_encode_tokens_and_vocabulary_equal_transformers(pair: Any) -> None:
    ours, theirs = pair
    vocab = ours.get_vocab()
    expected = theirs.get_vocab()
    if ours.path.name == "tekken.json":  # transformers maps the text of incomplete characters too
        del expected["\ufffd"]
    assert vocab == expected
    assert ours.vocab == vocab
    for text in [*TEXTS, *(random_text() for _ in range(20))]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
        options = {"truncation": True, "max_length": 3, "padding": "max_length"}
        assert ours.encode(text, **options) == theirs.encode(text, **options)
        tensor = ours.encode(text, return_tensors="pt")
        assert torch.equal(tensor, torch.tensor([ours.encode(text)]))
        tokens = ours.tokenize(text)
        assert tokens == theirs.tokenize(text)
        ids = ours.encode(text)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert ours.convert_ids_to_tokens(torch.tensor(ids)) == theirs.convert_ids_to_tokens(ids)
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
        assert ours.decode(ours(text)) == ours.decode(ids)
    token = ours.convert_ids_to_tokens(1)
    assert token == theirs.convert_ids_to_tokens(1)
    assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token) == 1
    unknown = "\U0001fae8 no token"
    assert ours.convert_tokens_to_ids(unknown) == theirs.convert_tokens_to_ids(unknown)
    assert ours.convert_ids_to_tokens([1, len(ours)]) == [token, None]
    assert ours.convert_ids_to_tokens([1], skip_special_tokens=True) == []


@pytest.mark.parametrize("case", FAST)
def test_tokens_to_string_equals_transformers(case: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, case)
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[1:]:
        tokens = ours.tokenize(text)
        assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)


def test_attributes_equal_transformers(pair: Any) -> None:
    ours, theirs = pair
    for name in ("bos", "eos", "unk", "pad"):
        for attribute in (f"{name}_token", f"{name}_token_id"):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
    for name in ("padding_side", "truncation_side", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.name_or_path == str(ours.path.parent)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(theirs.all_special_tokens) <= set(ours.all_special_tokens)
    assert ours.is_fast == getattr(theirs, "is_fast", False)
    assert len(ours) == len(theirs)


def test_padding_side_is_left_unless_the_files_define_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "byte_level")
    config = {"padding_side": "right", "model_max_length": 1000000000000000019884624838656}
    write(folder, tokenizer_config=config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == int(1e30)
    assert AutoTokenizer.from_pretrained(folder, padding_side="left").padding_side == "left"
    write(folder, tokenizer_config={})
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    bad = [({"padding_side": "up"}, 'padding_side must be "left" or "right", got \'up\'')]
    bad += [({"truncation_side": 3}, "truncation_side must be a string or null, got 3")]
    bad += [
        ({"model_max_length": x}, f"model_max_length must be at least 1, got {x!r}")
        for x in (0, -5, "7", True, [])
    ]
    for config, message in bad:
        write(folder, tokenizer_config=config)
        with pytest.raises(TokenizerError) as caught:
            AutoTokenizer.from_pretrained(folder)
        assert str(caught.value) == f"{folder}/tokenizer_config.json: {message}"


def test_named_tokens_can_be_set(pair: Any) -> None:
    ours, theirs = pair
    for tokenizer in pair:
        tokenizer.pad_token = tokenizer.unk_token
        tokenizer.eos_token_id = 1
    for name in ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "special_tokens_map"):
        assert getattr(ours, name) == getattr(theirs, name)
    call = {"padding": True, "padding_side": "left"}
    assert ours(["the", "the quick fox"], **call) == plain(theirs(["the", "the quick fox"], **call))
    ours.pad_token = None
    assert ours.pad_token is None
    assert ours.pad_token_id is None
    with pytest.raises(TokenizerError, match=r"^padding must be False: the tokenizer"):
        ours(["the"], padding=True)
    assert ours.add_special_tokens({"pad_token": ours.bos_token}) == 0
    assert ours.pad_token_id == ours.bos_token_id
    assert ours.add_tokens([ours.bos_token]) == ours.add_tokens(ours.bos_token) == 0


@pytest.mark.parametrize("case", FAST)
def test_pad_equals_transformers(case: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, case)
    ours = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    rows = [ours(text) for text in random.sample(["the", "the quick fox", "d'accord", "漢"], k=3)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    with_labels = [{**row, "labels": i} for i, row in enumerate(rows)]
    tensors = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    arrays = [{name: np.array(value) for name, value in row.items()} for row in rows]
    ids = [{"input_ids": row.input_ids} for row in rows]
    for given in (rows, columns, rows[0], with_labels, tensors, arrays, ids, tensors[0]):
        for options in (
            {},
            {"padding": "max_length", "max_length": 40, "return_tensors": "pt"},
            {"padding": True, "pad_to_multiple_of": 8, "padding_side": "right"},
            {"padding": False, "return_attention_mask": False},
        ):
            if given is arrays and options.get("padding") is False:
                continue  # transformers returns an array of arrays
            # transformers changes a dict that it pads
            succeeded = same(lambda t: t.pad(copy.copy(given), **options), ours, theirs)  # noqa: B023
            assert succeeded or (given is tensors and options["padding"] is False)


@pytest.mark.parametrize("case", FAST)
def test_chat_templates_equal_transformers(case: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, case)
    ours = AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    assert ours.chat_template == theirs.chat_template == CHATML
    chat = [USER, ANSWER, FOLLOW_UP]
    prompt = {"add_generation_prompt": True}
    for conversation in ([USER], chat, [[USER], chat], [[USER]]):
        for options in (
            {},
            {"return_dict": False},
            {"tokenize": False},
            {"return_tensors": "pt", "padding": True, **prompt},
            {"return_tensors": "np", "padding": True, "return_dict": False},
            {"truncation": True, "max_length": 5},
            {
                "padding": "max_length",
                "max_length": 60,
                "tokenizer_kwargs": {"padding_side": "left"},
            },
            {"who": "me", "tokenize": False, **prompt},
            {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "tools": None},
        ):
            call = lambda t: t.apply_chat_template(conversation, **options)  # noqa: B023, E731
            assert same(call, ours, theirs)
    given = {"tokenize": False, "continue_final_message": True}
    text = theirs.apply_chat_template([USER, ANSWER], **given)
    assert ours.apply_chat_template([USER, ANSWER], **given) == text
    assert not text.endswith("<|im_end|>\n")
    assert ours.get_chat_template() == CHATML
    ours.chat_template = theirs.chat_template = "{{ messages | length }}{{ pad_token }}"
    assert same(lambda t: t.apply_chat_template(chat, tokenize=False), ours, theirs)
    ours.chat_template = None
    assert ours.chat_template is ours.chat_version is None
    with pytest.raises(TokenizerError, match="is it a base model"):
        ours.apply_chat_template(chat)


@pytest.mark.parametrize("case", ["tekken", "sentencepiece"])
def test_chats_of_mistral_equal_transformers(case: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, case)
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.MistralCommonBackend.from_pretrained(folder)
    theirs.pad_token = theirs.eos_token
    ours.pad_token = ours.eos_token
    chat = [USER, ANSWER, FOLLOW_UP]
    for conversation in ([USER], chat, [[USER], chat]):
        for options in (
            {},
            {"return_dict": False},
            {"tokenize": False},
            {"return_tensors": "pt", "padding": True, "add_generation_prompt": True},
            {"truncation": True, "max_length": 5},
        ):
            if case == "sentencepiece" and "tokenize" in options:
                continue  # transformers writes spaces as U+2581
            call = lambda t: t.apply_chat_template(conversation, **options)  # noqa: B023, E731
            assert same(call, ours, theirs)
    given = {"continue_final_message": True}
    assert same(lambda t: t.apply_chat_template([USER, ANSWER], **given), ours, theirs)


def test_snippets_of_both_versions_of_transformers_run(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_folder(tmp_path, "chatml"))
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer))
    model = varied_model(config)
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template([USER], return_dict=True, **options).to("cpu")
    assert isinstance(inputs, TokenizerOutput)
    generated = model.generate(**inputs, max_new_tokens=3)
    answer = tokenizer.decode(generated[0][inputs["input_ids"].shape[-1] :])
    assert tokenizer.batch_decode(generated[:, inputs.shape[-1] :]) == [answer]
    same_inputs = tokenizer.apply_chat_template([USER], **options)
    assert same_inputs.to("cpu") is same_inputs
    assert same_inputs.shape == inputs.input_ids.shape
    assert torch.equal(same_inputs.input_ids, inputs.input_ids)
    assert "attention_mask" in inputs
    assert list(inputs) == list(inputs.keys()) == ["input_ids", "attention_mask"]
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(encoded.input_ids, inputs.input_ids)
    assert not hasattr(TokenizerOutput(), "shape")


def test_only_settings_can_be_set() -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    for name in ("path", "vocab_size", "is_fast", "all_special_ids", "chat_version", "foo"):
        with pytest.raises(AttributeError) as caught:
            setattr(tokenizer, name, 1)
        start = f"{name} of a tokenizer cannot be set; settable: bos_token, bos_token_id, eos_token"
        assert str(caught.value).startswith(start)


def test_max_length_without_truncation_warns() -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    with pytest.warns(UserWarning, match="^max_length is ignored with padding=True") as caught:
        assert len(tokenizer("It is a truth", padding=True, max_length=2).input_ids) == 5
    assert caught[0].filename == __file__


def test_the_argument_legacy_replaces_that_of_the_files(tmp_path: Path) -> None:
    config = {"eos_token": MARKERS[1], "legacy": False}
    folder = write(tmp_path, "v1", added_tokens={MARKERS[1]: 32000}, tokenizer_config=config)
    without = AutoTokenizer.from_pretrained(folder)
    legacy = AutoTokenizer.from_pretrained(folder, legacy=True)
    text = f"x{MARKERS[1]}y"
    assert without.encode(text, bos=False) == [1318, 32000, 28724]
    assert legacy.encode(text, bos=False) == [1318, 32000, 337]
    assert AutoTokenizer.from_pretrained(folder, legacy=False).encode(text) == without.encode(text)
    legacy.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(text) == legacy.encode(text)
