"""Compilations: a kernel is compiled for what it is, not for how many tokens it is given."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter

import pytest
import torch
from support.helpers import compile_only

from mistral_kernels.ops.attention import attention, kernels, rolling_cache_attention
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rolling_cache import rolling_cache_update_
from mistral_kernels.ops.rotary import apply_rotary, apply_rotary_, rotary_tables
from mistral_kernels.ops.swiglu import swiglu

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CAPACITY = 4096


def normal(*shape):
    return torch.randn(shape).bfloat16().requires_grad_()


def backward(*outputs):
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def heads(tokens):
    return [normal(tokens, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]


def ring(sequences, tokens):
    """Caches, and `tokens` new tokens of each sequence."""
    caches = torch.zeros(2, sequences, CAPACITY, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32) * tokens
    lengths = torch.full((sequences,), 100, dtype=torch.int32)
    return tuple(caches), (lengths, cu_seqlens, tokens)


def run_rms_norm(tokens):
    backward(rms_norm(normal(tokens, 64), normal(64)))


def run_rms_norm_residual(tokens):
    backward(*rms_norm(normal(tokens, 64), normal(64), residual=normal(tokens, 64)))


def run_rotary(tokens):
    q, k, _ = heads(tokens)
    backward(*apply_rotary(q, k, *rotary_tables(tokens, HEAD_DIM, 1e4), torch.arange(tokens)))


@torch.no_grad()
def run_rotary_in_place(tokens):
    q, k, _ = heads(tokens)
    apply_rotary_(q, k, *rotary_tables(tokens, HEAD_DIM, 1e4), torch.arange(tokens))


def run_swiglu(tokens):
    backward(swiglu(normal(tokens, 96), normal(tokens, 96)))


def run_swiglu_fused(tokens):
    backward(swiglu(normal(tokens, 192)))


def run_cross_entropy(tokens):
    hidden, weight = normal(tokens, 8), normal(32000, 8)
    backward(linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64)))


def run_attention(tokens):
    backward(attention(*(x[None] for x in heads(tokens)), sliding_window=256))


def run_attention_packed(tokens):
    ends = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    backward(attention(*heads(tokens), sliding_window=256, cu_seqlens_q=ends))


@torch.no_grad()
def run_cache_update(tokens):
    caches, where = ring(2, tokens)
    rolling_cache_update_(*caches, *heads(2 * tokens)[1:], *where)


@torch.no_grad()
def run_rotary_cache_update(tokens):
    caches, where = ring(2, tokens)
    q, k, v = heads(2 * tokens)
    cos, sin = rotary_tables(100 + tokens, HEAD_DIM, 1e4)
    rolling_cache_update_(*caches, k, v, *where, q=q, cos=cos, sin=sin)


@torch.no_grad()
def run_decode(tokens, fresh=False):
    """A token of each of so many sequences, over one ring: nothing is run, only compiled."""
    caches, where = ring(1, 1)
    caches = [x.expand(tokens, *x.shape[1:]) for x in caches]
    where = torch.full((tokens,), 100).int(), torch.arange(tokens + 1).int(), 1
    q, k, v = heads(tokens)
    new = (k, v) if fresh else (None, None)
    rolling_cache_attention(q, *new, *caches, *where, sliding_window=256)


def run_decode_fresh(tokens):
    run_decode(tokens, fresh=True)


OPERATORS = {
    name.removeprefix("run_"): value for name, value in globals().items() if name.startswith("run_")
}


def test_attention_kernels_have_few_parameters():
    """Tensors are tuples of a pointer and strides: a signature can still be read."""
    counts = {}
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                counts[name] = len(inspect.signature(value.fn).parameters)
    assert len(counts) == 5
    assert max(counts.values()) <= 32, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_at_most_two(name, set_backend):
    """Forward and backward: two configurations, or aligned and not, but none for a length."""
    set_backend("triton")
    with compile_only("sm_90") as launched:
        for tokens in (1, 7, 512, 4097):
            OPERATORS[name](tokens)
    distinct = {kernel.files["cubin"]: kernel for kernel in launched}.values()
    compilations = Counter(kernel.name for kernel in distinct)
    assert compilations and max(compilations.values()) <= 2, compilations
