"""The README names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_paths():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named = re.findall(r"`((?:benchmarks|csrc|mistral_kernels|tests)/[\w./-]*)`", text)
    assert links
    assert named
    assert [path for path in (*links, *named) if not (ROOT / path).exists()] == []
