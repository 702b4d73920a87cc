"""transformers' attention interface on these kernels: `attn_implementation="mistral_kernels"`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mistral_kernels.integrations import mask
from mistral_kernels.ops.attention import attention, check_qkv
from mistral_kernels.ops.attention.cache_view import CacheView
from mistral_kernels.ops.attention.cached import attend_cached
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.dispatch import uses_triton, with_unit_stride

NAME = "mistral_kernels"

# So few queries keep a GPU busy only if their keys are split over it, as those of a cache are.
_FEW_QUERIES = 16

_SHORT = 32  # tokens

_UNSAID: Any = object()  # a layer that does not name its window


def register() -> None:
    """Make `attn_implementation="mistral_kernels"` known to transformers. Twice is once."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask.create_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _UNSAID,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        module: the layer's attention; its `is_causal` stands in for the argument.
        query: (batch, num_heads, seqlen_q, head_dim), of the dtypes that `attention` takes.
        key, value: (batch, num_kv_heads, seqlen_k, head_dim); or what a `RollingCache` gives.
        attention_mask: one of `mask.py`'s, or a user's of 4-D, bool or float, which is PyTorch's
            attention's to serve.
        scaling: head_dim^-0.5 if None.
        sliding_window: how many keys a query sees, its own included; None for no window.
        softcap: as in `attention`; None for none.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` divide a packed
            batch, as transformers' `DataCollatorWithFlattening` makes them. What else would change
            the result raises.

    Returns:
        (batch, seqlen_q, num_heads, head_dim), 0 for padding on the left; and None, the weights.

    Raises:
        NotImplementedError: naming the argument that is not supported.
        ValueError: naming the argument that does not fit.
    """
    _refuse(dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is _UNSAID:
        sliding_window = None
        if causal:
            _check_has_no_window(module)
    if not isinstance(key, Tensor):
        if softcap:
            raise NotImplementedError(
                "softcap is not supported with RollingCache; use another cache"
            )
        windowed = {"scaling": scaling, "sliding_window": sliding_window}
        return key.attend(query, attention_mask, **windowed), None
    if attention_mask is not None and attention_mask.dtype != torch.int32:  # in full
        kwargs |= {"scaling": scaling, "is_causal": is_causal, "softcap": softcap or None}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = _autocast(query, key, value)
    on_torch = serves_directly(query)
    if on_torch and query.shape[2] == 1 and attention_mask is None and causal and not softcap:
        if kwargs.get("cu_seq_lens_q") is None:
            return attend_single(query, key, value, scaling, sliding_window), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    check_qkv(q, k, v, ndim=4, names=("query", "key", "value"))
    scoring: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0}
    if not causal:
        return _attention(q, k, v, causal=False, **scoring), None
    scoring["sliding_window"] = sliding_window
    lengths = _packed_lengths(attention_mask, q.shape[1], kwargs)
    if lengths:
        return _attend_packed(q, k, v, lengths, scoring), None
    if attention_mask is not None and not mask.is_descriptor(attention_mask):
        raise ValueError(
            "attention_mask must be 4-D, bool or float, or transformers' 2-D mask, got "
            f"{tuple(attention_mask.shape)} of {attention_mask.dtype}"
        )
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    in_place = not grad and q.shape[1] <= _FEW_QUERIES
    if attention_mask is None:
        if on_torch and not (grad or softcap) and _is_short(q, k, sliding_window):
            how: dict[str, Any] = {"is_causal": True, "scale": scaling, "enable_gqa": True}
            out = F.scaled_dot_product_attention(query, key, value, **how)
            return out.transpose(1, 2), None
        if on_torch or not in_place:
            return _attention(q, k, v, **scoring), None
        held = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        return _attend_in_place(q, k, v, held, None, **scoring), None
    if in_place or mask.is_tracing():
        places = mask.held_keys(attention_mask, q.shape[1])
        return _attend_in_place(q, k, v, *places, **scoring), None
    return _attend_padded(q, k, v, mask.places_of(attention_mask), scoring), None


def serves_directly(q: Tensor) -> bool:
    """On the torch backend PyTorch's attention may be called without an operator around it."""
    return not (torch.compiler.is_compiling() or uses_triton(q))


def _is_short(q: Tensor, k: Tensor, sliding_window: int | None) -> bool:
    """Plainly causal, and so short that an operator around PyTorch's attention would show."""
    seqlen = q.shape[1]
    in_sight = sliding_window is None or seqlen <= sliding_window
    return seqlen == k.shape[1] and seqlen <= _SHORT and in_sight


def attend_single(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """One query a row, over the last `sliding_window` keys, in PyTorch's attention.

    Takes (batch, heads, seqlen, head_dim) and returns (batch, 1, num_heads, head_dim). The query
    heads of a kv head become the rows of one product, so that its keys are read once.
    """
    if sliding_window is not None and sliding_window < key.shape[2]:
        key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    batch, num_heads, _, head_dim = query.shape
    groups = query.reshape(batch, key.shape[1], -1, head_dim)
    out = F.scaled_dot_product_attention(groups, key, value, scale=scaling)
    return out.reshape(batch, 1, num_heads, head_dim)


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, places: mask.Places, scoring: dict[str, Any]
) -> Tensor:
    """Padding on the left, or keys of a static cache that are not yet written. Differentiable."""
    seqlen = q.shape[1]
    k, v = (x[:, : places.num_keys(seqlen)] for x in (k, v))
    if not places.padded:
        return _attention(q, k, v, **scoring)
    cu_seqlens_q, cu_seqlens_k = places.packing(seqlen)
    lengths = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": seqlen,
        "max_seqlen_k": k.shape[1],
    }
    return _attend_packed(q, k, v, lengths, scoring)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: dict[str, Any], scoring: dict[str, Any]
) -> Tensor:
    """The rows of a batch one after the other, divided anew."""
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return _attention(*packed, **lengths, **scoring).unflatten(0, q.shape[:2])


def _attend_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Tensor,
    leftpad: Tensor | None,
    sliding_window: int | None,
    **scoring: Any,
) -> Tensor:
    """A few queries over keys where they lie: the last query stands on the last key `held`."""
    out, _ = attend_cached(
        *(with_unit_stride(q), None, None),
        CacheView(with_unit_stride(k), with_unit_stride(v), held, leftpad=leftpad),
        window=resolve_window(True, None, sliding_window),
        max_seqlen_q=q.shape[1],
        **scoring,
    )
    return out


def _attention(*qkv: Tensor, **options: Any) -> Tensor:
    out = attention(*qkv, **options)
    assert isinstance(out, Tensor)
    return out


def _packed_lengths(
    attention_mask: Tensor | None, seqlen: int, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """How a packed batch is divided, for `attention`; empty if it is not packed."""
    packed = attention_mask is not None and mask.is_packed(attention_mask)
    cu_seqlens_q = kwargs.get("cu_seq_lens_q")
    if cu_seqlens_q is None:
        if not packed:
            return {}
        # No sequence is longer than a row.
        lengths = {"max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
        return {"cu_seqlens_q": attention_mask, **lengths}
    if attention_mask is not None and not packed:
        raise ValueError("cu_seq_lens_q divides a packed batch, which has no attention_mask")
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": kwargs.get("cu_seq_lens_k"),
        "max_seqlen_q": kwargs.get("max_length_q"),
        "max_seqlen_k": kwargs.get("max_length_k"),
    }


_REFUSED = {
    "s_aux": "for attention sinks use attn_implementation='eager'",
    "position_bias": "use attn_implementation='sdpa'",
    "head_mask": "use attn_implementation='eager'",
    "output_attentions": "the weights are never formed; use attn_implementation='eager'",
    "cache": "for paged caches use attn_implementation='sdpa'",
}


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(
            f"dropout is not supported, got {dropout}: set config.attention_dropout = 0, or use "
            "attn_implementation='sdpa'"
        )
    for name, remedy in _REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise NotImplementedError(f"{name} is not supported: {remedy}")


def _check_has_no_window(module: nn.Module) -> None:
    """Most layers that do not name their window have none; of some, only the mask knows it."""
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None:
        raise NotImplementedError(
            f"{type(module).__name__} does not say whether config.sliding_window={window} is this "
            "layer's: use attn_implementation='sdpa'"
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, as for PyTorch's own attention: rotation may have widened q and k."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)
