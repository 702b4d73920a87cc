"""Names, shapes and the rotary permutation: all that differs between the two weight formats.

A *raw* checkpoint is what Mistral AI releases, an *HF* one what transformers reads. They hold the
same matrices under other names, and the rows of the query and key projections in another order:
raw rotates neighbouring pairs (2i, 2i + 1) of a head, HF the pairs (i, i + head_dim / 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mistral_kernels.model.config import MistralConfig
from mistral_kernels.utils.files import CheckpointError

_MODEL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Parts of names that wrapped modules add: torch.compile, DistributedDataParallel, FSDP and
# activation checkpoints.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def hf_names(config: MistralConfig) -> dict[str, str]:
    """Return HF's name of each tensor by its raw name, in the order in which the model uses them.

    With tied embeddings the output head is stored in neither format.
    """
    names = {"tok_embeddings.weight": _MODEL_NAMES["tok_embeddings.weight"]}
    for layer in range(config.num_hidden_layers):
        for raw, hf in _LAYER_NAMES.items():
            names[f"layers.{layer}.{raw}"] = f"model.layers.{layer}.{hf}"
    names |= _MODEL_NAMES
    if config.tie_word_embeddings:
        del names["output.weight"]
    return names


def expected_shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its HF name; a raw checkpoint has the same shapes."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    shapes = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {name: shapes.get(name.split(".")[-2], (hidden,)) for name in hf_names(config).values()}


def num_rotary_heads(hf_name: str, config: MistralConfig) -> int:
    """Return the number of heads in a projection that is rotated; 0 for other tensors."""
    if hf_name.endswith("q_proj.weight"):
        return config.num_attention_heads
    if hf_name.endswith("k_proj.weight"):
        return config.num_key_value_heads
    return 0


def interleaved_to_half(weight: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
    """Put the rows of a raw q or k projection `(num_heads * head_dim, hidden_size)` in HF's order.

    Return a copy, in `out` if that is given.

    Always a copy, in `out` if that is given.
    """
    rows, hidden = weight.shape
    halves = weight.view(num_heads, rows // num_heads // 2, 2, hidden).transpose(1, 2)
    out = torch.empty_like(weight) if out is None else out
    out.view(halves.shape).copy_(halves)
    return out


def half_to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Invert `interleaved_to_half`."""
    rows, hidden = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, hidden)
    return halves.transpose(1, 2).reshape(rows, hidden)


def unwrapped(name: str) -> str:
    """Return a tensor's name without the parts that wrapped modules add (`_orig_mod.`)."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_derived(name: str) -> bool:
    """Return whether a tensor, by either format's name, follows from the configuration.

    Old HF files store the rotary frequencies.
    """
    return name.endswith("rotary_emb.inv_freq")


def without_tied_head(
    tensors: Iterable[tuple[str, Tensor]], config: MistralConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield `tensors` except those that follow from others.

    These are the rotary frequencies and the head of a tied model.

    A tied model's `state_dict` has its head. Raises `CheckpointError` for a head that differs from
    the embedding although `config` ties them.
    """
    tied: dict[str, str] = {}
    for name, tensor in tensors:
        if config.tie_word_embeddings and name in (EMBEDDING, HEAD):
            tied[name] = _digest(tensor)
            if len(set(tied.values())) > 1:
                raise CheckpointError(
                    f"{HEAD} must equal {EMBEDDING}, which the configuration ties to it; "
                    "save with tie_word_embeddings=False to keep both"
                )
        if not is_derived(name) and not (name == HEAD and config.tie_word_embeddings):
            yield name, tensor
        del tensor  # a mapped one keeps its pages until it is dropped


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return f"{tensor.dtype} {hashlib.sha256(data).hexdigest()}"
