"""Test special and unknown tokens in generation, training and conversion."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_checkpoints import SMALL, random_state
from support.tokenizer_cases import write

from mistral_kernels import MistralTokenizer, convert
from mistral_kernels.checkpoint import resolve, save_hf
from mistral_kernels.generate import generate, main
from mistral_kernels.training.corpus import Corpus

PROMPTS = ["It is a truth", "Her"]


class Script:
    """Fake model that records its prompts and generates the given ids."""

    def __init__(self, *texts: list[int]) -> None:
        self.texts, self.config = texts, SMALL

    def stream(self, prompts: Any, **_: Any) -> Iterator[list[int | None]]:
        self.prompts = prompts
        yield from map(list, zip(*self.texts, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the bundled tokenizer with a configuration that adds EOS, and no BOS, to every text."""
    write(tmp_path / "model", tokenizer_config={"add_eos_token": True, "add_bos_token": False})
    shutil.copy(resolve("tiny") / "tokenizer.model", tmp_path / "model")
    return tmp_path / "model"


def test_generate_adds_no_eos_to_prompts(folder: Path) -> None:
    tokenizer = MistralTokenizer.from_pretrained(folder)
    bare = [tokenizer.encode(prompt, bos=False, eos=False) for prompt in PROMPTS]
    assert tokenizer(PROMPTS).input_ids == [[*ids, tokenizer.eos_token_id] for ids in bare]
    script: Any = Script([300, 301], [302, 303])
    generate(script, tokenizer, PROMPTS, max_tokens=2)
    assert script.prompts == bare


def test_generate_command_adds_default_bos_and_no_eos(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, vocab_size=2048)
    save_hf(
        random_state(config).items(),
        config,
        folder.parent / "hf",
        dtype=torch.float32,
        extra_files=[*folder.iterdir()],
    )
    encoded = []
    kind = type(MistralTokenizer.from_pretrained(folder))
    original = kind.encode

    def encode(*arguments: Any, **options: Any) -> list[int]:
        encoded.append(original(*arguments, **options))
        return encoded[-1]

    monkeypatch.setattr(kind, "encode", encode)
    assert main([PROMPTS[0], "--model", str(folder.parent / "hf"), "-m", "1", "--quiet"]) == 0
    tokenizer = MistralTokenizer.from_pretrained(folder)
    assert encoded == [original(tokenizer, PROMPTS[0], bos=False, eos=False)]


def test_unknown_ids_have_no_text(folder: Path) -> None:
    """Check ids of a padded vocabulary; the text of the other ids is complete."""
    tokenizer = MistralTokenizer.from_pretrained(folder)
    text = tokenizer.encode("the end", bos=False, eos=False)
    padded = [*text[:1], 5000, *text[1:]]
    script: Any = Script(padded, [5001] * len(padded))
    one, two = generate(script, tokenizer, PROMPTS, max_tokens=len(padded))
    assert (one.text, two.text) == (" the end", "")
    assert one.token_ids == padded


def test_training_texts_have_no_bos_and_no_eos(folder: Path) -> None:
    text = "It is a truth\n\nuniversally acknowledged\n"
    corpus = Corpus(text, folder / "tokenizer.model")
    bare = Corpus(text, resolve("tiny") / "tokenizer.model")
    assert torch.equal(corpus.tokens, bare.tokens)


def test_convert_copies_regular_files_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    save_hf(random_state(SMALL).items(), SMALL, source, dtype=torch.float32)
    (source / "tokenizer_old").mkdir()
    write(source, added_tokens={"x": 50})
    assert convert.main([str(source), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "added_tokens.json").read_text() == '{"x": 50}'
    assert not (tmp_path / "out" / "tokenizer_old").exists()
    capsys.readouterr()
    for name, make, kind in (
        ("tokenizer.model", lambda path: path.symlink_to("/dev/zero"), "a device"),
        ("chat_template.jinja", os.mkfifo, "a FIFO"),
    ):
        make(source / name)
        assert convert.main([str(source), str(tmp_path / "again")]) == 2
        expected = f"error: {source / name} must be a regular file, got {kind}\n"
        assert capsys.readouterr().err.endswith(expected)
        (source / name).unlink()
    assert not (tmp_path / "again").exists()
