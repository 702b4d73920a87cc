"""Loss and gradients of a whole model per length: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import models
from benchmarks.make_checkpoint import CONFIGS
from benchmarks.registry import CPU_DTYPES, Case, Operator, Prepared, cases


class TrainingStep(Operator):
    name = "training_step"
    summary = "Loss and gradients of whole models: time and peak memory"
    bound = "FLOP"
    providers = tuple(models.ENGINES)
    measures_memory = True

    def check(self, provider: str, case: Case, device: torch.device) -> None:
        models.check(provider, case.dtype, device, "loss", windowed=True, batch=2)

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        config = CONFIGS[case["model"]]
        model = models.engine(provider, case["model"], case.dtype, device)
        ids = torch.randint(config.vocab_size, (1, case["S"]), device=device)

        def ready(i: int) -> Callable[[], object]:
            model.model.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
            return lambda: model.loss(ids).backward()

        return ready

    def flops(self, case: Case) -> float:
        """Count the products with weights: one forward, two backward."""
        return 6.0 * case["S"] * models.num_product_weights(case["model"])

    def bytes(self, case: Case) -> float:
        """Count weights and their gradients."""
        return 2.0 * models.num_product_weights(case["model"]) * case.dtype.itemsize


OPERATOR = TrainingStep(
    cpu=cases([{"model": "10M", "S": n} for n in (256, 512, 1024, 2048)], CPU_DTYPES, ("step",)),
    gpu=cases(
        [{"model": "1.2B", "S": 1 << n} for n in range(10, 16)], (torch.bfloat16,), ("step",)
    ),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
