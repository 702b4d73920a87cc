"""Results of a run: one row per case and provider, with the machine, read and written as JSON."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "xformers",
    "liger-kernel",
    "llama-cpp-python",
)


@dataclass(frozen=True)
class Row:
    """Result of one provider in one case."""

    op: str
    sizes: dict[str, Any]
    dtype: str
    direction: str
    provider: str
    bound: str  # "FLOP" or "byte"
    work: float  # FLOPs or bytes, by `bound`
    seconds: float  # median
    noise: float | None = None  # relative to the median
    of_peak: float | None = None  # share of the machine's speed in the same rounds
    over_ours: float | None = None  # median ratio to our time in the same round
    over_ours_noise: float | None = None
    peak_memory: int | None = None  # bytes
    profile: dict[str, Any] | None = None  # of `step_profile`

    @property
    def key(self) -> tuple[Any, ...]:
        return self.op, tuple(self.sizes.items()), self.dtype, self.direction, self.provider

    @property
    def length(self) -> int | None:
        """Return the number of tokens, where the case has one."""
        return self.sizes.get("tokens", self.sizes.get("S"))

    @property
    def rate(self) -> float:
        """Return FLOPs or bytes per second."""
        return self.work / self.seconds

    @property
    def case(self) -> str:
        sizes = " ".join(
            f"{name}={'none' if value is None else value}" for name, value in self.sizes.items()
        )
        return f"{sizes}, {self.dtype}, {self.direction}"

    @property
    def is_tie(self) -> bool:
        """Return whether the ratio to our time differs from 1 by less than its noise."""
        if self.over_ours is None or self.over_ours_noise is None:
            return False
        return abs(self.over_ours - 1) < self.over_ours_noise


@dataclass
class Results:
    """Rows of one machine: measured, or copied from the text that `transcribed` names."""

    machine: str  # for titles: processor, instruction set or GPU, threads
    environment: dict[str, Any]
    date: str
    command: str
    rows: list[Row]
    transcribed: str | None = None  # the text, for rows whose file was not kept
    notes: list[str] = field(default_factory=list)  # paragraphs shown below the tables

    def select(self, **wanted: Any) -> list[Row]:
        """Return the rows whose fields or sizes have the given values."""
        return [
            row
            for row in self.rows
            if all(
                (row.sizes[name] if name in row.sizes else getattr(row, name, ...)) == value
                for name, value in wanted.items()
            )
        ]

    def save(self, path: Path) -> None:
        """Write the results as JSON, one row per line."""
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        rows = [
            json.dumps({k: _rounded(v) for k, v in vars(row).items() if v is not None})
            for row in fields.pop("rows")
        ]
        head = json.dumps({k: v for k, v in fields.items() if v}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: `save` cannot have written the file.
            OSError: the file cannot be read.
        """
        try:
            stored = json.loads(path.read_text())
            return cls(**{**stored, "rows": [Row(**row) for row in stored["rows"]]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be a file that `python -m benchmarks` wrote: {error}"
            ) from None


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """Return the hardware, the versions and the commit, on which times depend."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
        found[query] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return found


def machine_name(device: torch.device) -> str:
    """Return a short name of the machine, for titles."""
    found = environment(device)
    if device.type == "cuda":
        return str(found["gpu"])
    extra = " BF16" if has_bf16_products() else ""
    return f"{found['cpu']}, {found['instruction set']}{extra}, {found['threads']} threads"


def has_bf16_products() -> bool:
    """Return whether this CPU multiplies bfloat16 by its own instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(map(str.strip, line.partition(":")[::2]) for line in reversed(lines))
    name = fields.get("model name", "CPU")
    numbers = [
        f"{x} {fields[key]}"
        for x, key in (("family", "cpu family"), ("model", "model"))
        if key in fields
    ]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip()
