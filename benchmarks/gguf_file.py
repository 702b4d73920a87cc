"""Writer of a model's weights as a GGUF file, for llama.cpp. Needs the package `gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mistral_kernels import MistralConfig
from mistral_kernels.checkpoint.names import half_to_interleaved, num_rotary_heads

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, config: MistralConfig, weights: Mapping[str, Tensor]) -> None:
    """Write weights under Hugging Face's names, matrices in their dtype; no tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, x in weights.items():
        if heads := num_rotary_heads(name, config):
            x = half_to_interleaved(x, heads)
        for hf, theirs in NAMES.items():
            name = name.replace(hf, theirs)
        if x.ndim == 2 and x.dtype == torch.bfloat16:
            halves = x.contiguous().view(torch.uint16).numpy().view("uint8")
            writer.add_tensor(name, halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            halves = x.ndim == 2 and x.dtype == torch.float16
            writer.add_tensor(name, (x if halves else x.float()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
