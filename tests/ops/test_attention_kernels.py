"""Tests of attention on Triton: values, gradients, windows, packed batches, work and memory."""

from __future__ import annotations

import contextlib

import ptxrun
import pytest
import torch
import torch._dynamo.testing
from support.allocations import Allocations
from support.attention_cases import (
    OPTIONS,
    WINDOW,
    definition_of,
    eager,
    freeze,
    make_qkv,
    reach_of_a_key,
)
from support.helpers import assert_matches_reference

from mistral_kernels.ops import reference
from mistral_kernels.ops.attention import attention, tiles
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.dispatch import device_properties
from mistral_kernels.ops.launch_configs import cdiv

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def assert_matches(inputs, strided_gradients=False, **options):
    """Check that output, log-sum-exp and all gradients are as accurate as plain PyTorch's."""
    definition = definition_of(options)

    def plain(q, k, v):
        with torch.no_grad():  # in float32, like the log-sum-exp of the kernels
            lse = reference.attention(q, k, v, **definition)[1]
        return eager(q, k, v, **definition)[0], torch.where(lse.isneginf(), 99.0, lse)

    def ours(q, k, v):
        out, lse = attention(q, k, v, **options, return_lse=True)
        return out, torch.where(lse.isneginf(), 99.0, lse)

    assert_matches_reference(ours, plain, inputs, strided_gradients)


# Cases that also run compiled. They are few, since compiling takes most of the time.
COMPILED = [
    ((65, 111), "causal", (4, 1), 64, BF16),
    pytest.param((200, 70), "narrow", (6, 2), 24, BF16, marks=pytest.mark.long),
    pytest.param((100, 100), "softcap", (2, 2), 32, BF16, marks=pytest.mark.long),
    pytest.param((70, 130), "left-only", (4, 2), 32, F32, marks=pytest.mark.long),
]


@pytest.mark.kernels
@pytest.mark.parametrize(("seqlens", "options", "heads", "head_dim", "dtype"), COMPILED, ids=str)
def test_values_and_gradients(seqlens, options, heads, head_dim, dtype, triton_backend, device):
    inputs = make_qkv(*seqlens, heads, head_dim, dtype, device)
    assert_matches(inputs, **OPTIONS[options])


LENGTHS = [1, 63, 64, 65, 111, 128, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 1000]
UNEQUAL = [(1, 65), (64, 200), (200, 64), (65, 1), (7, 0), (0, 7), (130, 129)]
HEADS = [(4, 2), (3, 3), (4, 1), (6, 2)]
HEAD_DIMS = [64, 16, 128, 24, 80, 1]
MANY = [
    pytest.param(seqlens, options, HEADS[(i + j) % 4], HEAD_DIMS[(2 * i + j) % 6], dtype)
    for i, seqlens in enumerate([(n, n) for n in LENGTHS] + UNEQUAL)
    for j, options in enumerate(OPTIONS)
    if options == "window" or ((i + j) % 3 == 0 and max(seqlens) < 500)
    for dtype in (F32, F16)[(i + j) % 2 :][:1]
]


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize(("seqlens", "options", "heads", "head_dim", "dtype"), MANY, ids=str)
def test_lengths_and_options(seqlens, options, heads, head_dim, dtype, triton_backend, device):
    inputs = make_qkv(*seqlens, heads, head_dim, dtype, device)
    if seqlens[1] == 1:
        freeze(inputs, "qk")
    assert_matches(inputs, **OPTIONS[options])


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize("head_dim", [96, 160, 192, 256])
def test_large_head_dims(head_dim, triton_backend, device):
    assert_matches(make_qkv(90, 90, (2, 1), head_dim, F16, device), sliding_window=WINDOW)


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize("options", ["causal", "softcap", "both-sides", "narrow"])
@pytest.mark.parametrize("per_batch", [False, True], ids=["shared", "per-batch"])
def test_alibi(options, per_batch, triton_backend, device):
    inputs = make_qkv(130, 150, (4, 2), 32, F16, device, batch=2)
    slopes = torch.rand((2, 4) if per_batch else (4,), device=device)
    assert_matches(inputs, alibi_slopes=slopes, **OPTIONS[options])


