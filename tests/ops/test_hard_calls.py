"""Regression tests of calls that once had wrong results or unclear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mistral_kernels as mk
from mistral_kernels.flash_attn import flash_attn_func
from mistral_kernels.ops import extension, reference

Q, KV = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 2, 8)
COS, SIN = mk.rotary_tables(16, 8, 1e4)
POSITIONS = torch.arange(4)[None]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("write", ["inference", "numpy", "data"])
def test_offsets_changed_without_a_new_version(write: str) -> None:
    """These writes do not increment the version counter of the tensor."""
    q, kv = Q[0], KV[0]
    with torch.inference_mode(write == "inference"):
        array = np.array([0, 4, 4, 4], dtype=np.int32)
        cu_seqlens = int32(0, 4, 4, 4) if write != "numpy" else torch.from_numpy(array)
        mk.attention(q, kv, kv, cu_seqlens_q=cu_seqlens)
        if write == "numpy":
            array[:] = [0, 1, 2, 4]
        else:
            target = cu_seqlens if write == "inference" else cu_seqlens.data
            target.copy_(int32(0, 1, 2, 4))
        out = mk.attention(q, kv, kv, cu_seqlens_q=cu_seqlens)
        parts = [
            mk.attention(q[None, a:b], kv[None, a:b], kv[None, a:b])[0]
            for a, b in ((0, 1), (1, 2), (2, 4))
        ]
        torch.testing.assert_close(out, torch.cat(parts))


def test_page_sizes_past_32_bits_are_refused() -> None:
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    token = torch.zeros(1, 1, 8)
    for page_size in (2**32, 2**32 + 1):
        cache = torch.zeros(0, page_size, 1, 8)
        with pytest.raises((ValueError, RuntimeError), match=r"k_cache must|block_table must"):
            torch.ops.mistral_kernels.rolling_cache_update(
                *(cache, cache.clone(), token, token, int32(5), int32(0, 1), 1),
                *(None, torch.zeros(1, 2, dtype=torch.int32)),
            )


FUNCTIONS = {
    "rms_norm": lambda q: mk.rms_norm(q, torch.ones(8)),
    "rms_norm residual": lambda q: torch.cat(mk.rms_norm(q, torch.ones(8), residual=q)),
    "swiglu": lambda q: mk.swiglu(q, q),
    "swiglu fused": lambda q: mk.swiglu(q),
    "attention": lambda q: mk.attention(q, q, q),
    "apply_rotary": lambda q: torch.cat(mk.apply_rotary(q, q, COS, SIN, POSITIONS)),
    "linear_cross_entropy": lambda q: mk.linear_cross_entropy(
        q[0, :, 0], torch.linspace(-1, 1, 40).view(5, 8), torch.arange(4)
    ),
}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_transforms(name: str) -> None:
    """torch.compile would ignore the backward of a Function in a transform, and return 0."""

    def loss(q: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](q).pow(3).sum()

    gradient = torch.func.grad(loss)
    expected = gradient(Q)
    assert expected.any()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(Q), expected)
    gradients = torch.func.vmap(gradient)
    batch = torch.stack([Q, 2 * Q])
    compiled = torch.compile(gradients, backend="aot_eager")(batch)
    torch.testing.assert_close(compiled, gradients(batch))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_with_the_same_tensor_twice(name: str) -> None:
    q = Q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(FUNCTIONS[name](q).square().sum(), q)
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(q).square().sum(), q)[0], expected)


def test_autocast_changes_nothing() -> None:
    """Operators compute in the dtype of their arguments, unlike PyTorch's operators."""
    q, kv = Q.clone().requires_grad_(), KV.clone()
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for options in ({}, {"alibi_slopes": slopes}):
        plain = mk.attention(q, kv, kv, **options)
        with torch.autocast("cpu", torch.bfloat16):
            out = mk.attention(q, kv, kv, **options)
            (gradient,) = torch.autograd.grad(out.sum(), q)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, plain, rtol=0, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), q)[0])


def test_sequence_of_the_maximal_length() -> None:
    """The length plus the new token exceeds int32."""
    cache = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    arguments = (int32(2**31 - 1), int32(0, 1), 1)
    for dtype in (torch.float32, torch.float64):
        caches = [cache.to(dtype)] * 2
        q = Q[0, :1].to(dtype)
        out = mk.rolling_cache_attention(q, None, None, *caches, *arguments, sliding_window=4)
        expected = reference.attention(q[None], *(x.to(dtype) for x in (cache, cache)))[0][0]
        torch.testing.assert_close(out, expected)


def test_batch_without_sequences() -> None:
    for dtype in (torch.float32, torch.float64):
        q, cache = torch.zeros(0, 1, 2, 8, dtype=dtype), torch.zeros(0, 4, 2, 8, dtype=dtype)
        assert mk.flash_attn_with_kvcache(q, cache, cache).shape == q.shape


