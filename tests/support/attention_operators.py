"""Rows of the table of operators for attention and the rolling cache."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

import mistral_kernels as mk
from mistral_kernels.ops import reference
from support.attention_cases import definition_of
from support.operator_case import Bad, Inputs, Missing, OperatorCase

eager = reference.eager_arithmetic()
HEADS, KV_HEADS = 4, 2
CAPACITY, WINDOW = 30, 20
Device = torch.device | str


def int32(*values: int, device: Device = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def heads(tokens: tuple[int, ...], dtype: torch.dtype, device: Device, width: int) -> Inputs:
    return {
        name: torch.randn(*tokens, n, width, device=device).to(dtype)
        for name, n in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
    }


def rectangular(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    return heads((2, tokens), dtype, device, width)


def packed(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    """Return a packed batch: one sequence of `tokens` tokens and one of 2; both empty for 0."""
    total = tokens + (2 if tokens else 0)
    names = "cu_seqlens_q", "cu_seqlens_k"
    ends = {name: int32(0, tokens, total, device=device) for name in names}
    longest = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max(tokens, 2))
    return {**heads((total,), dtype, device, width), **ends, **longest}


def attend_per_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, definition: Inputs, **rest: Any
) -> Tensor:
    ends = cu_seqlens_q.tolist()
    rows = [slice(*x) for x in itertools.pairwise(ends)]
    return torch.cat(
        [reference.attention(q[None, x], k[None, x], v[None, x], **definition)[0][0] for x in rows]
    )


SLOPES = torch.ones(4)
RECTANGULAR_BAD = (
    Bad({"q": lambda x: x[0]}, ValueError, r"^q must be \(batch, seqlen, heads, head_dim\), got "),
    Bad({"k": lambda x: x[0]}, ValueError, r"^k must be \(batch, seqlen, heads, head_dim\), got "),
    *(
        Bad({name: torch.tensor(1.0)}, ValueError, rf"^{name} must be .*, got \(\)$")
        for name in "qkv"
    ),
    Bad({"v": lambda x: x[:, :2]}, ValueError, r"v must be .2, 3, 2, 16., got \(2, 2, 2, 16\)"),
    Bad(
        dict.fromkeys("kv", lambda x: x[..., :4]), ValueError, "k must have q's head_dim 16, got 4"
    ),
    Bad({"q": lambda x: x[:, :, :3]}, ValueError, "multiple of k's, got 3 and 2"),
    Bad(dict.fromkeys("kv", lambda x: x[:, :, :0]), ValueError, "multiple of k's, got 4 and 0"),
    Bad({"q": lambda x: x[:, :, :0]}, ValueError, "multiple of k's, got 0 and 2"),
    Bad(dict.fromkeys("qkv", lambda x: x[..., :0]), ValueError, r"q's head_dim must .*, got 0"),
    Bad(dict.fromkeys("qkv", torch.ones(1, 1, 1, 257)), ValueError, r"be in \[1, 256\], got 257"),
    Bad(dict.fromkeys("kv", lambda x: x[:1]), ValueError, "k must have q's batch size 2, got 1"),
    *(
        Bad({"softcap": x}, ValueError, f"^softcap must be 0, or in .1.2e-38, 3.4e.38., got {x}$")
        for x in (-1.0, 1e-46, math.nan)
    ),
    Bad({"softcap": 1e39}, ValueError, r"^softcap must be 0, or in .*, got 1e\+39$"),
    Bad({"softcap": "1"}, TypeError, "softcap must be a number, got '1'"),
    Bad({"softmax_scale": 0.0}, ValueError, "softmax_scale must be in .*, got 0.0"),
    Bad({"softmax_scale": math.nan}, ValueError, "softmax_scale must .*, got nan"),
    Bad({"softmax_scale": True}, TypeError, "softmax_scale must be a number, got True"),
    Bad({"causal": 0.25}, TypeError, "causal must be True or False, got 0.25"),
    Bad({"cu_seqlens_k": int32(0, 5)}, ValueError, "cu_seqlens_k must be None without cu"),
    Bad({"max_seqlen_q": 5}, ValueError, "max_seqlen_q must be None .*, got 5;"),
    Bad({"cu_seqlens_q": int32(0, 5)}, ValueError, r"q must be \(tokens, heads, head_dim\), got"),
    Bad({"alibi_slopes": SLOPES.int()}, TypeError, "alibi_slopes must be float16, .*, got torch.i"),
    Bad({"alibi_slopes": SLOPES[:2]}, ValueError, r"alibi_slopes must be .4,. or .2, 4., got .2,."),
    Bad({"alibi_slopes": SLOPES.to("meta")}, ValueError, "alibi_slopes must be on cpu like q, got"),
    Bad({"sliding_window": 0}, ValueError, "sliding_window must be positive .* got 0"),
    Bad({"sliding_window": -3}, ValueError, "sliding_window must be positive"),
    Bad({"sliding_window": 2.0}, TypeError, "sliding_window must be an integer or None"),
    Bad(
        {"sliding_window": None, "window_size": (-2, 0)},
        ValueError,
        r"-1 for no bound, got \(-2, 0\)",
    ),
    Bad(
        {"sliding_window": 3, "window_size": (2, 0)}, ValueError, "sliding_window must be None with"
    ),
)


def attention_row(
    name: str,
    bad: tuple[Bad, ...] = (),
    backends: tuple[str, ...] = ("torch", "csrc", "triton"),
    **options: Any,
) -> OperatorCase:
    is_packed = name.endswith("packed")
    definition = definition_of(options)

    def plain(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        if is_packed:
            return attend_per_sequence(q, k, v, definition=definition, **rest)
        return reference.attention(q, k, v, **definition)[0]

    by_tokens, *others = [("qkv", (dim,)) for dim in ((0, 1) if is_packed else (1, 0, 2))]
    return OperatorCase(
        name=name,
        function=functools.partial(mk.attention, **options),
        reference=eager(plain),
        make=packed if is_packed else rectangular,
        width=16,
        differentiable=("q", "k", "v"),
        public_name="attention",
        operators=frozenset({"attention_forward", "attention_backward"}),
        kernels=frozenset({"_forward_kernel", "_delta_kernel", "_dkdv_kernel", "_dq_kernel"}),
        traffic=Missing("test_attention_kernels.py::test_work_is_proportional_to_the_window"),
        matrix=Missing("test_attention_compiled.py::test_compile_matrix"),
        far=(by_tokens,),
        far_slow=tuple(others),
        large=((300, 16),),
        frozen=(("q",), ("k",), ("v",), ("k", "v"), ("q", "k")),
        layouts=(
            *("rows apart", "groups apart", "transposed", "heads first", "elements apart"),
            *(() if is_packed else ("expanded",)),
        ),
        empty=(0, 16),
        compiled=True if "triton" in backends else Missing("the graph is that of attention"),
        compiled_tokens=(30, 41, 65),
        backends=backends,
        optional=("cu_seqlens_q", "cu_seqlens_k"),
        triton_dtypes=(torch.float16,),
        bad=bad,
    )


def ring(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    """Return rolling caches and new tokens for two sequences: `tokens` and 2; none for 0."""
    counts = (tokens, 2 if tokens else 0)
    tensors = heads((sum(counts),), dtype, device, width)
    shape = 2, CAPACITY, KV_HEADS, width
    caches = {x: torch.randn(shape, device=device).to(dtype) for x in ("k_cache", "v_cache")}
    return {
        **tensors,
        **caches,
        "lengths": int32(4, 41, device=device),
        "cu_seqlens": int32(0, tokens, sum(counts), device=device),
        "max_seqlen": max(counts),
    }


def update_inputs(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    inputs = ring(tokens, dtype, device, width)
    names = ("k_cache", "v_cache", "k", "v", "lengths", "cu_seqlens", "max_seqlen")
    return {name: inputs[name] for name in names}


def rotary_update_inputs(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    inputs = update_inputs(tokens, dtype, device, width)
    cos, sin = mk.rotary_tables(tokens + 50, width, 1e4, device)
    q = torch.randn(len(inputs["k"]), HEADS, width, device=device).to(dtype)
    return {**inputs, "q": q, "cos": cos, "sin": sin}


def updated(k_cache: Tensor, v_cache: Tensor, **rest: Any) -> tuple[Tensor, ...]:
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    q = mk.rolling_cache_update_(k_cache, v_cache, **rest)
    return (k_cache, v_cache) if q is None else (q, k_cache, v_cache)


def updated_by_definition(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    q: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, ...]:
    rotated = ()
    if q is not None:
        counts = cu_seqlens.diff().tolist()
        starts = zip(lengths.tolist(), counts, strict=True)
        positions = torch.cat([torch.arange(n, n + count) for n, count in starts])
        q, k = reference.apply_rotary(q, k, cos, sin, positions.to(k.device))
        rotated = (q,)
    return (*rotated, *reference.rolling_cache_update(k_cache, v_cache, k, v, lengths, cu_seqlens))


def decode_inputs(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    """Return one query per sequence; its key and value are already in the ring."""
    tensors = heads((tokens,), dtype, device, width)
    shape = tokens, CAPACITY, KV_HEADS, width
    caches = {x: torch.randn(shape, device=device).to(dtype) for x in ("k_cache", "v_cache")}
    return {
        "q": tensors["q"],
        "k": None,
        "v": None,
        **caches,
        "lengths": torch.randint(CAPACITY, 99, (tokens,), dtype=torch.int32, device=device),
        "cu_seqlens": torch.arange(tokens + 1, dtype=torch.int32, device=device),
        "max_seqlen": 1,
    }


def attended_by_definition(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:
    if k is None:  # the newest token is in the cache, in the slot of one outside the window
        newest = torch.arange(len(lengths), device=q.device), lengths % CAPACITY
        k, v = k_cache[newest], v_cache[newest]
    where = {"lengths": lengths, "cu_seqlens": cu_seqlens, "sliding_window": WINDOW}
    return reference.rolling_cache_attention(q, k, v, k_cache, v_cache, **where)


def flat_cache_inputs(tokens: int, dtype: torch.dtype, device: Device, width: int) -> Inputs:
    inputs = rectangular(tokens, dtype, device, width)
    shape = 2, tokens + 8, KV_HEADS, width
    caches = {x: torch.randn(shape, device=device).to(dtype) for x in ("k_cache", "v_cache")}
    seqlens = int32(tokens + 3, tokens + 8, device=device)
    return {"q": inputs["q"], **caches, "cache_seqlens": seqlens}


def flat_by_definition(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor
) -> Tensor:
    window = {"causal": True, "window_size": (WINDOW - 1, 0)}
    outs = [
        reference.attention(q[i : i + 1], k_cache[i : i + 1, :n], v_cache[i : i + 1, :n], **window)
        for i, n in enumerate(cache_seqlens.tolist())
    ]
    return torch.cat([out for out, _ in outs])


def bad_argument(name: str, message: str, new: Any, error: type[Exception] = ValueError) -> Bad:
    return Bad({name: new}, error, message)


# For the arguments that both functions of the rolling cache take.
RING_BAD = (
    bad_argument(
        "k_cache", r"^k_cache must be \(batch, capacity, .* > 0, got .30, 2, 16.", lambda x: x[0]
    ),
    bad_argument("k_cache", r"^k_cache must be .* > 0, got \(2, 0, 2, 16\)", lambda x: x[:, :0]),
    bad_argument(
        "k_cache", r"^lengths must be .0,., one for each row of k_cache, got .2,.", lambda x: x[:0]
    ),
    bad_argument(
        "v_cache", r"^v_cache must be .2, 30, 2, 16., got \(2, 4, 2, 16\)", lambda x: x[:, :4]
    ),
    bad_argument("k", r"^k must be \(5, 2, 16\), got \(5, 1, 16\)$", lambda x: x[:, :1]),
    bad_argument("v", r"^v must be \(5, 2, 16\), got \(2, 16\)$", lambda x: x[0]),
    bad_argument("v", r"^v must be \(5, 2, 16\), got \(3, 2, 16\)$", lambda x: x[:3]),
    bad_argument(
        "lengths", r"^lengths must be .2,., one for each row .* got .3,.$", int32(0, 3, 1)
    ),
    bad_argument(
        "lengths", "^lengths must be torch.int32, got torch.int64$", lambda x: x.long(), TypeError
    ),
    bad_argument("lengths", r"^lengths must be in \[0, 2147483647\], got -1 to 0$", int32(0, -1)),
    bad_argument("cu_seqlens", r"^cu_seqlens must be \(3,\), got \(2,\)$", int32(0, 5)),
    *(
        bad_argument(
            "cu_seqlens",
            rf"^cu_seqlens must begin with 0, end with 5 .* got \[{', '.join(map(str, ends))}\]",
            int32(*ends),
        )
        for ends in ((0, 3, 4), (1, 3, 5), (0, 6, 5), (0, 1 << 26, 5))
    ),
    bad_argument("max_seqlen", r"steps of 0 to max_seqlen 2, got \[0, 3, 5\]", 2),
)


def update_row(rotary: bool) -> OperatorCase:
    return OperatorCase(
        name="rolling_cache_update_ rotary" if rotary else "rolling_cache_update_",
        function=mk.rolling_cache_update_,
        pure=updated,
        writes=("k_cache", "v_cache"),
        reference=eager(updated_by_definition),
        make=rotary_update_inputs if rotary else update_inputs,
        width=16,
        differentiable=("k_cache", "v_cache", "k", "v", *(("q",) if rotary else ())),
        public_name="rolling_cache_update_",
        operators=frozenset({"rotary_rolling_cache_update"} | {"rotary"})
        if rotary
        else frozenset({"rolling_cache_update"}),
        kernels=frozenset({"_update_kernel"}),
        traffic=Missing("test_decode_kernels.py::test_bytes_moved_by_the_update"),
        matrix=Missing("test_decode_kernels.py::test_compile_matrix"),
        far=((("k_cache", "v_cache"), (0,)), (("k", "v"), (0,))),
        large=((40, 16),),
        frozen=(("k_cache", "v_cache"), ("k", "v")),
        layouts=("rows apart", "transposed", "heads first", "elements apart"),
        unit_stride=("k_cache", "v_cache", *(("cos", "sin") if rotary else ())),
        empty=(0, 16),
        twice_differentiable=True,
        transforms=Missing("test_transforms.py::test_cache_update_raises_under_transforms"),
        compiled=Missing("test_decode_kernels.py::test_decode_step_is_one_graph"),
        triton_dtypes=(torch.float16,),
        optional=("q", "cos", "sin"),
        bad=RING_BAD,
    )


CACHED_ATTENTION_BAD = (
    *RING_BAD,
    bad_argument("q", r"^k must be \(3, 2, 16\), got \(5, 2, 16\)$", lambda x: x[:3]),
    bad_argument("q", "multiple of k_cache's, got 3 and 2", lambda x: x[:, :3]),
    bad_argument("q", "multiple of k_cache's, got 0 and 2", lambda x: x[:, :0]),
    bad_argument("q", r"^q must be \(tokens, heads, head_dim", lambda x: x[None]),
    bad_argument("k", "^k and v must both be given, or both be None", None),
    Bad({"k": None, "v": None}, ValueError, "unless each sequence has one new token, got 5 tok"),
    bad_argument("sliding_window", "^sliding_window must be positive", 0),
    bad_argument(
        "sliding_window", "^sliding_window must be an integer or None, got float", 1.5, TypeError
    ),
)


DECODE_BAD = (
    bad_argument("q", "^k_cache must have q's head_dim 4", lambda x: x[:, :, :4]),
    bad_argument("q", "multiple of k_cache's, got 3 and 2", lambda x: x[:, :3]),
)


def cached_attention_row(decode: bool) -> OperatorCase:
    caches = ("k_cache", "v_cache")
    return OperatorCase(
        name=f"rolling_cache_attention{' decode' if decode else ''}",
        function=functools.partial(mk.rolling_cache_attention, sliding_window=WINDOW),
        reference=eager(attended_by_definition),
        make=decode_inputs if decode else ring,
        width=16,
        differentiable=("q", *caches) if decode else ("q", "k", "v", *caches),
        public_name="attention",
        operators=frozenset({"cached_attention"})
        if decode
        else frozenset({"cached_attention", "attention_forward", "attention_backward"}),
        kernels=frozenset({"_decode_kernel"}),
        traffic=Missing("test_decode_kernels.py::test_each_key_is_read_once"),
        matrix=Missing("test_decode_kernels.py::test_compile_matrix"),
        far=((("k_cache", "v_cache"), (0,)), (("q",), (0,))),
        large=((40, 16),),
        frozen=(caches, ("q",)) if decode else (caches, ("k", "v"), ("q",)),
        layouts=("rows apart", "transposed", "heads first", "elements apart"),
        unit_stride=caches,
        empty=Missing("test_hard_calls.py::test_batch_without_sequences") if decode else (0, 16),
        twice_differentiable=Missing("PyTorch computes single tokens, and raises its own error")
        if decode
        else False,
        compiled=Missing("test_decode_kernels.py::test_decode_step_is_one_graph"),
        optional=("k", "v"),
        transforms=Missing("the transforms are those of rolling_cache_attention")
        if decode
        else True,
        triton_dtypes=(torch.float16,),
        bad=DECODE_BAD if decode else CACHED_ATTENTION_BAD,
    )


def flat_cache_row() -> OperatorCase:
    without_gradients = Missing("../test_kvcache.py::test_gradients_raise")
    return OperatorCase(
        name="flash_attn_with_kvcache",
        function=functools.partial(
            mk.flash_attn_with_kvcache, causal=True, window_size=(WINDOW - 1, 0)
        ),
        reference=eager(flat_by_definition),
        make=flat_cache_inputs,
        width=16,
        differentiable=(),
        public_name="flash_attn_with_kvcache",
        operators=frozenset({"cached_attention"}),
        kernels=frozenset({"_decode_kernel"}),
        traffic=Missing("test_decode_kernels.py::test_each_key_is_read_once"),
        matrix=Missing("test_decode_kernels.py::test_compile_matrix"),
        far=((("k_cache", "v_cache"), (0,)), (("q",), (1,))),
        large=((40, 16),),
        frozen=without_gradients,
        derivative=without_gradients,
        layouts=("rows apart", "transposed", "heads first"),
        empty=Missing("../test_kvcache.py::test_empty_inputs"),
        transforms=Missing("test_hard_calls.py::test_vmap_over_cache_lengths_is_refused"),
        checks=Missing("../test_kvcache.py::test_bad_input_raises_and_keeps_the_caches"),
        compiled=Missing("test_hard_calls.py::test_flat_cache_overflow_when_compiled"),
        triton_dtypes=(torch.float16,),
        bad=(),
    )


ATTENTION: tuple[OperatorCase, ...] = (
    attention_row("attention", sliding_window=WINDOW, bad=RECTANGULAR_BAD),
    # test_attention_kernels.py tests Triton's values for all options.
    attention_row("attention causal", backends=("torch", "csrc")),
    attention_row(
        "attention softcap", backends=("torch", "csrc"), sliding_window=WINDOW, softcap=0.8
    ),
    attention_row("attention packed", sliding_window=WINDOW),
    *map(update_row, (False, True)),
    *map(cached_attention_row, (False, True)),
    flat_cache_row(),
)
