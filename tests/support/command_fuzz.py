"""Call the commands with random arguments: `python command_fuzz.py FOLDER SEED COUNT`.

A program of test_command_fuzz.py. It calls `main` of the commands in this process, each time with
new standard streams, and prints a line of JSON before and after each call. Generation and training
are interrupted after a few steps: some command lines would otherwise run for days.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mistral_kernels import convert, generate, train
from mistral_kernels.cli import report
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.training.loop import Run
from mistral_kernels.utils.ranges import Range

SECONDS = 20  # limit of one call
MEMORY = 2 << 30  # limit of the process, in bytes
STEPS = 4  # of generation or training before the interrupt

COMMANDS = {"generate": generate, "convert": convert, "train": train, "report": report}
NUMBERS = [
    *("0", "1", "2", "3", "7", "0.5", "1e-3", "-1", "-0", "1e308", "-1e308", "1e-320", "1e999"),
    *("nan", "inf", "-inf", "", " ", "x", "0x10", "1_000", "1.5", "٣", "²", "+5", "--", "none"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551615", "18446744073709551616", "1000000000", "9" * 400, "9" * 5000),
]
TEXTS = [
    *(
        "It is",
        "She was",
        "",
        " ",
        "-",
        "\t\n",
        "é漢字👩‍👧",
        "\ud800",
        "caf\udce9",
        "</s>",
        "[INST]",
    ),
    *("\ufeffx", "a\r\nb", "\x1b[2Jx", "-x", "@x", "%s%n", "x" * 300, "\u2028", "null"),
]
DEVICES = ["auto", "cpu", "cuda", "cuda:0", "cuda:9999999999999", "meta", "cpu:1", "CPU", ""]
SIZES = ["5GB", "1", "0", "10KB", "-5MB", "1e400GB", "nanGB", "9" * 30, "GB", ""]


class BrokenStream(io.RawIOBase):
    """Stream that fails to write: its reader has exited, or its disk is full."""

    def __init__(self, error: int) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(self.error, os.strerror(self.error))


def prepare(folder: Path) -> dict[str, list[str]]:
    """Create the files that command lines name; return lists of paths."""
    from support.small_checkpoints import SMALL, varied_model

    tiny = Path(generate.__file__).parent / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["".join(random.choices("abcdefghijklm", k=random.randint(2, 9))) for _ in range(800)]
    paragraphs = ["\r\n".join(random.choices(words, k=40)) for _ in range(90)]
    (folder / "text").write_text("\ufeff" + "\r\n\r\n".join(paragraphs), encoding="utf-8")
    (folder / "short").write_text("a few words\n\nand more\n")
    (folder / "empty").touch()
    (folder / "latin").write_bytes(b"caf\xe9\n\nau lait\n" * 300)
    (folder / "nul").write_bytes(bytes(range(128)) * 100)
    (folder / "sub").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "keep").touch()
    shutil.copytree(tiny, folder / "copy")
    config = dataclasses.replace(SMALL, vocab_size=2048, sliding_window=None)
    varied_model(config).save_pretrained(folder / "raw", "raw", [tiny / "tokenizer.model"])
    models = ["tiny", str(folder / "copy"), str(folder / "raw"), "nobody/nothing", "a\udcffb"]
    with contextlib.suppress(ImportError):
        import mistral_common

        data = Path(mistral_common.__file__).parent / "data"
        vocabulary = data / "mistral_instruct_tokenizer_240323.model.v3"
        shutil.copy(vocabulary, folder / "tokenizer.model.v3")
        config = dataclasses.replace(config, vocab_size=32768)
        extra = [folder / "tokenizer.model.v3"]
        varied_model(config).save_pretrained(folder / "chat", extra_files=extra)
        models.append(str(folder / "chat"))
    os.symlink("loop", folder / "loop")
    names = ["text", "short", "empty", "latin", "nul", "sub", "full", "copy", "raw", "loop", "none"]
    odd = [
        "",
        ".",
        "/",
        "~",
        "~nosuchuser/x",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "x" * 300,
    ]
    odd += ["\x1b[31m", "//", "a/b/c", "a\0b"]
    paths = [str(folder / name) for name in names]
    return {
        "paths": [*paths, *odd, str(folder / "text" / "below")],
        "models": models,
        "chat": models[-1:],
        "texts": [str(folder / "text")] * 3,
        "new": [str(folder / f"new{i}") for i in range(10_000)],
    }


def value_for(action: argparse.Action, pools: dict[str, list[str]]) -> str:
    """Return a value for an option, in most cases one that the parser accepts."""
    name = action.dest
    if action.choices and random.random() < 0.8:
        return random.choice(list(action.choices))
    if name in ("output", "target", "output_dir"):
        return random.choice([pools["new"].pop(), random.choice(pools["paths"])])
    if name in ("model", "source", "input_dir"):
        return random.choice(random.choice([pools["models"], pools["models"], pools["paths"]]))
    if name == "text":
        return random.choice(random.choice([pools["texts"], pools["texts"], pools["paths"]]))
    if name == "prompt_file":
        return random.choice(pools["paths"])
    if name == "device":
        return random.choice(["cpu", "auto", random.choice(DEVICES)])
    if name == "max_shard_size":
        return random.choice(SIZES)
    if isinstance(action.type, Range) or name in ("window",):
        return random.choice(random.choice([NUMBERS[1:5]] * 3 + [NUMBERS]))
    return random.choice(TEXTS)


def command_line(name: str, pools: dict[str, list[str]]) -> list[str]:
    parser = COMMANDS[name]._parser()
    options, positional = [], []
    for action in parser._actions:
        chance = {"help": 0.005, "output": 0.95, "text": 0.95, "prompt": 0.6}.get(action.dest, 0.12)
        if name == "convert" and action.dest in ("source", "target"):
            chance = 0.9
        if name == "train" and action.dest in ("held_out_chars", "steps", "seqlen"):
            chance = 0.3
        if random.random() >= chance:
            continue
        if not action.option_strings:
            positional.append(value_for(action, pools))
            continue
        flag = random.choice(action.option_strings)
        if action.nargs == 0:
            options.append([flag])
        elif flag.startswith("--") and random.random() < 0.5:
            options.append([f"{flag}={value_for(action, pools)}"])
        else:
            options.append([flag, value_for(action, pools)])
        if random.random() < 0.03:
            options.append(options[-1])
    if name == "train" and random.random() < 0.8:
        given = "--held-out-chars 900 --batch-size 2 --seqlen 16 --eval-every 2 --steps 3"
        options.insert(0, given.split())
    if name == "generate" and random.random() < 0.7:
        options.insert(0, ["-m", "3"])
    if ["--chat"] in options or ["--instruct"] in options:
        options.append(["--model", pools["chat"][0]])
    random.shuffle(options)
    words = [word for option in options for word in option]
    return [*positional, *words] if random.random() < 0.7 else [*words, *positional]


def interrupt_generator(function: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """Wrap a generator function: raise KeyboardInterrupt after `steps` items."""

    def run(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from itertools.islice(function(*args, **kwargs), steps)
        if kwargs.get("max_new_tokens", 0) > steps:
            raise KeyboardInterrupt

    return run


def interrupt_training(step: int) -> Callable[..., Any]:
    """Wrap `Run.advance`: raise KeyboardInterrupt at `step`."""
    advance = Run.advance

    def run(self: Run, *args: Any) -> float:
        if self.step >= step:
            raise KeyboardInterrupt
        return advance(self, *args)

    return run


def on_alarm(*_: Any) -> None:
    raise AssertionError(f"a call must end within {SECONDS} s")


def streams() -> tuple[dict[str, Any], dict[str, io.BytesIO], str]:
    """Return standard streams for one call, the buffers behind them, and a description."""
    encoding = random.choice(["utf-8"] * 4 + ["ascii", "latin-1", "utf-16", "shift_jis", "cp037"])
    sinks = {name: io.BytesIO() for name in ("stdout", "stderr")}
    stdin = random.choice([b"", b"hi\n", b"\xef\xbb\xbfhi\r\nyou\r\n", b"caf\xe9\n", b"a\0b\n"])
    given: dict[str, Any] = {"stdin": io.TextIOWrapper(io.BytesIO(stdin), "utf-8")}
    for name, sink in sinks.items():
        errors = "strict" if name == "stdout" else "backslashreplace"
        given[name] = io.TextIOWrapper(sink, encoding, errors=errors)
    faults = []
    for name in given:
        fault = random.random()
        if fault < 0.05:
            given[name] = None
        elif fault < 0.12 and name != "stdin":
            error = random.choice([32, 28])  # EPIPE, ENOSPC
            given[name] = io.TextIOWrapper(io.BufferedWriter(BrokenStream(error)), encoding)
        else:
            continue
        faults.append(name)
    return given, sinks, f"{encoding} {stdin!r} without {faults}"


def call(name: str, arguments: list[str], faults: str, given: dict[str, Any]) -> dict[str, Any]:
    own = {stream: getattr(sys, stream) for stream in given}
    signal.alarm(SECONDS)
    failure = None
    try:
        for stream, value in given.items():
            setattr(sys, stream, value)
        try:
            code: Any = COMMANDS[name].main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            code, failure = None, traceback.format_exc()
    finally:
        signal.alarm(0)
        for stream, value in own.items():
            setattr(sys, stream, value)
    return {"code": code, "failure": failure}


def main() -> None:
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    pools = prepare(folder)
    os.chdir(folder / "sub")
    MistralForCausalLM.stream = interrupt_generator(MistralForCausalLM.stream, STEPS)  # type: ignore
    Run.advance = interrupt_training(STEPS)  # type: ignore
    signal.signal(signal.SIGALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    backend = os.environ.get("MISTRAL_KERNELS_BACKEND", "auto")
    kinds = ["generate"] * 9 + ["train"] * 5 + ["convert"] * 5 + ["report"]
    for _ in range(count):
        os.environ["MISTRAL_KERNELS_BACKEND"] = backend  # --backend sets it
        name = random.choice(kinds)
        arguments = command_line(name, pools)
        given, sinks, faults = streams()
        record = {"command": name, "arguments": arguments, "streams": faults}
        print(json.dumps(record), flush=True)
        outcome = call(name, arguments, faults, given)
        for stream, sink in sinks.items():
            encoding = faults.partition(" ")[0]
            outcome[stream] = None
            if given[stream] is not None and stream not in faults.rpartition("without")[2]:
                given[stream].flush()
                outcome[stream] = sink.getvalue().decode(encoding)
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
