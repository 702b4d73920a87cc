"""Tests of attention on the torch backend: values, gradients, windows, cost and memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
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
from support.helpers import assert_matches_reference, values_and_gradients

from mistral_kernels.ops import extension, reference
from mistral_kernels.ops.attention import attention, checks, torch_backend
from mistral_kernels.ops.attention.spec import Sequences

HALF = torch.bfloat16, torch.float16
DTYPES = (torch.float32, *HALF, torch.float64)


@pytest.fixture(autouse=True, params=["csrc", "PyTorch"])
def implementation(request, set_backend):
    """Select csrc or PyTorch for the forward pass on the torch backend."""
    set_backend("torch")
    if request.param == "PyTorch":
        request.getfixturevalue("no_csrc")
    elif not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    return request.param


@pytest.fixture
def device(implementation, device):
    """Return the device of the tensors: csrc computes on the CPU only."""
    return torch.device("cpu") if implementation == "csrc" else device


def assert_matches(inputs, strided_gradients=False, with_lse=False, **options):
    """Check that `attention` is as accurate as plain PyTorch, with and without the log-sum-exp."""
    definition = definition_of(options)

    def plain(q, k, v):
        return eager(q, k, v, **definition)[0]

    assert_matches_reference(
        lambda **x: attention(**x, **options), plain, inputs, strided_gradients
    )
    if not with_lse:
        return

    def plain_with_lse(q, k, v):
        with torch.no_grad():  # in float32, like the log-sum-exp of the implementations
            lse = reference.attention(q, k, v, **definition)[1]
        return plain(q, k, v), torch.where(lse.isneginf(), 99.0, lse)

    def ours_with_lse(q, k, v):
        out, lse = attention(q, k, v, **options, return_lse=True)
        assert not lse.requires_grad
        return out, torch.where(lse.isneginf(), 99.0, lse)

    assert_matches_reference(ours_with_lse, plain_with_lse, inputs, strided_gradients)


LENGTHS = [(0, 0), (1, 1), (63, 63), (64, 64), (65, 65), (111, 111), (128, 128), (500, 500)]
UNEQUAL = [(1, 65), (64, 200), (65, 1000), (200, 64), (65, 1), (7, 0), (0, 7), (130, 129)]
HEADS = [(8, 2), (8, 8), (4, 1)]
HEAD_DIMS = [64, 16, 128, 1, 40, 256]

# Every other pair of lengths and options; heads, head_dims and dtypes cycle through their values.
CASES = [
    pytest.param(seqlens, options, HEADS[(i + j) % 3], HEAD_DIMS[(i + 2 * j) % 6], DTYPES[n % 4])
    for i, seqlens in enumerate(LENGTHS + UNEQUAL)
    for j, options in enumerate(OPTIONS)
    for n in [i + j]
    if (i + j) % 2 == 0 or options == "window"
    if max(seqlens) < 500 or options in ("window", "causal")
]


@pytest.mark.parametrize(("seqlens", "options", "heads", "head_dim", "dtype"), CASES, ids=str)
def test_values_and_gradients(seqlens, options, heads, head_dim, dtype, device):
    batch = 1 if max(seqlens) > 100 else 2
    inputs = make_qkv(*seqlens, heads, head_dim, dtype, device, batch)
    if seqlens[1] == 1:
        freeze(inputs, "qk")
    assert_matches(inputs, **OPTIONS[options])


@pytest.mark.parametrize("seqlen", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_near_the_window(seqlen, dtype, device):
    inputs = make_qkv(seqlen, seqlen, (4, 2), 32, dtype, device, batch=2)
    assert_matches(inputs, sliding_window=WINDOW)


@pytest.mark.parametrize("triangle_rows", [1, 10_000], ids=["triangle", "blocks"])
@pytest.mark.parametrize("options", ["causal", "window"])
def test_triangle_and_blocks(options, triangle_rows, device, monkeypatch):
    """Check both code paths for rows before the window's left edge: causal mask and blocks."""
    monkeypatch.setattr(torch_backend, "_TRIANGLE_ROWS", triangle_rows)
    for seqlen in (70, 131, 200):
        inputs = make_qkv(seqlen, seqlen, (4, 2), 32, torch.float32, device)
        assert_matches(inputs, **OPTIONS[options])


