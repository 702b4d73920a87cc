"""Training on several ranks: same results as one process, and resuming on any number of ranks.

The ranks are processes on this machine, connected by gloo over the loopback interface.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.ranks import free_ports
from support.small_checkpoints import SMALL

from mistral_kernels import MistralForCausalLM
from mistral_kernels.checkpoint import open_checkpoint
from mistral_kernels.distributed.process_group import World
from mistral_kernels.train import main
from mistral_kernels.training import fsdp as sharded_training
from mistral_kernels.training.corpus import read_texts, train_tokenizer
from mistral_kernels.training.fsdp import local_sequences
from mistral_kernels.training.loop import Run

CONFIG = dataclasses.replace(SMALL, vocab_size=300)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
LIMIT = 120  # seconds until ranks are killed

# Ranks are forked from a process that has imported all modules, including dynamo, which FSDP uses.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        __name__,
        "mistral_kernels.training.fsdp_state",
        "mistral_kernels.training.fsdp",
        "torch._dynamo",
    ]
)

Kill = tuple[str, int]  # name of a function, and the number of its call that kills the rank


def _rank(variables: dict[str, str], arguments: list[str], log: Path, kill: Kill | None) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    if kill is not None:
        _kill_at(*kill)
    sys.exit(main(arguments))


def _kill_at(name: str, times: int) -> None:
    """Kill this process with SIGKILL at the `times`-th call of the function."""
    owner: Any = {"fsync": os, "rmtree": shutil, "advance": Run}[name]
    real, calls = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank, and a timeout of 60 seconds."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "MISTRAL_KERNELS_TIMEOUT": "60",
    }


@dataclasses.dataclass
class Ranks:
    """Callable that runs `main` on several ranks."""

    folder: Path

    def __call__(
        self,
        size: int,
        arguments: list[str],
        kills: dict[int, Kill] | None = None,
        others: dict[int, list[str]] | None = None,
    ) -> list[tuple[int | None, str]]:
        """Return the exit code and stderr of each rank.

        `kills` and `others` hold, by rank, the call at which a rank is killed, and arguments that
        replace `arguments`.
        """
        (port,) = free_ports(1)
        logs = [self.folder / f"rank{rank}.log" for rank in range(size)]
        processes = []
        for rank, log in enumerate(logs):
            log.unlink(missing_ok=True)
            kill = (kills or {}).get(rank)
            given = (others or {}).get(rank, arguments)
            variables = environment(rank, size, port)
            processes.append(_processes.Process(target=_rank, args=(variables, given, log, kill)))
            processes[-1].start()
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()
        # Remove gloo's own log lines about lost connections.
        texts = [re.sub(r"(?m)^\[.*\n", "", log.read_text()) for log in logs]
        return [(process.exitcode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Return a function that runs `main` as the only rank of a world, in this process."""

    def run(arguments: list[str]) -> int:
        with monkeypatch.context() as patch:
            for name, value in environment(0, 1, *free_ports(1)).items():
                patch.setenv(name, value)
            return main(arguments)

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of 80 paragraphs of 3 to 60 random words each."""
    chosen = random.Random(0)
    words = ["".join(chosen.choices("abcdefghi", k=chosen.randint(2, 9))) for _ in range(300)]
    paragraphs = [" ".join(chosen.choices(words, k=chosen.randint(3, 60))) for _ in range(80)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def starts(
    text: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Path]:
    """Create small random checkpoints with a tokenizer for the text."""
    torch.manual_seed(pytestconfig.option.seed)  # module fixtures run before a test sets its seed
    folder = tmp_path_factory.mktemp("starts")
    tokenizer = folder / "tokenizer.model"
    train_tokenizer(read_texts([text])[0], CONFIG.vocab_size, tokenizer)
    for name, config, format in (("hf", TIED, "hf"), ("raw", CONFIG, "raw")):
        MistralForCausalLM(config).save_pretrained(folder / name, format, [tokenizer])
    return {name: folder / name for name in ("hf", "raw")}


def command(text: Path, start: Path, out: Path, *options: str) -> list[str]:
    quick = "--held-out-chars 900 --steps 8 --batch-size 4 --seqlen 24 --eval-every 1 --device cpu"
    # With 3 times this rate, a few percent of the runs are unstable: rounding changes their losses.
    fp32 = "--dtype fp32 --warmup-steps 2 --learning-rate 3e-3"
    return [
        *(str(text), "--from", str(start), "--output", str(out)),
        *(*quick.split(), *fp32.split(), *options),
    ]


def curve_of(folder: Path) -> list[tuple[int, float, float]]:
    points = json.loads((folder / "training.json").read_text())["curve"]
    return [tuple(point.values()) for point in points]


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in open_checkpoint(folder).tensors()}


def assert_same_run(out: Path, reference: Path, noise: float = 1e-5) -> None:
    """Compare loss curves, weights and files of two runs, except for rounding."""
    curve, expected = curve_of(out), curve_of(reference)
    assert [step for step, *_ in curve] == [step for step, *_ in expected]
    for (step, *losses), (_, *wanted) in zip(curve, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=noise), step
    logs = log_of(out), log_of(reference)
    for record, wanted in zip(*logs, strict=True):
        wanted["tokens_per_second"] = record["tokens_per_second"]  # which varies
        assert record == pytest.approx(wanted, rel=20 * noise)
    theirs = weights_of(reference)
    for name, weight in weights_of(out).items():
        assert (weight - theirs[name]).norm() < 20 * noise * theirs[name].norm(), name
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}


@pytest.fixture(scope="module")
def whole(text: Path, starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process without an interruption; return the output folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(text, starts["hf"], out)) == 0
    return out


ALL = ("--pack", "--accumulate", "2", "--checkpoint-activations")
# Number of ranks, checkpoint, options, and tolerance of the losses.
RUNS: dict[str, tuple[int, str, tuple[str, ...], float]] = {
    "two": (2, "hf", ("--steps", "20"), 1e-5),
    "three, all options": (3, "raw", ALL, 1e-5),
    "bf16": (2, "raw", ("--dtype", "bf16", "--checkpoint-activations"), 5e-3),
}


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_like_one_process(
    name: str, ranks: Ranks, text: Path, starts: dict[str, Path], tmp_path: Path
) -> None:
    size, start, options, noise = RUNS[name]
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert main(command(text, starts[start], alone, *options)) == 0
    ended = ranks(size, command(text, starts[start], out, *options))
    assert [code for code, _ in ended] == [0] * size, ended
    assert ended[0][1].count("\n") == 5 + len(curve_of(out)), "rank 0 must log each evaluation"
    assert {stderr for _, stderr in ended[1:]} == {""}, "only rank 0 may write to stderr"
    assert curve_of(out)[-1][1] < curve_of(out)[0][1] - 0.5, "the loss must fall"
    assert_same_run(out, alone, noise)
    if "bf16" in options:
        assert set(open_checkpoint(out).dtypes.values()) == {torch.bfloat16}
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "out"}


LOST = re.compile(r"^error: rank \d: another rank ended")

# Rank that is killed during the second save, at step 4; the call; step of the remaining state.
KILLS: dict[str, tuple[int, Kill, int]] = {
    "rank 1, writing its share": (1, ("fsync", 2), 2),
    "writing its share": (0, ("fsync", 6), 2),
    "writing the metadata": (0, ("fsync", 7), 2),
    "writing run.pt": (0, ("fsync", 8), 2),
    "after run.pt": (0, ("fsync", 9), 4),
    "removing the previous step": (0, ("rmtree", 1), 4),
}
QUICK = ("rank 1, writing its share", "removing the previous step")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in KILLS],
)
def test_killed_while_saving(
    name: str, ranks: Ranks, alone: Callable[[list[str]], int], text: Path,
    starts: dict[str, Path], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Either the previous or the new state is complete, and one rank resumes from it."""
    rank, kill, step = KILLS[name]
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    saved = command(text, starts["hf"], out, "--save-every", "2")
    ended = ranks(2, saved, kills={rank: kill})
    assert ended[rank][0] == -signal.SIGKILL
    code, stderr = ended[1 - rank]
    assert code == 2, stderr
    assert LOST.search(stderr.splitlines()[-1]), stderr
    capsys.readouterr()
    assert alone(saved) == 0
    assert f"resuming from step {step}, saved in {partial}\n" in capsys.readouterr().err
    assert_same_run(out, whole)
    assert not partial.exists()


