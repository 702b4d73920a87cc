"""Rotary embedding of queries and keys, forward and backward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.registry import CPU_DTYPES, Case, Inputs, Runs, TensorOperator, cases, normal
from mistral_kernels import apply_rotary
from mistral_kernels.ops import reference
from mistral_kernels.ops.rotary import rotary_tables

HEADS, KV_HEADS, HEAD_DIM, THETA = 32, 8, 128, 1e4


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Any:
    """Rotate as transformers does, with tables that contain each angle twice."""
    cos, sin = (torch.cat((x, x), -1)[positions].unsqueeze(-2).to(q.dtype) for x in (cos, sin))
    return rotate_half(q, cos, sin), rotate_half(k, cos, sin)


compiled_plain = torch.compile(plain, dynamic=False)


def liger(case: Case, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Any:
    from liger_kernel.ops import LigerRopeFunction

    tables = (torch.cat((x, x), -1)[None].to(q.dtype) for x in (cos, sin))
    rotated = LigerRopeFunction.apply(*(x[None].transpose(1, 2) for x in (q, k)), *tables)
    return tuple(x.transpose(1, 2)[0] for x in rotated)


class Rotary(TensorOperator):
    name = "rotary"
    summary = "Rotary embedding of queries and keys"
    bound = "byte"
    runs: ClassVar[Runs] = {
        "ours": lambda case, **inputs: apply_rotary(**inputs),
        "eager": lambda case, **inputs: plain(**inputs),
        "compiled eager": lambda case, **inputs: compiled_plain(**inputs),
        "Liger": liger,
    }
    small = ((("tokens", 7),),)

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        tokens = case["tokens"]
        cos, sin = rotary_tables(tokens, HEAD_DIM, THETA, device)
        return {
            "q": normal(tokens, HEADS, HEAD_DIM, case=case, device=device),
            "k": normal(tokens, KV_HEADS, HEAD_DIM, case=case, device=device),
            "cos": cos,
            "sin": sin,
            "positions": torch.arange(tokens, device=device),
        }

    def definition(self, case: Case, **inputs: Tensor) -> Any:
        return reference.apply_rotary(**inputs)

    def flops(self, case: Case) -> float:
        return 3.0 * case["tokens"] * (HEADS + KV_HEADS) * HEAD_DIM

    def bytes(self, case: Case) -> float:
        """Count q and k in and out, and the float32 tables."""
        heads = 2 * (HEADS + KV_HEADS) * HEAD_DIM * case.dtype.itemsize
        return case["tokens"] * (heads + HEAD_DIM * 4)


OPERATOR = Rotary(
    cpu=cases([{"tokens": 512}], CPU_DTYPES),
    gpu=cases([{"tokens": n} for n in (1, 64, 2048, 16384)], (torch.bfloat16,)),
)


def test_speed(case: Case, provider: str, speed: Any) -> None:
    speed(OPERATOR, case, provider)
