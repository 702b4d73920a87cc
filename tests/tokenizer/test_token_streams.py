"""Test token streams: the texts of single tokens, joined, equal the text of `decode`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from random import choice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizer_cases import (
    ALL,
    CORPUS,
    JSON,
    SENTENCEPIECE,
    TEXTS,
    quick,
    streamed,
    train_json,
    write,
)

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_stream_joins_to_decode(open_tokenizer: Any, name: str, skip: bool) -> None:
    """Check the ids of whole texts, random tokens, and bytes that are not valid UTF-8."""
    tokenizer = open_tokenizer(name)
    # Many single bytes: partial characters, overlong forms, surrogates, stray continuation bytes.
    few = [*range(3), *tokenizer.encode("a é 漢👍 ▁", bos=False)]
    first_byte = (
        next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\x00")
        if name not in JSON[1:]
        else 3
    )
    bytes_ = st.integers(first_byte, min(first_byte + 255, tokenizer.vocab_size - 1))
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    any_ids = st.lists(st.one_of(st.sampled_from(few), bytes_, any_id), max_size=24)

    def check(ids: list[int], split: int) -> None:
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert streamed(tokenizer, ids, skip) == text
        # With a prompt, the stream returns the rest of the text after that of the prompt.
        prompt, rest = ids[:split], ids[split:]
        stream = tokenizer.stream(prompt, skip_special_tokens=skip)
        fresh = tokenizer.stream(skip_special_tokens=skip)
        start = len("".join(map(fresh.push, prompt)))
        assert "".join([*map(stream.push, rest), stream.flush()]) == text[start:]

    for text in TEXTS:
        check(tokenizer.encode(text), 3)
    quick(given(any_ids, st.integers(0, 24))(check))()


@pytest.mark.parametrize("name", ALL)
def test_stream_returns_characters_when_complete(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    text = "a 👩‍👧 漢 ש"
    stream, seen = tokenizer.stream(), ""
    for token_id in tokenizer.encode(text):
        seen += stream.push(token_id)
        assert text.startswith(seen)
    if name != "byte_fallback":  # byte_fallback decodes consecutive byte tokens together
        assert seen == text
    assert seen + stream.flush() == text
    # Only flush() returns an incomplete character.
    ids = tokenizer.encode("x \U0001fae8")[:-1]
    stream = tokenizer.stream()
    assert "\ufffd" not in "".join(map(stream.push, ids))
    assert "\ufffd" in stream.flush()


@pytest.mark.parametrize("name", list(SENTENCEPIECE.values()))
def test_stream_keeps_the_space_before_the_first_new_word(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    prompt, new = tokenizer.encode("The cat"), tokenizer.encode("sat", bos=False)
    assert "".join(map(tokenizer.stream(prompt).push, new)) == " sat"
    assert "".join(map(tokenizer.stream(torch.tensor(prompt)).push, new)) == " sat"
    assert "".join(map(tokenizer.stream().push, new)) == "sat"


def test_stream_work_is_constant_per_token(open_tokenizer: Any, monkeypatch: Any) -> None:
    """Check that a long sequence of bytes, even an invalid one, is not decoded repeatedly."""
    tokenizer = open_tokenizer("byte_fallback")
    byte = tokenizer.encode("\U0001fae8", bos=False)[-1]
    word = tokenizer.encode("fox", bos=False)
    decoded = 0
    original = tokenizer._decode

    def counted(ids: list[int], skip_special_tokens: bool) -> str:
        nonlocal decoded
        decoded += len(ids)
        return original(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "_decode", counted)
    stream = tokenizer.stream()
    for token_id in ([byte] * 500 + word) * 4:
        stream.push(token_id)
    assert decoded < 5 * 4 * (500 + len(word))


@pytest.mark.parametrize("extra_whitespace", [True, False])
def test_stream_of_a_model_that_removes_extra_spaces(
    tmp_path: Path, extra_whitespace: bool
) -> None:
    """Sentencepiece removes *all* leading spaces by default, not only the one that it adds."""
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        remove_extra_whitespaces=extra_whitespace,
        minloglevel=2,
    )
    tokenizer = MistralTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_version is None
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template is known for this vocabulary"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    space = tokenizer.encode("a  b", bos=False)[0]
    any_ids = st.lists(
        st.one_of(st.sampled_from([space, 0, 1]), st.integers(0, len(tokenizer) - 1)), max_size=9
    )

    @quick
    @given(any_ids)
    def check(ids: list[int]) -> None:
        assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)

    check()


# ------------------------------------------------------------------ the decoders of tokenizer.json


def random_decoder(depth: int = 0) -> Any:
    """Return a random decoder of the tokenizers library, a nested sequence of them, or None."""
    from tokenizers import Regex, decoders

    kinds: list[Callable[[], Any]] = [
        decoders.ByteLevel,
        decoders.ByteFallback,
        decoders.Fuse,
        lambda: decoders.Replace(choice(["\u2581", "a", "ab", "é"]), choice([" ", "", "xy"])),
        lambda: decoders.Replace(Regex(choice(["\u2581+", "[ab]+"])), choice([" ", ""])),
        lambda: decoders.Strip(choice(" a\u2581é"), random.randrange(3), random.randrange(2)),
        lambda: decoders.Metaspace(prepend_scheme=choice(["always", "never", "first"])),
        lambda: decoders.WordPiece(prefix=choice(["##", "a"]), cleanup=choice([True, False])),
        lambda: decoders.BPEDecoder(suffix=choice(["</w>", "b"])),
        lambda: decoders.CTC(pad_token=choice(["<pad>", "a"]), word_delimiter_token="\u2581"),
    ]
    if depth == 0:
        kinds.append(lambda: None)
    if depth < 2 and random.random() < 0.6:
        return decoders.Sequence([random_decoder(depth + 1) for _ in range(choice([1, 2, 3, 4]))])
    return choice(kinds)()


def test_streams_of_random_decoders_join_to_decode(tmp_path: Path) -> None:
    """Check byte tokens, partial characters, unknown ids and special ids."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel

    bytes_ = [*range(0x60, 0x64), *range(0x7E, 0x84), *range(0xC0, 0x100)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in bytes_), "<0xe2>", "<pad>", " "]
    tokens += ["\u2581", "\u2581\u2581", "\u2581a", "ab", "##x", "x</w>", "</w>", "n't", " .", "Ġa"]
    tokens += sorted({*ByteLevel.alphabet(), "é", "â", "Ĥ", "¬"})
    live = 0
    for _ in range(150):
        model = models.WordLevel({token: i for i, token in enumerate(tokens)}, "<unk>")
        theirs = Tokenizer(model)
        theirs.add_special_tokens(tokens[:3])
        theirs.add_tokens(["added one", "naïve 漢"])
        if (decoder := random_decoder()) is not None:
            theirs.decoder = decoder
        theirs.save(str(tmp_path / "tokenizer.json"))
        tokenizer = MistralTokenizer.from_pretrained(tmp_path)
        for skip in [True, False] * 5:
            pool = random.choices(range(len(tokenizer) + 3), k=choice([3, 10, 300]))
            ids = random.choices(pool, k=random.randrange(30))
            try:
                text = tokenizer.decode(ids, skip_special_tokens=skip)
            except TokenizerError:  # some decoders fail on some tokens
                continue
            stream = tokenizer.stream(skip_special_tokens=skip)
            pieces = [*map(stream.push, ids)]
            live += any(pieces)
            case = (decoder and decoder.__getstate__(), ids, skip)
            assert "".join(pieces) + stream.flush() == text, case
    assert live > 100


