"""PyTorch's own attention on these kernels: `scaled_dot_product_attention`'s flash backend.

    from mistral_kernels.integrations import torch_sdpa
    torch_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("mistral_kernels")
    ...
    torch_sdpa.restore()

In between, every call on a GPU that PyTorch sends to its flash backend runs here, forward and
backward: half precision without a mask, nested tensors, `varlen_attn` with its windows and pages.
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
        "mistral_kernels.integrations.torch_sdpa needs a torch whose flash backend can be "
        f"replaced (torch.nn.attention.register_flash_attention_impl), found {torch.__version__}; "
        "run pip install -U torch"
    ) from None

NAME = "mistral_kernels"


def register() -> None:
    """Make "mistral_kernels" known to `activate_flash_attention_impl`; activate nothing."""
    register_flash_attention_impl(NAME, register_fn=replace_flash_attention)


def restore() -> None:
    """Give PyTorch its own flash attention back, if it is replaced by this one."""
    if torch.nn.attention.current_flash_attention_impl() != NAME:
        return
    if hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        torch.nn.attention.restore_flash_attention_impl()
        return
    registry: Any = torch.nn.attention._registry  # torch 2.10 can only activate
    registry._FLASH_ATTENTION_HANDLES.pop(NAME).remove()
    registry._FLASH_ATTENTION_ACTIVE = None


class Replacement:
    """Operators that are replaced; `remove` gives them back."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library = library

    def remove(self) -> None:
        """Restore PyTorch's dispatcher."""
        self.library._destroy()


def replace_flash_attention(dispatch_key: str = "CUDA") -> Replacement:
    """Put these kernels in the place of PyTorch's flash attention, for tensors of a key."""
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    for name, function in _OPERATORS.items():
        if hasattr(torch.ops.aten, name):  # not every release has all
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
    """Attend to (batch, heads, seqlen, head_dim) tensors.

    A causal mask is aligned bottom-right, as flash-attn's is.
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
    """Attend to (batch, seqlen, heads, head_dim) tensors, or to packed ones with cum_seq_q.

    Packed tensors are (tokens, heads, head_dim).

    With a `block_table`, keys and values are pages of (pages, page_size, heads, head_dim), of which
    sequence i uses `seqused_k[i]` tokens.
    """
    _check(query, dropout_p)
    _refuse(return_debug_mask=return_debug_mask or None, alibi_slopes=alibi_slopes)
    query, key, value = (with_unit_stride(x) for x in (query, key, value))
    window = _window(is_causal, window_size_left, window_size_right)
    if block_table is None:
        _refuse(seqused_k=seqused_k)
        check_qkv(query, key, value, 4 if cum_seq_q is None else 3, ("query", "key", "value"))
        spec = AttentionSpec(Sequences(cum_seq_q, cum_seq_k, max_q, max_k), window, scale)
        out, lse = torch.ops.mistral_kernels.attention_forward(
            query, key, value, *spec.flatten(), True
        )
    else:
        if cum_seq_q is None or seqused_k is None:
            raise ValueError("block_table needs cum_seq_q and seqused_k too")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise NotImplementedError("block_table: attention over pages has no backward pass")
        lengths = seqused_k - cum_seq_q.diff()  # before the queries' own tokens
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
    """Run `_forward` into `out` and return the log-sum-exp."""
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
    _check(query, dropout_p)
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


def _check(query: Tensor, dropout_p: float) -> None:
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"dropout_p: attention with dropout is not supported, got {dropout_p}; "
            "torch_sdpa.restore() brings PyTorch's back"
        )
    if query.is_cuda and not uses_triton(query):
        raise RuntimeError(
            "MISTRAL_KERNELS_BACKEND=torch is PyTorch's attention, which is replaced by "
            "mistral_kernels: unset it, or call torch_sdpa.restore()"
        )


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not supported by mistral_kernels; leave it out")


def _window(is_causal: bool, left: int | None, right: int | None) -> Window:
    """Return the window of two bounds, of which None and negative ones are no bound."""
    bounds = (-1 if x is None or x < 0 else x for x in (left, right))
    window = Window(*bounds)
    return window._replace(right=0) if is_causal else window


def _laid_out_like(x: Tensor, result: Tensor) -> Tensor:
    """Return `result` with the strides that PyTorch promises for it, those of a tensor like x."""
    strides = torch.empty_like(x, device="meta").stride()
    if result.stride() == strides:
        return result
    return torch.empty_like(x).copy_(result)
