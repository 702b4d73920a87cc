"""Small models for the tests of `apply_mistral_kernels`, and comparisons of models."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_kernels.integrations.patch_handle import PARTS

VOCAB = 211
LLAMAS = ("Mistral", "Llama", "Qwen2", "Qwen3")
GEMMAS = ("Gemma", "Gemma2", "Gemma3")
OPS = {
    "attention": "attention_forward",
    "rms_norm": "rms_norm_forward",
    "rotary": "rotary",
    "swiglu": "swiglu_forward",
    "cross_entropy": "linear_cross_entropy",
}


def make(family: str = "Mistral", seed: int = 0, **options: Any) -> Any:
    """Make a small causal language model in training mode, with large random weights."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 73,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    if family in ("Mistral", "Gemma2", "Gemma3"):
        fields["sliding_window"] = 7
    if family == "Gemma3":
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**fields | options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.ndim == 2 else 0.3))
    return model.train()


def make_batch(seqlen: int = 23) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCAB, (2, seqlen))
    return {"input_ids": ids, "labels": ids.where(torch.rand(ids.shape) > 0.2, -100)}


def train_step(model: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Return the loss and all gradients by name."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert gradients
    results = {name.removeprefix("_orig_mod."): x.clone() for name, x in gradients.items()}
    return {"loss": loss.detach(), **results}


def logits(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    try:
        with torch.no_grad():
            return model(ids).logits
    finally:
        model.train()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 2e-5, name


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def assert_identical(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Check that every attribute of every module is the same object as before."""
    after = attributes(model)
    assert list(after) == list(before)
    for module, values in before.items():
        assert list(after[module]) == list(values), module
        for name, value in values.items():
            assert after[module][name] is value, f"{module}.{name}"


class Operators(TorchDispatchMode):
    """Mode that counts the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mistral_kernels":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def only(*parts: str) -> dict[str, bool]:
    """Return options of `apply_mistral_kernels` that patch these parts alone."""
    return {part: part in parts for part in PARTS}
