"""Command `train`: its output, its loss, reproducibility, and resuming after interruptions."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_checkpoints import SMALL

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, resolve
from mistral_kernels.distributed.process_group import World
from mistral_kernels.train import main
from mistral_kernels.training import corpus, on_texts
from mistral_kernels.training import loop as training
from mistral_kernels.training.corpus import Corpus, read_texts, train_tokenizer
from mistral_kernels.training.loop import held_out_loss, packed_loss
from mistral_kernels.training.metrics import StepMetrics
from mistral_kernels.training.recipe import Recipe
from mistral_kernels.training.state import FileSaving

QUICK = ("--steps", "6", "--batch-size", "2", "--seqlen", "24", "--eval-every", "3")
CONFIG = dataclasses.replace(SMALL, vocab_size=300, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write hard-wrapped paragraphs of random words, varied enough for a vocabulary of 2048."""
    words = ["".join(random.choices("abcdefghijklmno", k=random.randint(2, 9))) for _ in range(900)]
    paragraphs = []
    for _ in range(100):
        chosen = random.choices(words, k=60)
        paragraphs.append("\n".join(" ".join(chosen[i : i + 12]) for i in range(0, 60, 12)))
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a small random checkpoint with a tokenizer for the text."""
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(read_texts([text])[0], CONFIG.vocab_size, tokenizer)
    folder = tokenizer.parent / "start"
    MistralForCausalLM(CONFIG).save_pretrained(folder, extra_files=[tokenizer])
    return folder


def command(text: Path, start: Path, out: Path, *options: str) -> list[str]:
    quick = [
        "--held-out-chars",
        "900",
        "--steps",
        "9",
        "--batch-size",
        "2",
        "--seqlen",
        "24",
        "--eval-every",
        "4",
    ]
    return [str(text), "--from", str(start), "--output", str(out), *quick, *options]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of each file, without the speeds in log.jsonl, which vary."""
    speed = rb'"tokens_per_second": [^,}]+'
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"log.jsonl": re.sub(speed, b"", files["log.jsonl"])}


