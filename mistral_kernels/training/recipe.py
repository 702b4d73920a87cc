"""Settings of the optimization, which are also options of `python -m mistral_kernels.train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mistral_kernels.utils.ranges import COUNT, SEED, Range

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LARGEST_BATCH = 1 << 28  # tokens; offsets into a packed batch are int32


def _setting(default: Any, group: str, allowed: Range | None, text: str) -> Any:
    return field(default=default, metadata={"group": group, "range": allowed, "help": text})


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimization: AdamW, linear warmup, cosine decay to 10 % of the peak.

    A step has `accumulate` batches of `batch_size * seqlen` tokens each.

    Raises `ValueError` if a field is out of range and `TypeError` if it is not a number; the
    message names the field.
    """

    steps: int = _setting(1400, "optimization", COUNT, "number of optimizer steps")
    batch_size: int = _setting(16, "batches", COUNT, "sequences per batch, over all ranks")
    seqlen: int = _setting(256, "batches", COUNT, "tokens per sequence")
    learning_rate: float = _setting(
        2e-3, "optimization", Range(float, 0), "highest learning rate, at the end of the warmup"
    )
    warmup_steps: int = _setting(
        100, "optimization", Range(int, 0, COUNT.high), "steps of the linear warmup"
    )
    weight_decay: float = _setting(
        0.5, "optimization", Range(float, 0), "AdamW's decay of matrices; norms have none"
    )
    max_grad_norm: float = _setting(
        1.0,
        "optimization",
        Range(float, 0, above=True),
        "L2 norm to which larger gradients are scaled down",
    )
    eval_every: int = _setting(
        100, "evaluation and saving", COUNT, "steps between two held-out losses"
    )
    seed: int = _setting(0, "optimization", SEED, "seed of the new weights and of the batches")
    accumulate: int = _setting(
        1, "batches", COUNT, "batches per step; their gradients are summed in float32"
    )
    pack: bool = _setting(
        False,
        "batches",
        None,
        "fill each batch of batch-size * seqlen tokens with whole paragraphs, each as one "
        "sequence; longer paragraphs are split every seqlen tokens, and the last one is truncated",
    )
    checkpoint_activations: bool = _setting(
        False,
        "machine",
        None,
        "store only each layer's input and recompute the layer in the backward pass",
    )
    dtype: str = _setting(
        "bf16",
        "machine",
        None,
        "dtype of the weights; AdamW updates float32 copies of them",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            if (allowed := each.metadata["range"]) is not None:
                value = allowed.check(each.name, getattr(self, each.name))
                object.__setattr__(self, each.name, value)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size * self.seqlen > _LARGEST_BATCH:
            raise ValueError(
                f"batch_size * seqlen must be at most {_LARGEST_BATCH} tokens, got "
                f"{self.batch_size} * {self.seqlen}; use smaller batches, and accumulate more"
            )

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per optimizer step."""
        return self.accumulate * self.batch_size * self.seqlen

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))
