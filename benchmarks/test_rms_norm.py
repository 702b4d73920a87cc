"""RMSNorm, alone and with the residual addition before it, forward and backward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.registry import CPU_DTYPES, Case, Inputs, Runs, TensorOperator, cases, normal
from mistral_kernels import rms_norm
from mistral_kernels.ops import reference

EPS = 1e-5


def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    """Compute RMSNorm as transformers and the reference do."""
    return reference.rms_norm(x, weight, EPS, residual)


compiled_plain = torch.compile(plain, dynamic=False)


def liger(case: Case, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    if residual is None:
        from liger_kernel.ops import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


class RMSNorm(TensorOperator):
    name = "rms_norm"
    summary = "RMSNorm, alone and with the residual addition"
    bound = "byte"
    runs: ClassVar[Runs] = {
        "ours": lambda case, **inputs: rms_norm(
            inputs.pop("x"), inputs.pop("weight"), EPS, **inputs
        ),
        "eager": lambda case, **inputs: plain(**inputs),
        "compiled eager": lambda case, **inputs: compiled_plain(**inputs),
        "Liger": liger,
    }
    small = tuple((("tokens", 7), ("hidden", 257), ("residual", yes)) for yes in (False, True))

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        shape = case["tokens"], case["hidden"]
        inputs = {
            "x": normal(*shape, case=case, device=device),
            "weight": normal(case["hidden"], case=case, device=device),
        }
        if case["residual"]:
            inputs["residual"] = normal(*shape, case=case, device=device)
        return inputs

    def definition(self, case: Case, **inputs: Tensor) -> Any:
        return plain(**inputs)

    def flops(self, case: Case) -> float:
        return 4.0 * case["tokens"] * case["hidden"] * (2 if case.direction == "backward" else 1)

    def bytes(self, case: Case) -> float:
        """Count x and y, and with a residual also the residual and the sum.

        Backward counts dy, the input of the norm, dx and, with a residual, the gradient of the sum.
        """
        passes = {
            ("forward", False): 2,
            ("forward", True): 4,
            ("backward", False): 3,
            ("backward", True): 4,
        }[case.direction, case["residual"]]
        return case["tokens"] * case["hidden"] * case.dtype.itemsize * passes


def sizes(tokens: int, residual: bool = True) -> dict[str, Any]:
    return {"tokens": tokens, "hidden": 4096, "residual": residual}


OPERATOR = RMSNorm(
    cpu=cases([sizes(512, False), sizes(512)], CPU_DTYPES),
    gpu=cases(
        [sizes(n, residual) for n in (1, 64, 2048, 16384) for residual in (False, True)],
        (torch.bfloat16,),
    ),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
