"""Rolling cache for transformers' `generate`: constant memory, and keys are never moved.

    register()
    model.set_attn_implementation("mistral_kernels")
    model.generate(**inputs, past_key_values=RollingCache(model.config))

transformers pads a batch, while a ring stores only the tokens of a sequence. A layer therefore
receives `PendingKeys` in place of keys and values: it packs the new keys and values, writes them to
the rings and computes attention. Only `attn_implementation="mistral_kernels"` reads `PendingKeys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mistral_kernels.integrations.mask import Mask
from mistral_kernels.integrations.transformers_attention import (
    attend_single,
    can_call_torch_attention,
)
from mistral_kernels.model import cache as model_cache
from mistral_kernels.model.cache import CacheLayout, Packing
from mistral_kernels.ops.dispatch import with_unit_stride
from mistral_kernels.ops.rolling_cache import rolling_cache_update_


class RollingCache(Cache):
    """Cache of keys and values in rings of constant size, for transformers' `generate`.

    The first forward pass allocates the rings. A layer with a sliding window stores as many tokens
    as its window; a layer without one stores `max_length` tokens. The rings contain no padding. The
    cache is for inference only: it does not support gradients.

    The attribute `rings` is the underlying `mistral_kernels.RollingCache`; None before the first
    forward pass.

    Args:
        config: config of the transformers model.
        max_length: maximum number of tokens per sequence, including padding. None is allowed if
            every layer has a window; the length of the text is then unlimited.

    Raises:
        ValueError: a layer has no window and `max_length` is None; or the attention of a layer is
            neither full nor sliding.

    Example:
        >>> import torch
        >>> import transformers
        >>> from mistral_kernels.integrations.transformers import RollingCache, register
        >>> register()
        >>> config = transformers.MistralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4)
        >>> model = transformers.MistralForCausalLM(config).eval()
        >>> model.set_attn_implementation("mistral_kernels")
        >>> cache = RollingCache(model.config)
        >>> ids = torch.arange(1, 7).view(1, 6)
        >>> options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        >>> text = model.generate(ids, past_key_values=cache, max_new_tokens=8, **options)
        >>> text.shape
        torch.Size([1, 14])
        >>> cache.nbytes  # 2 layers, keys and values, 4 tokens of 1 head of 8 float32 values
        512
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        windows = layer_windows(config.get_text_config(decoder=True))
        if max_length is None:
            unbounded = [i for i, window in enumerate(windows) if window is None]
            if unbounded:
                raise ValueError(
                    f"max_length is required: layer {unbounded[0]} has no sliding window and "
                    "stores every token"
                )
            max_length = max(window for window in windows if window is not None)
        elif max_length <= 0:
            raise ValueError(f"max_length must be positive, got {max_length}")
        self.windows = windows
        self.max_length = max_length
        self.rings: model_cache.RollingCache | None = None
        self.columns = 0  # tokens seen per row, including padding
        self.step: _Step | None = None
        super().__init__(layers=[RollingLayer(self, i) for i in range(len(windows))])

    @property
    def nbytes(self) -> int:
        """Bytes of all rings: 0 before they are allocated, constant afterwards."""
        return 0 if self.rings is None else self.rings.nbytes

    def allocate(
        self, batch: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate the rings of all layers."""
        layout = CacheLayout(self.windows, num_kv_heads, head_dim)
        self.rings = model_cache.RollingCache(layout, batch, self.max_length, dtype, device)

    def begin(self, attention_mask: Mask | Tensor | None, batch: int, seqlen: int) -> None:
        """Prepare a forward pass of (batch, seqlen) new tokens, which may be padded on the left."""
        rings = self.rings
        assert rings is not None
        if batch != rings.batch:
            raise ValueError(
                f"batch must be {rings.batch}, that of the cache, got {batch}; create a new cache"
            )
        starts = _first_keys(attention_mask, batch)
        for row, (start, seen) in enumerate(zip(starts, rings.host_lengths, strict=True)):
            shown = max(self.columns - start, 0)
            if shown != seen:
                raise ValueError(
                    f"attention_mask must have {seen} ones for the cached tokens of row {row}, got "
                    f"{shown}; pass the mask of the whole text, not only of the new tokens"
                )
        padding = [min(max(start - self.columns, 0), seqlen) for start in starts]
        packing = rings.packing([seqlen - n for n in padding])
        real = None
        if any(padding):
            rows = [torch.arange(i * seqlen + n, (i + 1) * seqlen) for i, n in enumerate(padding)]
            real = torch.cat(rows).to(rings.lengths.device)
        held = None
        if packing.one_each and real is None and len(set(rings.host_lengths)) == 1:
            held = packing.end if can_call_torch_attention(rings.lengths) else None
        self.step = _Step(packing, real, (batch, seqlen), held)
        rings.interrupted = True

    def finish(self) -> None:
        """Complete the forward pass: add the new tokens to the lengths of the sequences."""
        assert self.rings is not None
        assert self.step is not None
        self.rings.advance(self.step.packing)
        self.columns += self.step.shape[1]
        self.step = None

    # `generate` calls these methods on the whole cache, and all other methods on the layers.

    def reset(self) -> None:
        """Empty the cache without freeing its memory."""
        if self.rings is not None:
            self.rings.reset()
        self.columns, self.step = 0, None

    def crop(self, length: int) -> None:
        """Drop the newest tokens: all except the first `length`, or `-length` if `length` <= 0.

        Raises `ValueError` if a remaining query would see keys that a ring has overwritten. Once a
        ring has overwritten a key, only the newest token can be dropped.
        """
        count = -length if length <= 0 else max(self.columns - length, 0)
        if count and self.rings is not None:
            self.rings.drop(count)
            self.columns -= count

    @property
    def is_croppable(self) -> bool:
        """True until a ring overwrites its first key."""
        return self.rings is None or max(self.rings.host_lengths) <= self.rings.smallest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by a copy of row `beam_idx[i]`, in place."""
        if self.rings is not None:
            self.rings.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Copy the rows `indices` to new rings and drop the others."""
        if self.rings is not None:
            rows = torch.arange(self.rings.batch, device=indices.device)
            self.rings = self.rings.select(rows[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy each row `repeats` times to new rings."""
        if self.rings is not None:
            rows = range(self.rings.batch)
            self.rings = self.rings.select([row for row in rows for _ in range(repeats)])

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 before the rings are allocated."""
        return -1 if self.rings is None else self.rings.batch

    max_batch_size = batch_size  # the name before transformers 5

    @property
    def max_cache_len(self) -> int:
        """Maximum number of tokens per sequence."""
        return self.max_length


class RollingLayer(CacheLayerMixin):
    """Layer of a `RollingCache` with transformers' interface: it reports every token as stored."""

    is_compileable = False
    keys = values = None  # not a tensor, so that no other attention can read it

    def __init__(self, cache: RollingCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def __repr__(self) -> str:
        window = self.cache.windows[self.index]
        return f"RollingLayer({'full' if window is None else f'sliding_window={window}'})"

    @property
    def is_sliding(self) -> bool:
        """True if the layer has a sliding window."""
        return self.cache.windows[self.index] is not None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]  # the base class has an attribute
        """True once the rings are allocated."""
        return self.cache.rings is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate the rings with the batch, heads and dtype of these states."""
        batch, heads, _, head_dim = key_states.shape
        # Under autocast keys may be wider than values. `attend` casts keys to the dtype of values.
        like = key_states if value_states is None else value_states
        self.cache.allocate(batch, heads, head_dim, like.dtype, like.device)

    def update(  # type: ignore[override]  # returns PendingKeys, not tensors
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PendingKeys, PendingKeys]:
        """Return the new keys and values as `PendingKeys`, whose `attend` writes them.

        Both are (batch, num_kv_heads, seqlen, head_dim), and the keys are already rotated.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pending = PendingKeys(self.cache, self.index, key_states, value_states)
        return pending, pending

    def get_seq_length(self) -> int:
        """Return the number of tokens seen per row, including padding."""
        return self.cache.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the number of keys for a mask, and the position of the first key.

        Older versions of transformers pass the positions of the new tokens as `query_length`.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.cache.columns + new, 0

    def get_max_length(self) -> int:
        """Return the maximum number of tokens; -1 if it is unlimited."""
        window, length = self.cache.windows[self.index], self.cache.max_length
        return -1 if window is not None and window <= length else length

    get_max_cache_shape = get_max_length  # the name before transformers 5


class PendingKeys:
    """New keys and values of one layer that are not yet written to its ring.

    The object replaces the tensors of keys and values. Every use except `attend` raises
    `TypeError`: only another attention implementation would read them as tensors.
    """

    def __init__(self, cache: RollingCache, layer: int, key: Tensor, value: Tensor) -> None:
        self._cache = cache
        self._layer = layer
        self._new = key, value

    def attend(
        self,
        query: Tensor,
        attention_mask: Mask | Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
    ) -> Tensor:
        """Write the new keys and values, and compute attention over all keys that `query` sees.

        Args:
            query: (batch, num_heads, seqlen, head_dim), of the same tokens as the keys.
            attention_mask: a `Mask`; None: no padding.
            scaling: factor of the scores before the softmax; head_dim^-0.5 if None.
            sliding_window: window of the layer; None: not checked.

        Returns:
            (batch, seqlen, num_heads, head_dim); 0 for padding.

        Raises:
            ValueError: the batch, the mask or the window does not match the cache, or the text is
                longer than the cache.
            RuntimeError: an input requires a gradient.
        """
        cache, layer, (key, value) = self._cache, self._layer, self._new
        window = cache.windows[layer]
        if sliding_window is not None and sliding_window != window:
            raise ValueError(
                f"sliding_window of layer {layer} must be {window}, that of the cache, got "
                f"{sliding_window}: the cache was created for another model"
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise RuntimeError(
                "RollingCache does not support gradients: run under torch.no_grad(), as generate "
                "does, or train with use_cache=False"
            )
        rings = cache.rings
        assert rings is not None
        if torch.is_autocast_enabled(value.device.type):
            query, key = query.to(value.dtype), key.to(value.dtype)
        _check_fits(key, rings.keys[layer])
        if layer == 0:
            cache.begin(attention_mask, query.shape[0], query.shape[2])
        step = cache.step
        if step is None:
            raise ValueError(f"layer 0 must run first in a forward pass, got layer {layer}")
        k, v = step.pack(key), step.pack(value)
        if step.held is not None:
            ring = rings.ring(layer, step.packing)
            rolling_cache_update_(**ring, k=k, v=v)
            keys, values = (
                ring[name][:, : step.held].transpose(1, 2) for name in ("k_cache", "v_cache")
            )
            out = attend_single(query, keys, values, scaling, None)
        else:
            q = step.pack(query)
            out = rings.attend(
                layer, q, k, v, step.packing, sliding_window=window, softmax_scale=scaling
            )
            out = step.unpack(out)
        if layer == len(cache) - 1:
            cache.finish()
        return out

    def __getattr__(self, name: str) -> NoReturn:
        raise TypeError(_READ_BY_ANOTHER)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(_READ_BY_ANOTHER)

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(_READ_BY_ANOTHER)


_READ_BY_ANOTHER = (
    "RollingCache must be used with attn_implementation='mistral_kernels'; call register() and "
    "model.set_attn_implementation('mistral_kernels')"
)


@dataclass(frozen=True)
class _Step:
    """New tokens of one forward pass, which transformers pads to `shape`, (batch, seqlen).

    Attributes:
        packing: division of the packed tokens into sequences.
        real: (total_tokens,) int64, indices of the tokens that are not padding; None: all tokens.
        shape: (batch, seqlen), including padding.
        held: number of keys per sequence after this pass, if PyTorch's attention can be called
            directly: one new token per sequence, no padding, equal lengths. None otherwise.
    """

    packing: Packing
    real: Tensor | None
    shape: tuple[int, int]
    held: int | None

    def pack(self, x: Tensor) -> Tensor:
        """Pack (batch, heads, seqlen, head_dim) into (total_tokens, heads, head_dim)."""
        x = with_unit_stride(x.transpose(1, 2)).flatten(0, 1)
        return x if self.real is None else x[self.real]

    def unpack(self, out: Tensor) -> Tensor:
        """Unpack (total_tokens, heads, head_dim) to (batch, seqlen, heads, head_dim)."""
        if self.real is not None:
            padded = out.new_zeros(self.shape[0] * self.shape[1], *out.shape[1:])
            padded[self.real] = out
            out = padded
        return out.view(*self.shape, *out.shape[1:])


def _first_keys(attention_mask: Mask | Tensor | None, batch: int) -> list[int]:
    """Return the index of the first valid key of each sequence, 0 without padding."""
    if attention_mask is None:
        return [0] * batch
    if isinstance(attention_mask, Mask) and attention_mask.full is attention_mask.last is None:
        return attention_mask.first_keys
    raise ValueError(
        "attention_mask must be causal with padding on the left only, got another mask of shape "
        f"{tuple(attention_mask.shape)}: RollingCache does not store padding"
    )


def _check_fits(key: Tensor, ring: Tensor) -> None:
    _, heads, _, head_dim = key.shape
    if (heads, head_dim) != ring.shape[2:] or (key.dtype, key.device) != (ring.dtype, ring.device):
        raise ValueError(
            f"keys must have {ring.shape[2]} heads of size {ring.shape[3]}, {ring.dtype} on "
            f"{ring.device}, as in the cache, got {heads} heads of size {head_dim}, {key.dtype} on "
            f"{key.device}; after moving or casting the model, create a new cache"
        )


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Return the sliding window of each layer of a transformers config; None: no window."""
    shared = getattr(config, "num_kv_shared_layers", 0)
    if shared:
        raise ValueError(f"num_kv_shared_layers must be 0 with RollingCache, got {shared}")
    count = config.num_hidden_layers
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    if types is None:
        windowed = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if windowed else "full_attention"] * count
    configs = getattr(config, "per_layer_config", None) or [config] * count
    windows: list[int | None] = []
    # strict=False: layer_types is longer if num_hidden_layers is reduced after construction.
    for i, (kind, layer_config) in enumerate(zip(types, configs, strict=False)):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types[{i}] must be full_attention or sliding_attention with RollingCache, "
                f"got {kind}"
            )
        windows.append(layer_config.sliding_window if kind == "sliding_attention" else None)
    return tuple(windows)
