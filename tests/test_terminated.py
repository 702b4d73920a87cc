"""Commands that SIGTERM or SIGHUP ends: they clean up, and the signal is their exit status."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.builds import await_end

from mistral_kernels.cli.command import run
from mistral_kernels.ops.compiler import BUILD_VARIABLE

NUMBERS = (signal.SIGTERM, signal.SIGHUP)
# Under nohup a command would ignore SIGHUP.
COMMAND = "import signal, sys, runpy; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
COMMAND += "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"


def terminate_command(
    number: int, ready: Callable[[], bool], module: str, *arguments: str, **environment: str
) -> tuple[int, str]:
    """Start a command and send it the signal once `ready`; return its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, f"mistral_kernels.{module}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("number", NUMBERS)
def test_terminated_training_removes_its_tokenizer(tmp_path: Path, number: int) -> None:
    words = ["".join(random.choices("abcdefghijklmno", k=random.randint(2, 9))) for _ in range(900)]
    text, scratch, out = tmp_path / "text", tmp_path / "scratch", tmp_path / "out"
    text.write_text("\n\n".join(" ".join(random.choices(words, k=60)) for _ in range(100)))
    scratch.mkdir()
    small = ("--batch-size", "2", "--seqlen", "24", "--held-out-chars", "900", "--device", "cpu")
    code, errors = terminate_command(
        *(number, lambda: any(scratch.glob("*/tokenizer.model")), "train"),
        *(str(text), "--output", str(out), "--steps", "1000000", *small),
        TMPDIR=str(scratch),
    )
    assert code == -number
    assert "Traceback" not in errors
    assert list(scratch.iterdir()) == []
    assert not out.exists()


def test_terminated_command_ends_its_compilers(tmp_path: Path) -> None:
    """No compiler keeps running, and no library is left."""
    compiler, pids, cache = tmp_path / "c++", tmp_path / "pids", tmp_path / "cache"
    compiler.write_text(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 600\n")
    compiler.chmod(0o755)
    cache.mkdir(mode=0o700)
    settings = {BUILD_VARIABLE: "auto", "CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(cache)}
    settings["MAX_JOBS"] = "2"
    arguments = ("She was", "-m", "1", "--device", "cpu")

    def started() -> bool:
        both = pids.exists() and pids.read_text().count("\n") == 2
        time.sleep(0.2 * both)  # until the command has registered the second compiler
        return both

    code, errors = terminate_command(signal.SIGTERM, started, "generate", *arguments, **settings)
    assert code == -signal.SIGTERM
    assert "Traceback" not in errors
    for pid in map(int, pids.read_text().split()):
        await_end(pid)
    assert list(cache.rglob("*.so")) == []


def test_signal_handlers_are_restored() -> None:
    """Only default handlers are replaced, and only while a command runs."""
    before = [signal.signal(number, signal.SIG_DFL) for number in NUMBERS]
    seen = []

    def command(_: None) -> None:
        seen.extend(map(signal.getsignal, NUMBERS))

    try:
        assert run(command, None) == 0
        assert all(map(callable, seen))
        assert signal.SIG_DFL not in seen
        assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_DFL] * 2
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert run(command, None) == 0
        assert seen[3] is signal.SIG_IGN
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
