"""Command `train`: log, curve, notes and errors of a run; `--evaluate`."""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mistral_kernels.checkpoint import resolve
from mistral_kernels.train import _parser, main
from mistral_kernels.training import loop, on_texts
from mistral_kernels.training.corpus import Corpus, read_texts
from mistral_kernels.training.recipe import Recipe

TEXT = resolve("tiny") / on_texts.HELD_OUT
OPTIONS = "--steps 5 --batch-size 2 --seqlen 16 --eval-every 2 --warmup-steps 2 --device cpu"


def command(out: Path, *options: str) -> list[str]:
    own = ["--from", "tiny", "--output", str(out), "--held-out-chars", "300"]
    return [str(TEXT), *own, *OPTIONS.split(), *options]


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_is_readable_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of the log agree with the recipe and the curve."""
    out, seen, real = tmp_path / "out", [], loop.Run.advance

    def advance(run: loop.Run, *args: Any) -> Any:
        seen.append([record["step"] for record in log_of(tmp_path / "out.log.jsonl")])
        return real(run, *args)

    monkeypatch.setattr(loop.Run, "advance", advance)
    assert main(command(out, "--learning-rate", "1e-3", "--max-grad-norm", "1e-6")) == 0
    assert seen == [list(range(1, step)) for step in range(1, 6)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    records = log_of(out / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    recipe = Recipe(steps=5, warmup_steps=2, learning_rate=1e-3)
    rates = [recipe.learning_rate_at(step) for step in range(5)]
    assert [record["learning_rate"] for record in records] == rates
    assert all(record["grad_norm"] > 0.01 for record in records), "the norm before clipping"
    assert all(record["tokens_per_second"] > 0 for record in records)
    report = json.loads((out / "training.json").read_text())
    curve = {point["step"]: point for point in report["curve"]}
    assert list(curve) == [2, 4, 5]
    losses = [record["loss"] for record in records]
    means = {2: sum(losses[:2]) / 2, 4: sum(losses[2:4]) / 2, 5: losses[4]}
    for record in records:
        point = curve.get(record["step"])
        assert record.get("held_out_loss") == (point and point["held_out_loss"])
        assert point is None or point["loss"] == pytest.approx(means[record["step"]])
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_gradient_norm_does_not_depend_on_clipping(tmp_path: Path) -> None:
    """With several batches per step, the norm is that of their mean gradient."""
    norms = {}
    for name, options in {
        "plain": ("--dtype", "fp32"),
        "clipped": ("--dtype", "fp32", "--max-grad-norm", "1e-3"),
        "accumulated": ("--dtype", "fp32", "--batch-size", "1", "--accumulate", "2"),
    }.items():
        assert main(command(tmp_path / name, "--seed", "3", *options)) == 0
        norms[name] = log_of(tmp_path / name / "log.jsonl")[0]["grad_norm"]
    assert norms["clipped"] == norms["plain"]
    assert norms["accumulated"] == pytest.approx(norms["plain"], rel=1e-4)


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the log. The earlier lines of the log stay."""
    log, limits = tmp_path / "out.log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        code = main(command(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: cannot write the log {log}: [Errno 27] File too large"
    assert log.stat().st_size == 300
    assert json.loads(log.read_text().splitlines()[0])["step"] == 1
    assert main(command(tmp_path / "out")) == 0, "the incomplete line is cut"
    assert [record["step"] for record in log_of(tmp_path / "out/log.jsonl")] == [1, 2, 3, 4, 5]


def test_another_file_at_the_path_of_the_log_is_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "out.log.jsonl"
    log.write_text("mine\n")
    assert main(command(tmp_path / "out")) == 2
    message = f"{log} must be the log of a run, got another file; move it, or name another output"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert log.read_text() == "mine\n"


