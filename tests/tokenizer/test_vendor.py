"""Compare Mistral's vocabularies and chat templates with mistral-common, which contains them."""

from __future__ import annotations

import functools
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from support.tokenizer_cases import (
    ALL,
    ANSWER,
    DATA,
    FOLLOW_UP,
    SENTENCEPIECE,
    SYSTEM,
    TEKKEN,
    TEXTS,
    USER,
    VENDOR,
    any_text,
    chat_ids,
    quick,
    refused,
    write,
)

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError


@pytest.mark.parametrize("name", ALL)
def test_encoded_text_is_decoded_exactly(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)

    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    # With tokenizer.json, the names of special tokens in a text are encoded as those tokens.
    names = [] if name in VENDOR else ["<s>", "</s>", "<unk>"]
    plain = any_text.filter(lambda text: not any(n in text for n in names))
    for text in TEXTS:
        if not any(n in text for n in names):
            check(text)
    quick(given(plain)(check))()


@pytest.mark.parametrize("name", VENDOR)
def test_ids_equal_mistral_common(open_tokenizer: Any, name: str) -> None:
    vendor = open_vendor(name).instruct_tokenizer.tokenizer
    tokenizer = open_tokenizer(name)
    assert tokenizer.vocab_size == len(tokenizer) == vendor.n_words
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vendor.bos_id, vendor.eos_id)
    assert tokenizer.all_special_ids == vendor.special_ids
    for text in TEXTS:
        assert tokenizer.encode(text) == vendor.encode(text, bos=True, eos=False)
        for bos, eos in [(True, False), (False, True)]:
            assert tokenizer.encode(text, bos=bos, eos=eos) == vendor.encode(text, bos, eos)


@pytest.mark.parametrize("name", VENDOR)
def test_special_tokens_are_decoded_to_their_names_unless_skipped(
    open_tokenizer: Any, name: str
) -> None:
    tokenizer = open_tokenizer(name)
    ids = tokenizer.encode("Hi there", eos=True) + tokenizer.encode(" You", bos=False)
    space = "" if "tekken" in name else " "  # sentencepiece puts a space before each text
    assert tokenizer.decode(ids) == f"<s>Hi there</s>{space} You"
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"Hi there{space} You"
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids[1]) == tokenizer.decode([ids[1]]) != ""
    assert tokenizer.batch_decode(torch.tensor([ids, ids])) == [tokenizer.decode(ids)] * 2


@pytest.mark.parametrize("name", SENTENCEPIECE.values())
def test_decode_equals_sentencepiece(open_tokenizer: Any, name: str) -> None:
    import sentencepiece

    tokenizer = open_tokenizer(name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(DATA / name))
    for _ in range(200):
        # Mostly bytes, which are rarely valid UTF-8, and spaces; also tokens of all kinds.
        pool = [*range(tokenizer.vocab_size), *[3, 4, 100, 200, 240, 800, 900] * 9999]
        ids = random.choices(pool, k=random.randrange(20))
        assert tokenizer.decode(ids, skip_special_tokens=True) == theirs.decode(ids), ids


