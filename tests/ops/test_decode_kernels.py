"""Tests of the Triton kernels of the rolling cache: values, bits, memory traffic, launches."""

from __future__ import annotations

import math

import ptxrun
import pytest
import torch
from support.helpers import TARGETS, assert_as_accurate, compile_only
from support.rolling_cache_cases import CASES, assert_same_bits, expected, make_arguments

from mistral_kernels.ops import reference
from mistral_kernels.ops.attention import rolling_cache_attention
from mistral_kernels.ops.attention.checks import check_cached_attention
from mistral_kernels.ops.attention.kernels.decode import attention_decode
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.rolling_cache import (
    _update_torch,
    _update_triton,
    rolling_cache_update_,
)
from mistral_kernels.ops.rotary import apply_rotary, rotary_tables

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROTARY = [None, "half-split", "interleaved"]
eager = reference.eager_arithmetic()(reference.rolling_cache_attention)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_inputs(lengths, counts, capacity, heads, head_dim, dtype, device):
    """Return new tokens and full rings as arguments of `rolling_cache_attention`."""
    num_heads, num_kv_heads = heads
    total, batch = sum(counts), len(counts)
    tokens = {
        name: torch.randn(total, n, head_dim, device=device).to(dtype)
        for name, n in zip("qkv", (num_heads, num_kv_heads, num_kv_heads), strict=True)
    }
    shape = (batch, capacity, num_kv_heads, head_dim)
    rings = {x: torch.randn(shape, device=device).to(dtype) for x in ("k_cache", "v_cache")}
    where = {
        "lengths": int32(lengths, device),
        "cu_seqlens": int32([0, *counts], device).cumsum(0, dtype=torch.int32),
    }
    return {**tokens, **rings, **where}


def assert_matches(inputs, counts, window):
    """Check the output with fresh keys and, for single tokens, with all keys in the ring."""
    definition = {"sliding_window": window}
    exact = reference.rolling_cache_attention(
        **{n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}, **definition
    )
    options = {"sliding_window": window, "max_seqlen": max(counts)}
    out = rolling_cache_attention(**inputs, **options)
    assert_as_accurate(out, eager(**inputs, **definition), exact, "out")
    if set(counts) == {1} and window <= inputs["k_cache"].shape[1]:
        q = inputs.pop("q")
        rolling_cache_update_(**inputs, max_seqlen=1)
        out = rolling_cache_attention(q, **{**inputs, "k": None, "v": None}, **options)
        assert_as_accurate(out, rounded_twice(out, exact), exact, "out, from the ring alone")


def rounded_twice(out, exact):
    """Return a result with the error of rounding the exact one twice."""
    return (exact.float() * (1 + torch.finfo(out.dtype).eps)).to(out.dtype)


# Lengths, new tokens per sequence, capacity, window, heads, head_dim, dtype.
COMPILED = [
    ([500, 3], [1, 1], 300, 300, (8, 2), 64, BF16),
    pytest.param(*([500, 3, 0], [50, 4, 0], 300, 200, (8, 2), 64, BF16), marks=pytest.mark.long),
]
# Lengths, new tokens per sequence, capacity, window.
SPANS = [
    ([0, 7, 29, 30, 31, 1000], [1] * 6, 30, 30),
    ([700, 2], [1, 1], 640, 640),
    ([640, 639], [1, 1], 640, 100),
    ([5, 0], [3, 0], 600, 600),
    ([900, 100], [2, 3], 600, 600),
    ([900, 100], [16, 1], 600, 300),
    ([0, 300, 10], [70, 200, 1], 128, 128),
    ([50], [400], 128, 30),
    ([1000, 20], [130, 31], 999, 5000),
    ([2**31 - 40], [1], 33, 33),
]
HEADS = [(4, 2), (3, 3), (8, 1), (40, 2)]
MANY = [
    (*span, HEADS[(i + j) % 4], head_dim, (F32, F16)[(i + j) % 2])
    for i, span in enumerate(SPANS)
    for j, head_dim in enumerate([64, 24, 128, 256][: 4 if i == 0 else 2])
]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("lengths", "counts", "capacity", "window", "heads", "head_dim", "dtype"),
    [*COMPILED, *(pytest.param(*case, marks=pytest.mark.interpreted) for case in MANY)],
    ids=str,
)
def test_values(lengths, counts, capacity, window, heads, head_dim, dtype, triton_backend, device):
    inputs = make_inputs(lengths, counts, capacity, heads, head_dim, dtype, device)
    assert_matches(inputs, counts, window)


