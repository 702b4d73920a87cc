"""SwiGLU, forward and backward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import CPU_DTYPES, Case, Inputs, Runs, TensorOperator, cases, normal
from mistral_kernels import swiglu
from mistral_kernels.ops import reference


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


compiled_plain = torch.compile(plain, dynamic=False)


def liger(case: Case, gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


class SwiGLU(TensorOperator):
    name = "swiglu"
    summary = "SwiGLU activation"
    bound = "byte"
    runs: ClassVar[Runs] = {
        "ours": lambda case, **inputs: swiglu(**inputs),
        "eager": lambda case, **inputs: plain(**inputs),
        "compiled eager": lambda case, **inputs: compiled_plain(**inputs),
        "Liger": liger,
    }
    small = ((("tokens", 7), ("intermediate", 257)),)

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        shape = case["tokens"], case["intermediate"]
        return {name: normal(*shape, case=case, device=device) for name in ("gate", "up")}

    def definition(self, case: Case, **inputs: Tensor) -> Tensor:
        return reference.swiglu(**inputs)

    def flops(self, case: Case) -> float:
        return 4.0 * case["tokens"] * case["intermediate"]

    def bytes(self, case: Case) -> float:
        """Count gate, up and y; in the backward pass dy, gate, up and two gradients."""
        passes = 5 if case.direction == "backward" else 3
        return case["tokens"] * case["intermediate"] * case.dtype.itemsize * passes


OPERATOR = SwiGLU(
    cpu=cases([{"tokens": 512, "intermediate": 14336}], CPU_DTYPES),
    gpu=cases(
        [{"tokens": n, "intermediate": 14336} for n in (1, 64, 2048, 16384)], (torch.bfloat16,)
    ),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
