"""Peak memory and time of loading a checkpoint, of the first token, and of a conversion.

    python benchmarks/load_memory.py /tmp/random-1.2B

Each of the three tasks runs in its own process, after all imports, with the files in the system's
page cache. "peak" is the growth of the process's resident set, mapped pages included. "bound" is
the size of the model (0 for a conversion) plus the largest tensor. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mistral_kernels import MistralForCausalLM, convert
from mistral_kernels.checkpoint import open_checkpoint


def resident(field: str) -> int:
    """Return the resident set of this process in bytes, now (`VmRSS`) or at its peak (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def load(path: str) -> None:
    MistralForCausalLM.from_pretrained(path)


def first_token(path: str) -> None:
    """Load a model and generate one token greedily after a prompt."""
    model = MistralForCausalLM.from_pretrained(path)
    model.generate([[1] * PROMPT], max_new_tokens=1)


def convert_away(path: str) -> None:
    with tempfile.TemporaryDirectory(dir=Path(path).resolve().parent) as folder:
        if convert.main([path, f"{folder}/converted"]):
            raise SystemExit("the conversion failed")


PROMPT = 512  # tokens
TASKS = {"load": load, "first token": first_token, "convert": convert_away}


def read_all(file: Path) -> None:
    """Read a file into the system's page cache without keeping it in this process."""
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 20):
            pass


def measure(task: str, path: str) -> None:
    checkpoint = open_checkpoint(path)
    largest = max(stored.num_bytes for stored in checkpoint.stored.values())
    held = 0 if task == "convert" else checkpoint.num_bytes
    for file in {stored.file for stored in checkpoint.stored.values()}:
        read_all(file)
    before = resident("VmRSS")
    start = time.perf_counter()
    TASKS[task](path)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    print(
        f"{task:11} {checkpoint.format:4} model {checkpoint.num_bytes / 1e6:7.0f} MB  "
        f"largest tensor {largest / 1e6:5.0f} MB  peak {peak / 1e6:7.0f} MB "
        f"= {peak / checkpoint.num_bytes:5.3f} of the model, "
        f"{peak / (held + largest):5.3f} of the bound  {seconds:6.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="folder of the checkpoint to load and to convert")
    parser.add_argument("--task", choices=TASKS, help="run only this task, in this process")
    args = parser.parse_args()
    if args.task:
        measure(args.task, args.checkpoint)
        return
    for task in TASKS:
        command = [sys.executable, __file__, args.checkpoint, "--task", task]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
