"""Mistral: the decoder and its language-modelling head."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from mistral_kernels import checkpoint
from mistral_kernels.checkpoint.stored import check_cast
from mistral_kernels.model.cache import Packing, RollingCache, cache_layout
from mistral_kernels.model.config import MistralConfig, check_fields
from mistral_kernels.model.generation import Generation
from mistral_kernels.model.layers import (
    MLP,
    Attention,
    DecoderLayer,
    FusedLinear,
    Linear,
    RMSNorm,
)
from mistral_kernels.model.memory import zeros
from mistral_kernels.model.quantization import destinations as quantized_destinations
from mistral_kernels.model.quantization import hold_int8
from mistral_kernels.ops import extension
from mistral_kernels.ops.decoder_step import Decoder, serves
from mistral_kernels.ops.rotary import rotary_tables

_log = logging.getLogger("mistral_kernels")


class MistralModel(nn.Module):
    """The decoder without its head: token ids to normalised hidden states."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        # Not nn.Embedding(...), whose own initialisation takes seconds to load on the meta device.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # In training: keep each layer's input alone, and compute the layer again going backwards.
        self.checkpoint_activations = False
        # Plain attributes: neither a state dict nor .to(torch.bfloat16) may touch them.
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(
        self, input_ids: Tensor, packing: Packing, cache: RollingCache | None = None
    ) -> Tensor:
        """(total_tokens, hidden_size) for packed ids (total_tokens,); appends to `cache`.

        Raises `ValueError` for a cache that was made for another model, dtype or device.
        """
        if cache is not None:
            self.check(cache)
        tables = self.rotary_tables(packing.end, input_ids.device)
        hidden = self.embed_tokens(input_ids)
        if cache is None:
            return self._run(hidden, tables, packing, None)
        cache.torn = True
        out = self._run(hidden, tables, packing, cache)
        cache.advance(packing)
        return out

    def _run(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor],
        packing: Packing,
        cache: RollingCache | None,
    ) -> Tensor:
        delta, residual = hidden, None
        recomputes = self.checkpoint_activations and cache is None and torch.is_grad_enabled()
        for layer in self.layers:
            if recomputes:
                delta, residual = recomputed(
                    *(layer, delta, residual, tables, packing, cache), use_reentrant=False
                )
            else:
                delta, residual = layer(delta, residual, tables, packing, cache)
        return self.norm(delta, residual)[0]

    def check(self, cache: RollingCache) -> None:
        """Raises `ValueError` for a cache that was made for another model, dtype or device."""
        ring, weight = cache.keys[0], self.norm.weight
        if cache.config is not self.config and cache_layout(cache.config) != cache_layout(
            self.config
        ):
            raise ValueError(
                "the cache was made for another model; its windows, kv heads and head_dim are "
                f"{cache_layout(cache.config)}, this model's {cache_layout(self.config)}"
            )
        if ring.dtype != weight.dtype or ring.device != weight.device:
            raise ValueError(
                f"the cache must be {weight.dtype} on {weight.device} like the model, got "
                f"{ring.dtype} on {ring.device}"
            )

    @property
    def num_positions(self) -> int:
        """How many positions the rotary tables hold now; they grow, and move, when more come."""
        return 0 if self._tables is None else self._tables[0].shape[0]

    def rotary_tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of that many positions, or more."""
        tables = self._tables
        if tables is None or tables[0].shape[0] < num_positions or tables[0].device != device:
            size = max(2048, 1 << (num_positions - 1).bit_length())
            with torch.inference_mode(False):  # training may want them next
                tables = rotary_tables(size, self.config.head_dim, self.config.rope_theta, device)
            self._tables = tables
        return tables


class MistralForCausalLM(Generation, nn.Module):
    """A Mistral language model, under Hugging Face's parameter names.

    A new model has random weights (normal, standard deviation 0.02); `from_pretrained` reads a
    checkpoint.
    """

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MistralModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._tie_weights()
        for weight in self.parameters():
            if weight.ndim == 2 and not weight.is_meta:
                nn.init.normal_(weight, std=0.02)

    def _tie_weights(self) -> None:
        if self.config.tie_word_embeddings and self.lm_head.scales is None:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _allocate(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Give every parameter memory; `to_empty` would import for a second first."""
        for module in self.modules():
            for name, meta in list(module.named_parameters(recurse=False)):
                own = dtype if meta.is_floating_point() else meta.dtype
                memory = zeros(meta.shape, own, device, large_pages=own == torch.int8)
                setattr(module, name, nn.Parameter(memory, meta.requires_grad))
        self._tie_weights()

    def part_of(self, name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        """Which part of the tensor `name` of a checkpoint this model holds: all of it."""
        return checkpoint.whole(name, shape)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        **overrides: Any,
    ) -> MistralForCausalLM:
        """Load a raw or Hugging Face checkpoint; peak memory is the model and one tensor.

        On the CPU, weights that need no change (of safetensors, in the stored dtype and order, on
        boundaries of pages, as `convert` and `save_pretrained` write them) are not copied but
        mapped, and read when first used. The file may be renamed, replaced or removed meanwhile,
        but not written to.

        Args:
            path: a folder, a Hugging Face hub id, or "tiny" for the bundled model.
            dtype: of the weights in memory; None: as most of them are stored.
            device: where they go.
            quantize: "int8": the projections and the head are held in 8 bits, which makes decode
                steps on the CPU nearly twice as fast (see `ops.linear_int8`); embedding, norms and
                activations keep `dtype`. Such a model cannot be trained or saved.
            overrides: configuration fields to replace, such as `sliding_window=1024`; see
                `MistralConfig.with_replaced`.

        Raises:
            CheckpointError: naming the file or tensor that is missing, corrupt or does not fit, or
                has values beyond the range of `dtype`.
            ConfigError: for a model that is not a dense Mistral, and for overrides of fields that
                the weights determine.
            TypeError: for an override that is no field, and a `dtype` of another type.
            ValueError: for an unknown `quantize`.
            NotImplementedError: for `quantize` anywhere but on the CPU.
        """
        check_fields(overrides, "dtype, device and quantize")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
        if quantize and torch.device(device).type != "cpu":
            raise NotImplementedError(
                f"quantize={quantize!r} is for the CPU; leave it out on {device}"
            )
        stored = checkpoint.open_checkpoint(checkpoint.resolve(path))
        for note in stored.config.notes:
            _log.warning("%s", note)
        with torch.device("meta"):
            model = cls(stored.config.with_replaced(**overrides))
        if quantize:
            if not extension.load("cpu"):
                _log.warning("%s: slower than unquantised weights", extension.status("cpu"))
            hold_int8(model)
        model._allocate(dtype or stored.dtype, device)
        mapped = _map(stored, model) if torch.device(device).type == "cpu" else set()
        destinations = quantized_destinations(model) if quantize else model.state_dict()
        with tqdm(total=stored.num_bytes, unit="B", unit_scale=True, delay=2) as progress:
            for name, tensor in stored.tensors(model.part_of):
                if name not in mapped:
                    destination = destinations[name]
                    destination.copy_(tensor)
                    cast = destination if isinstance(destination, Tensor) else destination.scales
                    check_cast(name, tensor, cast)
                progress.update(stored.stored[name].num_bytes)
                del tensor  # its pages are unmapped before the next one's are read
        if quantize and model.config.tie_word_embeddings:
            destinations["lm_head.weight"].copy_(model.model.embed_tokens.weight)
        return model.eval()

    def save_pretrained(
        self, directory: str | Path, format: str = "hf", extra_files: Iterable[Path] = ()
    ) -> None:
        """Write a checkpoint folder, "hf" or "raw", with copies of `extra_files` (a tokenizer's).

        The folder appears under its name only when it is whole.
        """
        save = {"hf": checkpoint.save_hf, "raw": checkpoint.save_raw}.get(format)
        if save is None:
            raise ValueError(f"format must be 'hf' or 'raw', got {format!r}")
        tensors = self.state_dict().items()
        save(tensors, self.config, directory, dtype=self.dtype, extra_files=extra_files)

    def decoder(self, token_ids: Tensor) -> Decoder | None:
        """For steps of tokens such as these (batch,), with the weights that there are now.

        None where a module is not as it was made, or is watched, or `serves` says no: then the
        modules have to be called.
        """
        if not serves(token_ids, self.model.norm.weight, self.config.head_dim):
            return None
        modules = (module for module in self.modules() if module is not self)
        if _has_any_global_hook() or not all(map(_is_plain, modules)):
            return None
        weights: list[Tensor | None] = []
        windows_left = []
        eps = {self.model.norm.eps}
        layer: Any
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            window = attention.sliding_window
            windows_left.append(-1 if window is None else window - 1)
            eps |= {layer.input_layernorm.eps, layer.post_attention_layernorm.eps}
            weights += [layer.input_layernorm.weight]
            weights += [attention.qkv_proj.weight, attention.qkv_proj.scales]
            weights += [attention.o_proj.weight, attention.o_proj.scales]
            weights += [layer.post_attention_layernorm.weight]
            weights += [mlp.gate_up_proj.weight, mlp.gate_up_proj.scales]
            weights += [mlp.down_proj.weight, mlp.down_proj.scales]
        if len(eps) != 1:
            return None
        return Decoder(
            embedding=self.model.embed_tokens.weight,
            weights=weights,
            norm=self.model.norm.weight,
            head=self.lm_head.weight,
            head_scales=self.lm_head.scales,
            windows_left=windows_left,
            head_dim=self.config.head_dim,
            eps=eps.pop(),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and caches, and of all weights that are not quantised."""
        return self.model.norm.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they lie in memory."""
        scales = (module.scales for module in self.modules() if isinstance(module, Linear))
        tensors = (*self.parameters(), *(x for x in scales if x is not None))
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, seqlen, vocab_size) of input_ids (batch, seqlen). No cache is used."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids must be (batch, seqlen) and not empty, got {tuple(input_ids.shape)}"
            )
        batch, seqlen = input_ids.shape
        packing = Packing.of([seqlen] * batch, [0] * batch, input_ids.device)
        return self.lm_head(self.model(input_ids.flatten(), packing)).view(batch, seqlen, -1)


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) in _PLAIN
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
        and getattr(module, "max_norm", None) is None  # of an embedding: it changes its rows
        # A subclass of weights has products of its own.
        and all(type(weight) is nn.Parameter for weight in module.parameters(recurse=False))
    )


_PLAIN = {
    *(MistralModel, nn.Embedding, nn.ModuleList, DecoderLayer, Attention, MLP),
    *(RMSNorm, Linear, FusedLinear),
}


def _map(stored: checkpoint.Checkpoint, model: nn.Module) -> set[str]:
    """Lets weights that are as they were stored lie in their files; names what they hold."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            tensors = {name: parameter}
            if isinstance(module, FusedLinear):
                tensors = module.parts_in_state_dict(f"{prefix}.")
            files = [stored.stored.get(name) for name in tensors]
            if any(
                file is None or (file.dtype, file.shape) != (x.dtype, x.shape)
                for file, x in zip(files, tensors.values(), strict=True)
            ):
                continue
            mapped = stored.mapped(*tensors)
            if mapped is not None:
                parameter.data = mapped
                found |= tensors.keys()
    return found
