"""Call time of each operator on small CPU tensors: the overhead around the kernel.

    python -m benchmarks.dispatch [--rounds N] PYTHON [PYTHON ...]

Each PYTHON is an interpreter with its own installation of the package. Rounds alternate between
them; the table has medians in microseconds. "warm" repeats a call; "cold" evicts the caches before
each call, as the weights of a model do between two operators of a decode step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

COLD_CALLS, WARM_CALLS, EVICTED_BYTES = 60, 2000, 48 << 20


def calls() -> dict[str, Callable[[], object]]:
    """Return one call without arguments per operator."""
    import torch

    import mistral_kernels as mk
    from mistral_kernels.ops.linear import linear
    from mistral_kernels.ops.linear_int8 import linear_int8, quantize_int8

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    x, weight = torch.randn(1, 64), torch.ones(64)
    learned = torch.randn(1, 64, requires_grad=True)
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 2, 16)
    tables, positions = mk.rotary_tables(32, 16, 1e4), torch.zeros(1, 1, dtype=torch.int64)
    caches = torch.zeros(1, 32, 2, 16), torch.zeros(1, 32, 2, 16)
    lengths = torch.zeros(1, dtype=torch.int32)
    packed = lengths, torch.tensor([0, 1], dtype=torch.int32), 1
    matrix = torch.randn(64, 64)
    quantized = quantize_int8(matrix)
    targets = torch.zeros(1, dtype=torch.int64)

    def trained() -> None:
        with torch.enable_grad():
            mk.rms_norm(learned, weight).sum().backward()

    return {
        "rms_norm": lambda: mk.rms_norm(x, weight),
        "rms_norm, residual": lambda: mk.rms_norm(x, weight, residual=x),
        "rms_norm, backward": trained,
        "swiglu": lambda: mk.swiglu(x),
        "apply_rotary": lambda: mk.apply_rotary(q, k, *tables, positions),
        "apply_rotary_": lambda: mk.apply_rotary_(q, k, *tables, positions),
        "rolling_cache_update_": lambda: mk.rolling_cache_update_(*caches, k[0], k[0], *packed),
        "rolling_cache_attention": lambda: mk.rolling_cache_attention(
            q[0], None, None, *caches, *packed, sliding_window=None
        ),
        "attention": lambda: mk.attention(q, k, k),
        "linear": lambda: linear(x, matrix),
        "linear_int8": lambda: linear_int8(x, *quantized),
        "linear_cross_entropy": lambda: mk.linear_cross_entropy(x, matrix, targets),
    }


def measure() -> dict[str, tuple[float, float]]:
    """Return the warm and the cold time of each call, in microseconds."""
    import torch

    evicted = torch.zeros(EVICTED_BYTES, dtype=torch.int8)
    times = {}
    for name, call in calls().items():
        for _ in range(20):
            call()
        start = time.perf_counter()
        for _ in range(WARM_CALLS):
            call()
        warm = (time.perf_counter() - start) / WARM_CALLS
        cold = []
        for _ in range(COLD_CALLS):
            evicted.add_(1)
            start = time.perf_counter()
            call()
            cold.append(time.perf_counter() - start)
        times[name] = (warm * 1e6, statistics.median(cold) * 1e6)
    return times


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="*", help="interpreters to compare")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if not args.python:
        print(json.dumps(measure()))
        return
    rounds: dict[str, list[dict[str, list[float]]]] = {python: [] for python in args.python}
    for _ in range(args.rounds):
        for python, results in rounds.items():
            output = subprocess.check_output([python, __file__], text=True)
            results.append(json.loads(output.splitlines()[-1]))
    for name in rounds[args.python[0]][0]:
        row = [f"{name:26}"]
        for i, kind in enumerate(("warm", "cold")):
            medians = [
                statistics.median(result[name][i] for result in rounds[python])
                for python in args.python
            ]
            row += [kind, *(f"{x:7.1f}" for x in medians), f"x{medians[-1] / medians[0]:.2f}  "]
        print(" ".join(row))


if __name__ == "__main__":
    main(sys.argv[1:])