@pytest.mark.parametrize(
    ("flags", "prefix", "suffix"),
    [
        ({}, [1], []),
        ({"add_bos_token": True, "add_eos_token": False}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": None, "add_eos_token": None}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"add_eos_token": True, "eos_token": None}, [1], []),
    ],
)
def test_flags_determine_bos_and_eos(
    tmp_path: Path, flags: dict[str, Any], prefix: list[int], suffix: list[int]
) -> None:
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", tokenizer_config=flags))
    text = [22557, 1526]
    assert tokenizer.encode("Hello world") == prefix + text + suffix
    assert tokenizer("Hello world").input_ids == prefix + text + suffix
    assert tokenizer("Hello world", add_special_tokens=False).input_ids == text
    assert tokenizer.encode("Hello world", bos=True) == [1, *text, *suffix]
    assert tokenizer.encode("Hello world", bos=False) == text + suffix
    assert tokenizer.encode("Hello world", eos=False) == prefix + text
    if tokenizer.eos_token_id is None:
        with pytest.raises(
            TokenizerError, match=r"eos must be None or False, got .* has no EOS token$"
        ):
            tokenizer.encode("Hello world", eos=True)
    else:
        assert tokenizer.encode("Hello world", eos=True) == [*prefix, *text, 2]


def test_tokens_are_named_by_the_configuration(tmp_path: Path) -> None:
    config = {"bos_token": "</s>", "eos_token": {"content": "<s>"}, "pad_token": "<unk>"}
    tokenizer = MistralTokenizer.from_pretrained(write(tmp_path, "v1", tokenizer_config=config))
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (2, 1, 0)
    assert tokenizer.encode("Hello") == [2, 22557]


CHATS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, FOLLOW_UP],
    [SYSTEM, USER, ANSWER, FOLLOW_UP, ANSWER, USER],
    [USER, FOLLOW_UP],
]


@functools.cache
def open_vendor(name: str) -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Vendor

    return Vendor.from_file(DATA / name)


def vendor_chat(name: str, messages: list[Any]) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest(messages=messages)
    return open_vendor(name).encode_chat_completion(request).tokens


@pytest.mark.parametrize("messages", CHATS, ids=len)
@pytest.mark.parametrize("name", VENDOR)
def test_chat_equals_mistral_common(open_tokenizer: Any, name: str, messages: list[Any]) -> None:
    tokenizer, expected = open_tokenizer(name), vendor_chat(name, messages)
    version = open_vendor(name).version.value
    assert tokenizer.has_chat_template
    assert tokenizer.chat_version == version
    assert chat_ids(tokenizer, messages) == expected
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tokenizer.decode(expected)
    tensor = chat_ids(tokenizer, messages, return_tensors="pt")
    assert tensor.tolist() == [expected]
    both = tokenizer.apply_chat_template(messages, return_tensors="pt")
    assert torch.equal(both.input_ids, tensor)
    assert both.attention_mask.all()


@pytest.mark.parametrize("name", [SENTENCEPIECE["v3"], SENTENCEPIECE["v7"], TEKKEN])
def test_chat_with_a_partial_answer(open_tokenizer: Any, name: str) -> None:
    messages = [USER, {**ANSWER, "prefix": True}]
    assert chat_ids(open_tokenizer(name), messages) == vendor_chat(name, messages)


def test_chat_that_ends_with_an_answer(open_tokenizer: Any) -> None:
    tokenizer = open_tokenizer(SENTENCEPIECE["v3"])
    ids = chat_ids(tokenizer, [USER, ANSWER])
    head = chat_ids(tokenizer, [USER])
    assert ids == head + tokenizer.encode(ANSWER["content"], bos=False, eos=True)
    assert chat_ids(tokenizer, [USER], add_generation_prompt=True) == head


