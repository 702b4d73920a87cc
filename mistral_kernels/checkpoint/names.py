"""Convert names and rotary layout between the two weight formats, and return expected shapes.

A *raw* checkpoint is in the format that Mistral AI releases, an *HF* checkpoint in the format of
transformers. Both formats hold the same matrices. Two things differ:

- The names of the tensors.
- The order of the rows of the query and key projections. In the raw format, the rotary embedding
  rotates the channels (2i, 2i + 1) of a head as a pair; in the HF format, the channels
  (i, i + head_dim / 2).
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

# Parts that wrapped modules add to the names of tensors: torch.compile, DistributedDataParallel,
# FSDP and activation checkpointing.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def hf_names(config: MistralConfig) -> dict[str, str]:
    """Return a mapping from raw names to HF names, in the order of the layers.

    With tied embeddings neither format stores the output head, so the head has no entry.
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
    """Return a mapping from HF names to shapes; a raw checkpoint has the same shapes."""
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
    """Return the number of heads of a query or key projection; 0 for any other tensor."""
    if hf_name.endswith("q_proj.weight"):
        return config.num_attention_heads
    if hf_name.endswith("k_proj.weight"):
        return config.num_key_value_heads
    return 0


def interleaved_to_half(weight: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
    """Permute the rows of a query or key projection from the raw order to the HF order.

    Args:
        weight: Projection `(num_heads * head_dim, hidden_size)`, contiguous.
        num_heads: Number of heads in `weight`.
        out: Tensor that receives the result; by default a new tensor is allocated.

    Returns:
        The permuted copy.
    """
    rows, hidden = weight.shape
    halves = weight.view(num_heads, rows // num_heads // 2, 2, hidden).transpose(1, 2)
    out = torch.empty_like(weight) if out is None else out
    out.view(halves.shape).copy_(halves)
    return out


def half_to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Permute the rows from the HF order to the raw order: the inverse of `interleaved_to_half`."""
    rows, hidden = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, hidden)
    return halves.transpose(1, 2).reshape(rows, hidden)


def unwrap_name(name: str) -> str:
    """Return the name of a tensor without the parts that wrapped modules add (`_orig_mod.`)."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_derived(name: str) -> bool:
    """Return whether a tensor is not loaded because the configuration determines its values.

    Only the rotary frequencies, which old HF files store, are such tensors. `name` may be in
    either format.
    """
    return name.endswith("rotary_emb.inv_freq")


def without_tied_head(
    tensors: Iterable[tuple[str, Tensor]], config: MistralConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield `tensors` without the rotary frequencies and without the output head of a tied model.

    The `state_dict` of a tied model contains the head, but a checkpoint does not store it.

    Raises:
        CheckpointError: `config` ties the head to the embedding, but the two tensors differ.
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
        del tensor  # a mapped tensor keeps its pages in memory until it is released


def _digest(tensor: Tensor) -> str:
    """Return the dtype and the SHA-256 hash of the data of a tensor."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return f"{tensor.dtype} {hashlib.sha256(data).hexdigest()}"
