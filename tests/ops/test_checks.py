"""Arguments that operators refuse, and results at the limits of the supported range."""

from __future__ import annotations

import pytest
import torch
from support.operator_case import OperatorCalls, assert_devices_are_checked

import mistral_kernels as mk

ops = torch.ops.mistral_kernels


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


RING = {
    "k_cache": torch.zeros(2, 6, 2, 8),
    "v_cache": torch.zeros(2, 6, 2, 8),
    "k": torch.ones(4, 2, 8),
    "v": torch.ones(4, 2, 8),
    "lengths": int32(0, 3),
    "cu_seqlens": int32(0, 1, 4),
}


INDICES = {
    "cache_batch_idx": int32(1, 0),
    "cache_leftpad": int32(0, 1),
    "block_table": int32(0, 1).view(2, 1),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_on_another_device(name):
    """Calls with and without new tokens use different operators."""
    q, cache = torch.ones(2, 2, 4, 8), torch.zeros(2, 256, 2, 8)
    index = {name: INDICES[name], "cache_seqlens": int32(4, 5)}
    with OperatorCalls() as seen:
        mk.flash_attn_with_kvcache(q, cache, cache.clone(), **index)
        if name != "cache_leftpad":
            new = q[:, :, :2]
            mk.flash_attn_with_kvcache(q, cache, cache.clone(), new, new, **index)
    assert seen.calls
    for operator, arguments in seen.calls:
        tensors = [x for x in arguments if torch.is_tensor(x)]
        assert any(torch.equal(x, INDICES[name]) for x in tensors)
        assert_devices_are_checked(operator, arguments)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "cache_seqlens"])
def test_a_flat_cache_on_another_device(name):
    arguments = {"q": torch.ones(2, 2, 4, 8), "cache_seqlens": int32(4, 5)}
    arguments |= {x: torch.zeros(2, 9, 2, 8) for x in ("k_cache", "v_cache")}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=r"\w+ must be .*on (cpu|meta).*, got .*(cpu|meta)"):
        mk.flash_attn_with_kvcache(**arguments)
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        tensors = {x: torch.zeros(2, 9, 2, 8).to(dtype) for x in ("q", "k_cache", "v_cache")}
        message = f"^\\w+ must be float16, bfloat16, float32 or float64, got {dtype}$"
        with pytest.raises(TypeError, match=message):
            mk.flash_attn_with_kvcache(**tensors)


def test_zero_query_heads_are_refused():
    q, k = torch.zeros(1, 3, 0, 8), torch.zeros(1, 3, 1, 8)
    cu_seqlens = int32(0, 3)
    options = None, None, 3, 3, None, -1, 0, 0.0, None, False
    step = k, k, int32(2), 1, None, None, None, None, 3, 1.0, -1, 0, 0.0, None, False, 0, None
    calls = {
        "attention": lambda: mk.attention(q, k, k),
        "flash": lambda: mk.flash_attn_func(q, k, k),
        "varlen": lambda: mk.flash_attn_varlen_func(q[0], k[0], k[0], cu_seqlens, cu_seqlens, 3, 3),
        "kvcache": lambda: mk.flash_attn_with_kvcache(q, k, k, cache_seqlens=2),
        "operator": lambda: ops.attention_forward(q, k, k, *options),
        "cached": lambda: ops.cached_attention(q, None, None, *step),
    }
    message = "q's number of heads must be a positive multiple of (k|k_cache)'s, got 0 and 1"
    for name, call in calls.items():
        error = RuntimeError if name in ("operator", "cached") else ValueError
        with pytest.raises((error, ValueError), match=message):
            call()


OUT_OF_RANGE = [
    ({"rows": int32(0, 1 << 24)}, "rows must be in .0, 1., got 0 to 16777216"),
    ({"rows": int32(-(1 << 24), 0)}, "rows must be in .0, 1., got -16777216 to 0"),
    ({"block_table": int32(0, 1 << 24).view(2, 1)}, "block_table must be in .0, 1., got 0 to 167"),
    ({"block_table": int32(-1, 0).view(2, 1)}, "block_table must be in .0, 1., got -1 to 0"),
    ({"cu_seqlens": int32(0, 1 << 26, 4)}, "cu_seqlens must begin with 0, end with 4"),
    ({"cu_seqlens": int32(0, -1, 4)}, "cu_seqlens must begin with 0, end with 4"),
    ({"lengths": int32(0, -3)}, "lengths must be in .0, 2147483647., got -3 to 0"),
]


@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE)
def test_indices_out_of_range_are_refused(change, message, backend, device):
    """Invalid indices would corrupt memory. Compiled calls and calls by name check them, too."""
    if device.type != "cpu":
        pytest.skip("indices on a GPU are not checked, because reading them synchronizes")
    arguments = {**RING, "max_seqlen": 3, "rows": None, "block_table": None, **change}
    arguments |= {"k_cache": RING["k_cache"].clone(), "v_cache": RING["v_cache"].clone()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.rolling_cache_update(**arguments)
    del arguments["rows"], arguments["block_table"]
    if arguments.keys() & change.keys():
        compiled = torch.compile(mk.rolling_cache_update_, backend="eager", fullgraph=True)
        with pytest.raises(ValueError, match=message):
            mk.rolling_cache_update_(**arguments)
        with pytest.raises((ValueError, RuntimeError), match=message):
            compiled(**arguments)
    assert not arguments["k_cache"].any()
    assert not arguments["v_cache"].any()


def test_huge_windows_are_unbounded():
    q, k, v = (torch.randn(1, 5, h, 8) for h in (4, 2, 2))
    expected = mk.attention(q, k, v, causal=False)
    for far in (5, 1 << 30, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**70):
        out = mk.attention(q, k, v, causal=False, window_size=(far, far))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            mk.attention(q, k, v, sliding_window=far), mk.attention(q, k, v, causal=True)
        )
    for far in (5, 2**31, 2**62, 2**63 - 1):
        out, _ = ops.attention_forward(q, k, v, *[None] * 2, 5, 5, None, far, far, 0.0, None, False)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("slopes", [None, torch.zeros(1)], ids=["plain", "alibi"])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_weights_of_large_scores_sum_to_one(size, slopes, torch_backend):
    """Rounding errors of large scores must not change the sum of the weights, or its gradient.

    All scores are equal, and v is 1, so that every output is 1.
    """
    q = torch.full((1, 4, 1, 16), size, requires_grad=True)
    v = torch.ones_like(q, requires_grad=True)
    for dtype in (torch.float32, torch.float64):  # computed by csrc and by PyTorch
        inputs = q.to(dtype), q.detach().to(dtype), v.to(dtype)
        out, _, _ = mk.flash_attn_func(*inputs, alibi_slopes=slopes, return_attn_probs=True)
        torch.testing.assert_close(out, torch.ones_like(out))
        (dv,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(dv, torch.ones_like(v))


def test_large_logits_lose_no_precision(backend, device):
    """The loss depends on differences of logits, whose precision must not depend on their size."""
    hidden = torch.full((3, 1), 1e5, device=device, requires_grad=True)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0], device=device)[:, None]
    targets = torch.tensor([0, 3, 1], device=device)
    for smoothing in (0.0, 0.5):
        loss = mk.linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing)
        exact = hidden.detach().double().requires_grad_()
        logits = exact @ weight.double().mT
        expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        grads = torch.autograd.grad(loss, hidden) + torch.autograd.grad(expected, exact)
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-6, atol=1e-6)
