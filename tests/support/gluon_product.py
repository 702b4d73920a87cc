"""Warp-specialized matmul in Gluon: one partition loads with TMA, the default one multiplies."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load(a_desc, b_desc, a_smem, b_smem, full, free, trips, BK: gl.constexpr):
    for i in range(trips):
        mbarrier.wait(free, (i & 1) ^ 1)
        mbarrier.expect(full, a_desc.nbytes_per_cta + b_desc.nbytes_per_cta)
        tma.async_load(a_desc, [0, i * BK], full, a_smem)
        tma.async_load(b_desc, [i * BK, 0], full, b_smem)


@gluon.jit
def _multiply(c_ptr, a_smem, b_smem, full, free, trips, BM: gl.constexpr, BN: gl.constexpr):
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.full([BM, BN], 0.0, gl.float32, L)
    for i in range(trips):
        mbarrier.wait(full, i & 1)
        acc = warpgroup_mma(a_smem, b_smem, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free, count=1)
    m = gl.arange(0, BM, gl.SliceLayout(1, L))
    n = gl.arange(0, BN, gl.SliceLayout(0, L))
    gl.store(c_ptr + m[:, None] * BN + n[None, :], acc)


@gluon.jit
def mm(a_ptr, b_ptr, c_ptr, trips, stride, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr):
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    B: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], gl.bfloat16)
    a_desc = tma.make_tensor_descriptor(a_ptr, [BM, stride], [stride, 1], [BM, BK], A)
    b_desc = tma.make_tensor_descriptor(b_ptr, [stride, BN], [BN, 1], [BK, BN], B)
    a_smem = gl.allocate_shared_memory(gl.bfloat16, [BM, BK], A)
    b_smem = gl.allocate_shared_memory(gl.bfloat16, [BK, BN], B)
    full = mbarrier.allocate_mbarrier()
    free = mbarrier.allocate_mbarrier()
    mbarrier.init(full, count=1)
    mbarrier.init(free, count=1)
    gl.warp_specialize(
        [
            (_multiply, (c_ptr, a_smem, b_smem, full, free, trips, BM, BN)),
            (_load, (a_desc, b_desc, a_smem, b_smem, full, free, trips, BK)),
        ],
        [4],
        [24],
    )
