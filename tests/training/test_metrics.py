"""Measurements of each step: log file, TensorBoard, and the image of the curve."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.training.metrics import (
    LogFile,
    StepMetrics,
    TensorBoard,
    draw_curve,
    summary_writer_class,
)


def some_metrics(step: int) -> StepMetrics:
    values = [random.uniform(0, 10) for _ in range(4)]
    return StepMetrics(step, *values, held_out_loss=random.choice([None, 2.5]))


def write_steps(path: Path, steps: range, resumed: int = 0) -> list[StepMetrics]:
    metrics = [some_metrics(step) for step in steps]
    with LogFile(path, resumed) as log:
        for each in metrics:
            log.write(each)
    return metrics


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


def test_lines_are_readable_at_once(tmp_path: Path) -> None:
    """Each line has the exact values. Lines are not lost if the file is removed."""
    path = tmp_path / "log"
    with LogFile(path, 0) as log:
        for step in (1, 2, 3):
            metrics = some_metrics(step)
            log.write(metrics)
            *_, line = path.read_text().splitlines()
            assert json.loads(line) == {"step": step, **metrics.scalars()}
        assert ("held_out_loss" in line) == (metrics.held_out_loss is not None)
        path.unlink()
        log.copy_to(tmp_path / "copy")
    assert steps_of(tmp_path / "copy") == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_null(value: float) -> None:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = StepMetrics(7, value, 1e-3, value, 10.5, value).to_json()
    assert json.loads(line, parse_constant=fail) == {
        "step": 7,
        "loss": None,
        "learning_rate": 1e-3,
        "grad_norm": None,
        "tokens_per_second": 10.5,
        "held_out_loss": None,
    }


@pytest.mark.parametrize("end", [b"", b'{"step": 6, "lo', b'{"step": 6}', b"[1]\n", b"\xff\n"])
def test_a_resumed_run_cuts_later_lines(end: bytes, tmp_path: Path) -> None:
    """Lines of later steps and an incomplete line are cut; each step occurs once."""
    path = tmp_path / "log"
    write_steps(path, range(1, 6))
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    with path.open("ab") as file:
        file.write(end)
    write_steps(path, range(4, 7), resumed=3)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes().startswith(b"".join(kept))
    with path.open("ab") as file:
        file.write(end)
    write_steps(path, range(7, 8), resumed=6)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
    write_steps(path, range(1, 3))
    assert steps_of(path) == [1, 2], "a new run begins a new log"


def test_an_empty_log_is_removed(tmp_path: Path) -> None:
    with LogFile(tmp_path / "log", 0):
        assert (tmp_path / "log").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("contents", [b"a note to myself\n", b'{"name": 1}\n', b"\0"])
def test_another_file_is_not_changed(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(contents)
    message = f"{path} must be the log of a run, got another file; move it, or name another output"
    with pytest.raises(CheckpointError) as caught:
        LogFile(path, 0)
    assert str(caught.value) == message
    assert path.read_bytes() == contents


@pytest.mark.parametrize("kind", ["FIFO", "link", "broken link", "folder", "below a file"])
def test_paths_that_are_not_files_are_refused(kind: str, tmp_path: Path) -> None:
    """Opening does not block on a FIFO, and does not write through a link."""
    path, mine = tmp_path / "log", tmp_path / "mine"
    mine.touch()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "below a file":
        path = mine / "log"
    else:
        path.symlink_to(mine if kind == "link" else "nowhere")
    reasons = {
        "FIFO": "must be a regular file, got a FIFO",
        "folder": "must be a regular file, got a folder",
        "broken link": "must be a regular file, got a broken symbolic link",
        "link": "Too many levels of symbolic links",
        "below a file": "Not a directory",
    }
    with pytest.raises(CheckpointError, match=reasons[kind]) as caught:
        LogFile(path, 0)
    assert str(path) in str(caught.value)
    assert mine.read_bytes() == b""


class SummaryWriter:
    """Replacement of torch.utils.tensorboard.SummaryWriter that records its calls."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.calls: list[Any] = [(folder, purge_step)]

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args))


def test_tensorboard_gets_each_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with TensorBoard(summary_writer_class(), tmp_path, 3) as board:
        board.write(StepMetrics(4, 5.5, 1e-3, 0.25, 100.0))
        board.write(StepMetrics(5, 5.0, 1e-4, 0.5, 200.0, 6.5))
    assert board._writer.calls == [
        (str(tmp_path), 4),
        ("add_scalar", "train/loss", 5.5, 4),
        ("add_scalar", "train/learning_rate", 1e-3, 4),
        ("add_scalar", "train/grad_norm", 0.25, 4),
        ("add_scalar", "train/tokens_per_second", 100.0, 4),
        ("flush",),
        ("add_scalar", "train/loss", 5.0, 5),
        ("add_scalar", "train/learning_rate", 1e-4, 5),
        ("add_scalar", "train/grad_norm", 0.5, 5),
        ("add_scalar", "train/tokens_per_second", 200.0, 5),
        ("add_scalar", "eval/loss", 6.5, 5),
        ("flush",),
        ("close",),
    ]


def test_a_missing_tensorboard_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--tensorboard requires the package tensorboard; pip install tensorboard"
    with pytest.raises(ValueError, match=f"^{message}$"):
        summary_writer_class()


@pytest.mark.parametrize("steps", [1, 40])
def test_the_curve_has_both_losses_at_their_steps(steps: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.axes import Axes

    log, image = tmp_path / "log.jsonl", tmp_path / "curve.png"
    metrics = [*write_steps(log, range(1, steps)), StepMetrics(steps, 3.5, 1, 1, 1, 4.5)]
    with LogFile(log, steps - 1) as file:
        file.write(metrics[-1])
    drawn, plot = [], Axes.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", lambda *args, **options: drawn.append(plot(*args, **options)))
        assert draw_curve(log, image) is None
    assert image.read_bytes().startswith(b"\x89PNG")
    training, held_out = [[tuple(point) for point in lines[0].get_xydata()] for lines in drawn]
    assert training == [(each.step, each.loss) for each in metrics]
    evaluated = [each for each in metrics if each.held_out_loss is not None]
    assert held_out == [(each.step, each.held_out_loss) for each in evaluated]


def test_a_curve_that_cannot_be_drawn_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the reason, and no error is raised."""
    image = tmp_path / "curve.png"
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "lo')
    reason = draw_curve(log, image)
    assert reason is not None
    assert reason.startswith("no curve.png: ")
    assert "\n" not in reason
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    missing = "no curve.png: it requires the package matplotlib; pip install matplotlib"
    assert draw_curve(log, image) == missing

    class InvalidBackend:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "matplotlib":
                raise ValueError("Key backend:\n'MPLBACKEND' is not valid")

    monkeypatch.setattr(sys, "meta_path", [InvalidBackend(), *sys.meta_path])
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert draw_curve(log, image) == "no curve.png: Key backend: 'MPLBACKEND' is not valid"
    assert not image.exists()
