"""Small models and batches for the tests of attn_implementation="mistral_kernels"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import masking_utils

W = 8
VOCAB = 97
# Name of the argument of `forward` for the cache, which differs between versions of transformers.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.MistralForCausalLM.forward).parameters
)
# Versions of transformers whose masks take `cache_position`.
OLD_MASKS = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large weights, so that attention is not uniform
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": W}),
    "no window": ("Mistral", {"sliding_window": None}),
    "llama": ("Llama", {}),
    # Gemma 2 has a window in every other layer, and a softcap.
    "gemma2": ("Gemma2", {"sliding_window": W, "query_pre_attn_scalar": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 1}),
}
# Tokens of padding per row: on the left, and on the right.
PADDING: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "none": ((0, 0, 0), (0, 0, 0)),
    "left": ((2, 0, 4), (0, 0, 0)),
    "right": ((0, 0, 0), (3, 0, 1)),
    "both": ((2, 0, 1), (0, 3, 2)),
}


def make_model(name: str = "mistral", **changes: Any) -> Any:
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def both(model: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return the results of a call with mistral_kernels' attention, and with eager attention."""
    model.set_attn_implementation("mistral_kernels")
    ours = call(*args, **kwargs)
    model.set_attn_implementation("eager")
    return ours, call(*args, **kwargs)


def both_logits(model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    ours, eager = both(model, model, ids, **given)
    return ours.logits, eager.logits


def batch(seqlen: int, padding: str = "none") -> tuple[Tensor, Tensor]:
    """Return ids and attention_mask of three rows; each row has at least one token."""
    ids = torch.randint(1, VOCAB, (3, seqlen))
    attention_mask = torch.ones_like(ids)
    for row, left, right in zip(attention_mask, *PADDING[padding], strict=True):
        row[: min(left, seqlen - 1)] = 0
        if right:
            row[max(seqlen - right, int(row.argmax()) + 1) :] = 0
    return ids.masked_fill(attention_mask == 0, 0), attention_mask


def positions_of(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(ours: Tensor, eager: Tensor, tolerance: float = 5e-5) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - eager).norm() <= tolerance * eager.norm()


def packed_positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def gradients(
    model: Any, ids: Tensor, real: Tensor, given: dict[str, Any], forward: Any = None
) -> dict[str, Tensor]:
    """Return the logits of the real tokens, and the gradients for a random gradient of them."""
    model.zero_grad()
    run = model if forward is None else forward
    logits = run(ids, use_cache=False, **given).logits[real]
    generator = torch.Generator().manual_seed(7)
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.device))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def check_gradients(name: str, case: str, device: torch.device) -> None:
    model = make_model("mistral" if name == "checkpointing" else name).to(device).train()
    if name == "checkpointing":
        model.gradient_checkpointing_enable()
    ids, attention_mask = batch(3 * W + 1, case if case in PADDING else "none")
    real = attention_mask.bool()
    given = {"attention_mask": attention_mask, "position_ids": positions_of(attention_mask)}
    if case == "packed":
        ids, real = ids[:1], real[:1]
        given = {"position_ids": packed_positions((3, 1, 2 * W, W - 3))}
    elif case == "packed rows":
        ends = ((25,), (3, 1, 12, 9), (8, 17))
        given = {"position_ids": torch.cat([packed_positions(lengths) for lengths in ends])}
    ids, real = ids.to(device), real.to(device)
    given = {key: x.to(device) for key, x in given.items()}
    ours, eager = both(model, gradients, model, ids, real, given)
    assert ours.keys() == eager.keys()
    assert len(ours) > 10
    for key in eager:
        assert_close(ours[key], eager[key], 1e-4)


def new_cache(kind: str, model: Any, max_length: int) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=max_length)
