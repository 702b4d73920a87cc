"""Load one rank's share of a model: `python parallel_memory.py CHECKPOINT`.

A program of test_parallel.py. It prints the bytes of the share, and by how many bytes the peak
memory of the process grew during loading.
"""

from __future__ import annotations

import sys

from benchmarks.load_memory import resident
from mistral_kernels.checkpoint import open_checkpoint
from mistral_kernels.distributed.process_group import joined
from mistral_kernels.distributed.tensor_parallel import ParallelMistralForCausalLM, memory_per_rank

with joined("cpu") as world:
    config = open_checkpoint(sys.argv[1]).config
    before = resident("VmRSS")
    model = ParallelMistralForCausalLM.from_pretrained(sys.argv[1])
    peak = resident("VmHWM") - before
    print(memory_per_rank(config, world.size).weights, peak)
