"""Inputs and options that the tests of attention share, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops import reference

eager = reference.eager_arithmetic()(reference.attention)

WINDOW = 70  # no multiple or divisor of a tile or band
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
    """Translate options of `attention` into the reference's."""
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
    """Random q, k and v of `heads` (query heads, kv heads), each to be differentiated."""
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
    """Freeze the named inputs.

    Tests freeze q and k of rows with one key, too: with an exact gradient of 0, errors have no
    scale.

    Errors have no scale there.
    """
    for name in names:
        inputs[name].requires_grad_(False)


def reach_of_a_key(
    run: Callable[[Tensor, Tensor], Tensor], k: Tensor, v: Tensor, j: int, row: int
) -> tuple[list[int], list[int], list[int]]:
    """Return the rows that another key j changes, and the keys in the gradients of one row."""
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
