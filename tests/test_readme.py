"""Tests of the Markdown pages: paths and headings that they name exist, and their Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "benchmarks",
    "csrc",
    "mistral_kernels",
    "tests",
)  # not the root, which may have a virtual environment
PAGES = [
    ROOT / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *(
        page
        for folder in FOLDERS
        for page in sorted((ROOT / folder).rglob("README.md"))
        if "tools" not in page.relative_to(ROOT).parts
    ),
]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, block in enumerate(PYTHON.findall(page.read_text(encoding="utf-8")))
]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            missing.append(link)
    named = re.findall(r"`((?:benchmarks|csrc|mistral_kernels|tests)/[\w./-]*)`", text)
    missing += [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert len(text.encode()) <= 12_000


def run(code: str, folder: Path) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block, tmp_path):
    if "transformers" in block:
        pytest.importorskip("transformers")
    run(block, tmp_path)


def test_readme_blocks_run_as_one_program(tmp_path):
    pytest.importorskip("transformers")
    blocks = PYTHON.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) > 3
    run("\n".join(blocks), tmp_path)
