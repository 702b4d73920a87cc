"""A model, not a measurement, of tensor parallelism: memory and time of a decode step per rank.

    python benchmarks/parallel_model.py

The table is of Mistral-7B in bfloat16 with a full window, one sequence, on H100s with NVLink.

A step reads a rank's weights and cache at the memory's bandwidth; then come the collectives. Each
costs what NCCL itself assumes when it chooses an algorithm (src/graph/tuning.cc, ring and its
low-latency protocol, NVLink): 6.6 us to start, 0.6 us for each of the 2 (N - 1) steps of an
all-reduce, and 2 (N - 1) / N of the message over a quarter of the link's rate.
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
    """Return the seconds that a decode step of one sequence takes for memory, for collectives."""
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
    """Return the rows of the README's table."""
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