def test_a_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    arguments = (str(text), "--held-out-chars", "1500", *QUICK)
    assert main([*arguments, "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    parameters = sum(p.numel() for p in MistralForCausalLM(on_texts.TINY).parameters())
    first, second, third, *evaluations, wrote, following = captured.err.splitlines()
    assert first == f"paragraphs: separated by blank lines in {text}"
    assert re.fullmatch(
        rf"{parameters:,} parameters, [\d,]+ tokens to train on, .+ held out", second
    )
    assert third == f"log of each step: {out}.log.jsonl, at the end {out}/log.jsonl"
    assert [line.split()[:2] for line in evaluations] == [["step", "3"], ["step", "6"]]

    report = json.loads((out / "training.json").read_text())
    loss, bits = report["held_out_loss"], report["held_out_bits_per_byte"]
    assert wrote == (
        f"wrote {out}: held-out loss {loss:.4f} nats per token, {bits:.4f} bits per byte"
    )
    command = f'python -m mistral_kernels.generate "Once upon a time" --model {out}'
    assert following == f"next: {command}"
    assert report["texts"] == ["words.txt"]
    assert report["recipe"]["steps"] == 6
    assert [point["step"] for point in report["curve"]] == [3, 6]
    model = MistralForCausalLM.from_pretrained(out)
    tokenizer = MistralTokenizer.from_pretrained(out)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.generate(tokenizer(["ab"]).input_ids, max_new_tokens=3)

    # The held-out text consists of the last paragraphs, whole and unwrapped.
    paragraphs = [" ".join(block.split()) for block in text.read_text().split("\n\n")]
    held_out = (out / "held_out.txt").read_text(encoding="utf-8")
    kept = held_out.splitlines()
    assert kept == paragraphs[-len(kept) :]
    assert 1500 >= len(held_out) > 1500 - 700

    # The recorded loss is that of the best evaluation and of the written checkpoint.
    corpus = Corpus(held_out, out / "tokenizer.model")
    loss = held_out_loss(model, corpus, corpus.tokens)
    recorded = report["held_out_loss"]
    assert recorded == min(p["held_out_loss"] for p in report["curve"])
    if torch.cuda.is_available():  # the recorded loss is the GPU's, which rounds differently
        assert loss == pytest.approx(recorded, rel=1e-3)
    else:
        assert loss == recorded
    ids = [1, *corpus.tokens.tolist()]
    logits = model(torch.tensor([ids[:-1]])).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert loss == pytest.approx(expected, rel=1e-3)
    bits = recorded * len(corpus.tokens) / math.log(2) / len(held_out.encode())
    assert report["held_out_bits_per_byte"] == pytest.approx(bits)

    # The same seed gives the same files; another seed gives other files.
    for seed, same in (("0", True), ("1", False)):
        again = tmp_path / f"seed{seed}"
        assert main([*arguments, "--output", str(again), "--seed", seed]) == 0
        equal = [files_of(again)[name] == data for name, data in files_of(out).items()]
        assert all(equal) == same


COUNTS, SELF = "in [1, 1000000000]", "python -m mistral_kernels.train"
ENOUGH = "\n\n".join(f"paragraph {i} of a text that is too short" for i in range(40))
BAD: dict[str, tuple[bytes | None, tuple[str, ...], str]] = {
    "missing file": (None, (), "No such file or directory"),
    "not UTF-8": (b"caf\xe9\n\nmore", (), "text.txt must be UTF-8"),
    "empty": (b"\n \n", (), "text.txt must have words, got none\n"),
    "a few characters": (
        b"words",
        (),
        "error: the text must have at least 10 characters, got 6; give more text\n",
    ),
    "shorter than what is held out": (
        b"word " * 99,
        ("--held-out-chars", "32000"),
        "error: --held-out-chars must be at least 1 and less than half of the text's 495 "
        "characters, got 32000; hold out less, or give more text\n",
    ),
    "nothing held out": (
        ENOUGH.encode(),
        ("--held-out-chars", "0"),
        f"held-out-chars must be {COUNTS}, got 0;",
    ),
    "no space": (
        b"word" * 99,
        ("--held-out-chars", "9"),
        "error: the last 9 characters of the text must have a line end or a space, to begin the "
        "held-out text, got neither; hold out more (--held-out-chars)\n",
    ),
    "too short a text": (
        ENOUGH.encode(),
        (),
        "error: the text is too short to train a vocabulary of 2048 tokens; give more text, or "
        "train a checkpoint further (--from tiny: the bundled model): ",
    ),
    "no steps": (ENOUGH.encode(), ("--steps", "0"), f"error: --steps must be {COUNTS}, got 0;"),
    "no batch": (
        ENOUGH.encode(),
        ("--batch-size", "-2"),
        f"--batch-size must be {COUNTS}, got -2;",
    ),
    "no evaluation": (
        ENOUGH.encode(),
        ("--eval-every", "0"),
        f"--eval-every must be {COUNTS}, got 0",
    ),
    "no batch to accumulate": (
        ENOUGH.encode(),
        ("--accumulate", "0"),
        f"error: --accumulate must be {COUNTS}, got 0; see {SELF} --help\n",
    ),
    "not a number": (
        ENOUGH.encode(),
        ("--accumulate", "x"),
        f"error: --accumulate must be an integer {COUNTS}, got 'x'; see {SELF} --help\n",
    ),
    "a flag with a value": (
        ENOUGH.encode(),
        ("--pack=yes",),
        "error: argument --pack: ignored explicit argument 'yes'; "
        "see python -m mistral_kernels.train --help\n",
    ),
    "another dtype": (
        ENOUGH.encode(),
        ("--dtype", "fp16"),
        "error: argument --dtype: invalid choice: 'fp16' (choose from ",
    ),
    "saved too often": (
        ENOUGH.encode(),
        ("--save-every", "-1"),
        f"error: --save-every must be in [0, 1000000000], got -1; see {SELF} --help\n",
    ),
    **{
        f"{option} {value}": (ENOUGH.encode(), (f"{option}={value}",), f"error: {option} must be ")
        for option, values in {
            "--warmup-steps": "-1 1.5",
            "--learning-rate": "-1 nan inf x",
            "--weight-decay": "-0.1 nan",
            "--max-grad-norm": "0 -1 nan",
            "--seed": "-1 18446744073709551616",
            "--steps": "1000000001 1e3",
            "--held-out-chars": "99999999999999999999 x",
        }.items()
        for value in values.split()
    },
    "too large a batch": (
        ENOUGH.encode(),
        ("--batch-size", "1000000", "--seqlen", "1000000"),
        "error: batch_size * seqlen must be at most 268435456 tokens, got 1000000 * 1000000; "
        "use smaller batches, and accumulate more\n",
    ),
    "no such device": (
        ENOUGH.encode(),
        ("--device", "tpu"),
        "error: --device must be auto, cpu, cuda or cuda:N, got 'tpu'\n",
    ),
    "from nowhere": (
        ENOUGH.encode(),
        ("--held-out-chars", "99", "--from", "nowhere"),
        "error: no such folder: 'nowhere'; a hub id must have the form 'owner/model', such as ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents, options, message = BAD[name]
    source, out = tmp_path / "text.txt", tmp_path / "out"
    if contents is not None:
        source.write_bytes(contents)
    before = list(tmp_path.iterdir())
    try:
        code: Any = main([str(source), "--output", str(out), *options])
    except SystemExit as exit:  # the parser's
        code = exit.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert list(tmp_path.iterdir()) == before, "the command must not leave files"


def test_bad_output(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raise before the training if the output is a file or a folder that is not empty."""
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "keep").write_text("me")
    file.write_text("keep me")
    for out, message in ((full, "is not empty; name a new"), (file, "is a file; name a new")):
        assert main([str(text), "--output", str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out} {message} folder\n"
    long = tmp_path / ("x" * 240)  # its temporary name has more than 255 bytes
    assert main([str(text), "--output", str(long)]) == 2
    message = f"the name of {long} is too long; name another folder"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert (full / "keep").read_text() == "me"
    assert file.read_text() == "keep me"


@pytest.mark.parametrize("below", ["file", "loop"])
def test_an_output_that_cannot_be_written(
    below: str, text: Path, start: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Raise before the training if the output cannot be written."""
    (tmp_path / "file").touch()
    os.symlink("loop", tmp_path / "loop")
    monkeypatch.setattr(training, "packed_loss", None)
    out = tmp_path / below / "out" if below == "file" else tmp_path / below
    assert main(command(text, start, out)) == 2
    stdout, error = capsys.readouterr()
    assert stdout == ""
    assert error.count("\n") == 1
    assert str(tmp_path / below) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_byte_order_marks_and_line_ends(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte order mark and other line ends do not change the text."""
    plain, other = text.read_text(), tmp_path / "other.txt"
    for end in ("\r\n", "\r"):
        other.write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", end).encode())
        assert read_texts([other])[0] == read_texts([text])[0]
    monkeypatch.setattr(corpus, "_PIPE_LIMIT", 1000)
    with pytest.raises(ValueError, match="/dev/zero must have at most 1000 bytes, got more"):
        read_texts([text, Path("/dev/zero")])


@pytest.mark.parametrize("save_every", ["0", "1"])
@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1e12", r"the (held-out )?loss is (nan|inf) at step [12]: use a lower learning rate"),
        ("1e38", r"the held-out loss is nan at step 1: use a lower learning rate"),
    ],
)
def test_a_loss_that_is_not_finite(
    rate: str, message: str, save_every: str, text: Path, start: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A loss that is not finite stops the run with one line, and no output is written."""
    options = ("--learning-rate", rate, "--warmup-steps", "0", "--eval-every", "1")
    out = tmp_path / "out"
    assert main([*command(text, start, out, *options), "--save-every", save_every]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {message} \(--learning-rate\)", error), error
    assert not out.exists()
    log = tmp_path / "out.log.jsonl"
    if save_every == "0":
        assert list(tmp_path.iterdir()) == [log]
    *finite, last = [json.loads(line) for line in log.read_text().splitlines()]
    assert f"at step {last['step']}:" in error
    assert last["held_out_loss" if "held-out" in error else "loss"] is None
    assert all(math.isfinite(value) for record in finite for value in record.values())


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_last_finite_state_is_kept(
    evaluates: bool, text: Path, start: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Do not save the weights of step 3, which overflow although the loss of the step is finite."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    real = training.Run.advance

    def advance(run: training.Run, *args: Any) -> StepMetrics:
        metrics = real(run, *args)
        if run.step == 3:
            for weight in (*run.parameters, *run.backend.weights):
                weight.detach().fill_(math.nan)
        return metrics

    options = ("--save-every", "1", "--eval-every", "3" if evaluates else "9")
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", advance)
        assert main(command(text, start, out, *options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the held-out loss is nan at step 3: use a lower"), error
    assert torch.load(partial, weights_only=True)["step"] == 2
    assert not out.exists()
    assert main(command(text, start, out, *options)) == 0
    assert f"resuming from step 2, saved in {partial}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_dtype(name: str, text: Path, start: Path, tmp_path: Path) -> None:
    """Test the dtype of the weights in training and in the output."""
    assert main(command(text, start, tmp_path / "out", "--dtype", name, "--warmup-steps", "1")) == 0
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    assert set(open_checkpoint(tmp_path / "out").dtypes.values()) == {expected}
    report = json.loads((tmp_path / "out/training.json").read_text())
    assert report["recipe"]["dtype"] == name
    assert report["curve"][-1]["loss"] < report["curve"][0]["loss"]


def test_further_training(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Continue training the bundled model, with its configuration and tokenizer."""
    out = tmp_path / "out"
    options = ("--learning-rate", "1e-4", "--warmup-steps", "0", "--pack", "--accumulate", "2")
    assert main(command(text, Path("tiny"), out, *options)) == 0
    assert "2,755,008 parameters" in capsys.readouterr().err
    assert (out / "tokenizer.model").read_bytes() == (
        resolve("tiny") / "tokenizer.model"
    ).read_bytes()
    assert not (out / "README.md").exists()
    trained, before = (MistralForCausalLM.from_pretrained(path) for path in (out, "tiny"))
    assert trained.config == before.config
    assert len(MistralTokenizer.from_pretrained(out)) == 2048
    held_out = (out / "held_out.txt").read_text()
    corpus = Corpus(held_out, out)
    report = json.loads((out / "training.json").read_text())
    assert report["from"] == "tiny"
    assert report["held_out_loss"] < held_out_loss(before, corpus, corpus.tokens)
    # The loss on the original held-out text does not rise much.
    old = (resolve("tiny") / "held_out.txt").read_text()[:4000]
    losses = [held_out_loss(m, corpus, corpus.encode(old)) for m in (trained, before)]
    assert losses[0] < losses[1] + 0.5


def test_all_tokenizer_files_are_copied(text: Path, start: Path, tmp_path: Path) -> None:
    """Copy all files of the tokenizer, no other files, and no folders with such names."""
    given = tmp_path / "given"
    shutil.copytree(start, given)
    (given / "tokenizer_old").mkdir()
    beside = {"special_tokens_map.json": b"{}", "chat_template.jinja": b"{{ messages }} [INST]"}
    for name, data in (beside | {"notes.txt": b"mine"}).items():
        (given / name).write_bytes(data)
    assert main(command(text, given, tmp_path / "out")) == 0
    own = {"config.json", "generation_config.json", "model.safetensors"}
    own |= {"held_out.txt", "training.json", "log.jsonl", "curve.png"}
    made = files_of(tmp_path / "out")
    assert made.keys() == own | {"tokenizer.model", *beside}
    assert {name: made[name] for name in beside} == beside


class Interruption:
    """Function that works `times` times, then raises once."""

    def __init__(self, function: Callable[..., Any], times: int, error: BaseException) -> None:
        self.function, self.times, self.error = function, times, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.times -= 1
        if self.times == -1:
            raise self.error
        return self.function(*args, **kwargs)


ALL = ("--pack", "--accumulate", "2", "--checkpoint-activations", "--dtype", "fp32")


@pytest.mark.parametrize("options", [(), ALL], ids=["default", "all options"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_an_interrupted_run_resumes_exactly(
    every: int, options: tuple[str, ...], text: Path, start: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Interrupt a run repeatedly: its output equals that of a run without interruptions."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    partial = tmp_path / "out.partial"
    assert main(command(text, start, whole, *options)) == 0
    saved = command(text, start, out, *options, "--save-every", str(every))
    real = packed_loss
    error = KeyboardInterrupt()
    for times in (0, 1, 2, 5, 7, 9, 11, 13):
        monkeypatch.setattr(training, "packed_loss", Interruption(real, times, error))
        code = main(saved)
        if code == 0:
            break
        stderr = capsys.readouterr().err
        assert code == 130
        assert stderr.endswith("\ninterrupted\n")
        if partial.exists():
            resume = f"to resume from the state in {partial}, run the same command again\n"
            assert resume in stderr
        else:
            assert "no state was saved from which to resume; use --save-every\n" in stderr
        assert not out.exists()
        assert {path.name for path in tmp_path.iterdir()} <= {
            "whole",
            "out.partial",
            "out.log.jsonl",
        }
    monkeypatch.setattr(training, "packed_loss", real)
    if code:
        assert main(saved) == 0
    assert files_of(out) == files_of(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}, "the state is removed"


# torch.save raises an error of its own for a failing second write, and the original for the 21st.
@pytest.mark.parametrize("moment", [1, 20, "syncing", "renaming"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_while_saving(
    error: BaseException, moment: int | str, text: Path, start: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The previous state stays complete, and the run resumes from it."""
    whole, out, partial = (tmp_path / name for name in ("whole", "out", "out.partial"))
    assert main(command(text, start, whole)) == 0
    saved = command(text, start, out, "--save-every", "2")
    real, saves = torch.save, 0

    def save(state: Any, file: Any) -> None:
        nonlocal saves
        saves += 1
        if saves < 3:
            return real(state, file)
        if isinstance(moment, int):
            file.write = Interruption(file.write, moment, error)
            return real(state, file)
        real(state, file)
        owner, name = (os, "fsync") if moment == "syncing" else (Path, "replace")
        patch.setattr(owner, name, Interruption(getattr(owner, name), 0, error))
        return None

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        code = main(saved)
    stderr = capsys.readouterr().err
    if isinstance(error, OSError):
        assert code == 2
        assert f"error: cannot save to {partial}: [Errno 28] No space left on device\n" in stderr
    else:
        assert code == 130
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"whole", "out.partial", "out.log.jsonl"}
    assert torch.load(partial, weights_only=True)["step"] == 4
    assert main(saved) == 0
    assert f"resuming from step 4, saved in {partial}\n" in capsys.readouterr().err
    assert files_of(out) == files_of(whole)


def interrupted(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        # 4 steps, the held-out loss before the first save, and an evaluation.
        patch.setattr(training, "packed_loss", Interruption(packed_loss, 6, KeyboardInterrupt()))
        assert main([*arguments, "--save-every", "2"]) == 130


def test_a_state_is_only_for_its_own_run(
    text: Path, start: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupted(command(text, start, out), monkeypatch)
    state = partial.read_bytes()
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.read_text().replace("a", "e"))
    other_start = tmp_path / "start"
    MistralForCausalLM(dataclasses.replace(CONFIG, num_hidden_layers=2)).save_pretrained(
        other_start, extra_files=[start / "tokenizer.model"]
    )
    capsys.readouterr()
    cases = [
        (command(text, start, out, "--steps", "8"), "steps was 9, is 8"),
        (
            command(text, start, out, "--seed", "1", "--pack"),
            "seed was 0, is 1; pack was False, is True",
        ),
        (command(text, start, out, "--dtype", "fp32"), "dtype was bf16, is fp32"),
        (command(text, start, out, "--accumulate", "2"), "accumulate was 1, is 2"),
        (command(other_text, start, out), "texts was "),
        (command(text, other_start, out), f"from was {start}, is {other_start}; model was "),
        (command(text, start, out, "--held-out-chars", "700"), "texts was "),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {partial} is the state of another run ({message}"), error
        assert error.endswith("repeat that run, remove the state, or name another output")
        assert partial.read_bytes() == state
        assert not out.exists()
    # --save-every is not part of the identity of a run.
    assert main(command(text, start, out, "--save-every", "0")) == 0
    assert not partial.exists()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "something else": lambda data: b"a note to myself\n",
    "one bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "code", "no state", "parts are missing"])
def test_a_damaged_state_raises(
    damage: str, text: Path, start: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, partial, harm = (tmp_path / name for name in ("out", "out.partial", "harm"))
    interrupted(command(text, start, out), monkeypatch)
    if damage == "code":
        torch.save(Harmful(harm), partial)
    elif damage == "no state":
        torch.save([1, 2], partial)
    elif damage == "parts are missing":
        state = torch.load(partial, weights_only=True)
        del state["tensors"]
        torch.save(state, partial)
    else:
        partial.write_bytes(DAMAGES[damage](partial.read_bytes()))
    before = partial.read_bytes()
    capsys.readouterr()
    assert main(command(text, start, out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    reasons = {
        "one bit": r"record archive/data/\d+ is damaged",
        "code": "it holds more than plain tensors",
        "no state": "parts of it are missing",
        "parts are missing": "parts of it are missing",
    }
    reason = reasons.get(damage, "File is not a zip file")
    expected = rf"{partial} is not a complete state of a run \({reason}\); remove it to start again"
    assert re.fullmatch(f"error: {expected}", error), error
    assert partial.read_bytes() == before
    assert not harm.exists()
    assert not out.exists()


def edit(state: Any, path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        state = state[key]
    state[last] = value


def like(tensor: torch.Tensor) -> list[Any]:
    """Return values that are similar to a tensor of a state."""
    return [
        tensor.double(), tensor[..., :-1], tensor[None], tensor.to_sparse(), tensor * math.inf,
        tensor.tolist(), None,
    ]  # fmt: skip


SCALARS = [None, True, "1", 2.5, -1, 0, 2**70, math.nan, math.inf, [1], {}, (), torch.tensor(1)]
BEST = "best.model.norm.weight"
POINT = (4, 1.5, 1.5)
EDITS: dict[tuple[Any, ...], Callable[[Any], list[Any]]] = {
    ("step",): lambda old: [*SCALARS, 10, 2, 3],
    ("running",): lambda old: [x for x in SCALARS if x != 2.5],
    ("curve",): lambda old: [
        *SCALARS, [POINT, POINT], [], [list(POINT)], [(4, 1.5)], [(3, 1.5, 1.5)],
        [(4, math.nan, 1.5)], [(4, 1.5, math.inf)], [(True, 1.5, 1.5)], ["abc"],
    ],
    ("generator",): lambda old: [*SCALARS, old[:-1], old.long(), torch.zeros_like(old)],
    ("identity",): lambda old: [*SCALARS, {"steps": torch.ones(3)}, {"steps": [9]}, {1: {}}],
    ("identity", "steps"): lambda old: [*SCALARS, torch.ones(2)],
    ("tensors",): lambda old: [
        *SCALARS, list(old.values()), dict(list(old.items())[1:]), {**old, "more": old[BEST]},
        {**old, 1: old[BEST]},
    ],
    **{
        ("tensors", f"{kind}.model.norm.weight"): lambda old: [*SCALARS, *like(old)]
        for kind in ("best", "master", "exp_avg", "exp_avg_sq")
    },
}  # fmt: skip


def test_an_edited_state_raises(
    text: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace each part of a state, with valid checksums: the error names the file in one line."""
    partial = tmp_path / "out.partial"
    interrupted(command(text, start, tmp_path / "out"), monkeypatch)
    whole = partial.read_bytes()
    state = torch.load(partial, weights_only=True)
    identity = state["identity"]
    recipe = Recipe(**{option.name: identity[option.name] for option in dataclasses.fields(Recipe)})
    run = on_texts._start(start, recipe, World(0, 1, torch.device("cpu")))
    saving = FileSaving(partial, 2, identity)
    untouched = {name: tensor.clone() for name, tensor in run.state["tensors"].items()}
    named = rf"{partial} is (not a complete state of a run \(.+\)|.+ another run \(.+\))"
    for path, values in EDITS.items():
        old = state
        for key in path:
            old = old[key]
        for value in values(old):
            edited = torch.load(io.BytesIO(whole), weights_only=True)
            edit(edited, path, value)
            torch.save(edited, partial)
            with pytest.raises(CheckpointError) as caught:
                run.restore(saving)
            assert re.match(named, str(caught.value)), (path, value, caught.value)
            assert "\n" not in str(caught.value)
    assert run.step == 0
    assert all(torch.equal(run.state["tensors"][name], old) for name, old in untouched.items())
    partial.write_bytes(whole)
    assert run.restore(saving)
    assert run.step == 4


@pytest.mark.parametrize("options", [(), ("--save-every", "2")])
def test_the_incomplete_state_of_a_killed_run_is_removed(
    options: tuple[str, ...], text: Path, start: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial.new").write_bytes(b"half a state")
    assert main(command(text, start, tmp_path / "out", *options)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["FIFO", "link", "loop", "folder"])
@pytest.mark.parametrize("options", [(), ("--save-every", "2")])
def test_other_files_at_the_path_of_a_new_state(
    options: tuple[str, ...], kind: str, text: Path, start: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Do not open a FIFO, which would block, or write through a link; keep a folder."""
    mine, taken = tmp_path / "mine", tmp_path / "out.partial.new"
    mine.write_text("mine")
    if kind == "FIFO":
        os.mkfifo(taken)
    elif kind == "folder":
        taken.mkdir()
    else:
        taken.symlink_to(mine if kind == "link" else taken)
    code = main(command(text, start, tmp_path / "out", *options))
    left = {path.name for path in tmp_path.iterdir()} - {"mine"}
    assert mine.read_text() == "mine"
    if kind == "folder" and options:
        error = f"error: cannot save to {tmp_path / 'out.partial'}: [Errno 21] Is a directory"
        assert code == 2
        assert error in capsys.readouterr().err
        assert left == {taken.name, "out.log.jsonl"}
    else:
        assert code == 0
        assert left == {"out", *([taken.name] if kind == "folder" else [])}


def test_a_state_that_is_a_broken_link(
    text: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raise for a broken link instead of starting a new run."""
    partial = tmp_path / "out.partial"
    partial.symlink_to("nowhere")
    assert main(command(text, start, tmp_path / "out")) == 2
    got = "a broken symbolic link"
    assert f"error: {partial} must be a regular file, got {got}\n" in capsys.readouterr().err


def test_terminated_while_saving(tmp_path: Path) -> None:
    """SIGTERM raises SystemExit, which torch.save replaces by its own error."""

    def terminate(*_: Any) -> None:
        raise SystemExit(143)

    class Terminated:
        def __reduce__(self) -> Any:
            return terminate()

    saving = FileSaving(tmp_path / "state", 1, {})
    with pytest.raises(SystemExit):
        saving.save({"step": Terminated()})
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_state_and_a_fifo_raise(
    text: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A compressed record could expand to any size, and opening a FIFO would block."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupted(command(text, start, out), monkeypatch)
    with zipfile.ZipFile(partial) as stored:
        contents = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, data in contents.items():
            deflated.writestr(name, data)
    capsys.readouterr()
    assert main(command(text, start, out)) == 2
    assert "is not a complete state of a run (it is compressed)" in capsys.readouterr().err
    partial.unlink()
    os.mkfifo(partial)
    assert main(command(text, start, out)) == 2
    assert f"error: {partial} must be a regular file, got a FIFO\n" in capsys.readouterr().err


def test_a_finished_run_whose_output_could_not_be_written(
    text: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume from the state of the last step: no step is trained again."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(text, start, whole)) == 0
    saved = command(text, start, out, "--save-every", "100")
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(MistralForCausalLM, "save_pretrained", Interruption(print, 0, full))
        assert main(saved) == 2
    monkeypatch.setattr(training.Run, "advance", Interruption(print, 0, AssertionError()))
    assert main(saved) == 0
    assert files_of(out) == files_of(whole)


def test_checkpoints_with_a_missing_or_wrong_tokenizer(
    text: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, foreign, out = (tmp_path / name for name in ("bare", "foreign", "out"))
    MistralForCausalLM(CONFIG).save_pretrained(bare)
    tokenizer = resolve("tiny") / "tokenizer.model"
    MistralForCausalLM(CONFIG).save_pretrained(foreign, extra_files=[tokenizer])
    for source, message in (
        (bare, f"error: {bare}: no tokenizer found; looked for tekken.json, tokenizer.model"),
        (foreign, "error: tokens must be less than the model's vocab_size, 300, got "),
    ):
        assert main(command(text, source, out)) == 2
        error = capsys.readouterr().err
        assert error.startswith(message)
        assert error.count("\n") == 1
    remedy = "use the tokenizer of the model"
    assert error.endswith(f" from {foreign / 'tokenizer.model'}; {remedy}\n")