def test_resuming_on_other_numbers_of_ranks(
    ranks: Ranks, text: Path, starts: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    """Kill a run on two ranks, then on one; complete it on three, whose shards are uneven."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    saved = command(text, starts["hf"], out, "--save-every", "1")
    step = 0
    for size, steps in ((2, 2), (1, 2)):
        ended = ranks(size, saved, kills={size - 1: ("advance", steps + 1)})
        assert ended[-1][0] == -signal.SIGKILL
        for code, stderr in ended[:-1]:
            assert code == 2, stderr
            assert LOST.search(stderr.splitlines()[-1]), stderr
        if step:
            assert f"resuming from step {step}, saved in {partial}\n" in ended[0][1]
        step += steps
        assert [path.name for path in partial.iterdir()] == [f"step-{step}"]
    ended = ranks(3, saved)
    assert [code for code, _ in ended] == [0, 0, 0]
    assert f"resuming from step 4, saved in {partial}\n" in ended[0][1]
    assert_same_run(out, whole)
    assert not partial.exists()


@pytest.fixture(scope="module")
def interrupted(
    text: Path, starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a state that two ranks saved at step 4."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    saved = command(text, starts["hf"], out, "--save-every", "2")
    ranks = Ranks(tmp_path_factory.mktemp("logs"))
    assert ranks(2, saved, kills={0: ("advance", 6)})[0][0] == -signal.SIGKILL
    return out.with_name("out.partial")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_file(step: Path, name: str, data: bytes) -> None:
    """Replace a file and its checksum."""
    (step / name).write_bytes(data)
    rest = torch.load(step / "run.pt", weights_only=True)
    rest["files"][name] = (len(data), zlib.crc32(data))
    torch.save(rest, step / "run.pt")


def edited(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rest = torch.load(step / "run.pt", weights_only=True)
    change(rest)
    torch.save(rest, step / "run.pt")


def with_metadata(step: Path, change: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((step / ".metadata").read_bytes())
    change(metadata)
    replace_file(step, ".metadata", pickle.dumps(metadata))


# Damage to the folder of step 4, and the reason in the error message.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a share": (
        lambda step: flip(step / "__1_0.distcp"),
        r"record archive/data\S* is damaged",
    ),
    "a bit of the metadata": (lambda step: flip(step / ".metadata"), r"\.metadata is damaged"),
    "a bit of run.pt": (lambda step: flip(step / "run.pt"), r"record archive/data\S* is damaged"),
    "half a share": (
        lambda step: os.truncate(step / "__1_0.distcp", 4000),
        "File is not a zip file",
    ),
    "a share is missing": (
        lambda step: (step / "__0_0.distcp").unlink(),
        r"__0_0\.distcp is missing",
    ),
    "a part is missing": (
        lambda step: edited(step, lambda rest: rest.pop("curve")),
        "parts of it are missing",
    ),
    "a step that is not a number": (
        lambda step: edited(step, lambda rest: rest.update(step="4")),
        "step must be int, got str",
    ),
    "a curve of other steps": (
        lambda step: edited(step, lambda rest: rest.update(curve=[(3, 1.0, 1.0)] * 4)),
        r"curve must have points at steps \[1, 2, 3, 4\], got \[3, 3, 3, 3\]",
    ),
    "a generator of another dtype": (
        lambda step: edited(step, lambda rest: rest.update(generator=torch.ones(9))),
        "RNG state must be a torch.ByteTensor",
    ),
    "files that are not a dict": (
        lambda step: edited(step, lambda rest: rest.update(files=["__0_0.distcp"])),
        "'list' object is not a mapping",
    ),
    "a checksum of another type": (
        lambda step: edited(step, lambda rest: rest["files"].update({".metadata": (1.5, 2)})),
        r"files\['\.metadata'\]\[0\] must be int, got float",
    ),
    "metadata of no tensors": (
        lambda step: replace_file(step, ".metadata", pickle.dumps({"a": 1})),
        r"\.metadata does not describe tensors",
    ),
    "metadata that lacks a tensor": (
        lambda step: with_metadata(step, lambda data: data.state_dict_metadata.popitem()),
        r"Missing key in checkpoint state_dict: \S+\.",
    ),
    "metadata of another shape": (
        lambda step: with_metadata(
            step,
            lambda data: setattr(
                data.state_dict_metadata["master.model.norm.weight"], "size", torch.Size([41])
            ),
        ),
        r"Size mismatch .+ for master\.model\.norm\.weight",
    ),
    "code in the metadata": (
        lambda step: replace_file(step, ".metadata", pickle.dumps(Harmful(step / "harm"))),
        "it holds more than plain tensors",
    ),
    "code in run.pt": (
        lambda step: torch.save(Harmful(step / "harm"), step / "run.pt"),
        "it holds more than plain tensors",
    ),
}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_that_is_a_fifo(
    name: str, alone: Callable[[list[str]], int], text: Path, starts: dict[str, Path],
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Opening a FIFO would block."""
    path = tmp_path / "out.partial/step-4" / name
    shutil.copytree(interrupted, tmp_path / "out.partial")
    path.unlink()
    os.mkfifo(path)
    assert alone(command(text, starts["hf"], tmp_path / "out")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: rank 0: {path} must be a regular file, got a FIFO"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_raises(
    name: str, alone: Callable[[list[str]], int], text: Path, starts: dict[str, Path],
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage, reason = DAMAGES[name]
    out, step = tmp_path / "out", tmp_path / "out.partial/step-4"
    shutil.copytree(interrupted, step.parent)
    damage(step)
    assert alone(command(text, starts["hf"], out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    where = rf"{step}(/run\.pt)?"
    expected = rf"{where} is not a complete state of a run \({reason}\); remove it to start again"
    assert re.fullmatch(f"error: rank 0: {expected}", error), error
    assert step.exists()
    assert not (step / "harm").exists()
    assert not out.exists()


@pytest.mark.slow
def test_random_damage(
    alone: Callable[[list[str]], int], text: Path, starts: dict[str, Path], interrupted: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Damage files but keep the checksums valid: the run reports one line or starts."""
    out, step = tmp_path / "out", tmp_path / "out.partial/step-4"

    def advance(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "advance", advance)
    names, refused = [path.name for path in interrupted.glob("*/*") if path.name != "run.pt"], 0
    for _ in range(120):
        shutil.rmtree(step.parent, ignore_errors=True)
        shutil.copytree(interrupted, step.parent)
        name, other = random.choice([".metadata", *names]), random.choice(names)
        data, kind = bytearray((step / name).read_bytes()), random.choice(["flip", "cut", "swap"])
        if kind == "cut":
            del data[random.randrange(len(data)) :]
        elif kind == "swap":
            data = bytearray((step / other).read_bytes())
        else:
            for _ in range(random.choice([1, 2, 30])):
                data[random.randrange(len(data))] = random.randrange(256)
        replace_file(step, name, bytes(data))
        code, error = alone(command(text, starts["hf"], out)), capsys.readouterr().err
        assert code in (2, 130), error
        assert "Traceback" not in error, error
        refused += code == 2
        errors = [line for line in error.splitlines() if "error: " in line]
        assert len(errors) == (code == 2), error
        assert all(line.startswith(f"error: rank 0: {step}") for line in errors), error
    assert refused >= 30


def test_a_state_that_is_not_finite_raises(
    alone: Callable[[list[str]], int], text: Path, starts: dict[str, Path], interrupted: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, real = tmp_path / "out", dcp.FileSystemReader.read_data

    def read_data(reader: Any, plan: Any, planner: Any) -> Any:
        done = real(reader, plan, planner)
        planner.state_dict["best.model.norm.weight"].to_local()[3] = torch.nan
        return done

    shutil.copytree(interrupted, tmp_path / "out.partial")
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", read_data)
    assert alone(command(text, starts["hf"], out)) == 2
    error = capsys.readouterr().err
    reason = "best.model.norm.weight must be finite, got inf or nan"
    assert f"step-4 is not a complete state of a run ({reason})" in error


def test_a_loss_that_is_not_finite(
    ranks: Ranks, text: Path, starts: dict[str, Path], tmp_path: Path
) -> None:
    """Rank 0 reports a loss that is not finite, and no output is written."""
    out = tmp_path / "out"
    fast = ("--learning-rate", "1e38", "--warmup-steps", "0", "--save-every", "1")
    ended = ranks(2, command(text, starts["hf"], out, *fast))
    assert [code for code, _ in ended] == [2, 2]
    message = "error: rank 0: the held-out loss is nan at step 1: use a lower learning rate"
    assert message in ended[0][1], ended
    assert ended[1][1] == "", ended
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/*/run.pt"))


def test_a_state_is_only_for_its_own_run(
    alone: Callable[[list[str]], int], text: Path, starts: dict[str, Path],
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(interrupted, partial)
    before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    own = command(text, starts["hf"], out)
    remedy = "repeat that run, remove the state, or name another output"
    other = "--nproc-per-node 1 is enough), remove it, or name another output"
    for run, arguments, message in (
        (alone, [*own, "--seed", "1"], f"{partial}/step-4 is the state of another run (seed was"),
        (alone, [*own, "--steps", "9"], f"(steps was 8, is 9); {remedy}\n"),
        (
            main,
            own,
            f"{partial} is the state of a run under torchrun; resume with torchrun ({other}",
        ),
    ):
        assert run(arguments) == 2
        assert message in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    shutil.rmtree(partial)
    for make, message in (
        (lambda: partial.write_bytes(b"x"), f"{partial} is the state of a run without torchrun; "),
        (
            lambda: (partial / "mine").mkdir(parents=True),
            f"{partial} must contain nothing except the state of a run, got other files; name ",
        ),
    ):
        make()
        assert alone(own) == 2
        assert f"error: rank 0: {message}" in capsys.readouterr().err
        partial.unlink() if partial.is_file() else shutil.rmtree(partial)


FULL = OSError(28, "No space left on device")
# Function that fails while step 6 is saved, and the number of the call that fails.
FAILURES = {
    "writing": (os, "fsync", 1),
    "new folder": (Path, "mkdir", 2),  # the first call creates the output's parent
}


@pytest.mark.parametrize(
    ("name", "error"), [("writing", KeyboardInterrupt()), *((name, FULL) for name in FAILURES)]
)
def test_interrupted_while_saving(
    name: str, error: BaseException, alone: Callable[[list[str]], int], text: Path,
    starts: dict[str, Path], interrupted: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """After Ctrl-C or a full disk during a save, the previous state stays; one line is written."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(interrupted, partial)
    shutil.copy(interrupted.with_name("out.log.jsonl"), tmp_path)
    saved = command(text, starts["hf"], out, "--save-every", "2")
    owner, function, times = FAILURES[name]
    real, calls = getattr(owner, function), 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fails)
        code = alone(saved)
    stderr = capsys.readouterr().err
    if isinstance(error, OSError):
        where = rf"error: rank 0: (cannot save to )?{partial}: "
        assert code == 2
        full = rf"{where}\[Errno 28\] No space left on device"
        assert re.fullmatch(full, stderr.splitlines()[-1])
    else:
        assert code == 130
        assert stderr.endswith("\ninterrupted\n")
        assert f"to resume from the state in {partial}, run the same command again\n" in stderr
    assert not out.exists()
    assert alone(saved) == 0
    assert "resuming from step 4" in capsys.readouterr().err
    assert not partial.exists()
    assert_same_run(out, whole)


def test_a_finished_run_whose_output_could_not_be_written(
    alone: Callable[[list[str]], int], text: Path, starts: dict[str, Path], whole: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Resume from the state of the last step: no step is trained again."""
    saved = command(text, starts["hf"], tmp_path / "out", "--save-every", "100")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sharded_training, "save_hf", fails)
        assert alone(saved) == 2
    monkeypatch.setattr(Run, "advance", fails)
    assert alone(saved) == 0
    assert_same_run(tmp_path / "out", whole)


def test_bad_input(ranks: Ranks, text: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    """Every rank exits with code 2 and writes at most one line."""
    own = command(text, starts["hf"], tmp_path / "out")
    small = [*own, "--batch-size", "1"]
    for of_rank_0, of_rank_1, message in (
        (small, small, "rank 0: batch_size must be at least the number of ranks, 2, got 1"),
        (own, [*own, "--seed", "1"], "rank 0: seed must be the same on all ranks"),
        (own, ["nowhere", *own[1:]], "rank 1: [Errno 2] No such file or directory: 'nowhere'"),
    ):
        ended = ranks(2, of_rank_0, others={1: of_rank_1})
        assert [code for code, _ in ended] == [2, 2]
        errors = [re.findall("(?m)^error: .*", stderr) for _, stderr in ended]
        assert max(map(len, errors)) == 1, ended
        assert any(message in line for own_errors in errors for line in own_errors), ended
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("longest", [1, 40])
def test_shares(size: int, longest: int) -> None:
    """Every sequence is on one rank; token counts differ at most by the longest sequence."""
    lengths = [random.randint(1, longest) for _ in range(random.randint(size, 30))]
    batch = [torch.full((n,), i) for i, n in enumerate(lengths)]
    worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
    shares = [local_sequences(batch, world) for world in worlds]
    assert all(shares)
    assert sorted(int(x[0]) for own in shares for x in own) == list(range(len(batch)))
    loads = [sum(map(len, own)) for own in shares]
    assert max(loads) - min(loads) <= longest


@pytest.mark.slow
def test_torchrun(text: Path, starts: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    """Start the ranks with torchrun itself."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    own = command(text, starts["hf"], tmp_path / "out")
    done = subprocess.run(
        [*run, "-m", "mistral_kernels.train", *own], timeout=LIMIT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", done.stderr
    assert done.stderr.count("  held-out ") == 8, done.stderr
    assert_same_run(tmp_path / "out", whole)
