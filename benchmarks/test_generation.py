"""Prompts and decode steps of whole models, with random weights and Mistral's head layout.

On a CPU the models have 160 million parameters, and 10 million for long texts; on a GPU the model
is Mistral-7B. Each timed decode step follows an untimed one of the same text, as in generation, so
tensors of that step may still be in the caches. The model of 1.2 billion parameters takes a quarter
of an hour and 16 GiB:

    python -m benchmarks --op generation --shapes large --sessions 3 \
        --providers "ours,ours int8,transformers sdpa,llama.cpp"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import models, step_profile
from benchmarks.make_checkpoint import CONFIGS
from benchmarks.registry import CPU_DTYPES, Case, Operator, Prepared, cases
from benchmarks.sessions import MAX_ROUNDS, UNTIMED

STEPS = 2 * (MAX_ROUNDS + UNTIMED)  # per text, at most


class Generation(Operator):
    """`prefill` of a prompt of `tokens` tokens, or one `decode` step after `tokens` tokens."""

    name = "generation"
    summary = "Prompts and decode steps of whole models"
    bound = "byte"
    providers = tuple(name for name in models.ENGINES if name != "transformers eager")
    measures_memory = True
    allocates_before = ("llama.cpp",)
    only_reads = True

    def compares_dtypes(self, case: Case) -> bool:
        return case["tokens"] == 512

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        models.check(provider, case.dtype, device, "logits", *self.checked(case)[1:])

    def checked(self, case: Case) -> Any:
        return case.dtype, self._passes_window(case), case["B"]

    def _passes_window(self, case: Case) -> bool:
        window = CONFIGS[case["model"]].sliding_window
        new = STEPS if case.direction == "decode" else 0
        return window is not None and case["tokens"] + new > window

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        self._keep(case)
        model = models.engine(provider, case["model"], case.dtype, device)
        vocab = CONFIGS[case["model"]].vocab_size
        generator = torch.Generator(device="cpu").manual_seed(0)
        ids = torch.randint(vocab, (case["B"], case["tokens"]), generator=generator).to(device)
        if case.direction == "prefill":
            return lambda i: lambda: model.prefill(ids)
        step = model.decoder(ids, STEPS)
        return lambda i: lambda: step(ids[:, i % case["tokens"]])

    def profile(
        self, provider: str, case: Case, call: Callable[[], object], device: torch.device
    ) -> Any:
        if case.direction != "decode" or device.type == "meta" or provider == "llama.cpp":
            return None
        return step_profile.profile(call, CONFIGS[case["model"]].num_hidden_layers, device)

    def _keep(self, case: Case) -> None:
        """Keep the models of this case for the next cases with the same ones."""
        wanted = case["model"], case.dtype
        if getattr(self, "kept", wanted) != wanted:
            models.release()
        self.kept = wanted

    def bound_of(self, case: Case) -> str:
        return "FLOP" if case.direction == "prefill" else "byte"

    def flops(self, case: Case) -> float:
        """Count the products with weights; the FLOPs of attention are few in comparison."""
        tokens = case["tokens"] if case.direction == "prefill" else 1
        return 2.0 * case["B"] * tokens * models.num_product_weights(case["model"])

    def bytes_of(self, provider: str, case: Case) -> float:
        """Count the weights, read once, and the keys and values in the window."""
        config = CONFIGS[case["model"]]
        seen = min(case["tokens"], config.sliding_window or case["tokens"])
        kv = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        weight = 1 if provider == "ours int8" else case.dtype.itemsize
        weights = models.num_product_weights(case["model"]) * weight
        return float(weights + case["B"] * seen * kv * case.dtype.itemsize)


def sizes(model: str, tokens: int, batch: int = 1) -> dict[str, Any]:
    return {"model": model, "B": batch, "tokens": tokens}


PREFILL, DECODE = ("prefill",), ("decode",)
HALF = (torch.bfloat16,)
OPERATOR = Generation(
    cpu=cases([sizes("10M", n) for n in (128, 512, 2048, 8192)], CPU_DTYPES, DECODE)
    + cases([sizes("160M", 512), sizes("160M", 64, 8)], CPU_DTYPES, DECODE)
    + cases([sizes("160M", n) for n in (128, 256, 1024)], CPU_DTYPES, PREFILL)
    + cases([sizes("160M", 512)], (*CPU_DTYPES, torch.float16), PREFILL),
    large=cases([sizes("1.2B", 64, n) for n in (1, 8)], CPU_DTYPES, DECODE)
    + cases([sizes("1.2B", n) for n in (512, 4096)], CPU_DTYPES, PREFILL),
    gpu=cases([sizes("7B", 1 << n) for n in range(10, 18)], HALF, DECODE)
    + cases([sizes("7B", 4096, n) for n in (8, 64)], HALF, DECODE)
    + cases([sizes("7B", 1 << n) for n in range(9, 16)], HALF, PREFILL),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
