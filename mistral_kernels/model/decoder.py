"""Modules of Mistral: the decoder, and the language model, which adds the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from mistral_kernels.model.cache import Packing, RollingCache, cache_layout
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.layers import DecoderLayer, Linear, RMSNorm
from mistral_kernels.ops.rotary import rotary_tables


class MistralModel(nn.Module):
    """Decoder without the head: computes normalized hidden states from token ids."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        # Not nn.Embedding(...): on the meta device its initialization imports modules, which takes
        # seconds.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # True: in training, save only the input of each layer, and recompute the layer in backward.
        self.checkpoint_activations = False
        # The rotary tables are a plain attribute: they must not be in a state dict, and
        # .to(torch.bfloat16) must not cast them.
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(
        self, input_ids: Tensor, packing: Packing, cache: RollingCache | None = None
    ) -> Tensor:
        """Return the normalized hidden states of packed tokens; append keys and values to `cache`.

        Args:
            input_ids: (total_tokens,) int64 or int32.
            packing: division of the tokens into sequences.
            cache: cache of earlier tokens; None: the sequences begin with `input_ids`.

        Returns:
            (total_tokens, hidden_size).

        Raises:
            ValueError: the cache was made for another model, dtype or device.
        """
        if cache is not None:
            self.check_cache(cache)
        tables = self.rotary_tables(packing.end, input_ids.device)
        hidden = self.embed_tokens(input_ids)
        if cache is None:
            return self._run(hidden, tables, packing, None)
        cache.interrupted = True
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
        normed: Tensor = self.norm(delta, residual)[0]
        return normed

    def check_cache(self, cache: RollingCache) -> None:
        """Raise a ValueError if the cache was made for another model, dtype or device."""
        ring, weight = cache.keys[0], self.norm.weight
        if cache.config is not self.config and cache_layout(cache.config) != cache_layout(
            self.config
        ):
            raise ValueError(
                f"the cache must have the layout of the model, {cache_layout(self.config)}, got "
                f"{cache_layout(cache.config)}"
            )
        if ring.dtype != weight.dtype or ring.device != weight.device:
            raise ValueError(
                f"the cache must be {weight.dtype} on {weight.device} like the model, got "
                f"{ring.dtype} on {ring.device}"
            )

    @property
    def num_positions(self) -> int:
        """Number of positions in the rotary tables. Growing replaces the tables by new tensors."""
        return 0 if self._tables is None else self._tables[0].shape[0]

    def rotary_tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin of at least `num_positions` positions, (positions, head_dim / 2) each.

        The tables are cached, and they grow when needed.
        """
        tables = self._tables
        if tables is None or tables[0].shape[0] < num_positions or tables[0].device != device:
            size = max(2048, 1 << (num_positions - 1).bit_length())
            with torch.inference_mode(False):  # training may use the same tables later
                tables = rotary_tables(size, self.config.head_dim, self.config.rope_theta, device)
            self._tables = tables
        return tables


class CausalLM(nn.Module):
    """Decoder and head: computes logits from token ids. A new model has random weights."""

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

    @property
    def dtype(self) -> torch.dtype:
        """Data type of hidden states, caches and all weights that are not quantized."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.lm_head.weight.device

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits after each token, without a cache.

        Args:
            input_ids: (batch, seqlen) int64 or int32.

        Returns:
            (batch, seqlen, vocab_size), in the model's dtype.

        Raises:
            ValueError: `input_ids` has another number of dimensions or is empty.
        """
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids must be (batch, seqlen) and not empty, got {tuple(input_ids.shape)}"
            )
        batch, seqlen = input_ids.shape
        packing = Packing.of([seqlen] * batch, [0] * batch, input_ids.device)
        logits: Tensor = self.lm_head(self.model(input_ids.flatten(), packing))
        return logits.view(batch, seqlen, -1)

    def new_cache(self, batch: int, max_length: int) -> RollingCache:
        """Return an empty cache with the model's dtype and device; see `RollingCache`."""
        return RollingCache(self.config, batch, max_length, self.dtype, self.device)
