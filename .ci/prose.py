"""Check the words of the repository, and the subjects of its commits.

    python .ci/prose.py                       every tracked file
    python .ci/prose.py FILE...               these files
    python .ci/prose.py --message FILE        a commit message, as git's commit-msg hook gives it
    python .ci/prose.py --commits RANGE       the subjects of a range of commits

Prints one line per finding and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SUFFIXES = {".py", ".cpp", ".h", ".cu", ".md", ".yml", ".yaml", ".toml"}
SUBJECT_LENGTH = 72
CHATS = r"chat|generate|tekken|test_readme"

# (words not used, words used instead, files that may use them in another sense). A word is matched
# inside identifiers too: `is_turned` has the word `turned`.
GLOSSARY = [
    (r"(?<!in )turn(ed|s|ing)?", "rotate, rotated, change, sequence", CHATS),
    (r"backwards", "inverse rotation, in reverse", ""),
    (r"(?<!in[ _-])(?<!decimal )places?", "position, slot, offset, index", ""),
    (r"doors?", "wrapper, entry point", ""),
    (r"switch(ed|es)? (on|off)", "patch, unpatch, enable, disable", ""),
    (r"torn", "interrupted, incomplete", ""),
    (r"figures|told", "statistics, stats", ""),
    (r"sittings?|trials?", "round, session, measurement", ""),
    (r"roll[ _]call", "rendezvous", ""),
    (r"bands?", "blocked attention, key blocks", ""),
    (r"serves|takes? over|taken over", "fallback, runs, computes", ""),
    (r"go(es)? on", "resume, continue", ""),
    (r"plays? no part", "padding", ""),
    (r"knows?|known to|says?|speaks?|forgets?|wants?", "hold, return, read, raise", ""),
    (r"(?<!\.)tells?", "print, return, report", ""),
    (r"ask(s|ed|ing)?", "check, require, request", ""),
    (r"but for", "except", ""),
    (r'"""(of|as|by|what|who|where|there|whose|both)', "begin with a verb or a noun", ""),
    (
        r"\w*colours?|\w*coloured|behaviou?rs?(?<!ior)(?<!iors)|neighbours?|favou?r(?<!or)"
        r"|\w*(normal|initial|quant|serial|optim|synchron|special|token|vector|material|general"
        r"|organ|recogn|minim|maxim|summar|parallel)is(e|es|ed|ing|er|ers|ation|ations)",
        "American spelling, as in torch",
        "",
    ),
]
PATTERNS = [
    (re.compile(rf"(?<![A-Za-z])({words})(?![A-Za-z])", re.IGNORECASE), instead, exempt)
    for words, instead, exempt in GLOSSARY
]


def findings(path: Path) -> Iterator[str]:
    """Yield one line per wrong word of a file."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        for pattern, instead, exempt in PATTERNS:
            if exempt and re.search(exempt, str(path)):
                continue
            for match in pattern.finditer(line):
                yield f"{path}:{number}: {match.group()!r}; use: {instead}"


def subject_finding(subject: str) -> str | None:
    """Return what is wrong with a commit's subject; None if nothing is."""
    if len(subject) > SUBJECT_LENGTH:
        return f"subject has {len(subject)} characters, at most {SUBJECT_LENGTH}: {subject}"
    if subject.endswith("."):
        return f"subject ends with a full stop: {subject}"
    return None


def _git(*arguments: str) -> list[str]:
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def _all_files() -> Iterator[Path]:
    """Yield the files that git tracks, or all files of a folder without git."""
    try:
        yield from map(Path, _git("ls-files"))
    except (OSError, subprocess.CalledProcessError):
        yield from (path for path in Path().rglob("*") if ".git" not in path.parts)


def main(argv: list[str] | None = None) -> int:
    """Print the findings and return the exit code."""
    parser = argparse.ArgumentParser(prog="python .ci/prose.py", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--message", type=Path)
    parser.add_argument("--commits")
    args = parser.parse_args(argv)
    found: Iterable[str | None]
    if args.message:
        found = [subject_finding(args.message.read_text().split("\n", 1)[0])]
    elif args.commits:
        found = map(subject_finding, _git("log", "--no-merges", "--format=%s", args.commits))
    else:
        files = args.files or _all_files()
        found = (
            finding
            for path in files
            if path.suffix in SUFFIXES and path.exists()
            if path.name not in ("prose.py", "test_prose.py")  # both contain the words
            for finding in findings(path)
        )
    lines = [line for line in found if line]
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
