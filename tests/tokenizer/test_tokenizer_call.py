"""Test calls of a tokenizer, token ids of every type, and options."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.tokenizer_cases import JSON, SENTENCEPIECE, TEKKEN

from mistral_kernels.tokenizer import TokenizerError, TokenizerOutput

KINDS = [SENTENCEPIECE["v1"], TEKKEN, *JSON]


def raises(message: str) -> Any:
    """Expect a TokenizerError whose whole message matches `message`."""
    return pytest.raises(TokenizerError, match=f"^{message}$")


def test_call_returns_ids_and_mask_as_in_transformers(open_tokenizer: Any) -> None:
    tokenizer = open_tokenizer(SENTENCEPIECE["v3"])
    one, two = tokenizer.encode("one"), tokenizer.encode("and two more")
    assert tokenizer("one") == {"input_ids": one, "attention_mask": [1] * len(one)}
    assert tokenizer(["one", "and two more"]).input_ids == [one, two]
    assert tokenizer("one", add_special_tokens=False).input_ids == one[1:]
    out = tokenizer("one", return_tensors="pt").to("cpu")
    assert isinstance(out, TokenizerOutput)
    assert out.input_ids.dtype == torch.int64
    assert out["input_ids"].tolist() == [one]
    assert {**out}.keys() == {"input_ids", "attention_mask"}
    assert out.to("meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="token_type_ids"):
        out.token_type_ids  # noqa: B018
    with raises('return_tensors="pt" requires texts of equal length, got 2 texts of .* tokens: .*'):
        tokenizer(["one", "and two more"], return_tensors="pt")


def test_padding_to_the_longest_text(open_tokenizer: Any) -> None:
    tokenizer = open_tokenizer(SENTENCEPIECE["v3"])
    texts = ["one", "and two more"]
    one, two = map(tokenizer.encode, texts)
    gap = len(two) - len(one)
    pad = [tokenizer.pad_token_id] * gap
    for padding in (True, "longest"):
        padded = tokenizer(texts, padding=padding, return_tensors="pt")
        assert padded.input_ids.tolist() == [pad + one, two]
        assert padded.attention_mask.tolist() == [[0] * gap + [1] * len(one), [1] * len(two)]
        assert tokenizer(["one", "one"], padding=padding).input_ids == [one, one]
    for padding in (False, "do_not_pad"):
        assert tokenizer(texts, padding=padding).input_ids == [one, two]
    for bad in ("yes", None, 1, 0, ["longest"]):
        offered = 'padding must be True or "longest" or "max_length" or False or "do_not_pad", got '
        with pytest.raises(TokenizerError) as caught:
            tokenizer(texts, padding=bad)
        assert str(caught.value) == f"{offered}{bad!r}"


def test_pad_token_is_from_the_files_or_eos(open_tokenizer: Any) -> None:
    assert open_tokenizer(SENTENCEPIECE["v1"]).pad_token_id == 2
    tekken = open_tokenizer(TEKKEN)
    assert tekken.decode([tekken.pad_token_id]) == "<pad>"


@pytest.mark.parametrize("name", KINDS)
def test_bad_texts_and_options_are_refused(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    for text in (3, None, [3], ["a", None], b"a", [["a"]], {"a": 1}):
        kind = type(text[-1] if isinstance(text, list) else text).__name__
        with raises(f"text must be a str, got {kind}"):
            tokenizer(text)
    with raises(r"text has a lone surrogate, '\\ud800', at index 1"):
        tokenizer("a\ud800")
    with raises('return_tensors must be None or "pt" or "np", got \'tf\''):
        tokenizer("a", return_tensors="tf")
    with raises("add_special_tokens must be True or False, got 'no'"):
        tokenizer("a", add_special_tokens="no")
    with raises("bos must be None or True or False, got 0"):
        tokenizer.encode("a", bos=0)
    for decode in (tokenizer.decode, lambda ids, skip: tokenizer.stream(skip_special_tokens=skip)):
        with raises("skip_special_tokens must be True or False, got 'yes'"):
            decode([1], "yes")


@pytest.mark.parametrize("name", KINDS)
def test_token_ids_of_every_integer_type_are_accepted(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    ids = [1, 100, 120, 3, 90]
    text = tokenizer.decode(ids)
    forms: list[Any] = [tuple(ids), iter(ids), np.array(ids), [*np.array(ids, dtype=np.uint16)]]
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32):
        forms += [torch.tensor(ids, dtype=dtype), [*torch.tensor(ids, dtype=dtype)]]
    for form in forms:
        assert tokenizer.decode(form) == text
    for batch in ([ids, ids], np.array([ids, ids]), torch.tensor([ids, ids], dtype=torch.uint8)):
        assert tokenizer.batch_decode(batch) == [text, text]
    for row in (ids, np.array(ids), torch.tensor(ids), [*torch.tensor(ids)]):
        assert tokenizer.batch_decode(row) == [text]
    one = tokenizer.decode([100])
    for form in (100, np.int32(100), torch.tensor(100), torch.tensor([100], dtype=torch.uint8)):
        assert tokenizer.decode(form) == one
        stream = tokenizer.stream(skip_special_tokens=False)
        assert stream.push(form) + stream.flush() == one
        streams = [tokenizer.stream(prompt) for prompt in (form, [100])]
        assert len({stream.push(120) + stream.flush() for stream in streams}) == 1
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([])) == ""


@pytest.mark.parametrize("name", KINDS)
def test_bad_token_ids_are_refused(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    wrong: list[tuple[Any, str]] = [
        (1.0, "integers, got float"),
        ([1, 2.5], "integers, got float"),
        (torch.tensor([1.0]), "integers, got float"),
        ([torch.tensor(1.0)], "integers, got Tensor"),
        (np.array([1.0]), "integers, got float"),
        (np.float32(1), "integers, got float"),
        (True, "integers, got bool"),
        (torch.tensor([True]), "integers, got bool"),
        (np.bool_(True), "integers, got bool"),
        ("12", "integers, got str"),
        ("", "integers, got str"),
        (["12"], "integers, got str"),
        (b"ab", "integers, got bytes"),
        (None, "integers, got NoneType"),
        ([None], "integers, got NoneType"),
        (Fraction(3), "integers, got Fraction"),
        ({"input_ids": [1]}, "integers, got dict"),
        ([[1]], "integers, got list; batch_decode takes a batch"),
        (torch.tensor([[1]]), "integers, got list; batch_decode takes a batch"),
        (-1, "at least 0, got -1"),
        (torch.tensor([1, -100]), "at least 0, got -100"),
    ]
    for ids, message in wrong:
        with raises(f"token ids must be {message}"):
            tokenizer.decode(ids)
        with raises(f"token ids must be {message}"):
            tokenizer.stream(ids)
        with raises(f"token ids must be {message}"):
            tokenizer.stream().push(ids)
    with raises("token_id must be one token id, got 2"):
        tokenizer.stream().push([1, 2])
    for batch in ("ab", 3, None, torch.tensor(3), {"a": 1}):
        with raises(f"sequences must be lists of token ids, got {type(batch).__name__}"):
            tokenizer.batch_decode(batch)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_ids_without_token_have_no_text(open_tokenizer: Any, name: str, skip: bool) -> None:
    """The vocabulary of a model is often padded beyond that of the tokenizer."""
    tokenizer = open_tokenizer(name)
    beyond = [len(tokenizer), len(tokenizer) + 7, 2**31, 2**32, 2**70]
    ids = tokenizer.encode("x \U0001fae8 y", eos=True)
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    for unknown in beyond:
        for at in range(len(ids) + 1):  # also in the middle of a character
            padded = [*ids[:at], unknown, *ids[at:]]
            assert tokenizer.decode(padded, skip_special_tokens=skip) == text
            stream = tokenizer.stream(skip_special_tokens=skip)
            assert "".join(map(stream.push, padded)) + stream.flush() == text
            stream = tokenizer.stream([unknown], skip_special_tokens=skip)
            assert "".join(map(stream.push, padded)) + stream.flush() == text
    assert tokenizer.batch_decode([ids, beyond], skip) == [text, ""]
    assert tokenizer.decode(beyond[0]) == tokenizer.stream().push(beyond[0]) == ""
