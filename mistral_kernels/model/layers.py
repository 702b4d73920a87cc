"""Parts of a Mistral decoder layer. Hidden states are packed: (total_tokens, hidden_size)."""

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


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, self.weight, self.eps, residual)


class Linear(nn.Linear):
    """`ops.linear` with its weight; or `ops.linear_int8`, if that is int8, with its `scales`."""

    # One for each row. Neither a parameter nor a buffer: .to(torch.bfloat16) may not touch them.
    scales: Tensor | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.scales is None:
            return linear(x, self.weight)
        return linear_int8(x, self.weight, self.scales)

    def parts_in_state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Return each entry's key and weight, where this module's own keys have `prefix`."""
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
                "a quantised model neither gives nor takes a state dict: save and load the "
                "unquantised one, and quantise with from_pretrained(quantize='int8')"
            )


class FusedLinear(Linear):
    """Several projections of one input as a single product, several entries in `state_dict`.

    `parts` maps each projection's name to its number of rows. In a state dict the projections stand
    under their own names, beside where this module is registered: as views of the one weight.
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__(in_features, sum(parts.values()))
        self.parts = parts

    def parts_in_state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Return each projection's key and weight, where the module's keys would have `prefix`."""
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
    """Join the projections of `module`'s `FusedLinear`s before it loads a state dict.

    This is its parent's business since a module is only shown the keys below its own name.
    """
    for name, child in module.named_children():
        if isinstance(child, FusedLinear):
            own = child.parts_in_state_dict(f"{prefix}{name}.")
            given = {key: state_dict.pop(key) for key in own if key in state_dict}
            if given:
                missing_keys += own.keys() - given.keys()
                state_dict[f"{prefix}{name}.weight"] = torch.cat(list((own | given).values()))


class Attention(nn.Module):
    """Grouped-query attention in a sliding window."""

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
    """SwiGLU feed-forward."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = FusedLinear(config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, config.hidden_size)
        self.register_load_state_dict_pre_hook(_fuse_parts)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return y


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm that also adds the residual before it."""

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
        """Return the layer's contribution, and the residual stream before it.

        `residual` is the stream so far, `delta` the contribution of the layer before.
        """
        if residual is None:
            x, residual = self.input_layernorm(delta), delta
        else:
            x, residual = self.input_layernorm(delta, residual)
        x, residual = self.post_attention_layernorm(
            self.self_attn(x, tables, packing, cache), residual
        )
        return self.mlp(x), residual