@pytest.mark.parametrize("byte_level", [True, False])
def test_nested_sequences_of_decoders_stream_like_single_decoders(
    tmp_path: Path, byte_level: bool
) -> None:
    train_json(tmp_path / "tokenizer.json", byte_level)
    tokenizer = MistralTokenizer.from_pretrained(tmp_path)
    text = "the fox 漢 jumps over the lazy dog 👩‍👧"
    ids = tokenizer.encode(text)
    expected = [*map(tokenizer.stream().push, ids)]
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    inner = {"type": "Sequence", "decoders": [saved["decoder"], {"type": "Fuse"}]}
    saved["decoder"] = {"type": "Sequence", "decoders": [inner, {"type": "Fuse"}]}
    write(tmp_path, tokenizer=saved)
    nested = MistralTokenizer.from_pretrained(tmp_path)
    assert [*map(nested.stream().push, ids)] == expected
    assert text.startswith("".join(expected))
    assert "the fox 漢 jumps" in "".join(expected)


def test_decoder_that_needs_the_whole_text_returns_it_in_flush(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    theirs = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    theirs.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "!")])
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = MistralTokenizer.from_pretrained(tmp_path)
    stream = tokenizer.stream([1, 0])
    assert [stream.push(token_id) for token_id in [1, 0, 1]] == ["", "", ""]
    assert stream.flush() == "b!!"[2:]
    assert streamed(tokenizer, [1, 0, 1, 0, 1]) == "b!!"
