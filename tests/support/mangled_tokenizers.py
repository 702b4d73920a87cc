"""Open and use mangled tokenizers: a program that tests run in a child process.

    python mangled_tokenizers.py KIND FIRST_SEED COUNT FOLDER

For each case the program mangles the file KIND of FOLDER, and writes the seed to FOLDER/seed. A
tokenizer that opens must encode, decode and stream consistently. Opening may otherwise only raise
a TokenizerError of one line.
"""

from __future__ import annotations

import copy
import importlib
import json
import random
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from random import choice, choices, randrange
from typing import Any

from peak_memory import peak_memory

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError

SECONDS = 20  # limit of one case, in processor time
GIB = 1 << 30
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64, 1.5, 32000]
VALUES += ["", "a", "\u2581", " ", "<s>", "\0", "\ud800", "x" * 3000, "{{ x }}", "<|im_start|>"]
VALUES += [[], {}, [[]], [0], {"a": 0}, {"String": "a"}, {"Regex": "(a+)+b"}, {"Regex": "("}]
VALUES += ["BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Sequence", "Metaspace"]
VALUES += ["TemplateProcessing", "first", "never", "v1", "v13"]
TEXTS = ["hello <s> wörld  漢 abc", "", "  ", "ｃ①㈱ \u3000 x\0y", "a" * 500, "<|im_start|>a</s>"]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each part of a JSON value; of long containers, to 6 parts at each end."""
    yield path
    keys: list[Any] = []
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        keys = keys if len(keys) <= 12 else keys[:6] + keys[-6:]
    for key in keys:
        yield from paths(value[key], (*path, key))


def part_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mangle_json(value: Any) -> str:
    value = copy.deepcopy(value)
    for _ in range(choice([1, 1, 1, 2, 3, 6])):
        where = [path for path in paths(value) if path]
        if not where:
            break
        *before, key = choice(where)
        parent, how = part_at(value, tuple(before)), randrange(4)
        if how == 0:
            del parent[key]
        elif how == 1:
            parent[key] = copy.deepcopy(choice(VALUES))
        elif how == 2:
            parent[key] = copy.deepcopy(part_at(value, choice(where)))
        elif isinstance(parent, dict):
            parent[str(choice([*VALUES, *parent]))[:99]] = copy.deepcopy(parent[key])
        else:
            parent.append(copy.deepcopy(parent[key]))
    text = json.dumps(value)
    return text if random.random() < 0.95 else text[: randrange(len(text) + 1)]


def fields(message: bytes) -> list[tuple[int, int, Any]]:
    """Return the fields of a protobuf message: number, wire type, value."""
    found, position = [], 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value: Any = varint()
        else:
            size = varint() if wire == 2 else 4
            value, position = message[position : position + size], position + size
        found.append((number, wire, value))
    return found


def to_bytes(parts: list[tuple[int, int, Any]]) -> bytes:
    def varint(value: int) -> bytes:
        value &= 2**64 - 1
        groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
        return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])

    message = b""
    for number, wire, value in parts:
        size = varint(len(value)) if wire == 2 else b""
        message += varint(number * 8 + wire) + (varint(value) if wire == 0 else size + value)
    return message


def mangle_value(wire: int, value: Any) -> Any:
    if wire == 0:
        return choice([0, 1, -1, 2, 3, 4, 5, 6, 259, 2**31 - 1, -(2**31), 2**63, randrange(400)])
    if wire == 5:
        return struct.pack("<f", choice([0.0, float("nan"), float("inf"), -1e38, random.random()]))
    bytes_ = bytearray(value)
    for _ in range(randrange(4)):
        if bytes_:
            bytes_[randrange(len(bytes_))] = randrange(256)
    texts = [b"", b"a", b"\0", b"<0x00>", b"<0xGG>", "\u2581".encode() * 50, b"<s>", b"\xff"]
    return choice([bytes(bytes_), bytes(bytes_[: randrange(len(bytes_) + 1)]), choice(texts)])


def mangle_model(model: bytes) -> bytes:
    parts = fields(model)  # field 1: a piece; fields 2 to 5: specifications
    for _ in range(choice([1, 1, 2, 5, 20])):
        i = choice([randrange(len(parts)), len(parts) - 1 - randrange(min(4, len(parts)))])
        how = randrange(6)
        if how == 0 and len(parts) > 1:
            del parts[i]
        elif how == 1:
            parts.insert(randrange(len(parts)), parts[i])
        else:
            number, wire, value = parts[i]
            inner = fields(value)
            if how == 2 or not inner:
                tag = randrange(1, 50)
                inner.append((tag, 0, mangle_value(0, 0)) if tag % 2 else (tag, 2, b"\x01\0\0\0x"))
            else:
                j = randrange(len(inner))
                inner[j] = (*inner[j][:2], mangle_value(*inner[j][1:]))
            parts[i] = (number, wire, to_bytes(inner))
    mangled = bytearray(to_bytes(parts))
    if random.random() < 0.1:
        mangled[randrange(len(mangled))] ^= 1 << randrange(8)
    return bytes(mangled)


def check(folder: Path) -> str:
    try:
        tokenizer = MistralTokenizer.from_pretrained(folder)
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
        for skip in (True, False):
            last = min(tokenizer.vocab_size, 2**40) + 3
            ids = [*tokenizer.encode(TEXTS[0]), *choices(range(last), k=30), *range(min(last, 40))]
            text = tokenizer.decode(ids, skip)
            stream = tokenizer.stream(skip_special_tokens=skip)
            assert "".join(map(stream.push, ids)) + stream.flush() == text
            assert tokenizer.batch_decode([ids], skip) == [text]
        tokenizer(["a", "a b c"], add_special_tokens=choice([True, False]))
        if tokenizer.chat_version is not None:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    except TokenizerError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < 2000, message
        return "refused"
    return "used"


def main(kind: str, first: int, count: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 * GIB, 8 * GIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Import before the first case: the import must not count as its time.
    importlib.import_module("transformers.utils.chat_template_utils")
    original = (folder / kind).read_bytes()
    outcomes = {"used": 0, "refused": 0}
    for seed in range(first, first + count):
        random.seed(seed)
        (folder / "seed").write_text(f"{seed}")
        if kind.endswith(".json"):
            (folder / kind).write_text(mangle_json(json.loads(original)))
        else:
            (folder / kind).write_bytes(mangle_model(original))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process
        outcomes[check(folder)] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        used = peak_memory()
        assert used < 2 * GIB, f"memory must be below {2 * GIB} bytes, got {used}"
    print(outcomes["used"], outcomes["refused"])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
