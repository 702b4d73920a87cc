"""Mistral: the decoder, its language-modelling head, and generation of token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from mistral_kernels import checkpoint
from mistral_kernels.model.cache import Packing, RollingCache, cache_layout
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.decoding import DecodeStep
from mistral_kernels.model.layers import DecoderLayer, Linear, RMSNorm
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.ops.rotary import rotary_tables

_log = logging.getLogger("mistral_kernels")

# Bounds of the tokens that a sequence contributes to one prefill pass, when nobody says.
_SMALLEST_CHUNK, _LARGEST_CHUNK = 512, 4096


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
            self._check(cache)
        tables = self._rotary_tables(packing.end, input_ids.device)
        delta, residual = self.embed_tokens(input_ids), None
        if cache is not None:
            cache.torn = True
        recomputes = self.checkpoint_activations and cache is None and torch.is_grad_enabled()
        for layer in self.layers:
            if recomputes:
                delta, residual = recomputed(
                    *(layer, delta, residual, tables, packing, cache), use_reentrant=False
                )
            else:
                delta, residual = layer(delta, residual, tables, packing, cache)
        if cache is not None:
            cache.advance(packing)
        return self.norm(delta, residual)[0]

    def _check(self, cache: RollingCache) -> None:
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
        return 0 if self._tables is None else len(self._tables[0])

    def _rotary_tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if tables is None or len(tables[0]) < num_positions or tables[0].device != device:
            size = max(2048, 1 << (num_positions - 1).bit_length())
            with torch.inference_mode(False):  # training may want them next
                tables = rotary_tables(size, self.config.head_dim, self.config.rope_theta, device)
            self._tables = tables
        return tables


class MistralForCausalLM(nn.Module):
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
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _allocate(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Give every parameter uninitialised memory; `to_empty` would import for a second first."""
        for module in self.modules():
            for name, meta in list(module.named_parameters(recurse=False)):
                memory = torch.empty(meta.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(memory))
        self._tie_weights()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **overrides: Any,
    ) -> MistralForCausalLM:
        """Load a raw or Hugging Face checkpoint; peak memory is the model and one tensor.

        Args:
            path: a folder, a Hugging Face hub id, or "tiny" for the bundled model.
            dtype: of the weights in memory; None: as most of them are stored.
            device: where they go.
            overrides: configuration fields to replace, such as `sliding_window=1024`.

        Raises:
            CheckpointError: naming the file or tensor that is missing, corrupt or does not fit.
            ConfigError: for a model that is not a dense Mistral.
        """
        stored = checkpoint.open_checkpoint(checkpoint.resolve(path))
        for note in stored.config.notes:
            _log.warning("%s", note)
        with torch.device("meta"):
            model = cls(replace(stored.config, **overrides))
        model._allocate(dtype or stored.dtype, device)
        destinations = model.state_dict()
        with tqdm(total=stored.num_bytes, unit="B", unit_scale=True, delay=2) as progress:
            for name, tensor in stored.tensors():
                destinations[name].copy_(tensor)
                progress.update(tensor.nbytes)
                del tensor  # its pages are unmapped before the next one's are read
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

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

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

    def new_cache(self, batch: int, max_length: int) -> RollingCache:
        """An empty cache for this model; `max_length` bounds the layers that have no window."""
        return RollingCache(self.config, batch, max_length, self.dtype, self.device)

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: RollingCache, chunk_size: int | None = None
    ) -> Tensor:
        """Append each prompt to its sequence of the cache; logits (batch, vocab_size) at the ends.

        A pass takes up to `chunk_size` tokens of every prompt (None: the largest window, but from
        512 to 4096); the result does not depend on it.
        """
        if chunk_size is None:
            widest = max(window or _LARGEST_CHUNK for window in self.config.layer_windows)
            chunk_size = min(max(widest, _SMALLEST_CHUNK), _LARGEST_CHUNK)
        if chunk_size <= 0:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}")
        if not all(prompts):
            raise ValueError("every prompt needs at least one token")
        last = torch.empty(
            len(prompts), self.config.hidden_size, dtype=self.dtype, device=self.device
        )
        for start in range(0, max(map(len, prompts)), chunk_size):
            chunks = [prompt[start : start + chunk_size] for prompt in prompts]
            packing = cache.packing([len(chunk) for chunk in chunks])
            ids = torch.tensor([token for chunk in chunks for token in chunk], device=self.device)
            hidden = self.model(ids, packing, cache)
            ended = [i for i, p in enumerate(prompts) if start < len(p) <= start + chunk_size]
            last[ended] = hidden[packing.last_tokens[ended]]
        return self.lm_head(last)

    def decode(self, token_ids: Tensor, cache: RollingCache) -> Tensor:
        """Append one token (batch,) to each sequence; the next token's logits (batch, vocab)."""
        packing = cache.packing([1] * len(token_ids))
        return self.lm_head(self.model(token_ids, packing, cache))

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        eos_token_ids: Sequence[int] = (),
        cache: RollingCache | None = None,
        context: Sequence[Sequence[int]] | None = None,
        chunk_size: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Generate token by token: yields one id a prompt, None for a text that has ended.

        Each text ends after its first token of `eos_token_ids` (which is yielded), all end after
        `max_new_tokens`. A text that has ended stays a row of the batch until all have, so that the
        others' bits are what they would be. With a `cache` that has seen earlier text, the prompts
        continue it; afterwards it holds everything but the last token yielded (of a text that ended
        before the others, also what nobody saw). `context`, that text's tokens, serves a repetition
        penalty alone.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("every prompt needs at least one token")
        for token in (min(map(min, prompts)), max(map(max, prompts))):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"token id {token} is not in the model's vocabulary of "
                    f"{self.config.vocab_size}: is this its tokenizer?"
                )
        if max_new_tokens == 0:
            return
        sampler = sampler or Sampler(temperature=0)
        batch, longest = len(prompts), max(map(len, prompts))
        if cache is None:
            cache = self.new_cache(batch, longest + max_new_tokens)
        seen = None
        if sampler.repetition_penalty != 1.0:
            seen = torch.zeros(batch, self.config.vocab_size, dtype=torch.bool, device=self.device)
            for texts in (prompts, context or ()):
                for row, text in zip(seen, texts):
                    row[torch.tensor(text, dtype=torch.long, device=self.device)] = True
        step = DecodeStep(self, cache, sampler, seen)
        step.choose(self.prefill(prompts, cache, chunk_size))
        ended = [False] * batch
        for remaining in reversed(range(max_new_tokens)):
            step.begin_read()
            # Where steps are queued, the next one runs while this one's tokens are looked at.
            ahead = step.captures and remaining > 0
            if ahead:
                step()
            wanted = False
            try:
                tokens = step.finish_read()
                yield [None if done else token for token, done in zip(tokens, ended)]
                ended = [done or token in eos_token_ids for token, done in zip(tokens, ended)]
                wanted = remaining > 0 and not all(ended)
            finally:
                if ahead and not wanted:
                    cache.take_back()
            if not wanted:
                return
            if not ahead:
                step()

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None | str = "config",
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        prefill_chunk_size: int | None = None,
    ) -> Tensor | list[list[int]]:
        """Prompt and new tokens, as transformers' `generate` returns them.

        Args:
            input_ids: (batch, seqlen), or a list of prompts of any lengths: no padding is needed.
            attention_mask: (batch, seqlen); tokens where it is 0 are padding, left or right, and
                play no part.
            max_new_tokens: at most so many new tokens.
            do_sample: draw from the distribution that `temperature`, `top_k`, `top_p`, `min_p` and
                `repetition_penalty` shape (see `Sampler`); otherwise take the likeliest token.
            eos_token_id: ends a text; "config": the model's own; None: never stop early.
            pad_token_id: fills the rows that end early (default: the first eos token, else 0).
            generator: source of randomness.
            prefill_chunk_size: tokens of a prompt in one pass; changes memory, not results.

        Returns:
            (batch, seqlen + new) for a tensor, a list of lists of ids for a list.

        Raises:
            ValueError: naming the argument that is out of range; an empty prompt.
        """
        if isinstance(eos_token_id, str):
            if eos_token_id != "config":
                raise ValueError(
                    f"eos_token_id must be 'config', ids or None, got {eos_token_id!r}"
                )
            eos_token_ids = self.config.eos_token_ids
        elif eos_token_id is None:
            eos_token_ids = ()
        else:
            single = isinstance(eos_token_id, int)
            eos_token_ids = (eos_token_id,) if single else tuple(eos_token_id)  # type: ignore
        sampler = Sampler(
            temperature if do_sample else 0.0,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            generator,
        )
        if do_sample and temperature == 0:
            raise ValueError(
                "do_sample needs a temperature above 0; without it, decoding is greedy"
            )
        prompts = _unpadded(input_ids, attention_mask)
        new: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            eos_token_ids=eos_token_ids,
            chunk_size=prefill_chunk_size,
        ):
            for text, token in zip(new, tokens):
                if token is not None:
                    text.append(token)
        if not isinstance(input_ids, Tensor):
            return [list(prompt) + text for prompt, text in zip(prompts, new)]
        pad = pad_token_id if pad_token_id is not None else next(iter(eos_token_ids), 0)
        longest = max(map(len, new))
        rows = [text + [pad] * (longest - len(text)) for text in new]
        added = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat((input_ids, added.view(len(rows), longest)), dim=1)


def _unpadded(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask belongs to a padded tensor; a list needs no padding")
        return [list(prompt) for prompt in input_ids]
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, seqlen), got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} like input_ids, "
            f"got {tuple(attention_mask.shape)}"
        )
    kept = attention_mask.bool()
    return [row[keep].tolist() for row, keep in zip(input_ids, kept)]
