"""Tests of the functions of flash-attn 2: arguments, results, gradients and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mistral_kernels as mk
from mistral_kernels.ops import reference

KINDS = ["plain", "kvpacked", "qkvpacked"]


def make(kind, device, dtype=torch.float32, seqlen=40, heads=(4, 2), head_dim=16):
    num_heads, num_kv_heads = heads if kind != "qkvpacked" else (heads[0], heads[0])
    q = torch.randn(2, seqlen, num_heads, head_dim, device=device, dtype=dtype)
    kv = torch.randn(2, seqlen, 2, num_kv_heads, head_dim, device=device, dtype=dtype)
    return q, kv


def call(kind, varlen, q, kv, *args, **options):
    """Call the function of a kind; with `varlen`, on the same sequences as a packed batch."""
    lengths = ()
    if varlen:
        batch, seqlen = q.shape[:2]
        q, kv = q.flatten(0, 1), kv.flatten(0, 1)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen
        single = kind == "qkvpacked"
        lengths = (cu_seqlens, seqlen) if single else (cu_seqlens, cu_seqlens, seqlen, seqlen)
    middle = "varlen_" if varlen else ""
    name = f"flash_attn_{middle}{'' if kind == 'plain' else kind + '_'}func"
    tensors = (q, *kv.unbind(-3)) if kind == "plain" else (q, kv)
    if kind == "qkvpacked":
        tensors = (torch.cat((q.unsqueeze(-3), kv), -3),)
    return getattr(mk, name)(*tensors, *lengths, *args, **options)


@pytest.mark.parametrize("varlen", [False, True], ids=["rectangular", "varlen"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_returns(kind, varlen, device):
    q, kv = make(kind, device)
    for args, options, definition in (
        ((), {}, {}),
        ((0.0, 0.3, True), {}, {"softmax_scale": 0.3, "causal": True}),
        ((), {"window_size": (5, 2)}, {"window_size": (5, 2)}),
        ((), {"window_size": [5, 2], "causal": True}, {"window_size": (5, 0)}),
        ((), {"window_size": torch.tensor([5, -1]), "softcap": 2.0}, {"window_size": (5, -1)}),
        ((None, None, True, (np.int64(7), 0)), {}, {"window_size": (7, 0)}),
    ):
        if "softcap" in options:
            definition["softcap"] = options["softcap"]
        out, lse, probs = call(
            kind, varlen, q, kv, *args, **options, deterministic=True, return_attn_probs=True
        )
        alone = call(kind, varlen, q, kv, *args, **options)
        expected, expected_lse = reference.attention(q, *kv.unbind(2), **definition)
        if varlen:
            expected = expected.flatten(0, 1)
            expected_lse = expected_lse.transpose(0, 1).flatten(1)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        assert lse.dtype == torch.float32
        assert probs.numel() == 0
        torch.testing.assert_close(alone, out)


@pytest.mark.parametrize("varlen", [False, True], ids=["rectangular", "varlen"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, varlen, device, torch_backend):
    q, kv = (x.double().requires_grad_() for x in make(kind, device))
    out = call(kind, varlen, q, kv, causal=True, window_size=(9, 0))
    expected = reference.attention(q, *kv.unbind(2), causal=True, window_size=(9, 0))[0]
    dout = torch.randn_like(expected)
    actual = torch.autograd.grad(out, (q, kv), dout.reshape(out.shape))
    for a, b in zip(actual, torch.autograd.grad(expected, (q, kv), dout), strict=True):
        torch.testing.assert_close(a, b)


def test_last_dimension_need_not_be_contiguous(device):
    q, kv = make("plain", device)
    k, v = kv.unbind(2)
    strided = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    assert torch.equal(mk.flash_attn_func(*strided), mk.flash_attn_func(q, k, v))


ORDER = "softmax_scale must be a number, got {}; the order of arguments is .* 3 and 4"
Q, KV = torch.ones(2, 5, 4, 8), torch.ones(2, 5, 2, 2, 8)
K = KV[:, :, 0]
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED = [Q.flatten(0, 1), K.flatten(0, 1), K.flatten(0, 1)]


def varlen(cu_q=CU, cu_k=CU, max_q=6, max_k=6, *args, **options):
    return mk.flash_attn_varlen_func(*PACKED, cu_q, cu_k, max_q, max_k, *args, **options)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda: mk.flash_attn_func(Q, K, K, Q),
            TypeError,
            "dropout_p must .* a tensor; the order",
        ),
        (
            lambda: varlen(CU, CU, 6, 6, Q),
            TypeError,
            "dropout_p must .* a tensor; the order",
        ),
        (lambda: mk.flash_attn_func(Q, K, K, 0.1), NotImplementedError, "dropout_p must be 0"),
        # Order of arguments in flash-attn 3: (q, k, v, softmax_scale, causal); in flash-attn 4:
        # (q, k, v, qv, gather, softmax_scale, causal). In the varlen function of flash-attn 3,
        # seqused_q, seqused_k, softmax_scale and causal follow the lengths.
        (lambda: mk.flash_attn_func(Q, K, K, None, True), TypeError, ORDER.format("True")),
        (lambda: mk.flash_attn_func(Q, K, K, 0.25, True), TypeError, ORDER.format("True")),
        (lambda: mk.flash_attn_func(Q, K, K, softmax_scale=True), TypeError, ORDER.format("True")),
        (lambda: mk.flash_attn_func(Q, K, K, 0.25), NotImplementedError, "0, got 0.25; .* 3 and 4"),
        (lambda: mk.flash_attn_func(Q, K, K, None, None, 0.25), TypeError, "causal .* 0.25; the"),
        (lambda: mk.flash_attn_func(Q, K, K, None, None, None, True), TypeError, "causal .* None;"),
        (lambda: varlen(CU, CU, 6, 6, None, None, 0.25), TypeError, "causal must .* 0.25; the"),
        (lambda: varlen(CU, CU, 6, 6, None, None, 1.0), TypeError, "causal must .*, got 1.0; the"),
        (lambda: mk.flash_attn_kvpacked_func(Q, KV, None, True), TypeError, ORDER.format("True")),
        (lambda: mk.flash_attn_func(Q, K, K, 0.0, "1"), TypeError, ORDER.format("'1'")),
        (lambda: varlen(dropout_p=0.1), NotImplementedError, "dropout_p must be 0, got 0.1"),
        (lambda: varlen(block_table=CU), NotImplementedError, "block_table must be None"),
        (lambda: mk.flash_attn_kvpacked_func(Q, K), ValueError, "kv must have 5 .* size 2 in dim"),
        (lambda: mk.flash_attn_qkvpacked_func(KV), ValueError, "qkv must have 5 .* size 3 in dim"),
        (lambda: mk.flash_attn_func(Q, K, K, window_size=(-2, 0)), ValueError, r"got \(-2, 0\)"),
        (lambda: varlen(CU.long()), TypeError, "cu_seqlens_q must be torch.int32, got torch.int64"),
        (lambda: varlen([0, 10]), TypeError, "cu_seqlens_q must be a tensor, got list"),
        (lambda: varlen(cu_k=CU[None]), ValueError, r"cu_seqlens_k must be .*, got \(1, 3\)"),
        (lambda: varlen(cu_k=CU.to("meta")), ValueError, "cu_seqlens_k must be on cpu like q"),
        (lambda: varlen(cu_k=CU[:2]), ValueError, "cu_seqlens_k must have 2 sequences .* got 1"),
        (lambda: varlen(CU.flip(0)), ValueError, r"cu_seqlens_q must begin with 0 and never"),
        (lambda: varlen(CU + 1), ValueError, r"cu_seqlens_q must begin with 0 .* \[1, 5, 11\]"),
        (lambda: varlen(CU * 2, max_q=99), ValueError, "cu_seqlens_q must end within the 10 tok"),
        (lambda: varlen(max_q=5), ValueError, "max_seqlen_q must be at least 6, .*, got 5"),
        (lambda: varlen(max_k=5), ValueError, "max_seqlen_k must be at least 6, .*, got 5"),
        (lambda: varlen(max_k=5.0), TypeError, "max_seqlen_k must be an integer, got float"),
    ],
)
def test_bad_input(function, error, message):
    with pytest.raises(error, match=message):
        function()


def test_modified_cu_seqlens_are_read_again(device):
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    varlen(cu_seqlens, cu_seqlens)
    cu_seqlens[1] = 1
    with pytest.raises(ValueError, match="max_seqlen_q must be at least 9"):
        varlen(cu_seqlens, cu_seqlens)


def test_lengths_may_be_numpy_integers_and_tensors(device):
    expected = varlen()
    assert torch.equal(varlen(max_q=np.int32(6), max_k=torch.tensor(6)), expected)