@pytest.mark.parametrize("version", SENTENCEPIECE)
def test_chat_version_of_a_plain_tokenizer_model(
    open_tokenizer: Any, tmp_path: Path, version: str
) -> None:
    """The name `tokenizer.model` contains no version; it is found from the vocabulary."""
    shutil.copy(DATA / SENTENCEPIECE[version], tmp_path / "tokenizer.model")
    plain = MistralTokenizer.from_pretrained(tmp_path)
    assert plain.chat_version == version
    assert plain.has_chat_template == (version != "v1")
    named = open_tokenizer(SENTENCEPIECE[version])
    assert chat_ids(plain, CHATS[3]) == chat_ids(named, CHATS[3])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "Conversation must have at least one message"),
        ("Hi", 'conversation must be a list of {"role": ..., "content": ...}, got str$'),
        (USER, "conversation must be a list of .*, got dict$"),
        (None, "conversation must be a list of .*, got NoneType$"),
        (["Hi"], "conversation must be a list of .*, got str in it$"),
        ([{"role": "bot", "content": "Hi"}], "messages.0 Input tag 'bot' found using 'role'"),
        ([{"content": "Hi"}], "messages.0 Unable to extract tag using discriminator 'role'"),
        ([{"role": "user"}], "messages.0.user.content Field required"),
        ([{"role": "user", "content": "\udcff"}], "conversation: content has a lone surrogate"),
        ([ANSWER], "Conversation must start with a user message or system message"),
        ([USER, ANSWER], "Expected last role User or Tool"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v7"])
def test_bad_conversations_are_refused(
    open_tokenizer: Any, version: str, messages: Any, error: str
) -> None:
    with pytest.raises(TokenizerError, match=error) as caught:
        open_tokenizer(SENTENCEPIECE[version]).apply_chat_template(
            messages, add_generation_prompt=True
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        (TEKKEN, "mistral_common", r'pip install "mistral_kernels\[chat\]"'),
        (SENTENCEPIECE["v3"], "mistral_common", r'pip install "mistral_kernels\[chat\]"'),
        ("tokenizer.json", "tokenizers", r'pip install "mistral_kernels\[hf\]"'),
    ],
)
def test_missing_packages_raise_install_command(
    tmp_path: Path, monkeypatch: Any, name: str, module: str, command: str
) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    file = DATA / name
    if name == "tokenizer.json":
        (file := tmp_path / name).write_text("{}")

    def use() -> None:
        tokenizer = MistralTokenizer.from_pretrained(file)
        assert tokenizer.decode(tokenizer.encode("works without")) == "<s>works without"
        tokenizer.apply_chat_template([USER])

    with pytest.raises(TokenizerError, match=command):
        use()


def test_vendor_templates_accept_tools_but_no_documents_or_template(open_tokenizer: Any) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    name = SENTENCEPIECE["v3"]
    tokenizer = open_tokenizer(name)
    request: Any = ChatCompletionRequest.model_validate({"messages": [USER], "tools": [tool]})
    expected = open_vendor(name).encode_chat_completion(request).tokens
    assert chat_ids(tokenizer, [USER], tools=[tool]) == expected
    assert expected != chat_ids(tokenizer, [USER])
    for option in ("documents", "chat_template"):
        with pytest.raises(TokenizerError, match=f"^{option} must be None for Mistral's own chat"):
            tokenizer.apply_chat_template([USER], **{option: "x"})


def test_message_without_content(open_tokenizer: Any) -> None:
    """Check that content=None counts as absent: clients of OpenAI's API send it."""
    call = {"id": "123456789", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "content": "2", "tool_call_id": "123456789"}
    tokenizer = open_tokenizer(SENTENCEPIECE["v3"])
    ids = chat_ids(tokenizer, [USER, answer, result])
    assert chat_ids(tokenizer, [USER, answer | {"content": None}, result]) == ids
    assert chat_ids(tokenizer, (m for m in [USER, answer, result])) == ids


def test_tekken_with_too_many_special_tokens_is_refused(tmp_path: Path) -> None:
    config = {"default_num_special_tokens": 2**40, "default_vocab_size": 2**40, "version": "v3"}
    write(tmp_path, tekken={"config": config, "vocab": []})
    refused(tmp_path, "tekken.json: not a tekken file: more than 1048576 special tokens")


def test_a_key_that_a_tekken_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, tekken={"config": {}, "vocab": []})
    refused(tmp_path, "tekken.json: not a tekken file: no key 'default_num_special_tokens'")


def test_text_refused_by_the_library_raises_one_line(open_tokenizer: Any) -> None:
    with pytest.raises(TokenizerError, match="the text cannot be encoded: Regex error") as caught:
        open_tokenizer(TEKKEN).encode(" " * 1_000_000)
    assert "\n" not in str(caught.value)
