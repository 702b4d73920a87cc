"""The check of words and commit subjects, `.ci/prose.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[1] / ".ci" / "prose.py"


def check(*arguments: str | Path, folder: Path | None = None) -> tuple[int, str]:
    command = [sys.executable, str(CHECK), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "q = is_turned(x)",
        "# the cache knows its length",
        '"""A door to it."""',
        "colour = 1",
        '"""Of the last dimension."""',
    ],
)
def test_wrong_words_are_found(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(f"right = 1\n{line}\n")
    code, printed = check(page)
    assert code == 1
    assert printed.startswith(f"{page}:2: ")


@pytest.mark.parametrize("line", ["x.add_(1)  # in place", "return replace(x)", "behavior of x"])
def test_other_senses_are_allowed(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(line)
    assert check(page) == (0, "")


def test_subjects(tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_text("s" * 72 + "\n\n" + "b" * 100)
    assert check("--message", message) == (0, "")
    message.write_text("s" * 73)
    assert check("--message", message)[0] == 1


def test_all_files_of_a_folder_without_git(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text("turned = 1")
    assert check(folder=tmp_path)[0] == 1
