"""Arguments that operators refuse, and results at the edges of what they take."""

from __future__ import annotations

import pytest
import torch
from support.fuzz_operators import OPERATORS

import mistral_kernels as mk
from mistral_kernels.ops import extension

ops = torch.ops.mistral_kernels


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_on_another_device(name):
    """Each by its name, whichever the dispatcher looks at: nothing is computed from the others."""
    operator = getattr(ops, name).default
    names = [argument.name for argument in operator._schema.arguments]
    for _ in range(20):  # several kinds of arguments
        arguments = OPERATORS[name][2](torch.float32)
        tensors = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
        for i in tensors if len(tensors) > 1 else []:
            moved = [x.to("meta") if j == i else x for j, x in enumerate(arguments)]
            named = i if i != tensors[0] else tensors[1]
            with pytest.raises(ValueError, match=rf"^{names[named]} must be on \w+ like \w+, got "):
                operator(*moved)


X, W = torch.ones(3, 8), torch.ones(8)
Q, K = torch.ones(2, 5, 4, 8), torch.ones(2, 5, 2, 8)
COS = torch.ones(9, 4)
RING = {
    "k_cache": torch.zeros(2, 6, 2, 8),
    "v_cache": torch.zeros(2, 6, 2, 8),
    "k": torch.ones(4, 2, 8),
    "v": torch.ones(4, 2, 8),
    "lengths": int32(0, 3),
    "cu_seqlens": int32(0, 1, 4),
}
FUNCTIONS = {
    "rms_norm": (mk.rms_norm, {"x": X, "weight": W, "residual": X}),
    "swiglu": (mk.swiglu, {"gate": X, "up": X}),
    "apply_rotary": (
        mk.apply_rotary,
        {"q": Q, "k": K, "cos": COS, "sin": COS, "positions": torch.ones(2, 5).long()},
    ),
    "linear_cross_entropy": (
        mk.linear_cross_entropy,
        {"hidden": X, "weight": torch.ones(5, 8), "targets": torch.ones(3).long()},
    ),
    "attention": (mk.attention, {"q": Q, "k": K, "v": K, "alibi_slopes": torch.ones(4)}),
    "packed_attention": (
        mk.attention,
        {"q": Q[0], "k": K[0], "v": K[0], "cu_seqlens_q": int32(0, 5), "cu_seqlens_k": int32(0, 5)},
    ),
    "flash_attn_with_kvcache": (
        mk.flash_attn_with_kvcache,
        {"q": Q, "k_cache": K, "v_cache": K, "cache_seqlens": int32(4, 5)},
    ),
    "rolling_cache_update_": (lambda **x: mk.rolling_cache_update_(**x, max_seqlen=3), RING),
    "rolling_cache_attention": (
        lambda **x: mk.rolling_cache_attention(**x, max_seqlen=3, sliding_window=4),
        {"q": torch.ones(4, 4, 8), **RING},
    ),
}
CASES = [(name, argument) for name, (_, arguments) in FUNCTIONS.items() for argument in arguments]


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_arguments_on_another_device(name, argument, trained):
    function, arguments = FUNCTIONS[name]
    arguments = {
        x: y.clone().requires_grad_(trained and y.is_floating_point())
        for x, y in arguments.items()
        if not (trained and x in ("k_cache", "v_cache"))  # leaves, which may not be written
    }
    if len(arguments) < len(FUNCTIONS[name][1]):
        return
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match=r"\w+ must be .*on (cpu|meta).*, got .*(cpu|meta)"):
        function(**arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_dtypes(name):
    """One message for a dtype that nothing here computes with."""
    function, arguments = FUNCTIONS[name]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64):
        changed = {x: y.to(dtype) if y.is_floating_point() else y for x, y in arguments.items()}
        message = f"^\\w+ must be float16, bfloat16, float32 or float64, got {dtype}$"
        with pytest.raises(TypeError, match=message):
            function(**changed)


def test_no_query_heads():
    """A group of query heads would be empty."""
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
    for call in calls.values():
        with pytest.raises(ValueError, match=r"1 heads must divide q's 0, and both be positive"):
            call()
    if extension.load("cpu"):
        with pytest.raises(RuntimeError, match="must divide the query heads.* got 1 and 0"):
            ops.attention(q, k, k, torch.empty_like(q), None, 9, 9, 1.0, 0.0)


OUT_OF_RANGE = [
    ({"rows": int32(0, 1 << 24)}, "rows must be in .0, 1., got 0 to 16777216"),
    ({"rows": int32(-(1 << 24), 0)}, "rows must be in .0, 1., got -16777216 to 0"),
    ({"block_table": int32(0, 1 << 24).view(2, 1)}, "block_table must be in .0, 1., got 0 to 167"),
    ({"block_table": int32(-1, 0).view(2, 1)}, "block_table must be in .0, 1., got -1 to 0"),
    ({"cu_seqlens": int32(0, 1 << 26, 4)}, "cu_seqlens must rise from 0 to the 4 new tokens"),
    ({"cu_seqlens": int32(0, -1, 4)}, "cu_seqlens must rise from 0 to the 4 new tokens"),
    ({"lengths": int32(0, -3)}, "lengths must be in .0, 2147483647., got -3 to 0"),
]


@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE)
def test_indices_out_of_range(change, message, backend, device):
    """They decide which memory is written: called by the operator's name, and in compiled code."""
    if device.type != "cpu":
        pytest.skip("to read them would wait for the GPU")
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


def test_windows_past_all_numbers():
    """A distance that reaches past any sequence is no bound, however large."""
    q, k, v = (torch.randn(1, 5, h, 8) for h in (4, 2, 2))
    expected = mk.attention(q, k, v, causal=False)
    for far in (5, 1 << 30, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**70):
        out = mk.attention(q, k, v, causal=False, window_size=(far, far))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            mk.attention(q, k, v, sliding_window=far), mk.attention(q, k, v, causal=True)
        )
    if extension.load("cpu"):
        for far in (5, 2**31, 2**62, 2**63 - 1):
            out = torch.empty_like(q)
            ops.attention(q, k, v, out, None, far, far, 8**-0.5, 0.0)
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("slopes", [None, torch.zeros(1)], ids=["plain", "alibi"])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_large_scores(size, slopes, torch_backend):
    """Weights add up to one, and gradients with them, where a rounding of a score is no small one.

    Scores of 1e10 are all equal: each row of the output is a mean of ones.
    """
    q = torch.full((1, 4, 1, 16), size, requires_grad=True)
    v = torch.ones_like(q, requires_grad=True)
    for dtype in (torch.float32, torch.float64):  # csrc, and PyTorch
        inputs = q.to(dtype), q.detach().to(dtype), v.to(dtype)
        out, _, _ = mk.flash_attn_func(*inputs, alibi_slopes=slopes, return_attn_probs=True)
        torch.testing.assert_close(out, torch.ones_like(out))
        (dv,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(dv, torch.ones_like(v))


def test_large_logits(backend, device):
    """A loss is of differences: a logit's size rounds away no part of it."""
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
