"""Common parts of the commands: dispatch, exit codes, one-line errors, streams, input files."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mistral_kernels
from mistral_kernels import __main__ as dispatcher
from mistral_kernels.cli import startup
from mistral_kernels.cli.command import Parser, read_input, run, user_path, write_out
from mistral_kernels.utils.errors import one_line, reason_of


def raising(error: BaseException) -> Callable[[Any], int]:
    def command(_: Any) -> int:
        raise error

    return command


def recurse(depth: Any) -> int:
    return recurse(depth) + 1


def allocate(_: Any) -> int:
    return torch.empty(1 << 50).numel()


def overflow(_: Any) -> int:
    return torch.empty(1 << 62, 1 << 62).numel()


CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB"
BAD: list[tuple[Callable[[Any], int], str]] = [
    (raising(ValueError("no\n  such \x1b[2Jthing\x00")), "no such \\x1b[2Jthing\\x00"),
    (raising(ValueError()), "ValueError"),
    (raising(FileNotFoundError(2, "No such file", "x")), "[Errno 2] No such file: 'x'"),
    (raising(NotImplementedError("not offered")), "not offered"),
    (raising(MemoryError()), "out of memory"),
    (raising(MemoryError("out of memory: 5 GB")), "out of memory: 5 GB"),
    (
        raising(torch.OutOfMemoryError(CUDA_OOM)),
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
        "of 79 GiB",
    ),
    (
        allocate,
        "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (lambda _: int(1e400), "cannot convert float infinity to integer"),
    (
        raising(RuntimeError("no library for cpu, and MISTRAL_KERNELS_BUILD=always: g++\n fails")),
        "no library for cpu, and MISTRAL_KERNELS_BUILD=always: g++ fails",
    ),
    (lambda _: Path("~no-such-user").expanduser().is_dir(), "Could not determine home directory."),
]


@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input_is_one_line(
    command: Callable[[Any], int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, None) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("command", [recurse, overflow])
def test_recursion_and_size_overflow_are_one_line(
    command: Callable[[Any], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The exact message depends on the versions of Python and PyTorch."""
    assert run(command, None) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "nested too deeply" in err or "out of memory: " in err


def test_exit_codes_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: None, None) == 0
    assert run(lambda code: code, 1) == 1
    assert run(raising(BrokenPipeError(32, "Broken pipe")), None) == 141
    assert capsys.readouterr() == ("", "")
    assert run(raising(KeyboardInterrupt()), None) == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")
    with pytest.raises(SystemExit) as ended:
        run(raising(SystemExit(7)), None)
    assert ended.value.code == 7


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), TypeError("x"), KeyError("memory"), AssertionError(), RuntimeError("x")],
)
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert reason_of(error) is None
    with pytest.raises(type(error)):
        run(raising(error), None)


def test_one_line_is_short_and_printable() -> None:
    for _ in range(200):
        highest = random.choice([0x80, 0x100, 0x110000])
        text = "".join(chr(random.randrange(highest)) for _ in range(random.randint(0, 3000)))
        line = one_line(text)
        assert line.isprintable()
        assert len(line) <= 1000
    assert one_line("é漢 'x'") == "é漢 'x'"


def test_option_values_are_parsed() -> None:
    assert user_path("~") == Path.home()
    assert user_path("a/b") == Path("a/b")
    parser = Parser(prog="x")
    parser.add_argument("--stop", action="append")
    assert parser.parse_args(["--stop=--", "--stop", "-"]).stop == ["--", "-"]


