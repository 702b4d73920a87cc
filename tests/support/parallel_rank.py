"""Run one rank of a parallel model: `python parallel_rank.py FOLDER [PORT...]`.

A program of test_parallel.py. The rank computes results with each checkpoint in FOLDER. If ports
are given, it also runs the SCENARIOS of the command, each in a new group on its own port. It writes
the results next to FOLDER.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_kernels.distributed.process_group import joined
from mistral_kernels.distributed.tensor_parallel import ParallelMistralForCausalLM
from mistral_kernels.generate import main
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.model.transformer import MistralForCausalLM

# Unequal prompts, shorter and longer than the window of 7.
PROMPTS = [[3, 5, 8], [*range(1, 31)], [60]]
CPU = ("--device", "cpu")  # a machine may have fewer GPUs than there are ranks
GREEDY = ("She was", *CPU, "--dtype", "fp32", "--temperature", "0", "-m", "20")

# Arguments of the command, arguments of the other ranks if they differ, and standard input.
SCENARIOS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "greedy": (GREEDY, (), ""),
    "random": (("-", *CPU, "--json", "-m", "20"), (), "She was"),
    "chat": (("--model", "CHAT", *CPU, "--chat", "--quiet", "-m", "9"), (), "Hello\n\nAnd you?\n"),
    "no_prompt": (("-", *CPU, "--quiet"), (), "  \n"),
    "no_model": (("x", *CPU, "--model", "/no/such"), (), ""),
    "other_option": (GREEDY, (*GREEDY, "--top-k", "5"), ""),
    "other_model": ((*GREEDY, "--model", "hf"), (*GREEDY, "--model", "raw"), ""),
    "other_tokenizer": ((*GREEDY, "--model", "CHAT"), (*GREEDY, "--model", "RETOKENIZED"), ""),
    "gpu": (("x", "--device", "cuda:0"), (), ""),
}


class Collectives(TorchDispatchMode):
    """Mode that counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "_c10d_functional":
            name = function.name().partition("::")[2]
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def results_of(model: MistralForCausalLM) -> dict[str, Any]:
    """Return results that must not depend on the number of ranks, and the sizes of the share."""
    cache = model.new_cache(len(PROMPTS), 64)
    logits = model.prefill(PROMPTS, cache, chunk_size=5)
    with Collectives() as collectives:
        decoded = model.decode(torch.tensor([4, 60, 9]), cache)
    weights = sum(weight.numel() for weight in model.parameters())
    forward = model(torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])).logits
    # In float64, rounding does not decide between two tokens of nearly equal probability.
    model = model.double()
    sampled = list(
        model.stream(
            PROMPTS,
            max_new_tokens=12,
            sampler=Sampler(0.8, top_p=0.9, generator=torch.Generator().manual_seed(3)),
        )
    )
    return {
        "forward": forward,
        "prefill": logits,
        "decode": decoded,
        "greedy": model.generate(PROMPTS, max_new_tokens=20, eos_token_id=None),
        "sampled": sampled,
        "collectives": collectives.counts,
        "cache": cache.nbytes,
        "weights": weights,
    }


def run_command(folder: Path, arguments: tuple[str, ...], stdin: str) -> tuple[object, str, str]:
    paths = {each.name: str(each) for each in folder.iterdir()}
    sys.stdin = io.StringIO(stdin)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code: object = main([paths.get(each, each) for each in arguments])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def run() -> None:
    folder, ports = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    with joined("cpu", timedelta(seconds=60)) as world:
        for path in sorted(each for each in folder.iterdir() if each.name.islower()):
            model = ParallelMistralForCausalLM.from_pretrained(path, dtype=torch.float32)
            results[path.name] = results_of(model)
        quantized = ParallelMistralForCausalLM.from_pretrained(folder / "hf", quantize="int8")
        results["int8"] = quantized(torch.tensor(PROMPTS[1:2])).logits
    # strict=False: without ports, no scenario runs.
    for (name, (mine, others, stdin)), port in zip(SCENARIOS.items(), ports, strict=False):
        os.environ["MASTER_PORT"] = port
        arguments = others if others and not world.is_main else mine
        # Only the main rank reads standard input.
        results[name] = run_command(folder, arguments, stdin if world.is_main else "nothing")
    torch.save(results, folder.parent / f"{world.size}-{rank}.pt")


if __name__ == "__main__":
    run()