def packed_case(heads, head_dim, dtype, device, pairs):
    """Return packed inputs for `pairs` of lengths, and the arguments of their lengths."""
    lengths_q, lengths_k = (torch.tensor([0, *x]) for x in zip(*pairs, strict=True))
    total_q, total_k = int(lengths_q.sum()), int(lengths_k.sum())
    rectangular = make_qkv(max(total_q, total_k), total_k, heads, head_dim, dtype, device)
    sizes = {"q": total_q, "k": total_k, "v": total_k}
    inputs = {
        name: x.detach()[0, : sizes[name]].clone().requires_grad_()
        for name, x in rectangular.items()
    }
    lengths = {
        "cu_seqlens_q": lengths_q.cumsum(0).int().to(device),
        "cu_seqlens_k": lengths_k.cumsum(0).int().to(device),
        "max_seqlen_q": int(lengths_q.max()),
        "max_seqlen_k": int(lengths_k.max()),
    }
    return inputs, lengths


def sequence_by_sequence(pairs, slopes, definition):
    """Return a function that computes packed attention per sequence in plain PyTorch."""

    def plain(q, k, v):
        outs, lses, begin_q, begin_k = [], [], 0, 0
        for i, (length_q, length_k) in enumerate(pairs):
            rows, keys = slice(begin_q, begin_q + length_q), slice(begin_k, begin_k + length_k)
            begin_q, begin_k = rows.stop, keys.stop
            own = None if slopes is None else slopes if slopes.ndim == 1 else slopes[i : i + 1]
            part = q[None, rows], k[None, keys], v[None, keys]
            outs.append(eager(*part, **definition, alibi_slopes=own)[0][0])
            with torch.no_grad():
                lses.append(reference.attention(*part, **definition, alibi_slopes=own)[1][0])
        lse = torch.cat(lses, 1)
        return torch.cat(outs), torch.where(lse.isneginf(), 99.0, lse)

    return plain


