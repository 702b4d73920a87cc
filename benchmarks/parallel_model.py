"""Estimate of tensor parallelism, not a measurement: memory and time of a decode step per rank.

    python benchmarks/parallel_model.py

Prints a table for Mistral-7B in bfloat16, one sequence with a full window, on H100s with NVLink.

A step reads the weights and the cache of a rank at memory bandwidth, and then runs the collectives.
The cost of a collective is the one that NCCL assumes when it chooses an algorithm
(src/graph/tuning.cc, ring with the low-latency protocol, NVLink): 6.6 us to start, 0.6 us for each
of the 2 (N - 1) steps of an all-reduce, and 2 (N - 1) / N of the message over a quarter of the
link's bandwidth.
"""

from __future__ import annotations

import torch

from mistral_kernels import MistralConfig
from mistral_kernels.distributed.tensor_parallel import Share, memory_per_rank

MEMORY_BANDWIDTH = 3.35e12  # bytes per second, HBM
LINK_BANDWIDTH = 450e9 / 4  # bytes per second, NVLink in one direction
START, HOP = 6.6e-6, 0.6e-6  # seconds
DTYPE = torch.bfloat16


def step_seconds(config: MistralConfig, size: int) -> tuple[float, float]:
    """Return the seconds of one decode step in memory and in collectives, for one sequence."""
    held = memory_per_rank(config, size, dtype=DTYPE)
    weights = held.weights
    if not config.tie_word_embeddings:  # a step reads one row of the embedding
        vocabulary = Share(config, 0, size).vocabulary
        weights -= len(vocabulary) * config.hidden_size * DTYPE.itemsize
    memory, hops = (weights + held.cache) / MEMORY_BANDWIDTH, size - 1
    if not hops:
        return memory, 0.0

    def collective(rounds: int, elements: int) -> float:
        sent = rounds * hops / size * elements * DTYPE.itemsize
        return START + rounds * hops * HOP + sent / LINK_BANDWIDTH

    all_reduces = 2 * config.num_hidden_layers + 1
    all_gather = collective(1, config.vocab_size)
    return memory, all_reduces * collective(2, config.hidden_size) + all_gather


def table() -> list[str]:
    """Return the rows of the table in benchmarks/README.md."""
    config, rows = MistralConfig(), []
    for size in (1, 2, 4, 8):
        held = memory_per_rank(config, size, dtype=DTYPE)
        sizes = (held.weights, held.cache, held.weights + held.cache)
        gigabytes = " | ".join(f"{bytes / 1e9:.2f} GB" for bytes in sizes)
        milliseconds = sum(step_seconds(config, size)) * 1e3
        rows.append(f"| {size} | {gigabytes} | {milliseconds:.1f} ms |")
    return rows


if __name__ == "__main__":
    print(*table(), sep="\n")
