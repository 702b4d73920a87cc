"""Prompts and decode steps of a whole model, with random weights and Mistral's head layout.

On a CPU of 160 million parameters and, far into a text, of 10 million; on a GPU Mistral-7B. Whole
models are timed as they are used: a step follows one of the same text, which on a CPU is made once
more before each that is timed, and tensors of that are still in the caches. 1.2 billion parameters
take a quarter of an hour and 16 GiB:

    python -m pytest benchmarks --op generation --shapes large --sittings 3 \
        --providers "ours,transformers sdpa,llama.cpp" --benchmark-json large.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import models, step_profile
from benchmarks.make_checkpoint import CONFIGS
from benchmarks.registry import Case, Operator, Prepared, cases
from benchmarks.sittings import MAX_ROUNDS, UNTIMED

STEPS = 2 * (MAX_ROUNDS + UNTIMED)  # of a text, at most


class Generation(Operator):
    """`prefill` of a prompt, or one `decode` step after `position` tokens."""

    name = "generation"
    bound = "byte"
    providers = tuple(name for name in models.ENGINES if name != "transformers eager")
    measures_memory = True
    only_reads = True

    def beyond(self, provider: str, case: Case) -> str | None:
        if provider == "ours int8" and case.direction == "prefill":
            return "is for decoding: prompts are multiplied in the dtype of x"
        return None

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
            return lambda turn: lambda: model.prefill(ids)
        step = model.decoder(ids, STEPS)
        return lambda turn: lambda: step(ids[:, turn % case["tokens"]])

    def profile(
        self, provider: str, case: Case, call: Callable[[], object], device: torch.device
    ) -> Any:
        if case.direction != "decode" or device.type == "meta" or provider == "llama.cpp":
            return None
        return step_profile.profile(call, CONFIGS[case["model"]].num_hidden_layers, device)

    def _keep(self, case: Case) -> None:
        """Keep models for the next case that wants the same."""
        wanted = case["model"], case.dtype
        if getattr(self, "kept", wanted) != wanted:
            models.release()
        self.kept = wanted

    def bound_of(self, case: Case) -> str:
        return "FLOP" if case.direction == "prefill" else "byte"

    def flops(self, case: Case) -> float:
        """Return the FLOPs of products with weights; attention's are few beside them."""
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
    cpu=cases([sizes("10M", n) for n in (512, 8192)], HALF, DECODE)
    + cases([sizes("160M", 512), sizes("160M", 512, 8)], HALF, DECODE)
    + cases([sizes("160M", n) for n in (512, 1536)], HALF, PREFILL),
    large=cases([sizes("1.2B", 512, n) for n in (1, 8)], HALF, DECODE)
    + cases([sizes("1.2B", n) for n in (512, 4096)], HALF, PREFILL),
    gpu=cases([sizes("7B", 1 << n) for n in range(10, 18)], HALF, DECODE)
    + cases([sizes("7B", 4096, n) for n in (8, 64)], HALF, DECODE)
    + cases([sizes("7B", 1 << n) for n in range(9, 16)], HALF, PREFILL),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
