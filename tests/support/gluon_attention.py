"""Attention forward for sm_90 in Gluon: one producer and two consumer warpgroups of 64 rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _producer(
    k_desc,
    v_desc,
    k_smem,
    v_smem,
    k_full,
    k_free,
    v_full,
    v_free,
    lo,
    hi,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    SCHED: gl.constexpr,
):
    n = (hi - lo + BN - 1) // BN + SCHED
    for i in range(n):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.nbytes_per_cta)
        tma.async_load(k_desc, [lo + i * BN, 0], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.nbytes_per_cta)
        tma.async_load(v_desc, [lo + i * BN, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _acquire(WG: gl.constexpr, PINGPONG: gl.constexpr):
    """Wait until this warpgroup may use the tensor cores."""
    if PINGPONG:
        if WG == 0:
            gl.inline_asm("bar.sync 10, 256;")
        else:
            gl.inline_asm("bar.sync 11, 256;")


@gluon.jit
def _release(WG: gl.constexpr, PINGPONG: gl.constexpr):
    """Let the other warpgroup use the tensor cores."""
    if PINGPONG:
        if WG == 0:
            gl.inline_asm("bar.arrive 11, 256;")
        else:
            gl.inline_asm("bar.arrive 10, 256;")


@gluon.jit
def _mask(
    s, position, first, seqlen_k, left, right, BN: gl.constexpr, PART: gl.constexpr, S: gl.constexpr
):
    key = first + gl.arange(0, BN, gl.SliceLayout(0, S))[None, :]
    if PART == 0:  # a narrow window can also end within a block of the left edge
        s = gl.where(
            (key >= position - left) & (key <= gl.minimum(position + right, seqlen_k - 1)),
            s,
            -1.0e30,
        )
    if PART == 2:
        s = gl.where(key <= gl.minimum(position + right, seqlen_k - 1), s, -1.0e30)
    return s


@gluon.jit
def _consumer(
    q_ptr,
    out_ptr,
    lse_ptr,
    q_smem,
    k_smem,
    v_smem,
    k_full,
    k_free,
    v_full,
    v_free,
    tile,
    kv_head,
    q_stride_s,
    q_stride_h,
    seqlen_q,
    seqlen_k,
    left,
    right,
    scale,
    lo,
    full_lo,
    full_hi,
    hi,
    WG: gl.constexpr,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
    TIE: gl.constexpr,
    SCHED: gl.constexpr,
):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    B: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row0 = tile * (2 * BM) + WG * BM
    # Rows of q are (query, head of the group); the head varies fastest.
    row = row0 + gl.arange(0, BM, gl.SliceLayout(1, B))
    dim = gl.arange(0, D, gl.SliceLayout(0, B))
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    at = (
        q_ptr
        + (query.to(gl.int64) * q_stride_s + head.to(gl.int64) * q_stride_h)[:, None]
        + dim[None, :]
    )
    q = gl.load(at, mask=(query < seqlen_q)[:, None], other=0.0)
    q_smem.store(q)
    fence_async_shared()
    gl.barrier()
    position = (row0 + gl.arange(0, BM, gl.SliceLayout(1, S))) // GROUP + seqlen_k - seqlen_q
    m = gl.full([BM], -1.0e38, gl.float32, gl.SliceLayout(1, S))
    denominator = gl.full([BM], 0.0, gl.float32, gl.SliceLayout(1, S))
    acc = gl.full([BM, D], 0.0, gl.float32, OUT)
    zero = gl.full([BM, BN], 0.0, gl.float32, S)
    if WG == 1:
        _release(WG, PINGPONG)  # warpgroup 0 is first

    # The first key block.
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(0), count=1)
    if lo < full_lo:
        s = _mask(s, position[:, None], lo, seqlen_k, left, right, BN, 0, S)
    if lo >= full_hi:
        s = _mask(s, position[:, None], lo, seqlen_k, left, right, BN, 2, S)
    new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new[:, None])
    denominator = gl.sum(p, 1)
    m = new
    pb = gl.convert_layout(p.to(gl.bfloat16), P)
    if SCHED == 0:
        i = 1
        start = lo + BN
        for PART in gl.static_range(3):
            if PART == 0:
                end = full_lo
            elif PART == 1:
                end = full_hi
            else:
                end = hi
            for first in range(start, end, BN):
                stage = i % STAGES
                phase = (i // STAGES) & 1
                vstage = (i - 1) % STAGES
                vphase = ((i - 1) // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                _acquire(WG, PINGPONG)
                s = warpgroup_mma(
                    q_smem, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(vstage), vphase)
                acc = warpgroup_mma(pb, v_smem.index(vstage), acc, is_async=True)
                _release(WG, PINGPONG)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(k_free.index(stage), count=1)
                if PART != 1:
                    s = _mask(s, position[:, None], first, seqlen_k, left, right, BN, PART, S)
                new = gl.maximum(m, gl.max(s, 1) * scale)
                p = gl.exp2(s * scale - new[:, None])
                rescale = gl.exp2(m - new)
                denominator = denominator * rescale + gl.sum(p, 1)
                m = new
                if TIE == 0:
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                    pb = gl.convert_layout(p.to(gl.bfloat16), P)
                elif TIE == 1:
                    acc, p, denominator = warpgroup_mma_wait(0, deps=(acc, p, denominator))
                    pb = gl.convert_layout(p.to(gl.bfloat16), P)
                else:
                    pb = gl.convert_layout(p.to(gl.bfloat16), P)
                    acc, pb, denominator = warpgroup_mma_wait(0, deps=(acc, pb, denominator))
                mbarrier.arrive(v_free.index(vstage), count=1)
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
                i += 1
            start = gl.maximum(start, end)
        vstage = (i - 1) % STAGES
        vphase = ((i - 1) // STAGES) & 1
        mbarrier.wait(v_full.index(vstage), vphase)
        acc = warpgroup_mma(pb, v_smem.index(vstage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        # s holds block 0; each later product of q and k is issued one block ahead.
        mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1)
        s = warpgroup_mma(
            q_smem, k_smem.index(1 % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(0), 0)
        acc = warpgroup_mma(pb, v_smem.index(0), acc, is_async=True)
        i = 1
        start = lo + BN
        for PART in gl.static_range(3):
            if PART == 0:
                end = full_lo
            elif PART == 1:
                end = full_hi
            else:
                end = hi
            for first in range(start, end, BN):
                # In flight: S of block i, then PV of block i - 1.
                stage = i % STAGES
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(k_free.index(stage), count=1)
                if PART != 1:
                    s = _mask(s, position[:, None], first, seqlen_k, left, right, BN, PART, S)
                new = gl.maximum(m, gl.max(s, 1) * scale)
                p = gl.exp2(s * scale - new[:, None])
                rescale = gl.exp2(m - new)
                denominator = denominator * rescale + gl.sum(p, 1)
                m = new
                pb = gl.convert_layout(p.to(gl.bfloat16), P)
                nstage = (i + 1) % STAGES
                nphase = ((i + 1) // STAGES) & 1
                mbarrier.wait(k_full.index(nstage), nphase)
                _acquire(WG, PINGPONG)
                s = warpgroup_mma(
                    q_smem, k_smem.index(nstage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(v_free.index((i - 1) % STAGES), count=1)
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
                mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
                acc = warpgroup_mma(pb, v_smem.index(stage), acc, is_async=True)
                _release(WG, PINGPONG)
                i += 1
            start = gl.maximum(start, end)
        acc, s = warpgroup_mma_wait(0, deps=(acc, s))
    lo_ = gl.convert_layout(denominator, gl.SliceLayout(1, OUT))
    acc = acc / lo_[:, None]
    out = gl.convert_layout(acc.to(gl.bfloat16), B)
    at = (
        out_ptr
        + (query.to(gl.int64) * q_stride_s + head.to(gl.int64) * q_stride_h)[:, None]
        + dim[None, :]
    )
    gl.store(at, out, mask=(query < seqlen_q)[:, None])
    lse = (m + gl.log2(denominator)) * 0.6931471805599453
    row_s = row0 + gl.arange(0, BM, gl.SliceLayout(1, S))
    gl.store(
        lse_ptr + (kv_head * GROUP + row_s % GROUP) * seqlen_q + row_s // GROUP,
        lse,
        mask=row_s // GROUP < seqlen_q,
    )


@gluon.jit
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_stride_s,
    q_stride_h,
    k_stride_s,
    k_stride_h,
    seqlen_q,
    seqlen_k,
    tiles,
    left,
    right,
    scale,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
    REGS: gl.constexpr,
    PWARPS: gl.constexpr,
    TIE: gl.constexpr,
    SCHED: gl.constexpr,
):
    program = gl.program_id(0)
    tile = tiles - 1 - program % tiles
    kv_head = program // tiles
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], gl.bfloat16)
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], gl.bfloat16)
    k_desc = tma.make_tensor_descriptor(
        k_ptr + kv_head.to(gl.int64) * k_stride_h, [seqlen_k, D], [k_stride_s, 1], [BN, D], K
    )
    v_desc = tma.make_tensor_descriptor(
        v_ptr + kv_head.to(gl.int64) * k_stride_h, [seqlen_k, D], [k_stride_s, 1], [BN, D], K
    )
    q0 = gl.allocate_shared_memory(gl.bfloat16, [BM, D], Q)
    q1 = gl.allocate_shared_memory(gl.bfloat16, [BM, D], Q)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], K)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], K)
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_free = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_free = mbarrier.allocate_mbarrier(batch=STAGES)
    for j in gl.static_range(STAGES):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(v_full.index(j), count=1)
        mbarrier.init(k_free.index(j), count=2)
        mbarrier.init(v_free.index(j), count=2)
    if PINGPONG:  # warpgroup 1 releases the tensor cores on entry, so warpgroup 0 is first
        gl.barrier()
    first_position = tile * (2 * BM) // GROUP + seqlen_k - seqlen_q
    last_position = (
        gl.minimum((tile * (2 * BM) + 2 * BM - 1) // GROUP, seqlen_q - 1) + seqlen_k - seqlen_q
    )
    lo = gl.maximum(first_position - left, 0) // BN * BN
    hi = gl.minimum(last_position + right + 1, seqlen_k)
    full_lo = gl.maximum(last_position - left + BN - 1, 0) // BN * BN
    full_hi = gl.maximum(gl.minimum(first_position + right + 1, seqlen_k) // BN * BN, full_lo)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_ptr,
                    out_ptr,
                    lse_ptr,
                    q0,
                    k_smem,
                    v_smem,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    tile,
                    kv_head,
                    q_stride_s,
                    q_stride_h,
                    seqlen_q,
                    seqlen_k,
                    left,
                    right,
                    scale,
                    lo,
                    full_lo,
                    full_hi,
                    hi,
                    gl.constexpr(0),
                    GROUP,
                    BM,
                    BN,
                    D,
                    STAGES,
                    PINGPONG,
                    TIE,
                    SCHED,
                ),
            ),
            (
                _consumer,
                (
                    q_ptr,
                    out_ptr,
                    lse_ptr,
                    q1,
                    k_smem,
                    v_smem,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    tile,
                    kv_head,
                    q_stride_s,
                    q_stride_h,
                    seqlen_q,
                    seqlen_k,
                    left,
                    right,
                    scale,
                    lo,
                    full_lo,
                    full_hi,
                    hi,
                    gl.constexpr(1),
                    GROUP,
                    BM,
                    BN,
                    D,
                    STAGES,
                    PINGPONG,
                    TIE,
                    SCHED,
                ),
            ),
            (
                _producer,
                (
                    k_desc,
                    v_desc,
                    k_smem,
                    v_smem,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    lo,
                    hi,
                    BN,
                    STAGES,
                    SCHED,
                ),
            ),
        ],
        [4, PWARPS],
        [REGS, 24],
    )