def test_the_last_line_is_a_command_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of the model is quoted if it has spaces."""
    out = tmp_path / "a model"
    assert main(command(out)) == 0
    *_, wrote, following = capsys.readouterr().err.splitlines()
    assert wrote.startswith(f"wrote {out}: held-out loss ")
    words = shlex.split(following.removeprefix("next: "))
    assert words[:3] == ["python", "-m", "mistral_kernels.generate"]
    assert words[-2:] == ["--model", str(out)]


def test_without_matplotlib_the_model_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(command(tmp_path / "out")) == 0
    missing = "no curve.png: it requires the package matplotlib; pip install matplotlib\n"
    assert missing in capsys.readouterr().err
    assert (tmp_path / "out/log.jsonl").exists()
    assert not (tmp_path / "out/curve.png").exists()


def test_tensorboard_gets_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, step))

        def flush(self) -> None:
            calls.append(("flush",))

        def close(self) -> None:
            calls.append(("close",))

    options = ("--tensorboard", str(tmp_path / "events"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(command(tmp_path / "out", *options)) == 2
    missing = "error: --tensorboard requires the package tensorboard; pip install tensorboard\n"
    assert capsys.readouterr().err == missing
    assert list(tmp_path.iterdir()) == []
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(command(tmp_path / "out", *options)) == 0
    assert calls[0] == (str(tmp_path / "events"), 1)
    assert calls[-1] == ("close",)
    assert [call[1] for call in calls if call[0] == "train/loss"] == [1, 2, 3, 4, 5]
    assert [call[1] for call in calls if call[0] == "eval/loss"] == [2, 4, 5]


@pytest.mark.parametrize("joined", [" ", "\n"])
def test_texts_without_blank_lines_can_be_trained_on(
    joined: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text of a single line, and a text of lines, train with the default held-out text."""
    source = tmp_path / "text.txt"
    source.write_text(joined.join(TEXT.read_text().splitlines()[:60]))
    options = ["--from", "tiny", "--output", str(tmp_path / "out")]
    assert main([str(source), *options, *OPTIONS.split()]) == 0
    rule = {
        " ": f"every sentence of {source} (a single line)",
        "\n": f"every line of {source} (no blank lines)",
    }[joined]
    assert capsys.readouterr().err.startswith(f"paragraphs: {rule}\n")
    held_out = (tmp_path / "out/held_out.txt").read_text()
    assert 0 < len(held_out) <= len(source.read_text()) / 10 + 1
    assert held_out.replace("\n", " ").strip() in source.read_text().replace("\n", " ")


# Evaluation


def results_of(out: str) -> dict[str, float]:
    """Return the first number of each printed line by its first word."""
    lines = [line.split() for line in out.splitlines()]
    return {name: float(value.replace(",", "")) for name, value, *_ in lines}


def test_evaluate_prints_the_recorded_loss_of_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes no file."""
    monkeypatch.chdir(tmp_path)
    options = ("--from", "tiny", "--dtype", "fp32", "--device", "cpu")
    assert main([str(TEXT), "--evaluate", *options]) == 0
    out, err = capsys.readouterr()
    found = results_of(out)
    report = json.loads((TEXT.parent / "training.json").read_text())
    # The recorded loss is that of bfloat16 arithmetic.
    assert found["loss"] == pytest.approx(report["held_out_loss"], rel=2e-3)
    assert found["bits"] == pytest.approx(report["held_out_bits_per_byte"], rel=2e-3)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-3)
    corpus = Corpus(read_texts([TEXT])[0], resolve("tiny"))
    assert found["tokens"] == len(corpus.tokens)
    assert out.endswith(f" of {len(TEXT.read_bytes()):,} bytes\n")
    assert err == (
        f"paragraphs: every line of {TEXT} (no blank lines)\nsequences of at most 32,768 tokens\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_shorter_sequences_have_a_larger_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dtype changes the loss by rounding only."""
    text, losses = tmp_path / "text.txt", []
    text.write_text(TEXT.read_text()[:3000])
    for options in ((), ("--dtype", "fp32"), ("--seqlen", "200"), ("--seqlen", "20")):
        assert main([str(text), "--from", "tiny", "--evaluate", *options]) == 0
        losses.append(results_of(capsys.readouterr().out)["loss"])
    stored, exact, medium, short = losses
    assert exact == pytest.approx(stored, rel=1e-2)
    assert stored < medium < short


# Options, and the start of the error.
BAD_EVALUATIONS = {
    ("--evaluate",): "--from must be given with --evaluate; name the checkpoint to evaluate; see ",
    (): "--output must be given, to train a model; or use --from with --evaluate; see ",
    ("--evaluate", "--from", "tiny", "--batch-size", "16"): (
        "--batch-size must not be given with --evaluate; leave out one of the two; see "
    ),
    ("--evaluate", "--from", "tiny", "--output", "out"): (
        "--output must not be given with --evaluate; leave out one of the two; see "
    ),
    ("--evaluate", "--from", "nowhere"): "no such folder: 'nowhere'; ",
    ("--evaluate", "--from", "tiny", "--seqlen", "0"): "--seqlen must be in [1, 1000000000], got 0",
    ("--evaluate", "--from", "tiny", "--device", "tpu"): "--device must be auto, cpu, cuda or ",
}


@pytest.mark.parametrize("options", BAD_EVALUATIONS)
def test_bad_options_of_evaluate_are_one_line(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main([str(TEXT), *options])
    except SystemExit as exit:  # the parser's
        code = exit.code
    assert code == 2
    stdout, error = capsys.readouterr()
    assert stdout == ""
    assert error.startswith(f"error: {BAD_EVALUATIONS[options]}"), error
    assert error.count("\n") == 1


def test_evaluate_refuses_several_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    assert main([str(TEXT), "--from", "tiny", "--evaluate"]) == 2
    assert capsys.readouterr().err == (
        "error: the number of ranks must be 1 with --evaluate, got 2; start the command without "
        "torchrun\n"
    )


def test_help_has_every_default() -> None:
    """The help of each option with a value names the default."""
    parser = _parser()
    assert "10 % of it at the last step" in parser.format_help()
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and action.dest != "output":
            assert "default: " in (action.help or ""), action.dest
