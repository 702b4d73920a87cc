"""transformers' `generate` over a rolling cache: memory stays what it is, and no key ever moves.

    register()
    model.set_attn_implementation("mistral_kernels")
    model.generate(**inputs, past_key_values=RollingCache(model.config))

transformers pads a batch, a ring holds a sequence's own tokens alone: `PendingKeys`, which a layer
gets in place of keys and values, packs the new ones, writes them, and attends. It can be read by
`attn_implementation="mistral_kernels"` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mistral_kernels.integrations.mask import Mask
from mistral_kernels.integrations.transformers_attention import attend_single, serves_directly
from mistral_kernels.model import cache as model_cache
from mistral_kernels.model.cache import CacheLayout, Packing
from mistral_kernels.ops.dispatch import with_unit_stride
from mistral_kernels.ops.rolling_cache import rolling_cache_update_


class RollingCache(Cache):
    """Keys and values in rings, sized by the first tokens that come, and constant from then on.

    A layer with a sliding window keeps as many tokens as it sees, one without keeps `max_length`.
    `rings` holds them, a `mistral_kernels.RollingCache` (None before the first tokens): tokens as
    packed sequences, without padding. For inference: nothing in it is differentiable.

    Args:
        config: the model's.
        max_length: tokens of a sequence, padding included, at most; None, where every layer has a
            window, for text without end.

    Raises:
        ValueError: a layer has no window and `max_length` is None, or is neither full nor sliding
            attention.
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        windows = layer_windows(config.get_text_config(decoder=True))
        if max_length is None:
            unbounded = [i for i, window in enumerate(windows) if window is None]
            if unbounded:
                raise ValueError(
                    f"max_length is needed: layer {unbounded[0]} has no sliding window and keeps "
                    "every token"
                )
            max_length = max(window for window in windows if window is not None)
        elif max_length <= 0:
            raise ValueError(f"max_length must be positive, got {max_length}")
        self.windows = windows
        self.max_length = max_length
        self.rings: model_cache.RollingCache | None = None
        self.columns = 0  # tokens seen of each row, padding included
        self.step: _Step | None = None
        super().__init__(layers=[RollingLayer(self, i) for i in range(len(windows))])

    @property
    def nbytes(self) -> int:
        """Bytes of all rings: constant once there are any."""
        return 0 if self.rings is None else self.rings.nbytes

    def allocate(
        self, batch: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        layout = CacheLayout(self.windows, num_kv_heads, head_dim)
        self.rings = model_cache.RollingCache(layout, batch, self.max_length, dtype, device)

    def begin(self, attention_mask: Mask | Tensor | None, batch: int, seqlen: int) -> None:
        """Place the new tokens of a forward pass, (batch, seqlen) with padding on the left."""
        rings = self.rings
        assert rings is not None
        if batch != rings.batch:
            raise ValueError(
                f"the cache holds {rings.batch} sequences, got {batch}; make a new one"
            )
        starts = _first_keys(attention_mask, batch)
        for row, (start, seen) in enumerate(zip(starts, rings.host_lengths, strict=True)):
            shown = max(self.columns - start, 0)
            if shown != seen:
                raise ValueError(
                    f"attention_mask shows {shown} earlier tokens of row {row}, and the cache "
                    f"holds {seen}: it can only be continued"
                )
        padding = [min(max(start - self.columns, 0), seqlen) for start in starts]
        packing = rings.packing([seqlen - n for n in padding])
        real = None
        if any(padding):
            rows = [torch.arange(i * seqlen + n, (i + 1) * seqlen) for i, n in enumerate(padding)]
            real = torch.cat(rows).to(rings.lengths.device)
        held = None
        if packing.one_each and real is None and len(set(rings.host_lengths)) == 1:
            held = packing.end if serves_directly(rings.lengths) else None
        self.step = _Step(packing, real, (batch, seqlen), held)
        rings.interrupted = True

    def finish(self) -> None:
        """Count the new tokens, which every layer has written."""
        assert self.rings is not None
        assert self.step is not None
        self.rings.advance(self.step.packing)
        self.columns += self.step.shape[1]
        self.step = None

    # What `generate` asks of a cache as a whole; the rest it asks of the layers.

    def reset(self) -> None:
        """Empty the cache; the memory stays."""
        if self.rings is not None:
            self.rings.reset()
        self.columns, self.step = 0, None

    def crop(self, length: int) -> None:
        """Drop the newest tokens: `-length` of them, or all but the first `length` if positive.

        Raises `ValueError` where that would bring keys back into sight which a ring has
        overwritten: past its window only the newest token can go.
        """
        count = -length if length <= 0 else max(self.columns - length, 0)
        if count and self.rings is not None:
            self.rings.drop(count)
            self.columns -= count

    @property
    def is_croppable(self) -> bool:
        """True until a ring overwrites a key."""
        return self.rings is None or max(self.rings.host_lengths) <= self.rings.smallest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move row `beam_idx[i]` to row i, in place."""
        if self.rings is not None:
            self.rings.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in new rings."""
        if self.rings is not None:
            rows = torch.arange(self.rings.batch, device=indices.device)
            self.rings = self.rings.select(rows[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, in new rings."""
        if self.rings is not None:
            rows = range(self.rings.batch)
            self.rings = self.rings.select([row for row in rows for _ in range(repeats)])

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 before the first tokens."""
        return -1 if self.rings is None else self.rings.batch

    max_batch_size = batch_size  # its name before transformers 5

    @property
    def max_cache_len(self) -> int:
        return self.max_length


class RollingLayer(CacheLayerMixin):
    """One layer of a `RollingCache`, as transformers sees it: every key from the first is there."""

    is_compileable = False
    keys = values = None  # never a tensor that another attention could read

    def __init__(self, cache: RollingCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def __repr__(self) -> str:
        window = self.cache.windows[self.index]
        return f"RollingLayer({'full' if window is None else f'sliding_window={window}'})"

    @property
    def is_sliding(self) -> bool:
        return self.cache.windows[self.index] is not None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]  # an attribute that layers set
        return self.cache.rings is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, heads, _, head_dim = key_states.shape
        # Under autocast keys may be wider than values, to which they are then cast.
        like = key_states if value_states is None else value_states
        self.cache.allocate(batch, heads, head_dim, like.dtype, like.device)

    def update(  # type: ignore[override]  # what it returns is for one attention alone
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PendingKeys, PendingKeys]:
        """Hold new keys and values until `attend` writes them.

        Both are (batch, num_kv_heads, seqlen, head_dim), and the keys are rotated.

        The keys are rotated.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pending = PendingKeys(self.cache, self.index, key_states, value_states)
        return pending, pending

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the number of keys and the offset of the first for a mask.

        Older transformers give the new tokens' positions for `query_length`.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.cache.columns + new, 0

    def get_max_length(self) -> int:
        """Return the number of tokens that fit; -1: no bound."""
        window, length = self.cache.windows[self.index], self.cache.max_length
        return -1 if window is not None and window <= length else length

    get_max_cache_shape = get_max_length  # its name before transformers 5


class PendingKeys:
    """New keys and values of one layer, and the ring they belong to. No tensor, though it looks it.

    Every use but `attend` is another attention's, and raises `TypeError`.
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
        """Write the new keys and values, and attend to all that `query` sees.

        Args:
            query: (batch, num_heads, seqlen, head_dim), the same tokens' as the keys.
            attention_mask: a `Mask`; None: no padding.
            scaling: head_dim^-0.5 if None.
            sliding_window: must be the layer's, if given.

        Returns:
            (batch, seqlen, num_heads, head_dim); 0 for padding.

        Raises:
            ValueError: the batch or the mask is not the cache's, the text is too long for it, or
                the window is not the layer's.
            RuntimeError: a gradient is wanted.
        """
        cache, layer, (key, value) = self._cache, self._layer, self._new
        window = cache.windows[layer]
        if sliding_window is not None and sliding_window != window:
            raise ValueError(
                f"layer {layer} attends in a window of {sliding_window}, and its ring is made for "
                f"{window}: the cache is another model's"
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise RuntimeError(
                "RollingCache has no gradients: run under torch.no_grad(), as generate does, or "
                "train with use_cache=False"
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
            raise ValueError(f"layer {layer} comes before layer 0 in a pass over the cache")
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
    "RollingCache is read by attn_implementation='mistral_kernels' alone; call register() and "
    "model.set_attn_implementation('mistral_kernels')"
)


@dataclass(frozen=True)
class _Step:
    """The new tokens of one forward pass, which transformers pads to `shape`, (batch, seqlen)."""

    packing: Packing
    real: Tensor | None  # (total_tokens,) which of all are no padding; None: all
    shape: tuple[int, int]
    held: int | None  # one token each, on the torch backend: how many every sequence has then

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
    """Return the first valid key of each sequence: 0 where there is no padding."""
    if attention_mask is None:
        return [0] * batch
    if isinstance(attention_mask, Mask) and attention_mask.full is attention_mask.last is None:
        return attention_mask.first_keys
    raise ValueError(
        "attention_mask must be causal, with each sequence's padding on its left, got another mask "
        f"of {tuple(attention_mask.shape)}: RollingCache holds tokens alone"
    )


def _check_fits(key: Tensor, ring: Tensor) -> None:
    _, heads, _, head_dim = key.shape
    if (heads, head_dim) != ring.shape[2:] or (key.dtype, key.device) != (ring.dtype, ring.device):
        raise ValueError(
            f"the cache holds {ring.shape[2]} heads of {ring.shape[3]}, {ring.dtype} on "
            f"{ring.device}, got {heads} of {head_dim}, {key.dtype} on {key.device}; every layer "
            "must have the same, and the cache be made anew where the model is moved or cast"
        )


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Return the sliding window of each layer of a transformers config; None: no window."""
    shared = getattr(config, "num_kv_shared_layers", 0)
    if shared:
        raise ValueError(f"{shared} layers share others' keys, which a RollingCache cannot")
    count = config.num_hidden_layers
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    if types is None:
        windowed = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if windowed else "full_attention"] * count
    configs = getattr(config, "per_layer_config", None) or [config] * count
    windows: list[int | None] = []
    # strict=False: layer_types stays longer where num_hidden_layers is lowered after construction.
    for i, (kind, layer_config) in enumerate(zip(types, configs, strict=False)):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer {i} is {kind}; a RollingCache serves full and sliding ones")
        windows.append(layer_config.sliding_window if kind == "sliding_attention" else None)
    return tuple(windows)