@pytest.mark.parametrize("flag", [np.True_, torch.tensor(True), np.array([1.0, 2.0])], ids=repr)
def test_scale_that_is_not_a_number_is_refused(flag: object) -> None:
    with pytest.raises(TypeError, match=r"^softmax_scale must be a number, got "):
        flash_attn_func(Q, KV, KV, 0.0, flag)  # type: ignore[arg-type]


FLAT = {"k_cache": torch.zeros(2, 4, 2, 8), "v_cache": torch.zeros(2, 4, 2, 8)}
NEW = {"q": torch.ones(2, 2, 4, 8), "k": torch.ones(2, 2, 2, 8), "v": torch.ones(2, 2, 2, 8)}


@pytest.mark.parametrize(
    "change",
    [
        {"num_splits": 0.5},
        {"num_splits": 2**64},
        {"return_softmax_lse": "y"},
        {"softmax_scale": 10**400},
        {"softcap": 10**400},
        {"block_table": [0]},
        {"rotary_cos": [1.0]},
        {"cache_leftpad": 3},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_cache_is_written(change: dict[str, object]) -> None:
    caches = {name: x.clone() for name, x in FLAT.items()}
    (name,) = change
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
        mk.flash_attn_with_kvcache(**{**NEW, **caches, "cache_seqlens": 0, **change})
    assert not any(x.any() for x in caches.values())


def test_flat_cache_overflow_when_compiled() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mk.flash_attn_with_kvcache, backend="aot_eager")
    for lengths, fits in ((int32(2, 1), True), (int32(2, 3), False)):
        caches = {name: x.clone() for name, x in FLAT.items()}
        if fits:
            compiled(**NEW, **caches, cache_seqlens=lengths)
            assert caches["k_cache"][0, 2:].all()
            assert not caches["k_cache"][0, :2].any()
        else:
            with pytest.raises(RuntimeError, match=r"cache_seqlens must be in \[0, 2\]"):
                compiled(**NEW, **caches, cache_seqlens=lengths)


def test_vmap_over_cache_lengths_is_refused() -> None:
    def call(lengths: torch.Tensor) -> torch.Tensor:
        return mk.flash_attn_with_kvcache(NEW["q"], **FLAT, cache_seqlens=lengths)

    with pytest.raises(
        NotImplementedError, match=r"^flash_attn_with_kvcache does not support torch"
    ):
        torch.func.vmap(call)(torch.ones(3, 2, dtype=torch.int32))


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin", "alibi_slopes"])
def test_gradients_of_tables_and_slopes_are_refused(name: str) -> None:
    tables = {"rotary_cos": COS, "rotary_sin": SIN, "alibi_slopes": torch.ones(4)}
    tables[name] = tables[name].clone().requires_grad_()
    caches = {key: x.clone() for key, x in FLAT.items()}
    with pytest.raises(NotImplementedError, match="no backward pass"):
        mk.flash_attn_with_kvcache(**NEW, **caches, cache_seqlens=0, **tables)


def test_batched_gradients_of_a_loss() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = mk.linear_cross_entropy(hidden, KV[0, :, 0], torch.zeros(4).long())
    (dhidden,) = torch.autograd.grad(loss, hidden, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(dhidden[1], 2 * dhidden[0])


@pytest.mark.parametrize("bad", [None, 3, [1.0], np.ones(8), "x"], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("function", "names"),
    [
        (mk.flash_attn_func, "q k v"),
        (mk.flash_attn_with_kvcache, "q k_cache v_cache"),
    ],
)
def test_arguments_that_are_not_tensors(function: object, names: str, bad: object) -> None:
    for name in names.split():
        arguments = {other: bad if other == name else Q for other in names.split()}
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got {type(bad).__name__}$"):
            function(**arguments)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 8, 1e4), "num_positions must be >= 0, got -1"),
        ((4, -2, 1e4), "head_dim must be even and positive, got -2"),
        ((4, 8, 0.0), "theta must be positive and finite, got 0.0"),
        ((4, 8, float("nan")), "theta must be positive and finite, got nan"),
    ],
)
def test_bad_rotary_tables_are_refused(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        mk.rotary_tables(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leftpad_in_a_wrapped_ring(dtype: torch.dtype) -> None:
    """`leftpad` counts positions, which differ from the slots of a wrapped ring."""
    keys, values = torch.randn(2, 1, 7, 2, 8, dtype=dtype)
    # Positions 3 to 6 in 4 slots.
    caches = [torch.cat((x[:, 4:], x[:, 3:4]), 1) for x in (keys, values)]
    q = Q[0, :1].to(dtype)
    for leftpad in (0, 4, 6):
        out = torch.ops.mistral_kernels.cached_attention(
            *(q, None, None, *caches, int32(6), 1, None, int32(leftpad), None, int32(0, 1), 1),
            *(None, -1, 0, 0.0, None, False, 0, None),
        )[0]
        first = max(leftpad, 3)
        seen = keys[:, first:], values[:, first:]
        torch.testing.assert_close(out, reference.attention(q[None], *seen)[0][0])
