"""Inputs and options of the attention tests, for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops import reference

eager = reference.eager_arithmetic()(reference.attention)

WINDOW = 70  # neither a multiple nor a divisor of a tile or key block
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"sliding_window": WINDOW},
    "softcap": {"sliding_window": WINDOW, "softcap": 0.8},
    "both-sides": {"causal": False, "window_size": (WINDOW, 9), "softmax_scale": 0.3},
    "right-only": {"causal": False, "window_size": (-1, 5)},
    "left-only": {"causal": False, "window_size": (5, -1)},
    "narrow": {"causal": False, "window_size": (3, 2)},
}


def definition_of(options: dict[str, Any]) -> dict[str, Any]:
    """Translate options of `attention` into those of `reference.attention`."""
    definition = {"causal": True, **options}
    if (count := definition.pop("sliding_window", None)) is not None:
        definition["window_size"] = (count - 1, 0)
    return definition


def make_qkv(
    seqlen_q: int,
    seqlen_k: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
) -> dict[str, Tensor]:
    """Return random q, k and v that require gradients; `heads` is (query heads, kv heads)."""
    num_heads, num_kv_heads = heads
    shapes = {
        "q": (batch, seqlen_q, num_heads, head_dim),
        "k": (batch, seqlen_k, num_kv_heads, head_dim),
        "v": (batch, seqlen_k, num_kv_heads, head_dim),
    }
    return {
        name: torch.randn(shape, device=device).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def freeze(inputs: dict[str, Tensor], names: Iterable[str]) -> None:
    """Set `requires_grad` of the named inputs to False.

    Tests also freeze q and k where each row has one key: the exact gradient is 0 there, so a
    relative error is undefined.
    """
    for name in names:
        inputs[name].requires_grad_(False)


def reach_of_a_key(
    run: Callable[[Tensor, Tensor], Tensor], k: Tensor, v: Tensor, j: int, row: int
) -> tuple[list[int], list[int], list[int]]:
    """Return which rows depend on key j, and on which keys and values one row depends.

    Returns:
        Rows of the output that change when key and value j change; then the indices of keys, and
        of values, for which the gradient of output row `row` is not zero.
    """
    out = run(k, v)
    other_k, other_v = k.detach().clone(), v.detach().clone()
    other_k[:, j] = -other_k[:, j]
    other_v[:, j] += 1000
    changed = (run(other_k, other_v) != out).any(-1).any(-1)[0]
    gradients = torch.autograd.grad(out[:, row].float().sum(), (k, v))
    changed, dk, dv = (
        x.nonzero().flatten().tolist()
        for x in (changed, *(grad.any(-1).any(-1)[0] for grad in gradients))
    )
    return changed, dk, dv
