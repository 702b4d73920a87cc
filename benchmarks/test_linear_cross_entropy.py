"""Output projection and cross entropy: the loss and both gradients in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import (
    CPU_DTYPES,
    Case,
    Inputs,
    Prepared,
    Runs,
    TensorOperator,
    cases,
    normal,
)
from mistral_kernels import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.mT).float(), targets)


compiled_plain = torch.compile(plain, dynamic=False)


def liger(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    result = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)
    return result[0] if isinstance(result, tuple) else result


class LinearCrossEntropy(TensorOperator):
    name = "linear_cross_entropy"
    summary = "Output projection and loss, forward and backward together"
    bound = "FLOP"
    runs: ClassVar[Runs] = {
        "ours": lambda case, **inputs: linear_cross_entropy(**inputs),
        "eager": lambda case, **inputs: plain(**inputs),
        "compiled eager": lambda case, **inputs: compiled_plain(**inputs),
        "Liger": liger,
    }
    small = ((("tokens", 40), ("hidden", 64), ("vocab", 1000)),)

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        vocab, hidden = case["vocab"], case["hidden"]
        weight = (torch.randn(vocab, hidden, device=device) / hidden**0.5).to(case.dtype)
        return {
            "hidden": normal(case["tokens"], hidden, case=case, device=device),
            "weight": weight.requires_grad_(case.direction == "backward"),
            "targets": torch.randint(vocab, (case["tokens"],), device=device),
        }

    def definition(self, case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ weight.mT
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def prepare(self, provider: str, case: Case, device: torch.device) -> Prepared:
        """Prepare forward and backward as one call: ours computes gradients in its forward pass."""
        copies = self._copies(case, device)

        def ready(i: int) -> Callable[[], object]:
            inputs = copies[i % len(copies)]
            leaves = inputs["hidden"], inputs["weight"]
            return lambda: torch.autograd.grad(self.runs[provider](case, **inputs), leaves)

        return ready

    def flops(self, case: Case) -> float:
        """Return the FLOPs of three products."""
        return 6.0 * case["tokens"] * case["hidden"] * case["vocab"]

    def bytes(self, case: Case) -> float:
        """Count inputs and gradients."""
        rows = case["tokens"] + case["vocab"]
        return 2.0 * rows * case["hidden"] * case.dtype.itemsize


def sizes(tokens: int, hidden: int) -> dict[str, int]:
    return {"tokens": tokens, "hidden": hidden, "vocab": 32000}


OPERATOR = LinearCrossEntropy(
    cpu=cases([sizes(512, 1024)], CPU_DTYPES, ("backward",)),
    gpu=cases([sizes(n, 4096) for n in (4096, 16384)], (torch.bfloat16,), ("backward",)),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
