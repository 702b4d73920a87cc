"""Modules of Mistral: the decoder, and the language model, which adds the head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from mistral_kernels.model.cache import Packing, RollingCache, cache_layout
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.layers import DecoderLayer, Linear, RMSNorm, is_autocast_enabled
from mistral_kernels.model.outputs import CausalLMOutput
from mistral_kernels.model.padding import (
    check_input_ids,
    check_position_ids,
    kept_tokens,
    unpadded_packing,
)
from mistral_kernels.ops.checks import can_read
from mistral_kernels.ops.rotary import rotary_tables
from mistral_kernels.utils.ranges import Range
from mistral_kernels.utils.unsupported import ANY_FLAG, TRANSFORMERS, Unsupported, check_unsupported

_IGNORED = -100  # the label of a token without loss
_KEPT_LOGITS = Range(int, 0)
_CACHE = Unsupported(remedy="call generate, or prefill and decode with the model's new_cache")
_UNSUPPORTED = {
    "past_key_values": _CACHE,
    "cache": _CACHE,  # the name of past_key_values from transformers 5.24 on
    "cache_position": _CACHE,
    "inputs_embeds": Unsupported(remedy=f"give input_ids, or {TRANSFORMERS}"),
    "use_cache": ANY_FLAG,
    "output_attentions": Unsupported((None, False)),
    "output_hidden_states": Unsupported((None, False)),
}


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on a device.

    A cache has the model's dtype, and a CUDA graph must not read weights that autocast has cast:
    they are freed at the end of autocast.
    """
    if is_autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Return the logits after each token and, with labels, the loss. No cache is used.

        Padding tokens are not computed. Their logits are zeros, whereas those of transformers are
        meaningless numbers. `attention_mask` and `position_ids` are copied to the host.

        Args:
            input_ids: (batch, seqlen) int64 or int32.
            attention_mask: (batch, seqlen) of any dtype; 0 for padding tokens, 1 for others; None:
                no padding. Padding may be before or after the tokens of a row. It may be between
                them if the row spans no more columns than the sliding window.
            position_ids: (batch, seqlen) or (1, seqlen) integers that count up by one from column
                to column, except in padding. They do not change the result; None: no check.
            labels: (batch, seqlen) int64 or int32, usually `input_ids`: the target of each token is
                the label of the next column. -100: the label is ignored, as are targets of padding
                tokens; None: no loss.
            logits_to_keep: number of last columns whose logits are computed; 0: all columns. Must
                be 0 with `labels`.
            num_items_in_batch: divisor of the sum of the losses; None: the number of targets that
                are not ignored.
            return_dict: False: return a tuple.
            **others: `num_logits_to_keep`, the earlier name of `logits_to_keep`, and arguments of
                transformers at values without effect, such as `use_cache`.

        Returns:
            `logits`, (batch, seqlen or `logits_to_keep`, vocab_size), in the model's dtype; with
            labels also `loss`, a float32 scalar in nats, computed from the logits in float32.

        Raises:
            TypeError: an argument is unknown, or has a wrong type or dtype.
            ValueError: a shape differs from that of `input_ids`, a value is out of range, or
                `input_ids` is empty.
            NotImplementedError: an argument that is not offered has an effect, `position_ids` skip
                or repeat positions, or a row with padding between its tokens spans more columns
                than the sliding window.

        Example:
            >>> import torch
            >>> from mistral_kernels import MistralForCausalLM, MistralTokenizer
            >>> model = MistralForCausalLM.from_pretrained("tiny")
            >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
            >>> inputs = tokenizer(["It is a truth", "She"], return_tensors="pt", padding=True)
            >>> labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
            >>> out = model(**inputs, labels=labels)
            >>> out.loss.shape, out.logits.shape == (*inputs.input_ids.shape, 2048)
            (torch.Size([]), True)
        """
        if others:
            logits_to_keep = others.pop("num_logits_to_keep", logits_to_keep)
            check_unsupported("forward", others, _UNSUPPORTED)
        logits_to_keep = _KEPT_LOGITS.check("logits_to_keep", logits_to_keep)
        if labels is not None and logits_to_keep:
            raise ValueError(f"logits_to_keep must be 0 with labels, got {logits_to_keep}")
        check_input_ids(input_ids)
        assert input_ids is not None
        self._check_tokens(input_ids)
        kept = None if attention_mask is None else kept_tokens(attention_mask, input_ids)
        if position_ids is not None:
            check_position_ids(position_ids, input_ids, kept)
        hidden = self._hidden_states(input_ids, None if kept is None or kept.all() else kept)
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits: Tensor = self.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        out = CausalLMOutput(logits=logits)
        if labels is not None:
            loss = self._next_token_loss(logits, labels, kept, num_items_in_batch)
            out = CausalLMOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out

    def _check_tokens(self, input_ids: Tensor) -> None:
        """Raise a ValueError for tokens on the CPU only, or outside the vocabulary."""
        if input_ids.is_cpu and not self.lm_head.weight.is_cpu:
            raise ValueError(
                f"input_ids must be on {self.device} like the model, got {input_ids.device}; move "
                "them with .to(model.device)"
            )
        # A caller may have replaced the embedding; tensor parallelism divides it.
        size = max(self.config.vocab_size, len(self.model.embed_tokens.weight))
        if can_read(input_ids):
            stray = input_ids[(input_ids < 0) | (input_ids >= size)]
            if len(stray):
                raise ValueError(
                    f"input_ids must be in [0, {size}), the model's vocabulary, got {stray[0]}; "
                    "check that the tokenizer belongs to the model"
                )

    def _hidden_states(self, input_ids: Tensor, kept: Tensor | None) -> Tensor:
        """Return the hidden states of a padded batch, (batch, seqlen, hidden_size).

        Args:
            input_ids: (batch, seqlen).
            kept: (batch, seqlen) booleans on the CPU; False for padding, whose hidden states are
                zeros; None: no padding.
        """
        batch, seqlen = input_ids.shape
        if kept is None:
            packing = Packing.of([seqlen] * batch, [0] * batch, input_ids.device)
            hidden: Tensor = self.model(input_ids.flatten(), packing)
            return hidden.view(batch, seqlen, -1)
        packing, index = unpadded_packing(kept, self.config.layer_windows, input_ids.device)
        hidden = self.model(input_ids.flatten()[index], packing)
        padded = hidden.new_zeros(batch * seqlen, hidden.shape[-1]).index_copy(0, index, hidden)
        return padded.view(batch, seqlen, -1)

    def _next_token_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        """Return the cross entropy between each column's logits and the next column's label.

        The losses are added up and divided by `num_items_in_batch`; see `forward`.
        """
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be an int64 or int32 tensor, got {got}")
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels must be {tuple(logits.shape[:2])} like input_ids, got "
                f"{tuple(labels.shape)}"
            )
        size = logits.shape[-1]
        if can_read(labels):
            stray = labels[((labels < 0) | (labels >= size)) & (labels != _IGNORED)]
            if len(stray):
                raise ValueError(f"labels must be in [0, {size}) or {_IGNORED}, got {stray[0]}")
        targets = F.pad(labels[:, 1:].long(), (0, 1), value=_IGNORED)
        if kept is not None:
            targets = targets.masked_fill(~kept.to(targets.device), _IGNORED)
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=_IGNORED,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    def new_cache(self, batch: int, max_length: int) -> RollingCache:
        """Return an empty cache with the model's dtype and device; see `RollingCache`."""
        return RollingCache(self.config, batch, max_length, self.dtype, self.device)