@pytest.mark.kernels
@pytest.mark.interpreted
def test_gradients(triton_backend, device):
    """Check gradients, which are computed per sequence by the forward and backward kernels."""
    names = ("q", "k", "v", "k_cache", "v_cache")
    counts = [3, 40]
    inputs = make_inputs([500, 9], counts, 30, (4, 2), 16, F32, device)
    for name in names:
        inputs[name].requires_grad_()
    out = rolling_cache_attention(**inputs, max_seqlen=40, sliding_window=25)
    cotangent = torch.randn_like(out)
    actual = torch.autograd.grad(out, [inputs[name] for name in names], cotangent)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    exact = reference.rolling_cache_attention(**wide, sliding_window=25)
    expected_grads = torch.autograd.grad(exact, [wide[name] for name in names], cotangent.double())
    for a, b in zip(actual, expected_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.kernels
@pytest.mark.parametrize("fresh", [False, True], ids=["ring", "fresh"])
def test_unseen_slots_may_hold_anything(fresh, triton_backend, device):
    """Check that NaN in unwritten slots and outside the window does not reach the output."""
    lengths, window = [40, 700], 100
    inputs = make_inputs(lengths, [1, 1], 300, (8, 2), 64, F16, device)
    if not fresh:
        inputs["k"] = inputs["v"] = None
    expected_out = rolling_cache_attention(**inputs, max_seqlen=1, sliding_window=window)
    for sequence, length in enumerate(lengths):
        end = length if fresh else length + 1
        seen = {p % 300 for p in range(max(0, length + 1 - window), end)}
        unseen = [slot for slot in range(300) if slot not in seen]
        for name in ("k_cache", "v_cache"):
            inputs[name][sequence, unseen] = math.nan
    out = rolling_cache_attention(**inputs, max_seqlen=1, sliding_window=window)
    assert torch.equal(out, expected_out)
    assert not out.isnan().any()


@pytest.mark.kernels
def test_bits_do_not_depend_on_the_batch(triton_backend, device):
    """Check that a sequence has the same bits alone, in a batch and in repeated calls."""
    inputs = make_inputs([500, 3, 299], [1, 1, 1], 300, (8, 2), 64, F16, device)
    inputs["k"] = inputs["v"] = None
    options = {"max_seqlen": 1, "sliding_window": 300}
    together = rolling_cache_attention(**inputs, **options)
    assert torch.equal(rolling_cache_attention(**inputs, **options), together)
    for i in range(3):
        alone = {name: inputs[name][i : i + 1] for name in ("q", "k_cache", "v_cache", "lengths")}
        alone = {**inputs, **alone, "cu_seqlens": int32([0, 1], device)}
        assert torch.equal(rolling_cache_attention(**alone, **options), together[i : i + 1])


@pytest.mark.kernels
def test_counters(triton_backend, device):
    """Check that the caller's counters are used, and are 0 again after the call."""
    inputs = make_inputs([500, 3], [1, 1], 300, (8, 2), 64, F16, device)
    inputs["k"] = inputs["v"] = None
    options = {"max_seqlen": 1, "sliding_window": 300}
    expected_out = rolling_cache_attention(**inputs, **options)
    counters = torch.zeros(16, dtype=torch.int32, device=device)
    for _ in range(2):
        out = rolling_cache_attention(**inputs, **options, counters=counters)
        assert torch.equal(out, expected_out)
        assert not counters.any()
    counters += 1  # with a wrong start, no program detects that it is the last
    out = rolling_cache_attention(**inputs, **options, counters=counters)
    assert not torch.equal(out, expected_out)
    for bad, message in (
        (counters[:15], "counters must hold at least 16 zeros of .*, got 15 of torch.int32"),
        (counters.long(), "counters must hold at least 16 zeros of .*, got 16 of torch.int64"),
        (counters.to("meta"), f"counters must be on {device} like q, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            rolling_cache_attention(**inputs, **options, counters=bad)


def test_counters_are_per_sequence_not_per_page():
    """Three sequences may share one page."""
    page = torch.zeros(1, 4, 1, 8)
    cache = CacheView(
        page, page, int32([2, 3, 4], "cpu"), 1, block_table=torch.zeros(3, 1, dtype=torch.int32)
    )
    spec = AttentionSpec(Sequences(None, None, 1, 1), resolve_window(True, None, None), cache=cache)
    q, counters = torch.zeros(3, 1, 2, 8), torch.zeros(12, dtype=torch.int32)
    check_cached_attention(q, None, None, spec, 0, counters)
    with pytest.raises(ValueError, match="counters must hold at least 12 zeros"):
        check_cached_attention(q, None, None, spec, 0, counters[:11])


@pytest.mark.kernels
def test_counters_of_many_tiles(triton_backend, device):
    """With num_splits, a call may have more tiles than `num_counters` assumes."""
    page = torch.zeros(1, 512, 1, 16, dtype=F16, device=device)
    cache = CacheView(page, page, int32([400], device), 300)
    spec = AttentionSpec(
        Sequences(None, None, 300, 300), resolve_window(True, None, None), cache=cache
    )
    q = torch.zeros(1, 300, 1, 16, dtype=F16, device=device)
    with pytest.raises(ValueError, match=r"counters must hold at least .* with this num_splits"):
        attention_decode(q, None, None, spec, 4, torch.zeros(1, dtype=torch.int32, device=device))


# Cases in float32 and float16 run in the interpreter only; a few in bfloat16 run compiled.
UPDATES = [
    pytest.param(case, dtype, rotary, marks=() if compiled else pytest.mark.interpreted)
    for case in CASES
    for dtype in (F32, F16, BF16)
    for rotary in ROTARY
    for compiled in [dtype == BF16 and case in ("wrap", "paged")]
    if dtype != BF16 or compiled
]


@pytest.mark.kernels
@pytest.mark.parametrize(("case", "dtype", "rotary"), UPDATES, ids=str)
def test_update_has_the_same_bits(case, dtype, rotary, triton_runs, device, set_backend):
    """Check the updates of Triton and PyTorch; other tests check csrc on the same cases."""
    for backend, update in (("triton", _update_triton), ("torch", _update_torch)):
        set_backend(backend)
        arguments = make_arguments(dtype, rotary, **CASES[case], device=device)
        after = expected(arguments)
        update(*arguments.values())
        assert_same_bits(arguments, after)


def test_rotation_has_the_same_bits(backend, device):
    """Check that rotation in the update equals rotation before it."""
    cos, sin = rotary_tables(1000, 64, 1e4, device)
    inputs = make_inputs([500, 3], [5, 4], 300, (8, 2), 64, F16, device)
    q = inputs.pop("q")
    rings = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    positions = torch.cat([torch.arange(500, 505), torch.arange(3, 7)]).to(device)
    q_rotated, k_rotated = apply_rotary(q, inputs["k"], cos, sin, positions)
    rotated = rolling_cache_update_(**inputs, max_seqlen=5, q=q, cos=cos, sin=sin)
    rolling_cache_update_(**{**inputs, **rings, "k": k_rotated}, max_seqlen=5)
    assert torch.equal(rotated, q_rotated)
    assert all(torch.equal(inputs[name], ring) for name, ring in rings.items())


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_gradients_of_the_fused_update(interleaved, backend, device):
    """Check gradients through the rotation and the ring against the reference."""
    tables = rotary_tables(1000, 16, 1e4, device)
    inputs = make_inputs([4, 0, 11], [9, 0, 3], 5, (4, 2), 16, F32, device)
    names = ("q", "k", "v", "k_cache", "v_cache")
    leaves = [inputs[name].requires_grad_() for name in names]
    where = {name: inputs[name] for name in ("lengths", "cu_seqlens")}
    q, k, v, *rings = leaves
    rings = [ring.clone() for ring in rings]
    options = {"cos": tables[0], "sin": tables[1], "interleaved": interleaved}
    rotated = rolling_cache_update_(*rings, k, v, **where, max_seqlen=9, q=q, **options)
    positions = torch.tensor([*range(4, 13), *range(11, 14)], device=device)
    definition = reference.apply_rotary(q, k, *tables, positions, interleaved)
    expected_rings = reference.rolling_cache_update(*leaves[3:], definition[1], v, **where)
    cotangents = [torch.randn_like(x) for x in (rotated, *rings)]
    actual = torch.autograd.grad((rotated, *rings), leaves, cotangents)
    exact = torch.autograd.grad((definition[0], *expected_rings), leaves, cotangents)
    for name, a, b in zip(names, actual, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def profiled(function):
    """Return ptxrun's profiles of the kernels that a call launches."""
    if not ptxrun.installed():
        pytest.skip("only ptxrun counts memory traffic, not a GPU or the interpreter")
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        function()
        return list(ptxrun.profiles())


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[1, 1], [3, 40]], ids=str)
def test_no_races(counts, triton_backend):
    """Check that the last program reads the other programs' parts without a race."""
    if not ptxrun.installed():
        pytest.skip("only ptxrun detects races, not a GPU or the interpreter")
    inputs = make_inputs([700, 3], counts, 300, (8, 2), 64, F16, "cpu")
    tables = rotary_tables(1000, 64, 1e4)
    options = {"max_seqlen": max(counts), "sliding_window": 300}
    with ptxrun.options(racecheck=True):
        rolling_cache_attention(**inputs, **options)
        q = inputs.pop("q")
        rotary = {"q": q, "cos": tables[0], "sin": tables[1]}
        rolling_cache_update_(**inputs, max_seqlen=max(counts), **rotary)
        if set(counts) == {1}:
            rolling_cache_attention(q, **{**inputs, "k": None, "v": None}, **options)


def attend_profiled(lengths, capacity, window):
    """Return the profile of one decode step with the heads of Mistral-7B."""
    batch = len(lengths)
    inputs = make_inputs(lengths, [1] * batch, capacity, (32, 8), 128, BF16, "cpu")
    inputs["k"] = inputs["v"] = None
    counters = torch.zeros(32 * batch, dtype=torch.int32)
    options = {"max_seqlen": 1, "sliding_window": window, "counters": counters}
    (profile,) = profiled(lambda: rolling_cache_attention(**inputs, **options))
    return profile


@pytest.mark.parametrize("lengths", [[5000], [5000, 4095, 100_000, 17]], ids=str)
def test_each_key_is_read_once(lengths, triton_backend):
    """Check that one launch reads the visible k and v once, by 16 bytes, in full sectors."""
    profile = attend_profiled(lengths, 4096, 4096)
    needed = sum(min(length + 1, 4096) for length in lengths) * 8 * 128 * 2 * 2
    read = {name: counts["read"] for name, counts in profile.tensors.items()}
    assert read["cache[0][0]"] + read["cache[1][0]"] == needed
    # Asynchronous copies load k, v and the parts of the softmax, each once.
    assert profile.cp_async_bytes <= 1.001 * (needed + read["parts[0]"])
    assert profile.dram_read <= 1.035 * needed  # includes the parts, which fit a GPU's L2
    assert profile.global_read_sectors * 32 <= 1.09 * needed  # q and scalars, once per program


def test_windowed_costs_no_more_than_full(triton_backend):
    """Check that a window adds no instructions and reads only visible keys."""
    for length in (500, 1023, 3000):
        full = attend_profiled([length], 4096, None)
        windowed = attend_profiled([length], 4096, 1024)
        shown = min(length + 1, 1024)
        assert windowed.cp_async_bytes <= full.cp_async_bytes
        assert windowed.instructions <= 1.01 * full.instructions
        assert windowed.tensors["cache[0][0]"]["read"] == shown * 8 * 128 * 2
        assert full.tensors["cache[0][0]"]["read"] == (length + 1) * 8 * 128 * 2


@pytest.mark.parametrize("rotary", [None, "half-split", "interleaved"])
@pytest.mark.parametrize("batch", [1, 4])
def test_bytes_moved_by_the_update(batch, rotary, triton_backend):
    """Check that the update moves at most 1.05 times the minimum, in 16-byte accesses."""
    arguments = make_arguments(
        BF16,
        rotary,
        counts=[1] * batch,
        capacity=600,
        head_dim=128,
        heads=(32, 8),
        lengths=[100 + 600 * i for i in range(batch)],
        num_positions=100 + 600 * batch,
    )
    (profile,) = profiled(lambda: _update_triton(*arguments.values()))
    heads = 48 if rotary else 16
    minimum = batch * (2 * heads * 128 * 2 + (2 * 64 * 4 if rotary else 0))
    assert profile.dram_bytes <= 1.05 * minimum
    # Each program also loads scalars, in requests of 4 to 128 bytes.
    wide = 2 * heads * 128 * 2 * batch / 512
    programs = math.prod(profile.grid)
    assert profile.global_requests <= wide + programs * (5 + 4 * bool(rotary))


def test_opcheck_with_counters(backend, device):
    inputs = make_inputs([500, 3], [1, 1], 300, (8, 2), 64, F16, device)
    q, _, _, k_cache, v_cache, lengths, cu_seqlens = inputs.values()
    counters = torch.zeros(16, dtype=torch.int32, device=device)
    rest = (lengths, 0, None, None, None, cu_seqlens, 1, 0.125, 299, 0, 0.0, None, False, 0)
    arguments = (q, None, None, k_cache, v_cache, *rest, counters)
    torch.library.opcheck(torch.ops.mistral_kernels.cached_attention.default, arguments)


def test_decode_step_is_one_graph(backend, device):
    """Compile a decode step without graph breaks, for different batch sizes."""

    def step(q, k, v, k_cache, v_cache, lengths, cu_seqlens, cos, sin):
        ring = (k_cache, v_cache), (lengths, cu_seqlens, 1)
        q = rolling_cache_update_(*ring[0], k, v, *ring[1], q=q, cos=cos, sin=sin)
        return rolling_cache_attention(q, None, None, *ring[0], *ring[1], sliding_window=300)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    tables = rotary_tables(1000, 64, 1e4, device)
    for lengths in ([500, 3], [7, 8, 900]):
        inputs = make_inputs(lengths, [1] * len(lengths), 300, (8, 2), 64, F16, device)
        copies = {name: x.clone() for name, x in inputs.items()}
        with torch.no_grad():
            expected_out = step(*inputs.values(), *tables)
            assert torch.equal(compiled(*copies.values(), *tables), expected_out)
        assert all(torch.equal(copies[name], inputs[name]) for name in ("k_cache", "v_cache"))


def launched(target, dtype, head_dim, count):
    """Return the kernels of a decode step, or of a chunk, with Mistral's numbers of heads."""
    with compile_only(target) as kernels:
        inputs = make_inputs([5000], [count], 4096, (32, 8), head_dim, dtype, "cpu")
        tables = rotary_tables(6000, head_dim, 1e4)
        options = {"max_seqlen": count, "sliding_window": 4096}
        q = inputs.pop("q")
        if count > 1:
            rolling_cache_attention(q, **inputs, **options)
        rolling_cache_update_(**inputs, max_seqlen=count, q=q, cos=tables[0], sin=tables[1])
        if count == 1:
            inputs["k"] = inputs["v"] = None
            rolling_cache_attention(q, **inputs, **options)
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "head_dim", "count"),
    [
        (name, dtype, head_dim, count)
        for name, target in TARGETS.items()
        for head_dim in (64, 128, 256)
        # float16 does not need more registers than bfloat16.
        for dtype in ((target.dtypes()[-1], F32) if head_dim == 128 else (F16,))
        for count in (1, 1000)
        # Chunks: one target per kind of architecture, without head_dim 64.
        if count == 1
        or (head_dim > 64 and name in ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"))
    ],
    ids=str,
)
def test_compile_matrix(target, dtype, head_dim, count, set_backend):
    set_backend("triton")
    kernels = launched(target, dtype, head_dim, count)
    assert kernels.keys() == {"_decode_kernel", "_update_kernel"}
    kernels["_update_kernel"].assert_healthy()
    if not (target == "gfx1100" and head_dim == 256):  # where attention spills too
        # The last blocks of fresh keys need two registers too many at head_dim 256.
        edge_spills = 2 if (target, head_dim, count) == ("sm_90", 256, 1000) else 0
        kernels["_decode_kernel"].assert_healthy(edge_spills)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "clocks"), [("sm_80", 2447), ("sm_90", 2266)])
def test_decode_is_memory_bound(target, clocks, set_backend):
    """Check that no pipe is busy for more than 0.4 of the `clocks` that loading 32 KiB takes.

    Also check that about 128 KiB are in flight per multiprocessor.
    """
    set_backend("triton")
    kernel = launched(target, BF16, 128, 1)["_decode_kernel"]
    loop = kernel.main_loop()  # 64 keys and values of 128 elements: 32 KiB
    assert loop["spills"] == 0
    assert max(loop["bounds"]["cycles"].values()) <= 0.4 * clocks, loop["bounds"]["cycles"]
    blocks = loop["bounds"]["units"]
    in_flight = 2 * 32 * blocks  # in KiB: two of the three stages are being loaded
    print(target, loop["bounds"]["cycles"], blocks, in_flight)
    assert min(blocks, 256 / kernel.target.multiprocessors) * 64 >= 2 * 0.95 * 64