@pytest.mark.parametrize("window", [1, 2, 64, 10_000])
def test_windows(window, device):
    inputs = make_qkv(131, 150, (4, 2), 32, torch.float32, device)
    if window == 1:
        freeze(inputs, "qk")
    assert_matches(inputs, with_lse=True, sliding_window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_key_has_weight_one(dtype, device):
    q, k, v = make_qkv(70, 70, (2, 1), 16, dtype, device).values()
    out = attention(q, k, v, sliding_window=1)
    roundings = 4 if device.type == "cuda" else 1
    rtol = roundings * torch.finfo(dtype).eps
    torch.testing.assert_close(out, v.expand_as(out), rtol=rtol, atol=0)
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq.abs().max() < 1e-4
    assert dk.abs().max() < 1e-4


@pytest.mark.parametrize("options", ["causal", "full", "softcap", "both-sides"])
@pytest.mark.parametrize("per_batch", [False, True], ids=["shared", "per-batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alibi(options, per_batch, dtype, device):
    inputs = make_qkv(130, 150, (4, 2), 32, dtype, device, batch=2)
    slopes = torch.rand((2, 4) if per_batch else (4,), device=device)
    assert_matches(inputs, alibi_slopes=slopes, **OPTIONS[options])


@pytest.mark.parametrize("options", ["causal", "window", "softcap", "both-sides", "left-only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(options, dtype, device):
    for seqlens in ((70, 70), (150, 65), (65, 150), (0, 3)):
        inputs = make_qkv(*seqlens, (4, 2), 16, dtype, device, batch=1)
        assert_matches(inputs, with_lse=True, **OPTIONS[options])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", ["causal", "full", "window"])
def test_many_rows_add_to_one_key(options, dtype, device, monkeypatch):
    """Check that the gradient of a key, a long sum, is accumulated in float32."""
    monkeypatch.setattr(torch_backend, "_BLOCK_ROWS", 4)
    monkeypatch.setattr(torch_backend, "_TRIANGLE_ROWS", 1)
    seqlen = 1500 if options == "causal" else 500
    inputs = make_qkv(seqlen, seqlen, (1, 1), 8, dtype, device, batch=1)
    definition = {"causal": True, "window_size": (WINDOW - 1, 0)} if options == "window" else {}
    definition = definition or {"causal": options == "causal"}

    def plain(q, k, v):
        return eager(q, k, v, **definition)[0]

    dout = [torch.randn(inputs["q"].shape, device=device).to(dtype)]
    ours = values_and_gradients(lambda **x: attention(**x, **OPTIONS[options]), inputs, dout)
    rounded = values_and_gradients(plain, inputs, dout)
    exact = values_and_gradients(plain, inputs, dout, torch.float64)
    for name in ("gradient of k", "gradient of v"):
        errors = [(x[name] - exact[name]).square().mean().sqrt() for x in (ours, rounded)]
        assert errors[0] < 0.7 * errors[1], name


def test_rows_without_keys_give_zeros(device):
    inputs = make_qkv(200, 70, (4, 2), 16, torch.float32, device)
    for softcap in (0.0, 2.0):
        out, lse = attention(**inputs, softcap=softcap, return_lse=True)
        alone = attention(**inputs, softcap=softcap)
        assert (out[:, :130] == 0).all()
        assert (alone[:, :130] == 0).all()
        assert lse[:, :, :130].isneginf().all()
        assert lse[:, :, 130:].isfinite().all()
        (dq,) = torch.autograd.grad(alone.sum(), inputs["q"])
        assert (dq[:, :130] == 0).all()
        assert (dq[:, 131:] != 0).any()


PATHS = [{}, {"softcap": 5.0}, {"alibi_slopes": torch.tensor([0.001, 0.002])}]


@pytest.mark.parametrize("options", PATHS, ids=["plain", "softcap", "alibi"])
@pytest.mark.parametrize("window", [1, 7, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_key_affects_exactly_its_window(window, dtype, options, device):
    """Check that a change of key j changes the rows j to j + W - 1, and no bit of other rows."""
    options = {name: x.to(device) if name[0] == "a" else x for name, x in options.items()}
    seqlen = 230
    q, k, v = make_qkv(seqlen, seqlen, (2, 1), 16, dtype, device, batch=1).values()

    def run(k, v):
        return attention(q, k, v, sliding_window=window, **options)

    for j in (0, 63, 130, seqlen - 1):
        row = min(j + window - 1, seqlen - 1)
        changed, dk, dv = reach_of_a_key(run, k, v, j, row)
        assert changed == list(range(j, min(j + window, seqlen)))
        assert dv == list(range(max(0, row - window + 1), row + 1))
        assert dk == dv or window == 1  # a single key always has weight 1


def test_sliding_window_looks_back_even_when_not_causal(device):
    inputs = make_qkv(100, 100, (2, 1), 16, torch.float32, device)
    pair = attention(**inputs, causal=False, window_size=(6, 0))
    assert torch.equal(attention(**inputs, causal=False, sliding_window=7), pair)


SEQLEN, LONG_WINDOW = 16384, 1024
PATHS_WITH_LSE = [*PATHS, {"return_lse": True}]


@pytest.mark.parametrize(
    ("seqlen", "window", "options"),
    [(SEQLEN, LONG_WINDOW, {}), *((SEQLEN // 4, LONG_WINDOW // 4, x) for x in PATHS_WITH_LSE)],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_cost_and_memory_are_linear_in_the_window(seqlen, window, options, device, implementation):
    options = {name: x.to(device) if name[0] == "a" else x for name, x in options.items()}
    inputs = make_qkv(seqlen, seqlen, (2, 1), 16, torch.float32, device, batch=1)
    with Allocations() as forward:
        out = attention(**inputs, sliding_window=window, **options)
    out = out[0] if isinstance(out, tuple) else out
    with Allocations() as backward:
        out.backward(torch.ones_like(out))
    linear = out.numel()  # 32 elements per token; scores would take 2 * seqlen
    assert forward.largest_new <= linear
    assert backward.largest_new <= linear
    needed = 2 * (seqlen * window - window * (window - 1) // 2)
    if device.type == "cpu" and implementation == "PyTorch":
        # A block of 64 rows computes at most 63 more scores per row.
        assert 0.95 * needed <= forward.scores <= 1.1 * needed * (1 + 63 / window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_csrc_never_reads_blocks_outside_the_window(dtype):
    """Fill blocks outside the window with NaN, which would propagate to the output."""
    block, seqlen, window = 64, 700, 100
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    q, k, v = (torch.randn(1, seqlen, n, 64).to(dtype) for n in (4, 1, 1))
    for query in (0, 63, 64, 350, 699):
        first = max(query - window + 1, 0) // block * block
        end = (query // block + 1) * block
        seen = torch.zeros(seqlen, dtype=torch.bool)
        seen[first:end] = True
        hidden = [x.masked_fill(~seen[:, None, None], torch.nan) for x in (k, v)]
        # Drop the keys after the query: the last query has the position of the last key.
        rows = (x[:, : query + 1] for x in hidden)
        out = attention(q[:, query : query + 1], *rows, sliding_window=window)
        assert torch.isfinite(out).all(), query


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided-heads"])
@pytest.mark.parametrize("triangle_rows", [1, 10_000], ids=["triangle", "blocks"])
def test_memory_is_linear_without_a_window(triangle_rows, contiguous, dtype, device, monkeypatch):
    monkeypatch.setattr(torch_backend, "_TRIANGLE_ROWS", triangle_rows)
    q, k, v = make_qkv(2000, 2000, (4, 2), 64, dtype, device, batch=1).values()
    if not contiguous:
        q, k, v = (torch.stack((x, x), dim=-1).detach()[..., 0] for x in (q, k, v))
        q.requires_grad_()
    with Allocations() as seen:
        attention(q, k, v).sum().backward()
    assert seen.largest_new <= 2 * q.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    """Measure the peak memory of a process, in which one matrix of scores would take 1 GiB.

    VmHWM is the peak of this program alone; ru_maxrss starts at the size of the parent process.
    """
    code = f"""
import re, torch
from mistral_kernels.ops.attention import attention
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) >> 10
def run(seqlen):
    q = torch.randn(1, seqlen, 1, 16, requires_grad=True)
    attention(q, q, q, sliding_window={LONG_WINDOW}).sum().backward()
    attention(q, q, q, sliding_window={LONG_WINDOW}, softcap=9.0, return_lse=True)
run(1024)
before = peak()
run({SEQLEN})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64  # MiB


def test_check_sequences_drops_empty_sequences_and_tightens_lengths():
    q = torch.empty(9, 1, 16)
    cu_seqlens = torch.tensor([0, 4, 4, 9, 9, 9], dtype=torch.int32)
    found = checks.check_sequences(q, q, Sequences(cu_seqlens, None, 9, 9))
    assert found.cu_seqlens_q.tolist() == found.cu_seqlens_k.tolist() == [0, 4, 4, 9]
    assert found[2:] == (5, 5, True, True)
    made = checks.make_cu_seqlens([4, 0, 5, 0, 0], q.device)
    assert torch.equal(made, cu_seqlens)
    longer = checks.make_cu_seqlens([1, 2, 3, 1, 0], q.device)  # one sequence more
    found = checks.check_sequences(q, q, Sequences(made, longer, 5, 3))
    assert found.cu_seqlens_q.tolist() == [0, 4, 4, 9, 9]
    assert found.cu_seqlens_k.tolist() == [0, 1, 3, 6, 7]
    assert found[2:] == (5, 3, True, False)
