"""Loop of `python -m mistral_kernels.generate --chat`: messages, commands, answers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mistral_kernels.cli.command import wrapped, write_out
from mistral_kernels.cli.output import with_progress, write_record
from mistral_kernels.cli.terminal import Entry, Interrupts, MessageReader, note
from mistral_kernels.distributed.process_group import World
from mistral_kernels.text.chat import Conversation
from mistral_kernels.text.stats import GenerationStats
from mistral_kernels.text.streaming import Completion
from mistral_kernels.utils.errors import reason_of
from mistral_kernels.utils.files import expand_user, write_atomically

_HELP = {
    "/help": "show this list",
    "/exit": "leave; also /quit, Ctrl-D",
    "/clear": "begin a new conversation; the system message stays",
    "/regen": "generate the last answer again",
    "/system [TEXT]": 'show the system message, or replace it; "-" removes it',
    "/save [FILE]": "write the conversation: JSON lines, or a JSON list if FILE ends with .json",
    '"""': "begin or end a message of several lines; pasted lines are one message",
    " /...": 'message that begins with "/": put a space before it',
    "Ctrl-C": "end the answer, or clear the line",
}
_BANNER = (
    "/help /exit /clear /regen /system [TEXT] /save [FILE]",
    "Ctrl-C ends an answer, Ctrl-D leaves",
)


