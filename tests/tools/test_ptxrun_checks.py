"""Errors that ptxrun must find in Triton and CUDA C++ kernels."""

from pathlib import Path

import ptxrun
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sm_80")]


@triton.jit
def copy(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i), mask=i < n)


def test_out_of_range_read():
    x, y = torch.zeros(100), torch.zeros(300)
    with pytest.raises(
        ptxrun.MemoryFault,
        match=r"out-of-range global read .*kernel copy, CTA \(0, 0, 0\), thread \d+.*PTX line \d+"
        r".*nearest tensor: x .*past its end",
    ):
        copy[(1,)](x, y, 100, B=128)


def test_out_of_range_write():
    x, y = torch.zeros(256), torch.zeros(100)
    with pytest.raises(
        ptxrun.MemoryFault,
        match=r"out-of-range global write .*CTA \(1, 0, 0\)|out-of-range global write",
    ) as e:
        copy[(2,)](x, y, 256, B=128)
    assert e.value.kind == "oob"
    assert e.value.kernel == "copy"
    assert e.value.line > 0


def test_view_may_access_its_whole_storage():
    x, y = torch.randn(1000), torch.zeros(1000)
    copy[(1,)](x[100:], y[100:], 128, B=128)
    assert torch.equal(y[100:228], x[100:228])


@triton.jit
def overlap(y, B: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, B)
    tl.store(y + p * (B // 2) + i, i.to(tl.float32) + p)


def test_race_between_ctas():
    y = torch.zeros(256)
    overlap[(3,)](y, 64)
    ptxrun.Options.racecheck = True
    with pytest.raises(ptxrun.RaceError, match="global-memory race: write after a write"):
        overlap[(3,)](y, 64)


def test_read_write_race_between_ctas():
    @triton.jit
    def shift(y, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        tl.store(y + i, tl.load(y + i + 1))

    ptxrun.Options.racecheck = True
    with pytest.raises(ptxrun.RaceError, match="after a"):
        shift[(4,)](torch.randn(300), 64)


SOURCE = Path(__file__).parent / "cuda" / "faults.cu"


@pytest.fixture(scope="module")
def mod(nvcc):
    return ptxrun.compile_cuda(SOURCE)


def test_shared_race(mod):
    a, b = torch.randn(128), torch.zeros(128)
    ptxrun.Options.racecheck = True
    mod["good_sync"].launch(1, 128, [a, b])
    assert torch.equal(b, a.flip(0) + 1)
    with pytest.raises(
        ptxrun.RaceError, match=r"shared-memory race: (read|write) after a (read|write)"
    ):
        mod["missing_sync"].launch(1, 128, [a, b])
    with pytest.raises(
        ptxrun.RaceError, match=r"shared-memory race: (write after a read|read after a write)"
    ):
        mod["missing_sync_in_loop"].launch(1, 128, [a, b])


def test_shared_write_after_read(mod):
    ptxrun.Options.racecheck = True
    with pytest.raises(
        ptxrun.RaceError, match=r"write after a read .*earlier access by warp 0 .*warp 2"
    ):
        mod["write_after_read"].launch(1, 128, [torch.randn(128), torch.zeros(128)])


def test_misaligned_access(mod):
    a, b = torch.zeros(1000), torch.zeros(64)
    for k in ("misaligned", "misaligned_vector"):
        with pytest.raises(ptxrun.MemoryFault, match="misaligned"):
            mod[k].launch(1, 32, [a, b])


def test_shared_access_out_of_range(mod):
    b = torch.zeros(64)
    mod["shared_write"].launch(1, 64, [b, 0], shared_bytes=256)
    with pytest.raises(
        ptxrun.MemoryFault, match=r"out-of-range shared write at offset 256 .*thread 63"
    ):
        mod["shared_write"].launch(1, 64, [b, 1], shared_bytes=256)


def test_divergent_barrier(mod):
    with pytest.raises(ptxrun.DivergenceError):
        mod["divergent_barrier"].launch(1, 32, [torch.zeros(32)])


def test_divergent_shuffle(mod):
    with pytest.raises(ptxrun.DivergenceError, match="member mask"):
        mod["divergent_shuffle"].launch(1, 32, [torch.zeros(32, dtype=torch.int32)])


def test_endless_loop(mod):
    ptxrun.Options.max_steps = 10000
    with pytest.raises(ptxrun.ExecutionError, match="step budget exhausted"):
        mod["spin"].launch(1, 32, [torch.zeros(1, dtype=torch.int32)])


def test_deadlock(mod):
    with pytest.raises(ptxrun.DivergenceError, match="never complete"):
        mod["deadlock"].launch(1, 64, [torch.zeros(64)])


def test_cp_async_without_wait(mod):
    b = torch.zeros(32)
    mod["copy_without_wait"].launch(1, 32, [torch.ones(32, 4), b])
    assert torch.isnan(b).all()


def test_cp_async_waits_for_the_wrong_group(mod):
    a, b = torch.randn(64, 4), torch.zeros(96)
    mod["read_before_wait"].launch(1, 32, [a, b, 0])
    assert torch.equal(b[:32], a[:32, 0])
    assert torch.isnan(b[32:64]).all()
    assert torch.equal(b[64:], a[32:, 0])


def test_last_block_reduction(mod):
    a, part, cnt, out = (
        torch.randn(8, 32),
        torch.zeros(8),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1),
    )
    ptxrun.Options.racecheck = True
    mod["last_block_sum"].launch(8, 32, [a, part, cnt, out, 1])
    torch.testing.assert_close(out[0], a.sum(), rtol=1e-4, atol=1e-4)
    cnt.zero_()
    with pytest.raises(ptxrun.RaceError, match="read after a write"):
        mod["last_block_sum"].launch(8, 32, [a, part, cnt, out, 0])


def test_launch_errors(mod):
    b = torch.zeros(64)
    with pytest.raises(ptxrun.LaunchError, match="takes 2 parameters"):
        mod["shared_write"].launch(1, 64, [b])
    with pytest.raises(ptxrun.LaunchError, match="shared memory"):
        mod["shared_write"].launch(1, 64, [b, 0], shared_bytes=200000)
    with pytest.raises(ptxrun.LaunchError, match="threads per block"):
        mod["shared_write"].launch(1, 2048, [b, 0])


def test_shared_memory_limit():
    @triton.jit
    def k(A, B, C, N: tl.constexpr, n):
        i = tl.arange(0, N)
        acc = tl.zeros([N, N], tl.float32)
        for j in range(0, n, N):
            acc = tl.dot(
                tl.load(A + i[:, None] * n + j + i[None]),
                tl.load(B + (j + i)[:, None] * N + i[None]),
                acc,
            )
        tl.store(C + i[:, None] * N + i[None], acc)

    A = torch.zeros(128, 512)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        k[(1,)](A, A, A, 128, 512, num_stages=5)
