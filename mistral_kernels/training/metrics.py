"""Measurements of every step of a run: log file, TensorBoard, and an image of the loss curve."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.utils.errors import one_line
from mistral_kernels.utils.files import check_regular, is_taken

_BEGIN = b'{"step": '  # first bytes of each line of a log


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one optimizer step. Losses are in nats per token.

    Attributes:
        step: number of the step, from 1 on.
        loss: mean training loss of the step's batches, before the update.
        learning_rate: learning rate of the update.
        grad_norm: L2 norm of all gradients before clipping; NaN if the loss is not finite.
        tokens_per_second: speed of this step, without evaluations and saves, over all ranks.
        held_out_loss: loss of the held-out text after the update; None: not evaluated.

    Example:
        >>> from mistral_kernels.training.metrics import StepMetrics
        >>> print(StepMetrics(1, 7.625, 0.0002, float("inf"), 5000.0).to_json())
        {"step": 1, "loss": 7.625, "learning_rate": 0.0002, "grad_norm": null,
        "tokens_per_second": 5000.0}
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    held_out_loss: float | None = None

    def scalars(self) -> dict[str, float]:
        """Return the values by name, except the step and a loss that was not evaluated."""
        values = asdict(self)
        return {name: x for name, x in values.items() if name != "step" and x is not None}

    def to_json(self) -> str:
        """Return one line of JSON, which has null for a value that is not finite."""
        values = {name: x if math.isfinite(x) else None for name, x in self.scalars().items()}
        return json.dumps({"step": self.step, **values})


class MetricsWriter(Protocol):
    """Destination of a run's measurements: `LogFile` or `TensorBoard`."""

    def write(self, metrics: StepMetrics) -> None:
        """Write the measurements of one step so that they can be read at once."""


class LogFile:
    """Log beside the output of a run: one line of JSON per step.

    A run that resumes keeps the lines of the steps up to `step`; later lines are cut. The file is
    removed if it is still empty when the run ends.

    Args:
        path: the file. A file that is not a log is not changed.
        step: number of completed steps of the run.

    Raises:
        CheckpointError: the file cannot be written, or is not a log.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        with self._reporting():
            if is_taken(path):
                check_regular(path)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            # Without a buffer, which `close` would try to write again after an error.
            self._file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
            end = 0
            with open(self._file.fileno(), "rb", closefd=False) as lines:
                begin = lines.peek(len(_BEGIN))[: len(_BEGIN)]
                if not _BEGIN.startswith(begin):
                    self._file.close()
                    raise CheckpointError(
                        f"{path} must be the log of a run, got another file; move it, or name "
                        "another output"
                    )
                for line in lines:
                    if not 1 <= _step_of(line) <= step:
                        break
                    end += len(line)
            self._file.truncate(end)
            self._file.seek(end)

    def write(self, metrics: StepMetrics) -> None:
        """Append one line. Raises CheckpointError if it cannot be written."""
        line = metrics.to_json().encode() + b"\n"
        with self._reporting():
            while line:  # a full disk may take only a part of the line
                line = line[self._file.write(line) :]

    def copy_to(self, target: Path) -> None:
        """Copy all lines to a new file, even if the log was renamed or removed meanwhile."""
        self._file.seek(0)
        with target.open("wb") as copy:
            shutil.copyfileobj(self._file, copy)

    def remove(self) -> None:
        """Remove the file, after its copy is in the output."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            self.remove()
        self._file.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot write the log {self.path}: {error}") from None


def _step_of(line: bytes) -> int:
    """Return the step of a line of a log; 0 if the line is incomplete."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return step if type(step) is int else 0


def summary_writer_class() -> Any:
    """Return PyTorch's class that writes TensorBoard's event files.

    Raises:
        ValueError: the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard requires the package tensorboard; pip install tensorboard"
        ) from None
    return SummaryWriter


class TensorBoard:
    """TensorBoard's event files of a run, with one scalar per measurement.

    Args:
        summary_writer: class from `summary_writer_class`.
        folder: folder of the event files.
        step: number of completed steps. TensorBoard hides the events that an interrupted run has
            written for later steps.
    """

    def __init__(self, summary_writer: Any, folder: Path, step: int) -> None:
        self._writer = summary_writer(str(folder), purge_step=step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Write the scalars train/loss, train/grad_norm, ... and eval/loss of one step."""
        for name, value in metrics.scalars().items():
            tag = "eval/loss" if name == "held_out_loss" else f"train/{name}"
            self._writer.add_scalar(tag, value, metrics.step)
        self._writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def draw_curve(log: Path, image: Path) -> str | None:
    """Draw the losses of a log, over the steps, as a PNG.

    Args:
        log: file with the lines of `LogFile`.
        image: file to write.

    Returns:
        None, or one line with the reason why there is no image. No error is raised, because the
        trained model must still be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {image.name}: it requires the package matplotlib; pip install matplotlib"
    except Exception as error:  # an invalid MPLBACKEND
        return one_line(f"no {image.name}: {error}")
    try:
        with log.open(encoding="utf-8") as lines:
            points = [json.loads(line) for line in lines]
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        styles: dict[str, dict[str, Any]] = {
            "loss": {"label": "training", "linewidth": 1, "alpha": 0.7},
            "held_out_loss": {"label": "held-out", "linewidth": 2, "marker": "o", "markersize": 4},
        }
        for name, style in styles.items():
            given = [(point["step"], point[name]) for point in points if name in point]
            axes.plot(*zip(*given, strict=True), **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(image, dpi=120)
    except Exception as error:
        image.unlink(missing_ok=True)
        return one_line(f"no {image.name}: {error}")
    return None
