"""Modules of a Mistral decoder layer. Hidden states are packed: (total_tokens, hidden_size)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mistral_kernels.model.cache import Packing, RollingCache
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.ops.linear import linear
from mistral_kernels.ops.linear_int8 import linear_int8
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rotary import apply_rotary, apply_rotary_
from mistral_kernels.ops.swiglu import swiglu


def is_autocast_enabled(device: torch.device) -> bool:
    """Return whether autocast is enabled for a device; some devices, such as meta, have none."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class RMSNorm(nn.Module):
    """RMSNorm with a weight parameter, computed by `ops.rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of `x`; with a residual, the norm of `x + residual`, and this sum."""
        if x.dtype != self.weight.dtype and is_autocast_enabled(x.device):
            x = x.to(self.weight.dtype)  # autocast has cast `x`, but not the residual
        return rms_norm(x, self.weight, self.eps, residual)


class Linear(nn.Linear):
    """Linear layer without bias: `ops.linear`, or `ops.linear_int8` if the weight is quantized.

    Attributes:
        scales: one float32 scale per row of a quantized weight; None: the weight is not quantized.
    """

    # Neither a parameter nor a buffer: .to(torch.bfloat16) must not cast the scales.
    scales: Tensor | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x (..., in_features)."""
        if self.scales is None:
            return linear(x, self.weight)
        return linear_int8(x, self.weight, self.scales)

    def parts_in_state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Return this module's entries in a state dict. `prefix` begins the module's own keys."""
        return {f"{prefix}weight": self.weight.detach()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse_quantized()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._refuse_quantized()
        super()._load_from_state_dict(*args)

    def _refuse_quantized(self) -> None:
        if self.scales is not None:
            raise NotImplementedError(
                "a quantized model cannot return or load a state dict; save and load the "
                "unquantized model, and quantize it with from_pretrained(quantize='int8')"
            )


class FusedLinear(Linear):
    """Several projections of the same input, computed as one matrix product.

    A state dict has one entry per projection, a view of the fused weight. Its key is the name of
    the projection under this module's parent, as in Hugging Face checkpoints.

    Attributes:
        parts: number of rows of each projection, by its name.
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__(in_features, sum(parts.values()))
        self.parts = parts

    def parts_in_state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Return the projections' entries in a state dict. `prefix` begins this module's keys."""
        parent = prefix.removesuffix(".").rpartition(".")[0]
        keys = (f"{parent}.{name}.weight".removeprefix(".") for name in self.parts)
        return dict(zip(keys, self.weight.detach().split(tuple(self.parts.values())), strict=True))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse_quantized()
        destination.update(self.parts_in_state_dict(prefix))


def _fuse_parts(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    *_: Any,
) -> None:
    """Concatenate the projections of each `FusedLinear` child of `module` in a state dict.

    This function is a load_state_dict pre-hook of the parent module, because a module receives only
    the keys that begin with its own name.
    """
    for name, child in module.named_children():
        if isinstance(child, FusedLinear):
            own = child.parts_in_state_dict(f"{prefix}{name}.")
            given = {key: state_dict.pop(key) for key in own if key in state_dict}
            if given:
                missing_keys += own.keys() - given.keys()
                state_dict[f"{prefix}{name}.weight"] = torch.cat(list((own | given).values()))


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings and an optional sliding window."""

    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.sliding_window = config.layer_windows[layer]
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.heads = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
        sizes = {name: heads * config.head_dim for name, heads in self.heads.items()}
        self.qkv_proj = FusedLinear(config.hidden_size, sizes)
        self.o_proj = Linear(sizes["q_proj"], config.hidden_size)
        self.register_load_state_dict_pre_hook(_fuse_parts)  # type: ignore[no-untyped-call]

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], packing: Packing, cache: RollingCache | None
    ) -> Tensor:
        """Return the attention output, and append the new keys and values to `cache`.

        Args:
            x: (total_tokens, hidden_size).
            tables: cos and sin of the rotary embedding, (positions, head_dim / 2) each.
            packing: division of the tokens into sequences.
            cache: cache of earlier tokens; None: there are none.

        Returns:
            (total_tokens, hidden_size).
        """
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(tuple(self.heads.values()), dim=-2)
        window = self.sliding_window
        if cache is not None and packing.one_each:
            out = cache.attend(self.layer, q, k, v, packing, sliding_window=window, tables=tables)
        else:
            rotate = apply_rotary if torch.is_grad_enabled() else apply_rotary_
            q, k = rotate(q, k, *tables, packing.positions)
            if cache is None:
                out = packing.attend(q, k, v, window)
            else:
                out = cache.attend(self.layer, q, k, v, packing, sliding_window=window)
        y: Tensor = self.o_proj(out.flatten(-2))
        return y


class MLP(nn.Module):
    """SwiGLU feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = FusedLinear(config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, config.hidden_size)
        self.register_load_state_dict_pre_hook(_fuse_parts)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return (total_tokens, hidden_size) for x (total_tokens, hidden_size)."""
        y: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return y


class DecoderLayer(nn.Module):
    """Attention and feed-forward network. The norm before each block also adds the residual."""

    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        delta: Tensor,
        residual: Tensor | None,
        tables: tuple[Tensor, Tensor],
        packing: Packing,
        cache: RollingCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the feed-forward network's output, and the residual stream without it.

        Args:
            delta: output of the previous layer, or the embedding in the first layer.
            residual: residual stream to which `delta` is added first; None in the first layer.
            tables: cos and sin of the rotary embedding, (positions, head_dim / 2) each.
            packing: division of the tokens into sequences.
            cache: cache of earlier tokens; None: there are none.
        """
        if residual is None:
            x, residual = self.input_layernorm(delta), delta
        else:
            x, residual = self.input_layernorm(delta, residual)
        x, residual = self.post_attention_layernorm(
            self.self_attn(x, tables, packing, cache), residual
        )
        return self.mlp(x), residual