@pytest.mark.parametrize(
    ("program", "commands"),
    [
        ("/venv/bin/mistral-kernels", ("mistral-kernels train", "mistral-kernels build")),
        (
            "/src/mistral_kernels/train.py",
            ("python -m mistral_kernels.train", "python -m mistral_kernels build"),
        ),
    ],
)
def test_help_and_errors_name_the_command_that_the_user_has_typed(
    program: str,
    commands: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    parser = Parser("python -m mistral_kernels.train", "or: python -m mistral_kernels build")
    text = parser.format_help()
    assert text.startswith(f"usage: {commands[0]} [-h]\n")
    assert text.endswith(f"\nor: {commands[1]}\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["x"])
    assert (
        capsys.readouterr().err == f"error: unrecognized arguments: x; see {commands[0]} --help\n"
    )


def test_the_list_of_commands_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = random.randint(40, 120)
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        dispatcher.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) < columns  # the first line is the usage
    assert any(line.startswith("  build     compile ") for line in lines)


# Choice of the command

UNKNOWN = "error: command must be one of generate, chat, convert, train, report, build, got "
HELP = "; see python -m mistral_kernels --help\n"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the modules of the commands; return the list of their names and arguments."""
    calls: list[Any] = []

    def import_module(name: str) -> Any:
        def main(argv: list[str]) -> int:
            calls.append((name.removeprefix("mistral_kernels."), argv))
            return 7

        return types.SimpleNamespace(main=main)

    monkeypatch.setattr(dispatcher.importlib, "import_module", import_module)
    return calls


@pytest.mark.parametrize(
    ("argv", "module", "arguments"),
    [
        ([], "cli.report", []),
        (["--check"], "cli.report", ["--check"]),
        (["report", "--check"], "cli.report", ["--check"]),
        (["build"], "cli.build", []),
        (["generate"], "generate", []),
        (["generate", "It is", "--help"], "generate", ["It is", "--help"]),
        (["chat", "--model", "x"], "generate", ["--chat", "--model", "x"]),
        (["convert", "a", "b"], "convert", ["a", "b"]),
        (["train", "--version"], "train", ["--version"]),
    ],
)
def test_commands_are_passed_their_arguments(
    argv: list[str], module: str, arguments: list[str], calls: list[Any]
) -> None:
    assert dispatcher.main(argv) == 7
    assert calls == [(module, arguments)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate", "x"], f"{UNKNOWN}'genrate'; did you mean generate?{HELP}"),
        (["Train"], f"{UNKNOWN}'Train'; did you mean train?{HELP}"),
        (["It is a\ntruth"], f"{UNKNOWN}'It is a\\ntruth'; did you mean generate?{HELP}"),
        (["xyz"], f"{UNKNOWN}'xyz'{HELP}"),
        ([""], f"{UNKNOWN}''{HELP}"),
        (["--chek"], f"error: unrecognized arguments: --chek{HELP}"),
        (["--version", "build"], f"error: unrecognized arguments: build{HELP}"),
    ],
)
def test_unknown_commands_are_one_line(
    argv: list[str], message: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatcher.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", message)
    assert calls == []


def test_help_lists_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatcher.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("generate", "chat", "convert", "train", "report", "build"):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Write the script that pip installs."""
    config = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    entry = re.search(r'\[project\.scripts\]\n([\w-]+) = "([\w.]+):(\w+)"\n', config)
    assert entry is not None
    path = tmp_path / entry[1]
    path.write_text(f"import sys\nfrom {entry[2]} import {entry[3]}\nsys.exit({entry[3]}())\n")
    return path


def test_the_script_and_the_module_are_the_same_command(script: Path) -> None:
    for command in ([str(script)], ["-m", "mistral_kernels"]):
        done = subprocess.run(
            [sys.executable, *command, "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"mistral_kernels {mistral_kernels.__version__}\n"
        assert done.stderr == ""


def test_ctrl_c_during_the_imports_of_the_script_prints_one_word(script: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(script), "generate", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith(" mistral_kernels.cli.startup\n"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    times, _, rest = err.rpartition("\ninterrupted\n")  # the last line may be incomplete
    assert (process.returncode, out, rest) == (130, "", "")
    assert all(line.startswith("import time: ") for line in times.splitlines()), times


# Streams


class BrokenStream(io.RawIOBase):
    """Stream whose writes fail, as those to a closed pipe or a full disk."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.failing = True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.failing:
            raise OSError(self.error, os.strerror(self.error))
        return len(data)


@contextlib.contextmanager
def broken(name: str, error: int) -> Iterator[None]:
    """Make writes to a standard stream fail inside the block."""
    device = BrokenStream(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(device), "utf-8"))
        yield
    device.failing = False  # its buffer is flushed when the garbage collector deletes it


@pytest.mark.parametrize(("error", "code"), [(32, 141), (28, 2), (9, 2)])
@pytest.mark.parametrize("late", [False, True])
def test_exit_codes_of_a_broken_stdout(
    error: int, code: int, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `late`, the first flush is at the end of the command."""
    with broken("stdout", error):
        assert run(lambda _: print("text") if late else write_out("text"), None) == code
    line = f"error: [Errno {error}] {os.strerror(error)}: 'standard output'\n"
    assert capsys.readouterr().err == (line if code == 2 else "")


@pytest.mark.parametrize("error", [32, 28])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (raising(ValueError("x")), 2),
        (raising(KeyboardInterrupt()), 130),
        (lambda _: 0, 0),
        (lambda _: print("a note", file=sys.stderr), None),
    ],
)
def test_exit_codes_of_a_broken_stderr(
    error: int, command: Callable[[Any], int], code: int | None
) -> None:
    with broken("stderr", error):
        assert run(command, None) == ({32: 141, 28: 2}[error] if code is None else code)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp037", "shift_jis", "utf-8", "utf-16"])
def test_stdout_escapes_characters_that_its_encoding_lacks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other characters are printed unchanged."""
    sink, text = io.BytesIO(), "é漢😀 \ud800!\n"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding))
        write_out(text)
        written = sink.getvalue().decode(encoding)
    for char in text:
        try:
            char.encode(encoding)
        except UnicodeEncodeError:
            char = char.encode("ascii", "backslashreplace").decode()
        assert written.startswith(char), (written, char)
        written = written[len(char) :]
    assert written == ""


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe gets the text unchanged."""
    text, shown = "é\t\x1b]0;title\x07\r\n\x9b31m\x00\x7f\n", "\\x1b]0;title\\x07"
    for at_terminal in (False, True):
        sink = io.StringIO()
        sink.isatty = lambda value=at_terminal: value  # type: ignore[method-assign]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", sink)
            write_out(text)
        expected = f"é\t{shown}\r\n\\x9b31m\\x00\\x7f\n" if at_terminal else text
        assert sink.getvalue() == expected


@pytest.mark.parametrize("encoding", ["ascii", "cp037"])
def test_stderr_escapes_characters_that_its_encoding_lacks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is one that a caller has set, with errors="strict"."""
    sink = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.TextIOWrapper(sink, encoding, errors="strict"))
        assert run(raising(ValueError("漢")), None) == 2
        assert sink.getvalue().decode(encoding) == "error: \\u6f22\n"


def test_missing_streams_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    kept = [sys.stdin, sys.stdout, sys.stderr]

    def command(_: Any) -> int:
        kept[:] = [sys.stdin, sys.stdout, sys.stderr]
        assert sys.stdin.read() == ""
        print("a text")
        print("a note", file=sys.stderr)
        raise ValueError("written to no stream")

    assert run(command, None) == 2
    for stream in kept:
        stream.close()


IMPORT_STARTUP = (
    "import os, sys; sys.argv = ['-m', 'x']; "
    "sys.orig_argv = ['python', '-m', 'mistral_kernels', 'x']; "
    "sys.path.insert(0, {folder!r}); import startup; "
)


@pytest.mark.parametrize("argv", ["['-m', 'x']", "['/bin/mistral-kernels', 'x']"])
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_no_file_gets_the_descriptor_of_a_closed_stream(closed: tuple[int, ...], argv: str) -> None:
    code = IMPORT_STARTUP.format(folder=str(Path(startup.__file__).parent))
    code = code.replace("['-m', 'x']", argv)
    code += "file = os.open('/', os.O_RDONLY); print('x', file=sys.stderr); os._exit(file)"
    redirections = " ".join(f"{number}>&-" for number in closed)
    shell = f'exec "$0" -c "$1" {redirections}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], capture_output=True, text=True)
    assert done.returncode > 2
    assert done.stdout == ""
    assert done.stderr == ("" if 2 in closed else "x\n")


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ("['-m', 'x']", "['x.py', 'x']"),
        ("['-m', 'x']", "['x.py', 'mistral-kernels']"),
        ("['-m', 'x']", "[]"),
        ("'mistral_kernels'", "'mistral_kernelsx'"),
        ("'-m', 'x'", "'-m'"),
    ],
)
def test_startup_does_nothing_in_other_programs(ours: str, other: str) -> None:
    """The other programs also run with `-m`, or have `mistral_kernels` as an argument."""
    code = IMPORT_STARTUP.format(folder=str(Path(startup.__file__).parent))
    assert ours in code
    code = code.replace(ours, other)
    code += "import signal; print(sys.excepthook is sys.__excepthook__, sys.stderr, "
    code += "signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    shell = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    assert subprocess.run(shell, capture_output=True, text=True).stdout == "True None True\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            "No module named 'torch'",
        ),
        ("ImportError('libtorch.so: failed to\\nmap')", "libtorch.so: failed to map"),
        ("MemoryError", "MemoryError"),
    ],
)
def test_a_failed_import_is_one_line(error: str, message: str) -> None:
    code = IMPORT_STARTUP.format(folder=str(Path(startup.__file__).parent)) + f"raise {error}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: cannot import a module that the command needs: {message}\n"


def test_a_failed_import_of_this_package_keeps_its_traceback() -> None:
    code = IMPORT_STARTUP.format(folder=str(Path(startup.__file__).parent))
    code += "raise ImportError('x', name='mistral_kernels.ops')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ")


# Input files


def test_read_input_normalizes_texts(tmp_path: Path) -> None:
    file = tmp_path / "text"
    for data, text in (
        (b"", ""),
        (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n"),
        ("é\u2028\0".encode(), "é\u2028\0"),
        (b"\xef\xbb\xbf\xef\xbb\xbfx", "\ufeffx"),
    ):
        file.write_bytes(data)
        assert read_input(file, 100) == text
    file.write_bytes(b"x" * 3_000_000)
    assert len(read_input(file, 10)) == 3_000_000, "regular files may have any size"
    file.write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=f"{file} must be UTF-8: .* 0xff in position 3"):
        read_input(file, 100)
    with pytest.raises(IsADirectoryError):
        read_input(tmp_path, 100)


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (1 << 20) + 1, 2_500_000])
def test_read_input_reads_a_pipe_to_its_end(size: int, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def send() -> None:
        with pipe.open("wb") as file:
            for start in range(0, size, 70_000):
                file.write(b"x" * min(70_000, size - start))

    for limit in (size, size + 1, 1 << 28):
        sender = threading.Thread(target=send)
        sender.start()
        assert len(read_input(pipe, limit)) == size
        sender.join()


def test_an_endless_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="/dev/zero must have at most 5000000 bytes, got more"):
        read_input(Path("/dev/zero"), 5_000_000)