class Chat:
    """A conversation over stdin, stdout and stderr.

    At a terminal, errors of a message or a command are printed, and the chat continues. From a
    pipe, they are raised. All ranks run the same loop; rank 0 reads, prints and saves.

    Args:
        conversation: the conversation.
        world: rank and device of this process, and the number of ranks.
        options: options of `stream_generate`.
        stats: the statistics to update.
        model_name: name of the model in the banner.
        as_json: write JSON records instead of texts.
        quiet: print no banner, prompts or notes.
    """

    def __init__(
        self,
        conversation: Conversation,
        world: World,
        options: dict[str, Any],
        stats: GenerationStats,
        *,
        model_name: str,
        as_json: bool,
        quiet: bool,
    ) -> None:
        self.conversation, self.world = conversation, world
        self.options, self.stats = options, stats
        self.model_name, self.as_json, self.quiet = model_name, as_json, quiet
        self._reader = MessageReader(quiet)
        self._at_terminal = world.from_main(lambda: self._reader.at_terminal)
        # Under torchrun, Ctrl-C reaches the ranks at different times, and ends all of them.
        self._survives_interrupts = self._at_terminal and world.size == 1
        self._interrupts = Interrupts()
        # Number of tokens to keep free for an answer: at most half of the context.
        self._room = min(options["max_tokens"], max(conversation.max_length // 2, 1))
        self._saved: list[Path] = []
        self._ended = False
        self._commands: dict[str, Callable[[], None]] = {
            "/help": self._help,
            "/exit": self._exit,
            "/quit": self._exit,
            "/clear": self._clear,
            "/regen": self._regenerate,
        }
        self._commands_with_argument: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/save": self._save,
        }

    def run(self, messages: list[str]) -> None:
        """Answer `messages`, then those of stdin until its end or /exit."""
        with self._interrupts if self._survives_interrupts else nullcontext():
            if self._at_terminal:
                self._banner()
            for message in messages:
                self._handle(Entry(message.strip()), echo=True)
            while not self._ended and (entry := self._read()) is not None:
                self._handle(entry, echo=not self._at_terminal)

    # Input

    def _read(self) -> Entry | None:
        while True:
            try:
                with self._interrupts.allowed():
                    entry: Entry | None = self.world.from_main(self._reader.read)
            except KeyboardInterrupt:
                if not self._survives_interrupts:
                    raise
                self._reader.end_line()
                self._note("Ctrl-D or /exit leaves the chat")
                continue
            except ValueError as error:
                self._report(error)
                continue
            if entry is None and self._at_terminal:
                self._reader.end_line()
            return entry

    def _handle(self, entry: Entry, echo: bool) -> None:
        """Run a command, or answer a message that is not empty."""
        if echo and entry.text and not self.quiet:
            print(f"> {entry.text}", file=sys.stderr, flush=True)
        try:
            if entry.is_command:
                self._run_command(*entry.text.split(maxsplit=1))
            elif entry.text:
                self._answer(
                    entry.text, lambda: self.conversation.prompt_for(entry.text, self._room)
                )
        except ValueError as error:
            self._report(error)

    def _report(self, error: ValueError) -> None:
        """Print an error at a terminal; raise it otherwise."""
        if not self._at_terminal:
            raise error
        print(f"error: {reason_of(error)}", file=sys.stderr, flush=True)

    def _note(self, text: str) -> None:
        if not self.quiet:
            note(text)

    def _banner(self) -> None:
        context = f"{self.conversation.max_length} tokens"
        if self.conversation.endless:
            context = "endless (sliding window)"
        for line in (f"Chat with {self.model_name}, context: {context}", *_BANNER):
            self._note(wrapped(line))

    # Answers

    def _answer(self, message: str, make_prompt: Callable[[], list[int]]) -> None:
        """Generate and print an answer to `message`."""
        completion, before, interrupted = Completion(), replace(self.stats), False
        try:
            with self._reader.without_echo(), self._interrupts.allowed():
                prompt = make_prompt()
                if dropped := self.conversation.dropped:
                    what = f"{dropped} messages and their answers"
                    if dropped == 1:
                        what = "message and its answer"
                    self._note(
                        f"dropped the oldest {what}, to fit in the context of "
                        f"{self.conversation.max_length} tokens"
                    )
                deltas = with_progress(
                    lambda progress: self.conversation.reply(
                        prompt, progress=progress, **self.options
                    ),
                    len(prompt),
                )
                with closing(self.stats.time(deltas, len(prompt))) as timed:
                    for delta in timed:
                        completion.add(delta)
                        if not self.as_json:
                            write_out(delta.text)
        except KeyboardInterrupt:
            if not self._survives_interrupts:
                raise
            interrupted = True
        except ValueError:
            if completion.text and not self.as_json:
                write_out("\n")
            raise
        if self.as_json:
            write_record({"prompt": message, **asdict(completion)})
        elif completion.text or not interrupted:
            write_out("\n")
        self._note(self._summary(completion, before, interrupted))

    def _summary(self, completion: Completion, before: GenerationStats, interrupted: bool) -> str:
        """Return one line: the number of tokens, their rate, and why an answer is incomplete."""
        line = _count(len(completion.token_ids), "token")
        seconds = self.stats.decode_seconds - before.decode_seconds
        if seconds > 0:
            rate = (self.stats.later_tokens - before.later_tokens) / seconds
            line = f"{line}, {rate:,.1f} tokens/s"
        if not completion.text:
            what = "interrupted" if interrupted else "empty answer"
            return f"{line}; {what}, the conversation is unchanged"
        if interrupted:
            return f"{line}; interrupted"
        if completion.finish_reason != "length":
            return line
        if self.conversation.full:
            full = f"the context of {self.conversation.max_length} tokens (--context) is full"
            return f"{line}; {full}, the next message drops the oldest ones"
        return f"{line}; stopped at --max-tokens {self.options['max_tokens']}"

    # Commands

    def _run_command(self, name: str, argument: str = "") -> None:
        if name in self._commands_with_argument:
            self._commands_with_argument[name](argument)
        elif name not in self._commands:
            raise ValueError(
                f"no command {name}; /help lists the commands; to send a message that begins "
                'with "/", put a space before it'
            )
        elif argument:
            raise ValueError(f"{name} takes no argument, got {argument}")
        else:
            self._commands[name]()

    def _help(self) -> None:
        width = max(map(len, _HELP)) + 2
        for name, text in _HELP.items():
            note(wrapped(f"{name:{width}}{text}", indent=width))

    def _exit(self) -> None:
        self._ended = True

    def _clear(self) -> None:
        self._note(f"cleared {_count(self.conversation.clear(), 'message')}")

    def _regenerate(self) -> None:
        sent = [m["content"] for m in self.conversation.messages if m["role"] == "user"]
        self._answer(sent[-1] if sent else "", lambda: self.conversation.regenerate(self._room))

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
            self._note("system message removed" if text == "-" else "system message set")
        else:
            note(f"system message: {self.conversation.system or 'none'}")

    def _save(self, name: str) -> None:
        messages = self.conversation.transcript
        if not messages:
            raise ValueError("the conversation has no messages to save")
        path = expand_user(name) if name else Path(time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
        if not name and self._saved:
            path = self._saved[-1]
        again = path in self._saved
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        else:
            text = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in messages)

        def write() -> None:
            try:
                write_atomically(path, text.encode(), replace=again)
            except FileExistsError:
                raise ValueError(f"{path} exists; give another name") from None
            except OSError as error:
                raise ValueError(str(error)) from None

        self.world.from_main(write)
        self._saved.append(path)
        self._note(f"saved {_count(len(messages), 'message')} in {path}" + ", again" * again)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
