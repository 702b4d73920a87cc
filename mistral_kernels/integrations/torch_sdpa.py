"""Flash backend of PyTorch's `scaled_dot_product_attention` that runs on these kernels.

    from mistral_kernels.integrations import torch_sdpa
    torch_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("mistral_kernels")
    ...
    torch_sdpa.restore()

Between activation and restoration, every GPU call that PyTorch dispatches to its flash backend runs
on these kernels, forward and backward: half precision without a mask, nested tensors, and
`varlen_attn` with windows. `varlen_attn` with pages runs forward only. Dropout raises an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.attention import check_qkv
from mistral_kernels.ops.attention.ops import attend_cached
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.window import Window
from mistral_kernels.ops.dispatch import uses_triton, with_unit_stride

try:
    from torch.nn.attention import register_flash_attention_impl
except ImportError:
    raise ImportError(
        "mistral_kernels.integrations.torch_sdpa requires a torch with "
        f"torch.nn.attention.register_flash_attention_impl, found {torch.__version__}; "
        "run pip install -U torch"
    ) from None

NAME = "mistral_kernels"


def register() -> None:
    """Register "mistral_kernels" for PyTorch's `activate_flash_attention_impl`.

    Registering changes no operator: PyTorch keeps its own flash attention until "mistral_kernels"
    is activated. A second call does nothing.

    Example:
        >>> import torch
        >>> from mistral_kernels.integrations import torch_sdpa
        >>> torch_sdpa.register()
        >>> "mistral_kernels" in torch.nn.attention.list_flash_attention_impls()
        True
        >>> torch.nn.attention.activate_flash_attention_impl("mistral_kernels")
        >>> torch.nn.attention.current_flash_attention_impl()
        'mistral_kernels'
        >>> torch_sdpa.restore()
    """
    register_flash_attention_impl(NAME, register_fn=replace_flash_attention)


def restore() -> None:
    """Restore PyTorch's own flash attention. Do nothing unless "mistral_kernels" is active.

    Example:
        >>> import torch
        >>> from mistral_kernels.integrations import torch_sdpa
        >>> torch_sdpa.register()
        >>> torch.nn.attention.activate_flash_attention_impl("mistral_kernels")
        >>> torch_sdpa.restore()
        >>> torch.nn.attention.current_flash_attention_impl() is None
        True
    """
    if torch.nn.attention.current_flash_attention_impl() != NAME:
        return
    if hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        torch.nn.attention.restore_flash_attention_impl()
        return
    registry: Any = torch.nn.attention._registry  # torch 2.10 has no function that restores
    registry._FLASH_ATTENTION_HANDLES.pop(NAME).remove()
    registry._FLASH_ATTENTION_ACTIVE = None


class Replacement:
    """Replaced operators of PyTorch; `remove` restores PyTorch's own.

    Example:
        >>> from mistral_kernels.integrations import torch_sdpa
        >>> replacement = torch_sdpa.replace_flash_attention("CPU")
        >>> isinstance(replacement, torch_sdpa.Replacement)
        True
        >>> replacement.remove()
    """

    def __init__(self, library: torch.library.Library) -> None:
        self.library = library

    def remove(self) -> None:
        """Restore PyTorch's own operators."""
        self.library._destroy()


