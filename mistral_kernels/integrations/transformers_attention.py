"""Attention interface of transformers on these kernels: `attn_implementation="mistral_kernels"`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import logging

from mistral_kernels.integrations.mask import Mask, is_tracing
from mistral_kernels.integrations.transformers_masks import create_mask
from mistral_kernels.ops.attention import attention, check_qkv
from mistral_kernels.ops.attention.ops import attend_cached
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.dispatch import uses_triton, with_unit_stride

NAME = "mistral_kernels"

# Up to this many queries, a kernel that splits the keys over the GPU is used, as for a cache:
# one program per query tile would leave most of the GPU idle.
_FEW_QUERIES = 16

# Up to this many tokens, PyTorch's attention is called directly: for so few tokens, the overhead of
# our operator is a noticeable part of the time.
_SHORT = 32

_NOT_PASSED: Any = object()  # marks a `sliding_window` that the layer did not pass

_logger = logging.get_logger(__name__)


def register() -> None:
    """Register `attn_implementation="mistral_kernels"` with transformers.

    Call it once before `from_pretrained` or `set_attn_implementation`. Further calls do nothing.

    Example:
        >>> import torch
        >>> import transformers
        >>> from mistral_kernels.integrations.transformers import register
        >>> register()
        >>> config = transformers.MistralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4)
        >>> model = transformers.MistralForCausalLM(config).eval()
        >>> ids = torch.arange(12).view(2, 6)
        >>> expected = model(ids).logits
        >>> model.set_attn_implementation("mistral_kernels")
        >>> torch.allclose(model(ids).logits, expected, atol=1e-5)
        True
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, create_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _NOT_PASSED,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature of transformers' attention interface.

    Args:
        module: the layer's attention. Its `is_causal` attribute is used if the argument is None.
        query: (batch, num_heads, seqlen_q, head_dim), of a dtype that `attention` supports.
        key: (batch, num_kv_heads, seqlen_k, head_dim), or the `PendingKeys` of a `RollingCache`.
        value: like `key`.
        attention_mask: a `Mask`; or a full mask, bool or additive, that broadcasts to (batch,
            num_heads, seqlen_q, seqlen_k), for which PyTorch computes attention; or None for a
            causal mask without padding.
        scaling: factor of the scores before the softmax; head_dim^-0.5 if None.
        dropout: must be 0.
        sliding_window: number of keys that a query sees, including its own; None for no window. A
            full mask already contains the window.
        softcap: as in `attention`; None for no softcap.
        is_causal: whether later keys are hidden from a query; None: `module.is_causal`.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` divide a packed
            batch, in the form of transformers' `DataCollatorWithFlattening`. `position_ids` that
            restart within a row divide it as well. Others raise an error if they change the result.

    Returns:
        The output, (batch, seqlen_q, num_heads, head_dim), 0 for queries padded on the left; and
        None in place of the attention weights.

    Raises:
        NotImplementedError: an argument is not supported; the message names it.
        ValueError: an argument has an invalid value or shape; the message names it.
    """
    _check_supported(dropout, kwargs)
    _warn_if_weights_requested(module, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is _NOT_PASSED:
        sliding_window = None
        if causal:
            _check_has_no_window(module)
    if not isinstance(key, Tensor):
        if softcap:
            raise NotImplementedError(
                "softcap is not supported with RollingCache; use another cache"
            )
        if isinstance(attention_mask, Mask) and _packed_lengths(attention_mask, kwargs):
            raise NotImplementedError(
                "a packed batch is not supported with RollingCache; pad it, or use another cache"
            )
        windowed = {"scaling": scaling, "sliding_window": sliding_window}
        return key.attend(query, attention_mask, **windowed), None
    full = attention_mask.full if isinstance(attention_mask, Mask) else attention_mask
    if isinstance(full, Tensor):
        return _attend_with_full_mask(module, query, key, value, full, scaling, softcap), None
    mask = _as_mask(attention_mask, query, key, causal)
    lengths = _packed_lengths(mask, kwargs, causal)
    scoring: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0}
    # As in other implementations, a mask that is given overrides `is_causal`.
    if causal or not mask.is_plain:
        scoring["sliding_window"] = sliding_window
    else:
        scoring["causal"] = False
    out = _attend_masked(*_autocast(query, key, value), mask, lengths, scoring)
    if mask.last is not None:
        last_query = query[:, :, -1:]
        last = _attend_with_full_mask(module, last_query, key, value, mask.last, scaling, softcap)
        out = torch.cat((out[:, :-1], last), dim=1)
    return out, None


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    lengths: dict[str, Any],
    scoring: dict[str, Any],
) -> Tensor:
    """Compute attention under a `Mask`, ignoring its `last`; `lengths` divide a packed batch.

    Takes (batch, heads, seqlen, head_dim) and returns (batch, seqlen_q, num_heads, head_dim).
    """
    causal = scoring.get("causal", True)
    window, scaling = scoring.get("sliding_window"), scoring["softmax_scale"]
    direct = can_call_torch_attention(query) and causal and not (lengths or scoring["softcap"])
    if direct and query.shape[2] == 1 and mask.descriptor is None:
        return attend_single(query, key, value, scaling, window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    check_qkv(q, k, v, ndim=4, names=("query", "key", "value"))
    if lengths:
        if mask.descriptor is not None:
            k, v = k[:, : mask.num_keys], v[:, : mask.num_keys]
        return _attend_packed(q, k, v, lengths, scoring)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    as_cache = causal and not grad and q.shape[1] <= _FEW_QUERIES
    if mask.descriptor is None:
        if direct and not grad and _is_short(q, k, window):
            how: dict[str, Any] = {"is_causal": True, "scale": scaling, "enable_gqa": True}
            return F.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2)
        if can_call_torch_attention(q) or not as_cache:
            return _attention(q, k, v, **scoring)
        held = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        return _attend_as_cache(q, k, v, held, None, **scoring)
    if as_cache or is_tracing(q):
        return _attend_as_cache(q, k, v, *mask.held_keys(), **scoring)
    k, v = k[:, : mask.num_keys], v[:, : mask.num_keys]
    if not mask.is_padded:
        return _attention(q, k, v, **scoring)
    cu_seqlens_q, cu_seqlens_k = mask.packing()
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    lengths |= {"max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}
    return _attend_packed(q, k, v, lengths, scoring)


def _as_mask(attention_mask: Any, query: Tensor, key: Tensor, causal: bool) -> Mask:
    if isinstance(attention_mask, Mask):
        return attention_mask
    (batch, _, seqlen_q, _), seqlen_k = query.shape, key.shape[2]
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be a 3-D or 4-D tensor, bool or floating point, or the mask of "
            f"attn_implementation={NAME!r}, got {type(attention_mask).__name__}: {_REMEDY}"
        )
    # With fewer queries than keys, the call is ambiguous: some implementations align the causal
    # mask to the first key, others to the last key.
    if causal and 1 < seqlen_q < seqlen_k:
        raise ValueError(
            f"attention_mask must not be None for {seqlen_q} queries and {seqlen_k} keys: {_REMEDY}"
        )
    return Mask((batch, 1, seqlen_q, seqlen_k))


_REMEDY = "call set_attn_implementation() on the whole model"


def can_call_torch_attention(q: Tensor) -> bool:
    """Return whether PyTorch's attention may be called directly, without our operator around it.

    This is the case on the torch backend, except under torch.compile.
    """
    return not (torch.compiler.is_compiling() or uses_triton(q))


def _is_short(q: Tensor, k: Tensor, sliding_window: int | None) -> bool:
    """Return whether there are at most `_SHORT` tokens, all of them new and within the window."""
    seqlen = q.shape[1]
    fits_window = sliding_window is None or seqlen <= sliding_window
    return seqlen == k.shape[1] and seqlen <= _SHORT and fits_window


def attend_single(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Compute attention of one query per row over the last `sliding_window` keys, in PyTorch.

    Takes (batch, heads, seqlen, head_dim) and returns (batch, 1, num_heads, head_dim). The query
    heads that share a key/value head are the rows of one matrix, so that each key is read once.
    """
    if sliding_window is not None and sliding_window < key.shape[2]:
        key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    batch, num_heads, _, head_dim = query.shape
    groups = query.reshape(batch, key.shape[1], -1, head_dim)
    out = F.scaled_dot_product_attention(groups, key, value, scale=scaling)
    return out.reshape(batch, 1, num_heads, head_dim)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: dict[str, Any], scoring: dict[str, Any]
) -> Tensor:
    """Compute attention of a batch whose rows, concatenated, are divided by `lengths`."""
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out = _attention(*packed, **lengths, **scoring)
    return out.view(*q.shape[:2], *out.shape[1:])


def _attend_as_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Tensor,
    leftpad: Tensor | None,
    sliding_window: int | None,
    **scoring: Any,
) -> Tensor:
    """Compute attention with the operator for caches, which does not copy the keys.

    Row i of the batch has the keys [`leftpad[i]`, `held[i]`). The last query of the row is aligned
    to the last key.
    """
    spec = AttentionSpec(
        Sequences(None, None, q.shape[1], 0),
        resolve_window(True, None, sliding_window),
        cache=CacheView(with_unit_stride(k), with_unit_stride(v), held, leftpad=leftpad),
        **scoring,
    )
    out, _ = attend_cached(with_unit_stride(q), None, None, spec)
    return out


def _attention(*qkv: Tensor, **options: Any) -> Tensor:
    out = attention(*qkv, **options)
    assert isinstance(out, Tensor)
    return out


def _attend_with_full_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Compute attention under a query-by-key mask with PyTorch's operators.

    Takes (batch, heads, seqlen, head_dim) and returns (batch, seqlen_q, num_heads, head_dim).
    """
    if mask.ndim not in (3, 4) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            "attention_mask must be a 3-D or 4-D tensor, bool or floating point, got "
            f"{tuple(mask.shape)} of {mask.dtype}: {_REMEDY}"
        )
    if not softcap:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
    num_groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def _packed_lengths(mask: Mask, kwargs: dict[str, Any], causal: bool = True) -> dict[str, Any]:
    """Return the arguments of `attention` that divide a packed batch; {} if it is not packed."""
    cu_seqlens_q = kwargs.get("cu_seq_lens_q")
    if cu_seqlens_q is None:
        cu_seqlens = mask.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = mask.packed_cu_seqlens(kwargs.get("position_ids")) if causal else None
        if cu_seqlens is None:
            return {}
        seqlen = mask.shape[2]  # no sequence is longer than a row
        return {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
    if mask.descriptor is not None or mask.last is not None:
        raise ValueError(
            "attention_mask must be None if cu_seq_lens_q is given: a packed batch has no padding"
        )
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": kwargs.get("cu_seq_lens_k"),
        "max_seqlen_q": kwargs.get("max_length_q"),
        "max_seqlen_k": kwargs.get("max_length_k"),
    }


_UNSUPPORTED = {
    "s_aux": "for attention sinks use attn_implementation='eager'",
    "position_bias": "use attn_implementation='sdpa'",
    "head_mask": "use attn_implementation='eager'",
    "cache": "for paged caches use attn_implementation='sdpa'",
}


def _check_supported(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(
            f"dropout is not supported, got {dropout}: set config.attention_dropout = 0, or use "
            "attn_implementation='sdpa'"
        )
    for name, remedy in _UNSUPPORTED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise NotImplementedError(f"{name} is not supported: {remedy}")


def _warn_if_weights_requested(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Warn once, as sdpa does, if the attention weights are requested."""
    requested = kwargs.get("output_attentions")
    # Only layer 0 reads the config: reading an attribute of a config is slow.
    if not requested and getattr(module, "layer_idx", 0) == 0:
        requested = getattr(getattr(module, "config", None), "output_attentions", False)
    if requested:
        _logger.warning_once(
            f"attn_implementation={NAME!r} does not support output_attentions=True: it never "
            "computes the attention weights. Use attn_implementation='eager'"
        )


def _check_has_no_window(module: nn.Module) -> None:
    """Raise NotImplementedError if a layer does not pass its window but its config has one."""
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None:
        raise NotImplementedError(
            f"{type(module).__name__} must pass sliding_window to its attention function, because "
            f"config.sliding_window is {window} and a layer may have no window; use "
            "attn_implementation='sdpa'"
        )


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast the tensors to autocast's dtype, as autocast does for PyTorch's attention."""
    dtype = autocast_dtype(query.device)
    if dtype is None:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype; None if autocast is disabled or not available for the device."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)
