"""Texts: which part is a paragraph, and which part is held out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mistral_kernels.training.corpus import read_texts, split_held_out

WORDS = [f"word{i}" for i in range(120)]
GROUPS = [" ".join(WORDS[:50]), " ".join(WORDS[50:100]), " ".join(WORDS[100:])]
# Contents of a file, its paragraphs, and the rule that is printed.
LAYOUTS: dict[str, tuple[str, list[str], str]] = {
    "blank lines": ("a b\nc\n\n\n \nd  e\n", ["a b c", "d e"], "separated by blank lines in {}"),
    "lines": ("\n\na b\n c. d\n\n", ["a b", "c. d"], "every line of {} (no blank lines)"),
    "sentences": (
        'a b. "c d!"  e f?\n',
        ["a b.", '"c d!"', "e f?"],
        "every sentence of {} (a single line)",
    ),
    "sentences without spaces": (
        "\u4f60\u597d\u3002\u518d\u89c1\uff01",
        ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01"],
        "every sentence of {} (a single line)",
    ),
    "words": (
        " ".join(WORDS),
        GROUPS,
        "every 50 words of {} (a single line without sentences)",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_of_a_text_has_its_paragraphs(name: str, tmp_path: Path) -> None:
    contents, paragraphs, rule = LAYOUTS[name]
    path = tmp_path / "text.txt"
    path.write_text(contents, encoding="utf-8")
    text, found = read_texts([path])
    assert text == "".join(f"{paragraph}\n" for paragraph in paragraphs)
    assert found == f"paragraphs: {rule.format(path)}"


def test_each_file_has_its_own_rule(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("blank.txt", "lines.txt", "other.txt")]
    for path, contents in zip(paths, ("a\nb\n\nc", "d\ne", "f\n\ng"), strict=True):
        path.write_text(contents)
    text, found = read_texts(paths)
    assert text == "a b\nc\nd\ne\nf\ng\n"
    blank, lines, other = paths
    assert found == (
        f"paragraphs: separated by blank lines in {blank}, {other}; "
        f"every line of {lines} (no blank lines)"
    )


def test_the_held_out_text_has_32000_characters_or_10_percent() -> None:
    """The size is 10 % of a small text, and at most 32,000 characters."""
    line = "x" * random.randint(1, 9) + "\n"
    for lines, largest in ((100, 10 * len(line)), (400_000 // len(line), 32_000)):
        training, held_out = split_held_out(line * lines)
        assert training + held_out == line * lines
        assert largest - len(line) < len(held_out) <= largest


# Text, size, and the held-out text.
SPLITS: dict[str, tuple[str, int, str]] = {
    "a paragraph": ("one two\nthree four\nfive six\n", 12, "five six\n"),
    "all of a paragraph": ("one two\nthree four\nfive six\n", 9, "five six\n"),
    "a sentence": ("one. two three. four five. six\n", 14, "six\n"),
    "a word": ("one two three four five six\n", 10, "five six\n"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_held_out_text_begins_with_a_whole_part(name: str) -> None:
    text, size, expected = SPLITS[name]
    training, held_out = split_held_out(text, size)
    assert held_out == expected
    assert training == text.removesuffix(held_out).rstrip() + "\n"