def replace_flash_attention(dispatch_key: str = "CUDA") -> Replacement:
    """Replace PyTorch's flash attention operators by these kernels.

    `activate_flash_attention_impl("mistral_kernels")` calls this function. PyTorch selects its
    flash backend on GPUs only; on the CPU the operators must be called directly.

    Args:
        dispatch_key: dispatch key of the tensors, "CUDA" or "CPU".

    Returns:
        The replacement; its `remove()` restores PyTorch's own operators.

    Example:
        >>> import torch
        >>> from mistral_kernels.integrations import torch_sdpa
        >>> replacement = torch_sdpa.replace_flash_attention("CPU")
        >>> q = torch.randn(1, 4, 6, 16)  # (batch, heads, seqlen, head_dim)
        >>> k, v = torch.randn(2, 1, 2, 6, 16)
        >>> out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        >>> replacement.remove()
        >>> expected = torch.nn.functional.scaled_dot_product_attention(
        ...     q, k, v, is_causal=True, enable_gqa=True)
        >>> torch.allclose(out, expected, atol=1e-5)
        True
    """
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    for name, function in _OPERATORS.items():
        if hasattr(torch.ops.aten, name):  # older releases of torch lack some of them
            library.impl(name, function)
    return Replacement(library)


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Compute attention of (batch, heads, seqlen, head_dim) tensors.

    A causal mask is aligned to the bottom right, as in flash-attn.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    max_q, max_k = q.shape[1], k.shape[1]
    dense = None, None, max_q, max_k
    out, lse, *random = _forward(
        q, k, v, *dense, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return _laid_out_like(query, out.transpose(1, 2)), lse, *dense, *random


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    dense = cum_seq_q, cum_seq_k, max_q, max_k
    random = philox_seed, philox_offset
    grads = _backward(
        dout, q, k, v, o, logsumexp, *dense, dropout_p, is_causal, *random, scale=scale
    )
    return tuple(
        _laid_out_like(x, grad.transpose(1, 2))
        for x, grad in zip((query, key, value), grads, strict=True)
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute attention of (batch, seqlen, heads, head_dim) tensors.

    With `cum_seq_q`, the tensors are packed: (tokens, heads, head_dim). With `block_table`, `key`
    and `value` are (pages, page_size, heads, head_dim), and sequence i uses `seqused_k[i]` tokens
    of its pages.
    """
    _check_dropout_and_backend(query, dropout_p)
    _check_omitted(return_debug_mask=return_debug_mask or None, alibi_slopes=alibi_slopes)
    query, key, value = (with_unit_stride(x) for x in (query, key, value))
    window = _window(is_causal, window_size_left, window_size_right)
    if block_table is None:
        _check_omitted(seqused_k=seqused_k)
        check_qkv(query, key, value, 4 if cum_seq_q is None else 3, ("query", "key", "value"))
        spec = AttentionSpec(Sequences(cum_seq_q, cum_seq_k, max_q, max_k), window, scale)
        out, lse = torch.ops.mistral_kernels.attention_forward(
            query, key, value, *spec.flatten(), True
        )
    else:
        if cum_seq_q is None or seqused_k is None:
            raise ValueError("cum_seq_q and seqused_k are required when block_table is given")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise NotImplementedError(
                "block_table is not supported with gradients: attention over pages has no backward "
                "pass; run under torch.no_grad()"
            )
        lengths = seqused_k - cum_seq_q.diff()  # tokens in the cache before the new ones
        pages = CacheView(key, value, lengths, block_table=block_table.contiguous())
        sequences = Sequences(cum_seq_q, None, max_q, max_q)
        spec = AttentionSpec(sequences, window, scale, cache=pages)
        out, lse = attend_cached(
            query, None, None, spec, return_lse=True, num_splits=num_splits or 0
        )
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    return _laid_out_like(query, out), lse, seed, offset, query.new_empty(0)


def _forward_inplace(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `_forward`, write its output to `out` and return the log-sum-exp."""
    result, lse, *_ = _forward(*args, **kwargs)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    _check_dropout_and_backend(query, dropout_p)
    inputs = [with_unit_stride(x) for x in (query, key, value)]
    window = _window(is_causal, window_size_left, window_size_right)
    spec = AttentionSpec(Sequences(cum_seq_q, cum_seq_k, max_q, max_k), window, scale)
    grads = torch.ops.mistral_kernels.attention_backward(
        *(grad_out, *inputs, out, logsumexp), *spec.flatten(), True, True, True
    )
    return tuple(
        _laid_out_like(x, grad) for x, grad in zip((query, key, value), grads, strict=True)
    )


_OPERATORS = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_inplace,
    "_flash_attention_backward": _backward,
}


def _check_dropout_and_backend(query: Tensor, dropout_p: float) -> None:
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"dropout_p must be 0, got {dropout_p}: dropout is not supported; call "
            "torch_sdpa.restore() to use PyTorch's own attention"
        )
    if query.is_cuda and not uses_triton(query):
        raise RuntimeError(
            "MISTRAL_KERNELS_BACKEND must not be torch while mistral_kernels replaces PyTorch's "
            "flash attention, which the torch backend calls: unset the variable, or call "
            "torch_sdpa.restore()"
        )


def _check_omitted(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported by mistral_kernels; omit it")


def _window(is_causal: bool, left: int | None, right: int | None) -> Window:
    """Return the window with these bounds; None or a negative number means unbounded."""
    bounds = (-1 if x is None or x < 0 else x for x in (left, right))
    window = Window(*bounds)
    return window._replace(right=0) if is_causal else window


def _laid_out_like(x: Tensor, result: Tensor) -> Tensor:
    """Return `result` with the strides of `torch.empty_like(x)`, which PyTorch's tracer assumes."""
    strides = torch.empty_like(x, device="meta").stride()
    if result.stride() == strides:
        return result
    return torch.empty_like(x).copy_(result)
