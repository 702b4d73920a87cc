"""What turns products of queries and keys into scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mistral_kernels.ops.attention.spec import AttentionSpec
from mistral_kernels.ops.attention.window import Window


@dataclass(frozen=True)
class Scoring:
    """How scores are formed from q and k, and whether their log-sum-exp is wanted."""

    window: Window
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    return_lse: bool

    @classmethod
    def of(cls, spec: AttentionSpec, q: Tensor, return_lse: bool) -> Scoring:
        """Return the scoring of `spec` for these queries."""
        scale = spec.scale(q.shape[-1])
        return cls(spec.window, scale, spec.softcap, spec.alibi_slopes, return_lse)

    @property
    def needs_formula(self) -> bool:
        return bool(self.softcap) or self.return_lse
