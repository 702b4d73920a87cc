"""Test `new_folder`: folders appear complete; interrupted, killed and concurrent writers."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mistral_kernels.checkpoint import CheckpointError, writing
from mistral_kernels.checkpoint.writing import new_folder

# Program that writes into a new folder, prints its path, and waits for a line on stdin.
WRITER = """
    import signal, sys
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP is ignored under nohup
        signal.signal(number, signal.SIG_DFL)
    from mistral_kernels.checkpoint.writing import new_folder
    with new_folder(sys.argv[1], 0) as folder:
        (folder / "part").write_text("x")
        print(folder, flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def writer() -> Iterator[Callable[[Path], tuple[subprocess.Popen[str], Path]]]:
    processes = []

    def start(target: Path) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_folders_of_killed_writers_only_are_removed(
    tmp_path: Path,
    writer: Callable[[Path], tuple[subprocess.Popen[str], Path]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check one killed and one running writer, each with its own target."""
    killed, left = writer(tmp_path / "killed")
    living, kept = writer(tmp_path / "living")
    killed.kill()
    killed.wait()
    assert names(tmp_path) == {left.name, kept.name}
    with (
        caplog.at_level(logging.WARNING, "mistral_kernels"),
        new_folder(tmp_path / "out", 0) as new,
    ):
        assert names(tmp_path) == {kept.name, new.name}
    assert [record.message for record in caplog.records] == [
        f"removed {left}, which an interrupted run had left"
    ]
    _out, _ = living.communicate("\n", timeout=60)
    assert living.returncode == 0
    assert names(tmp_path) == {"living", "out"}
    assert (tmp_path / "living" / "part").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated_writers_leave_no_files(
    tmp_path: Path,
    writer: Callable[[Path], tuple[subprocess.Popen[str], Path]],
    number: signal.Signals,
) -> None:
    """Check that the signal ends the process, as it would without `new_folder`."""
    process, _ = writer(tmp_path / "out")
    process.send_signal(number)
    assert process.wait() == -number
    assert names(tmp_path) == set()


def test_signal_handlers_of_the_program_are_kept(tmp_path: Path) -> None:
    """Check a handler, an ignored signal as under nohup, and the restored default."""
    seen: list[int] = []
    before = [signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))]
    before.append(signal.signal(signal.SIGHUP, signal.SIG_IGN))
    try:
        with new_folder(tmp_path / "out", 0):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with new_folder(tmp_path / "other", 0):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_thread_writes_a_folder(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", 0) as folder:
            (folder / "x").touch()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert names(tmp_path / "out") == {"x"}


def test_files_and_folders_of_other_names_are_kept(tmp_path: Path) -> None:
    kept = {".out.partial-12", ".out.partial-x", "out.partial-0123456789abcdef", ".partial"}
    for name in kept:
        (tmp_path / name).mkdir()
    file, link = ".file.partial-0123456789abcdef", ".link.partial-0123456789abcdef"
    (tmp_path / file).touch()
    (tmp_path / link).symlink_to(tmp_path / ".partial")
    with new_folder(tmp_path / "new", 0):
        pass
    assert names(tmp_path) == {*kept, file, link, "new"}


def test_folder_removed_before_its_lock_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that another folder is made if a process removes the first before it is locked."""
    make, removed = Path.mkdir, []

    def make_and_remove(path: Path, *args: object, **options: object) -> None:
        make(path, *args, **options)  # type: ignore[arg-type]
        if ".partial-" in path.name and len(removed) < 2:
            removed.append(path)
            writing._remove_abandoned(tmp_path)

    monkeypatch.setattr(Path, "mkdir", make_and_remove)
    with new_folder(tmp_path / "out", 0) as folder:
        assert folder not in removed
        assert names(tmp_path) == {folder.name}
    assert names(tmp_path) == {"out"}
    assert len(removed) == 2


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a folder is written and that no other folder is removed."""
    (tmp_path / ".old.partial-0123456789abcdef").mkdir()

    def flock(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(writing.fcntl, "flock", flock)
    with new_folder(tmp_path / "out", 0) as folder:
        (folder / "x").touch()
    assert names(tmp_path) == {"out", ".old.partial-0123456789abcdef"}


@pytest.mark.parametrize("rival", ["folder", "file"])
def test_target_created_during_writing_is_kept(tmp_path: Path, rival: str) -> None:
    target = tmp_path / "out"
    message = "out is not empty" if rival == "folder" else "out is a file"

    def write() -> None:
        with new_folder(target, 0):
            if rival == "folder":
                target.mkdir()
                (target / "mine").touch()
            else:
                target.touch()

    with pytest.raises(CheckpointError, match=message):
        write()
    assert names(tmp_path) == {"out"}
    assert not target.is_dir() or names(target) == {"mine"}


def test_first_of_two_writers_creates_the_target(
    tmp_path: Path, writer: Callable[[Path], tuple[subprocess.Popen[str], Path]]
) -> None:
    """Check that the writer that ends second raises an error."""
    (first, _), (second, _) = (writer(tmp_path / "out") for _ in range(2))
    first.communicate("\n", timeout=60)
    second.communicate("\n", timeout=60)
    assert (first.returncode, second.returncode) == (0, 1)
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"part"}


def test_special_extra_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with (
        pytest.raises(CheckpointError, match=r"tokenizer.model must be a regular file, got a FIFO"),
        new_folder(tmp_path / "out", 0, [tmp_path / "tokenizer.model"]),
    ):
        pass
    assert names(tmp_path) == {"tokenizer.model"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, OSError])
def test_exceptions_leave_no_files(tmp_path: Path, error: type[BaseException]) -> None:
    expected = CheckpointError if error is OSError else error

    def write() -> None:
        with new_folder(tmp_path / "out", 0) as folder:
            (folder / "x").touch()
            raise error

    with pytest.raises(expected):
        write()
    assert names(tmp_path) == set()


def test_home_folder_of_unknown_user_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(
            CheckpointError, match=r"no such user: '~no.such.user/x'; name the folder in"
        ),
        new_folder("~no.such.user/x", 0),
    ):
        pass