PAIRS = {
    "same": [(0, 0), (33, 33), (1, 1), (100, 100), (0, 0), (64, 64)],
    "cross": [(5, 70), (0, 9), (80, 20), (7, 0), (1, 64)],
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("options", ["causal", "window", "softcap", "both-sides", "narrow"])
@pytest.mark.parametrize("alibi", [None, "shared", "per-sequence"])
def test_packed_on_the_torch_backend(alibi, options, pairs, dtype, device, torch_backend):
    check_packed(alibi, options, PAIRS[pairs], dtype, device)


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("options", ["causal", "window", "both-sides"])
@pytest.mark.parametrize("alibi", [None, "per-sequence"])
def test_packed(alibi, options, pairs, triton_backend, device):
    check_packed(alibi, options, PAIRS[pairs], F16, device)


@pytest.mark.long
@pytest.mark.kernels
def test_packed_compiled(triton_backend, device):
    for pairs in PAIRS.values():
        check_packed(None, "window", pairs, F16, device)


def check_packed(alibi, options, pairs, dtype, device):
    """Check packed attention of `pairs` of lengths against one call per sequence."""
    inputs, lengths = packed_case((4, 2), 32, dtype, device, pairs)
    shape = {"shared": (4,), "per-sequence": (len(pairs), 4)}.get(alibi)
    slopes = None if shape is None else torch.rand(shape, device=device)

    def ours(q, k, v):
        out, lse = attention(
            *(q, k, v), **lengths, **OPTIONS[options], alibi_slopes=slopes, return_lse=True
        )
        return out, torch.where(lse.isneginf(), 99.0, lse)

    definition = definition_of(OPTIONS[options])
    assert_matches_reference(ours, sequence_by_sequence(pairs, slopes, definition), inputs)


@pytest.mark.long
def test_tokens_outside_sequences_give_zeros(backend, device):
    """Check that tokens after the end of cu_seqlens have output 0 and gradient 0."""
    inputs, _ = packed_case((2, 1), 16, F32, device, [(40, 40)])
    lengths = torch.tensor([0, 10, 33], dtype=torch.int32, device=device)
    out, lse = attention(**inputs, cu_seqlens_q=lengths, return_lse=True)
    assert (out[33:] == 0).all()
    assert lse[:, 33:].isneginf().all()
    assert (out[:33] != 0).any(-1).all()
    for grad in torch.autograd.grad(out.sum(), list(inputs.values())):
        assert (grad[33:] == 0).all()
        assert (grad[:33] != 0).any()


@contextlib.contextmanager
def racecheck(device):
    """Check all addresses and races, if ptxrun executes the kernels."""
    if device.type == "cpu" and not pytest.importorskip("triton").knobs.runtime.interpret:
        with ptxrun.options(racecheck=True):
            yield
    else:
        yield


@pytest.mark.long
def test_lengths_in_bfloat16(triton_backend, device):
    """Check many lengths with the same compiled kernels."""
    for seqlens in [(n, n) for n in LENGTHS] + UNEQUAL:
        inputs = make_qkv(*seqlens, (8, 2), 64, BF16, device)
        if seqlens[1] == 1:
            freeze(inputs, "qk")
        assert_matches(inputs, sliding_window=WINDOW)


@pytest.mark.long
def test_mistral_in_bfloat16(triton_backend, device):
    """Check the shape of Mistral-7B: 32 query heads, 8 kv heads, head_dim 128."""
    inputs = make_qkv(512, 512, (32, 8), 128, BF16, device)
    with racecheck(device):
        assert_matches(inputs, sliding_window=200)


@pytest.fixture
def with_descriptors(monkeypatch):
    """Force kernels with descriptors, as on sm_90 and later, with small tiles."""
    small_tiles = {
        "attention_forward": tiles.Tile(64, 32, 4, 2, True),
        "attention_dkdv": tiles.Tile(32, 64, 4, 2, True),
        "attention_dq": tiles.Tile(64, 32, 4, 2, True),
    }
    monkeypatch.setattr(tiles, "choose_tile", lambda kernel, *_: small_tiles[kernel])
    tiles.configs.cache_clear()
    yield
    tiles.configs.cache_clear()


@pytest.mark.long
@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_descriptors(layout, triton_backend, with_descriptors, device):
    inputs = make_qkv(150, 150, (4, 2), 64, F16, device, batch=2)
    if layout == "bhsd":
        inputs = {
            name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for name, x in inputs.items()
        }
    with racecheck(device):
        assert_matches(inputs, sliding_window=WINDOW)


@pytest.mark.long
@pytest.mark.kernels
def test_descriptors_of_packed_batches(triton_backend, with_descriptors, device):
    for pairs in PAIRS.values():
        check_packed(None, "window", pairs, F16, device)


@pytest.mark.long
def test_frozen_inputs_launch_no_kernel(triton_backend, device):
    if device.type != "cpu":
        pytest.skip("only ptxrun, on CPU tensors, counts launches and operations")
    for needed, kernels in (
        ("q", {"_delta_kernel", "_dq_kernel"}),
        ("kv", {"_delta_kernel", "_dkdv_kernel"}),
    ):
        inputs = make_qkv(70, 70, (4, 2), 16, F16, device)
        freeze(inputs, set(inputs) - set(needed))
        out = attention(**inputs, sliding_window=30)
        with ptxrun.options(profile=True):
            ptxrun.reset_profile()
            out.backward(torch.ones_like(out))
            assert {profile.name for profile in ptxrun.profiles()} == kernels


@pytest.mark.long
@pytest.mark.kernels
def test_rows_without_keys_give_zeros(triton_backend, device):
    inputs = make_qkv(200, 70, (4, 2), 16, F16, device)
    out, lse = attention(**inputs, return_lse=True)
    assert (out[:, :130] == 0).all()
    assert (out[:, 130:] != 0).any(-1).all()
    assert lse[:, :, :130].isneginf().all()
    assert lse[:, :, 130:].isfinite().all()
    (dq,) = torch.autograd.grad(out.sum(), inputs["q"])
    assert (dq[:, :130] == 0).all()
    assert (dq[:, 131:] != 0).any()


@pytest.mark.kernels
@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_key_affects_exactly_its_window(window, triton_backend, device):
    """Check that a change of key j changes the rows j to j + W - 1, and no bit of other rows."""
    seqlen = 230
    q, k, v = make_qkv(seqlen, seqlen, (2, 1), 16, F16, device).values()

    def run(k, v):
        return attention(q, k, v, sliding_window=window)

    for j in (0, 63, 130, seqlen - 1):
        row = min(j + window - 1, seqlen - 1)
        changed, dk, dv = reach_of_a_key(run, k, v, j, row)
        assert changed == list(range(j, min(j + window, seqlen)))
        # Weights inside the window may round to 0; weights outside must be 0.
        assert set(dk) | set(dv) <= set(range(max(0, row - window + 1), row + 1))
        assert len(dv) >= 0.9 * min(window, row + 1)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(F16, marks=pytest.mark.slow), pytest.param(BF16, marks=pytest.mark.long)],
    ids=str,
)
def test_backward_is_bitwise_repeatable(dtype, triton_backend, device):
    inputs = make_qkv(300, 300, (4, 2), 64, dtype, device)
    out = attention(**inputs, sliding_window=100)
    dout = torch.randn_like(out)

    def gradients():
        return torch.autograd.grad(out, list(inputs.values()), dout, retain_graph=True)

    first = gradients()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def blocks_needed(seqlen, window, group, tile_m, tile_n):
    """Return the total number of key blocks that the tiles of rows need, at least."""
    left = resolve_window(True, None, window).left
    rows = [
        (max(0, m // group - left), min(seqlen, (m + tile_m - 1) // group + 1))
        for m in range(0, seqlen * group, tile_m)
    ]
    return sum(cdiv(end - begin, tile_n) for begin, end in rows)


def test_work_is_proportional_to_the_window(triton_backend, device):
    """Check that only blocks with visible keys are visited, and that cost grows linearly."""
    if device.type != "cpu":
        pytest.skip("only ptxrun, on CPU tensors, counts launches and operations")
    window, head_dim = 1024, 128
    visited = {}
    for seqlen in (2048, 4096, 8192):
        inputs = make_qkv(seqlen, seqlen, (4, 1), head_dim, BF16, device)
        with torch.no_grad(), ptxrun.options(profile=True):
            ptxrun.reset_profile()
            attention(**inputs, sliding_window=window)
            (profile,) = ptxrun.profiles()
        visited[seqlen] = profile.mma_flop
    properties = device_properties(inputs["q"])
    tile = tiles.choose_tile(
        "attention_forward", 128, 2, properties, tiles.has_descriptors(properties)
    )
    needed = blocks_needed(8192, window, 4, tile.m, tile.n) * tile.m * tile.n * 4 * head_dim
    assert needed <= visited[8192] <= 1.1 * needed
    pairs = 4 * (8192 * window - window * (window - 1) // 2)
    assert visited[8192] <= 1.1 * pairs * 4 * head_dim  # masked pairs at edges add at most 10 %
    assert visited[8192] - visited[4096] == 2 * (visited[4096] - visited[2048])


@pytest.mark.kernels
def test_allocated_memory(triton_backend, device):
    """Check that forward allocates out and lse, and backward the gradients and two lse."""
    inputs = make_qkv(500, 500, (4, 2), 16, F16, device)
    q, k, _ = inputs.values()
    size, kv_size, lse_size = q.numel() * 2, k.numel() * 2, 4 * 500 * 4
    with Allocations() as forward:
        out = attention(**inputs, sliding_window=WINDOW)
    # With a tensor memory accelerator, each tile needs 256 more bytes for its descriptors.
    descriptors = 16 << 10 if tiles.has_descriptors(device_properties(q)) else 0
    assert size + lse_size <= forward.total_new <= size + lse_size + descriptors
    dout = torch.ones_like(out)
    with Allocations() as backward:
        torch.autograd.grad(out, list(inputs.values()), dout)
    assert backward.total_new <= size + 2 * kv_size + 2 * lse_size + 2 * descriptors
