"""Chat at a terminal: commands, editing, Ctrl-C, history, styles."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.terminal import PASTE_END, PASTE_START, Terminal

from mistral_kernels.checkpoint import resolve
from mistral_kernels.cli import terminal
from mistral_kernels.cli.command import wrapped
from mistral_kernels.cli.history import History
from mistral_kernels.cli.terminal import Interrupts, MessageReader

TEMPLATE = """\
{{ bos_token }}{% for m in messages %}{% if m.role == "user" %}<< {{ m.content }} >>\
{% elif m.role == "assistant" %}{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\
{% endif %}{% endfor %}"""
PROMPT = "\x1b[1m>\x1b[0m "
NEW_LINE = (
    "\x1b[?2004h" + PROMPT
)  # readline enables bracketed paste; later it may draw PROMPT again
RATE = r"\d+ tokens?(, [\d,.]+ tokens/s)?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the bundled model's weights and a chat template."""
    pytest.importorskip("transformers", reason="extra `hf` is not installed")
    folder = tmp_path_factory.mktemp("instruct")
    for file in resolve("tiny").iterdir():
        if file.suffix != ".md":
            (folder / file.name).symlink_to(file)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def chat(folder: Path, *options: str) -> tuple[str, ...]:
    return (
        "mistral_kernels.generate",
        "--chat",
        "--model",
        str(folder),
        "--device",
        "cpu",
        *options,
    )


def test_each_command_works_and_errors_do_not_end_the_chat(
    folder: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Each error is one line."""
    options = ("--window", "none", "--context", "120", "-m", "7", "--ignore-eos")
    saved, listed = tmp_path / "saved.jsonl", tmp_path / "saved.json"
    with Terminal(*chat(folder, *options), **environment) as terminal:

        def enter(text: str) -> str:
            """Type a line, and return the output up to the next prompt."""
            terminal.send(text + "\r")
            return terminal.expect(NEW_LINE)

        banner = terminal.expect(NEW_LINE)
        assert f"Chat with {folder}, context: 120 tokens" in banner.replace("\n", " ")
        assert "/help /exit /clear /regen /system [TEXT] /save [FILE]" in banner
        first = enter("Hi é漢!")
        assert "Hi é漢!" in first
        assert re.search(r"\x1b\[2m7 tokens, .+ tokens/s; stopped at --max-tokens 7\x1b\[0m", first)
        assert "7 tokens" in enter("/regen")
        assert "message that begins with" in enter("/help")
        assert "error: no command /usr; /help lists the commands; to send a" in enter("/usr is?")
        assert "error: /clear takes no argument, got now" in enter("/clear now")
        assert "system message: none" in enter("/system")
        assert "system message set" in enter("/system\u00a0Be brief. ")
        assert "system message: Be brief." in enter("/system")
        long = enter(" ".join(["word"] * 200))
        assert re.search(r"error: the message .+ must have at most 120 tokens .+, got \d+;", long)
        assert "7 tokens" in enter(" /etc is a message")
        terminal.send(f"{PASTE_START}" + "\r".join("abcdefghij") + PASTE_END)
        terminal.expect("j")
        assert "7 tokens" in enter("")
        terminal.send('"""one\r')
        terminal.expect("\x1b[1m...\x1b[0m ")
        terminal.send("two\r")
        terminal.expect("\x1b[1m...\x1b[0m ")
        assert "7 tokens" in enter('three"""')
        assert f"saved 9 messages in {saved}" in enter(f"/save {saved}")
        assert f"saved 9 messages in {saved}, again" in enter("/save")
        assert f"saved 9 messages in {listed}\x1b" in enter(f"/save {listed}")
        assert f"error: {folder / 'config.json'} exists; give" in enter(
            f"/save {folder / 'config.json'}"
        )
        assert "error: . exists; give another name" in enter("/save .")
        assert "error: [Errno 2] No such file or directory: " in enter(f"/save {tmp_path}/no/file")
        assert re.search(r"dropped the oldest .+ the context of 120 tokens", enter("word " * 60))
        assert re.search(r"cleared \d messages?", enter("/clear"))
        assert "error: the conversation has no answer to generate again" in enter("/regen")
        assert "system message removed" in enter("/system -")
        assert "error: the conversation has no messages to save" in enter("/save")
        terminal.send("/exit\r")
        assert terminal.end() == 0
        assert re.search(r"\nseed +\d+\n$", terminal.output)
        assert "Traceback" not in terminal.output
    messages = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert json.loads(listed.read_text(encoding="utf-8")) == messages
    sent = [message["content"] for message in messages if message["role"] == "user"]
    assert sent == ["Hi é漢!", "/etc is a message", "\n".join("abcdefghij"), "one\ntwo\nthree"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    history = tmp_path / "state" / "mistral_kernels" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text(encoding="utf-8").startswith('"Hi é漢!"\n"/regen"\n')


def test_ctrl_c_ends_an_answer_and_ctrl_d_leaves(folder: Path, environment: dict[str, str]) -> None:
    """At the prompt, Ctrl-C clears the line."""
    options = ("-m", "1000000", "--ignore-eos")
    with Terminal(*chat(folder, *options), **environment) as terminal:
        assert "context: endless" in terminal.expect(NEW_LINE).replace("\n", " ")
        for message in ("Hello\r", "/regen\r"):
            terminal.send(message)
            terminal.expect("\n")
            terminal.expect("e")  # of the answer
            terminal.send("\x03" * 3)
            assert re.search(rf"{RATE}; interrupted\x1b", terminal.expect(NEW_LINE))
        terminal.send("not sent")
        terminal.expect("not sent")
        assert "Ctrl-D or /exit leaves the chat" in terminal.interrupt(NEW_LINE)
        terminal.send('"""not\r')
        terminal.expect("\x1b[1m...\x1b[0m ")
        assert "Ctrl-D or /exit leaves the chat" in terminal.interrupt(NEW_LINE)
        terminal.send("\x1b[A\x1b[A")  # the message before /regen
        terminal.expect("Hello")
        terminal.send("\x15\x04")  # clear the line, leave
        assert terminal.end() == 0
        assert re.search(r"\nseed +\d+\n$", terminal.output)
        assert "Traceback" not in terminal.output


@pytest.mark.parametrize("style", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_styles_can_be_disabled(
    folder: Path, environment: dict[str, str], style: dict[str, str]
) -> None:
    options = ("-m", "3", "--ignore-eos")
    with Terminal(*chat(folder, *options), columns=40, **environment, **style) as terminal:
        banner = terminal.expect("> ")
        assert all(len(line) <= 40 for line in banner.splitlines() if "/" not in line)
        terminal.send("Hi\r")
        terminal.expect("tokens/s")
        terminal.expect("> ")  # before the prompt, the terminal would not pass Ctrl-D to readline
        terminal.send("\x04")
        assert terminal.end() == 0
    escapes = set(re.findall(r"\x1b[^a-zA-Z]*[a-zA-Z]", terminal.output))
    # readline's own: bracketed paste, keypad and meta keys.
    assert all("?" in escape or "TERM" not in style for escape in escapes), escapes
    assert not any(escape.endswith("m") for escape in escapes), escapes


def test_stdout_has_only_the_answers(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Prompts are on the terminal. Pasted lines are one message, also without readline."""
    out = tmp_path / "out"
    options = ("-m", "5", "--temp", "0", "--ignore-eos", "--json")
    with out.open("wb") as file:
        terminal = Terminal(*chat(folder, *options), stdout=file, **environment)
    with terminal:
        for message in ("Hi\n", "one\ntwo\nthree\n", "/regen\n"):
            terminal.expect(PROMPT)
            terminal.send(message)
        terminal.expect(PROMPT)
        terminal.send("\x03")
        terminal.expect(PROMPT)
        terminal.send("\x04")
        assert terminal.end() == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["Hi"] + ["one\ntwo\nthree"] * 2
    assert records[1] == records[2]


def test_ctrl_c_before_the_prompt_ends_the_command(
    folder: Path, environment: dict[str, str]
) -> None:
    """The interrupt comes during the imports, or while the model is loaded."""
    trace = {"PYTHONPROFILEIMPORTTIME": "1"}
    for module in ("mistral_kernels.text.chat", "transformers"):
        with Terminal(*chat(folder), **environment, **trace) as terminal:
            terminal.expect(f" {module}\n")
            terminal.send("\x03")
            assert terminal.end() == 130
            assert "Traceback" not in terminal.output
            assert "\ninterrupted\n" in terminal.output


# Parts


def test_a_reader_of_a_pipe_returns_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a pipe, commands and quotes are messages."""
    monkeypatch.setattr(sys, "stdin", io.StringIO('/help \n"""\n\n\ufeffx\r\nlast'))
    reader = MessageReader(quiet=False)
    entries = list(iter(reader.read, None))
    assert entries == [("/help", False), ('"""', False), ("", False), ("x", False), ("last", False)]


def test_interrupts_are_raised_only_where_they_are_allowed() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            ignored = False
            try:
                with interrupts.allowed():
                    signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)  # a second one
                ignored = True
            assert ignored
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mistral_kernels" / "chat_history"


def test_the_history_is_private_and_bounded(state: Path) -> None:
    history = History()
    assert history.load() == []
    texts = ["é\n漢\x1b\\", ' "x"', "y" * 4000]
    for text in [*texts, "z" * 4001]:
        history.append(text)
    assert History().load() == texts
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    with state.open("a") as file:
        file.write('not JSON\n1\n"\\u0000"\n' + "".join(f'"{i}"\n' for i in range(3000)))
        file.write('"incomplete')
    assert History().load() == [str(i) for i in range(2000, 3000)]
    assert state.read_text().count("\n") == 1000
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert [path.name for path in state.parent.iterdir()] == [state.name]


def test_the_locale_may_lack_characters_of_the_history(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages with such characters are left out."""
    added: list[bytes] = []
    readline = SimpleNamespace(
        set_auto_history=lambda _: None, add_history=lambda text: added.append(text.encode("ascii"))
    )
    monkeypatch.setattr(terminal, "_import_readline", lambda: readline)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, SimpleNamespace(isatty=lambda: True))
    for text in ("one", "é漢", "two"):
        History().append(text)
    MessageReader(quiet=False)
    assert added == [b"one", b"two"]


def test_a_history_that_cannot_be_kept_is_one_note(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder needs no note."""
    state.parent.parent.write_text("a file instead of the folder")
    history = History()
    history.append("x")
    history.append("y")
    assert capsys.readouterr() == (
        "",
        f"note: no history: [Errno 20] Not a directory: '{state.parent}'\n",
    )
    state.parent.parent.unlink()
    state.parent.mkdir(parents=True)
    os.mkfifo(state)
    history = History()
    assert history.load() == []
    assert (
        capsys.readouterr().err == f"note: no history: {state} must be a regular file, got a FIFO\n"
    )
    state.unlink()
    state.write_bytes(b"\xff\n")
    assert History().load() == []
    assert capsys.readouterr().err.startswith(f"note: no history: {state} must be UTF-8: ")

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(state))

    monkeypatch.setattr(os, "open", refuse)
    History().append("x")
    assert capsys.readouterr() == ("", "")


def test_the_history_requires_an_absolute_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative XDG_STATE_HOME is ignored, as its specification requires."""
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    History().append("x")
    assert (tmp_path / ".local/state/mistral_kernels/chat_history").read_text() == '"x"\n'
    assert not (tmp_path / "state").exists()


def test_lines_are_wrapped_at_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (1, 40, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = wrapped("/save [FILE]    " + "word " * 30, indent=16).splitlines()
        assert all(len(line) < max(columns, 21) for line in lines)
        assert " ".join(" ".join(lines).split()) == "/save [FILE] " + " ".join(["word"] * 30)
