"""Training: what a run leaves behind, that it learns, and that it can be repeated."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import SMALL

from mistral_kernels import MistralForCausalLM, MistralTokenizer, train
from mistral_kernels.train import Corpus, Recipe, held_out_loss, main

QUICK = ("--steps", "6", "--batch-size", "2", "--seqlen", "24", "--eval-every", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hard-wrapped paragraphs of made-up words: enough variety for a vocabulary of 2048."""
    words = ["".join(random.choices("abcdefghijklmno", k=random.randint(2, 9))) for _ in range(900)]
    paragraphs = []
    for _ in range(100):
        chosen = random.choices(words, k=60)
        paragraphs.append("\n".join(" ".join(chosen[i : i + 12]) for i in range(0, 60, 12)))
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    arguments = (str(text), "--held-out-chars", "1500", *QUICK)
    assert main([*arguments, "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 3

    report = json.loads((out / "training.json").read_text())
    assert report["texts"] == ["words.txt"] and report["recipe"]["steps"] == 6
    assert [point["step"] for point in report["curve"]] == [3, 6]
    model = MistralForCausalLM.from_pretrained(out)
    tokenizer = MistralTokenizer.from_pretrained(out)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.generate(tokenizer(["ab"]).input_ids, max_new_tokens=3)

    # Held out are the last paragraphs, unwrapped, whole, and nothing that was trained on.
    paragraphs = [" ".join(block.split()) for block in text.read_text().split("\n\n")]
    held_out = (out / "held_out.txt").read_text(encoding="utf-8")
    kept = held_out.splitlines()
    assert kept == paragraphs[-len(kept) :] and 1500 >= len(held_out) > 1500 - 700

    # Its recorded loss is that of the best evaluation, and of the files as they are.
    corpus = Corpus(held_out, out / "tokenizer.model")
    loss = held_out_loss(model, corpus, corpus.tokens)
    assert loss == report["held_out_loss"] == min(p["held_out_loss"] for p in report["curve"])
    ids = [1, *corpus.tokens.tolist()]
    logits = model(torch.tensor([ids[:-1]]))[0].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert loss == pytest.approx(expected, rel=1e-3)
    bits = loss * len(corpus.tokens) / math.log(2) / len(held_out.encode())
    assert report["held_out_bits_per_byte"] == pytest.approx(bits)

    # The same seed gives the same files, another one does not.
    for seed, same in (("0", True), ("1", False)):
        again = tmp_path / f"seed{seed}"
        assert main([*arguments, "--output", str(again), "--seed", seed]) == 0
        equal = [files_of(again)[name] == data for name, data in files_of(out).items()]
        assert all(equal) == same


def small_corpus(tmp_path: Path, text: str) -> Corpus:
    """With a vocabulary that the small text is enough for."""
    train.train_tokenizer(text, 300, tmp_path / "tokenizer.model")
    return Corpus(text, tmp_path / "tokenizer.model")


def test_the_loss_falls_and_the_best_weights_stay(tmp_path: Path) -> None:
    text = "the cat sat on the mat and the dog ran to the cat again.\n" * 40
    corpus = small_corpus(tmp_path, text)
    config = dataclasses.replace(SMALL, vocab_size=300, tie_word_embeddings=True)
    model = MistralForCausalLM(config).to(torch.bfloat16)
    held_out = corpus.encode("the dog sat on the cat.\n")
    before = held_out_loss(model, corpus, held_out)
    assert before == pytest.approx(math.log(300), abs=0.5), "a new model knows nothing"
    recipe = Recipe(
        steps=60, batch_size=4, seqlen=16, learning_rate=1e-2, warmup_steps=5, eval_every=10
    )
    log = io.StringIO()
    curve = train.train(model, corpus, held_out, recipe, log)
    assert [step for step, _, _ in curve] == [10, 20, 30, 40, 50, 60]
    losses = [loss for _, loss, _ in curve]
    assert losses[-1] < 0.5 * losses[0]
    best = min(loss for _, _, loss in curve)
    assert best < before - 1
    assert held_out_loss(model, corpus, held_out) == best
    assert log.getvalue().count("\n") == 6 and f"held-out {curve[-1][2]:.4f}" in log.getvalue()


def test_windows_begin_where_paragraphs_do(tmp_path: Path) -> None:
    lines = [f"paragraph {word} is this" for word in ("one", "two", "three", "four", "five")]
    corpus = small_corpus(tmp_path, "\n".join(lines * 3) + "\n")
    starts = {tuple(corpus.encode(line + "\n")[:4].tolist()) for line in lines}
    sampled = corpus.sample(64, 4, torch.Generator().manual_seed(0))
    assert sampled.shape == (64, 4)
    assert {tuple(row) for row in sampled.tolist()} == starts
    inputs = corpus.with_bos(sampled)
    assert (inputs[:, 0] == 1).all() and torch.equal(inputs[:, 1:], sampled[:, :-1])
    tokenizer = MistralTokenizer.from_pretrained(tmp_path / "tokenizer.model")
    joined = tokenizer.decode(corpus.tokens.tolist()).replace("\n ", "\n")
    assert joined == "\n".join(lines * 3) + "\n"


def test_learning_rate() -> None:
    recipe = Recipe(steps=1100, warmup_steps=100, learning_rate=0.5)
    for step, expected in ((0, 0.005), (49, 0.25), (99, 0.5), (100, 0.5), (600, 0.275)):
        assert recipe.learning_rate_at(step) == pytest.approx(expected)
    assert recipe.learning_rate_at(1100) == pytest.approx(0.05)
    rates = [recipe.learning_rate_at(step) for step in range(1100)]
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert Recipe(steps=1, warmup_steps=0).learning_rate_at(0) == pytest.approx(2e-3)


ENOUGH = "\n\n".join(f"paragraph {i} of a text that is too short" for i in range(40))
BAD: dict[str, tuple[bytes | None, tuple[str, ...], str]] = {
    "missing file": (None, (), "No such file or directory"),
    "not UTF-8": (b"caf\xe9\n\nmore", (), "text.txt is not UTF-8"),
    "empty": (b"", (), "held-out size must be in (0, 0), got 32000"),
    "shorter than what is held out": (b"word " * 99, (), "held-out size must be in (0, 247)"),
    "nothing held out": (ENOUGH.encode(), ("--held-out-chars", "0"), "got 0"),
    "one paragraph": (b"word " * 99, ("--held-out-chars", "9"), "lie in one paragraph"),
    "too short a text": (ENOUGH.encode(), ("--held-out-chars", "99"), "too short to train a vocab"),
    "no steps": (ENOUGH.encode(), ("--steps", "0"), "steps must be positive, got 0"),
    "no batch": (ENOUGH.encode(), ("--batch-size", "-2"), "batch_size must be positive, got -2"),
    "no evaluation": (ENOUGH.encode(), ("--eval-every", "0"), "eval_every must be positive, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents, options, message = BAD[name]
    source, out = tmp_path / "text.txt", tmp_path / "out"
    if contents is not None:
        source.write_bytes(contents)
    before = list(tmp_path.iterdir())
    assert main([str(source), "--output", str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert list(tmp_path.iterdir()) == before, "nothing is left behind"


def test_bad_output(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is trained."""
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "keep").write_text("me")
    file.write_text("keep me")
    for out, message in ((full, "is not empty; name a new"), (file, "is a file; name a new")):
        assert main([str(text), "--output", str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out} {message} folder\n"
    assert (full / "keep").read_text() == "me" and file.read_text() == "keep me"


def test_too_long_a_window(tmp_path: Path) -> None:
    corpus: Any = small_corpus(tmp_path, "a few words only, but a few of them.\n" * 8)
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, too few for seqlen 1000"):
        corpus.sample(2, 1000, torch.Generator())
