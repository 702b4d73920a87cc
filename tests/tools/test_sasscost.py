"""Costs that sasscost computes from machine code: loops, waits, barriers, partitions."""

from __future__ import annotations

import json
import subprocess

import pytest
import sasscost as sc
from sasscost import cfg, warps
from sasscost import classify as C
from sasscost.bounds import bounds, mva
from sasscost.counts import Counts
from sasscost.disasm import Ins, find_nvdisasm, parse
from sasscost.report import ranges
from sasscost.waits import overlap, wgmma_waits
from support import hopper_loops as hopper

pytestmark = pytest.mark.slow

TEXT = """
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!PT LDS RZ, [RZ] ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   FFMA R10, R10, R11, R12 ;
        /*0050*/                   MUFU.EX2 R10, R10 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   ISETP.GE.AND P1, PT, R1, R2, PT ;
        /*0080*/                   FSEL R10, R10, -INF , P1 ;
.L_x_2:
        /*0090*/              @!P1 BRA `(.L_x_0) ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3) ;
"""


def instruction(op, args="", pred=""):
    return Ins(0, pred, op, args)


def test_parse_and_nested_loops():
    _, ks = parse(TEXT)
    ins, labels = ks["k"]
    blocks = cfg.build(ins, labels)
    ls = cfg.loops(blocks)
    assert [each.depth for each in ls] == [1, 2]
    assert ls[1].parent is ls[0]
    r = sc.analyze_kernel(ins, labels, sc.get_arch("sm_80"), warps=4, ctas_per_sm=2)
    inner = next(each for each in r["loops"] if each["depth"] == 2)
    assert inner["body_instructions"] == 7
    assert inner["steady_instructions"] == 5  # the cheapest path skips two guarded instructions
    assert inner["tensor_ops"] == {"HMMA.16x8x16": 1}
    assert r["instructions"] == 12  # the @!PT instruction is not counted
    assert sc.main_loop(r)["name"] == inner["name"]


def test_mma_shapes():
    assert C.mma_shape("HMMA.16816.F32.BF16") == (16, 8, 16)
    assert C.mma_shape("HMMA.1688.F32.TF32") == (16, 8, 8)
    assert C.mma_shape("HGMMA.64x128x16.F32.BF16") == (64, 128, 16)
    t = C.tensor_cost(instruction("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24"))
    assert t["flops"] == 2 * 64 * 128 * 16
    assert t["smem"] == (64 + 128) * 16 * 2
    t = C.tensor_cost(instruction("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR8], R24"))
    assert t["smem"] == 128 * 16 * 2
    assert C.descriptor_shape(0x8100490, "UTCHMMA") == (128, 64, 16)


@pytest.mark.parametrize(
    ("op", "k"),
    [
        ("FADD.FTZ", "fma"),
        ("FMUL2", "fma"),
        ("IADD3.X", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "conv"),
        ("MUFU.EX2", "mufu"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("STL.64", "local"),
        ("SHFL.BFLY", "shuffle"),
        ("BAR.SYNC", "barrier"),
        ("UIADD3", "uniform"),
        ("UTCHMMA", "tensor"),
        ("IMAD.MOV.U32", "imad"),
        ("UTMALDG.2D", "global"),
        ("LDTM.x64", "tmem"),
    ],
)
def test_instruction_classes(op, k):
    assert C.klass(op) == k


def test_access_bytes():
    assert C.access_bytes("LDG.E.128") == 16
    assert C.access_bytes("LDG.E.U16.CONSTANT") == 2
    assert C.access_bytes("LDSM.16.M88.4") == 16


def test_peaks_match_vendor_numbers():
    for arch, tf in (
        ("sm_80", 312),
        ("sm_90", 989.4),
        ("sm_100", 2250),
        ("sm_120", 503.8),
        ("sm_89", 362),
        ("sm_86", 149.7),
    ):
        assert abs(sc.get_arch(arch).peak_tflops / tf - 1) < 0.01
    assert sc.get_arch("90a").name == "sm_90"
    assert sc.get_arch("sm_120", geforce=True).tensor["HMMA"] == 512


def test_occupancy():
    a = sc.get_arch("sm_80")
    assert sc.occupancy(a, 255, 4, 0, 64 * 1024)["ctas_per_sm"] == 2
    assert sc.occupancy(a, 128, 4)["ctas_per_sm"] == 4
    assert sc.occupancy(a, 32, 4)["ctas_per_sm"] == 16
    assert sc.occupancy(a, 64, 4, 0, 200 * 1024)["ctas_per_sm"] == 0
    assert sc.occupancy(sc.get_arch("sm_90"), 168, 12)["ctas_per_sm"] == 1


def test_bounds_equal_hand_computed_values():
    # 16 HMMAs and 64 MUFUs of 8 clocks each on a scheduler: bound by MUFU, 4 to 1
    c = Counts()
    for _ in range(16):
        c.add(instruction("HMMA.16816.F32.BF16", "R8, R4, R6, R8"))
    for _ in range(64):
        c.add(instruction("MUFU.EX2", "R0, R0"))
    r = bounds(c, sc.get_arch("sm_80"), warps=4, ctas_per_sm=1)
    assert r["cycles"]["tensor"] == 128
    assert r["cycles"]["mufu"] == 512
    assert r["bound_a"] == 0.25
    assert r["limiter_a"] == "mufu"
    assert abs(r["bound_b"] - 128 / (128 + 512)) < 1e-3  # one unit is strictly serial


def test_mva_limits():
    assert abs(mva(1, 3.0, 1.0) - 0.25) < 1e-9
    assert abs(mva(2, 1.0, 1.0) - 2 / 3) < 1e-9  # balanced network: N / (N + 1)
    assert mva(64, 3.0, 1.0) <= 1 / 3 + 1e-9


def test_mufus_under_wgmma():
    w = instruction("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR8], R24")
    d = instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    m = instruction("MUFU.EX2", "R0, R0")
    assert overlap([w, d, m, m]) == (0, 2)
    assert overlap([w, m, d, m]) == (1, 2)
    assert overlap([m, m, d, w]) == (2, 2)  # in flight across the back edge


def G(d):
    return instruction("HGMMA.64x64x16.F32.BF16", f"{d}, gdesc[UR8], {d}")


ALL, ONE = (instruction("WARPGROUP.DEPBAR.LE", f"gsb0, {n}") for n in ("0x0", "0x1"))


def counts(seq, **kw):
    return tuple(wgmma_waits(seq, **kw)[k] for k in ("hgmma", "depbars", "alone", "serialized"))


def test_serialized_wgmma_counts():
    a, b = G("R24"), G("R88")
    assert counts([a, a, ALL]) == (2, 1, 0, 0)
    assert counts([a, a, b, b, ONE, ALL]) == (4, 2, 0, 0)  # two products in flight
    assert counts([a, ALL, a, ALL, b, ALL, b, ALL]) == (4, 4, 4, 4)
    assert counts([a, ONE, a, ONE]) == (2, 2, 0, 0)  # one wgmma stays in flight
    assert counts([a, ALL]) == (1, 1, 1, 0)  # a product of one k-step
    assert counts([a, ALL, b, ALL]) == (2, 2, 2, 0)  # two such products
    assert counts([a, a, ALL, b, ALL, b, ALL]) == (4, 3, 2, 2)  # two of four are serialized
    assert counts([ALL, a], cyclic=True) == (1, 1, 1, 0)
    assert counts([a, a], cyclic=False) == (2, 0, 0, 0)
    assert counts([a, ALL, a, ALL], cyclic=False) == (2, 2, 2, 2)
    assert counts([]) == (0, 0, 0, 0)


def test_serialized_wgmma_lowers_the_bounds():
    c = Counts()
    for _ in range(16):
        c.add(G("R24"))
    for _ in range(64):
        c.add(instruction("MUFU.EX2", "R0, R0"))
    arch = sc.get_arch("sm_90")
    free, held = (bounds(c, arch, 8, 1, serial=n) for n in (0, 16))
    t, o, z = 512, 512, 16 * arch.wgmma_latency  # clocks of one warpgroup: MMA, the rest, waits
    assert free["bound_a"] == 1.0
    assert free["bound_b"] == 1.0
    assert abs(held["bound_b"] - 2 * t / (t + o + z)) < 1e-3
    assert held["bound_a"] == held["bound_b"]
    assert held["limiter_a"] == "wgmma waits"
    assert held["est_m"] < held["bound_b"]
    assert held["est_m"] < free["est_m"] - 0.1
    one = bounds(c, arch, 4, 1, covered=0.0, serial=16)
    assert abs(one["est_m"] - t / (t + o + z)) < 1e-3  # one warpgroup is strictly serial
    assert abs(mva(1, 3.0, 1.0, 4.0) - 1 / 8) < 1e-9


def test_lockstep_of_some_warps():
    c = Counts()
    for _ in range(16):
        c.add(G("R24"))
    for _ in range(64):
        c.add(instruction("MUFU.EX2", "R0, R0"))
    arch = sc.get_arch("sm_90")

    def est(lockstep):
        return bounds(c, arch, 12, 1, lockstep=lockstep)["est_m"]

    assert est(0) == est(4)  # a warpgroup is always the unit
    assert est(0) > est(8) > est(12) == est(True)


def run_text(lines, n, **kw):
    """Return instructions, labels, and dicts from mnemonic to warp mask and to barrier."""
    body = "\n".join(
        x if x.endswith(":") else f"        /*{16 * i:04x}*/ {x} ;" for i, x in enumerate(lines)
    )
    _, ks = parse(f'\t.section\t.text.k,"ax",@progbits\n{body}\n')
    ins, labels = ks["k"]
    blocks = cfg.build(ins, labels)
    flow = warps.run(ins, blocks, n, **kw)
    at = {x.op: flow.masks.get(b.i, 0) for b in blocks for x in ins[b.start : b.end]}
    return ins, labels, at, {ins[i].op: v for i, v in flow.barriers.items()}


BY_NUMBER = [
    "S2R R0, SR_TID.X",
    "SHF.R.U32.HI R1, RZ, 0x5, R0",
    "R2UR UR4, R1",
    "UISETP.GE.U32.AND UP0, UPT, UR4, 0x4, UPT",
    "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0",
    "@P0 BRA `(.L_x_0)",
    "FADD R4, R4, R4",
    "ULOP3.LUT UP0, URZ, UR4, 0x3, URZ, 0xc0, !UPT",
    "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0",
    "@P0 EXIT",
    "FMUL R4, R4, R4",
    "EXIT",
    ".L_x_0:",
    "IADD3 R2, R1, -0x3, RZ",
    "BAR.SYNC.A R2, 0x80",
    "ISETP.LT.AND P1, PT, R0, 0xa0, PT",
    "@P1 BRA `(.L_x_1)",
    "MUFU.EX2 R5, R5",
    "EXIT",
    ".L_x_1:",
    "FFMA R6, R6, R6, R6",
    "EXIT",
]


def test_branches_on_the_warp_number():
    _, _, at, bars = run_text(BY_NUMBER, 8)
    assert at["FADD"] == 0b1111
    assert at["FMUL"] == 0b1
    assert at["FFMA"] == 0b00010000
    assert at["MUFU.EX2"] == 0b11100000
    assert bars["BAR.SYNC.A"] == [{1, 2, 3, 4}, {128}]
    _, _, at, _ = run_text(BY_NUMBER, 8, linear=False)  # the warp numbers are unknown
    assert at["FADD"] == at["FFMA"] == at["FMUL"] == 0xFF
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


LOOP = [
    ".L_x_%d:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "%s",
    "@!P3 BRA `(.L_x_%d)",
]


def loop(n, extra):
    return [x % n if "%d" in x else x % extra if "%s" in x else x for x in LOOP]


@pytest.mark.parametrize(
    ("barrier", "cta", "partition", "ordered"),
    [
        ("BAR.SYNC 0x0", 1, 0, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x3", 1, 0, 0),
        ("BAR.SYNC 0x0, 0x80", 0, 1, 0),
        ("BAR.SYNC 0x1, 0x180", 1, 0, 0),
        ("BAR.SYNC 0x1, R9", 0, 1, 0),
        ("BAR.SYNC R8, R9", 0, 1, 0),
        ("BAR.SYNC 0x4, 0x100", 0, 0, 1),
        ("BAR.RED.POPC 0x0, P1", 1, 0, 0),
    ],
)
def test_barriers(barrier, cta, partition, ordered):
    ins, labels, _, _ = run_text(["BAR.ARV 0x4, 0x100", *loop(0, barrier), "EXIT"], 12)
    r = sc.analyze_kernel(ins, labels, sc.get_arch("sm_90"), 12, 1)
    (each,) = r["loops"]
    assert (
        each["barriers"]["cta"],
        each["barriers"]["partition"],
        each["barriers"]["ordered"],
    ) == (
        cta,
        partition,
        ordered,
    )
    assert each["cta_barriers"] == cta
    assert r["partitions"] == []
    plain = sc.analyze_kernel(
        *run_text([*loop(0, "NOP"), "EXIT"], 12)[:2], sc.get_arch("sm_90"), 12, 1
    )["loops"][0]
    assert (each["bounds"]["est_m"] < plain["bounds"]["est_m"]) == bool(cta)


@pytest.mark.parametrize("queue", [False, True])
def test_pingpong_is_not_a_queue(queue):
    arrive = "BAR.ARV 0x9, 0x100"
    text = [
        *BY_NUMBER[:5],
        "@P0 BRA `(.L_x_9)",
        ".L_x_5:",
        "BAR.SYNC 0x9, 0x100" if queue else "NOP",
        "LDGSTS [R4], [R6]",
        "BAR.ARV 0x8, 0x100" if queue else "NOP",
        "@!P3 BRA `(.L_x_5)",
        "EXIT",
        ".L_x_9:",
        *[
            x
            for y in loop(1, arrive)
            for x in ([y, "BAR.SYNC 0x8, 0x100"] if y.endswith(":") else [y])
        ],
        "EXIT",
    ]
    if not queue:
        text.insert(-8, "BAR.ARV 0x8, 0x100")
    ins, labels, _, _ = run_text(text, 12)
    r = sc.analyze_kernel(ins, labels, sc.get_arch("sm_90"), 12, 1, launch_regs=168)
    m = sc.main_loop(r)
    assert [p["role"] for p in r["partitions"]] == ["load", "mma"]
    assert m["bounds"]["warps"] == 8
    assert m["barriers"] == {"cta": 0, "partition": 0, "ordered": 1, "lockstep_warps": 0}
    assert (m["pingpong"] is None) == queue


def test_partition_sizes_from_barriers():
    # After a jump through a table, any warp may run any side. The barrier of 64 threads, which only
    # one side uses, gives the number of warps of that side.
    table = 'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_7,.L_x_8"*)'
    text = [
        table,
        ".L_x_7:",
        "USETMAXREG.DEALLOC.CTAPOOL 0x18",
        ".L_x_0:",
        "FADD R4, R4, R4",
        "LDGSTS [R4], [R6]",
        "BAR.SYNC 0x1, 0x40",
        "@!P3 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_8:",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
        *loop(1, "BAR.SYNC 0x2, 0x100"),
        "EXIT",
    ]
    ins, labels, _, _ = run_text(text, 10)
    r = sc.analyze_kernel(ins, labels, sc.get_arch("sm_90"), 10, 1, launch_regs=168)
    assert [
        (p["role"], p["regs"], p["count"], p["warps"], p["warps_from"]) for p in r["partitions"]
    ] == [("load", 24, 2, None, "barrier"), ("mma", 240, 8, None, "barrier")]
    assert [(each["own_warps"], each["bounds"]["warps"]) for each in r["loops"]] == [(2, 2), (8, 8)]
    assert r["register_pool"] is None
    # Without such a barrier the number of warps is an upper bound.
    ins, labels, _, _ = run_text([x.replace("0x40", "0x140") for x in text], 10)
    r = sc.analyze_kernel(ins, labels, sc.get_arch("sm_90"), 10, 1, launch_regs=168)
    assert [(p["count"], p["warps_from"]) for p in r["partitions"]] == [
        (10, "unknown"),
        (8, "barrier"),
    ]


KERNEL = """
extern "C" __global__ void __launch_bounds__(128) axpy(float* y, const float* x, float a, int n) {
  __shared__ float s[256];
  for (int i = threadIdx.x; i < n; i += 128) { s[threadIdx.x] = x[i]; y[i] += a * s[threadIdx.x]; }
}
"""


@pytest.fixture
def nvdisasm():
    try:
        return find_nvdisasm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("nvcc", "nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_cubin_round_trip(tmp_path, arch):
    cubin, _ = compiled(tmp_path, KERNEL, arch)
    (k,) = sc.analyze(cubin)
    assert k["kernel"] == "axpy"
    assert k["arch"] == arch
    assert k["regs"] >= 8
    assert k["static_smem"] == 4 * 256
    assert k["spill_instructions"] == 0
    assert k["loops"]
    assert k["classes"]["fma"] >= 1
    assert k["classes"]["global"] >= 3
    json.loads(sc.to_json([k]))
    assert "axpy" in sc.to_text([k])


def compiled(tmp_path, text, arch="sm_90a"):
    source, cubin = tmp_path / "k.cu", tmp_path / "k.cubin"
    source.write_text(text)
    p = subprocess.run(
        ["nvcc", f"-arch={arch}", "-cubin", "-o", str(cubin), str(source)],
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr
    return str(cubin), p.stdout + p.stderr


@pytest.mark.usefixtures("nvcc", "nvdisasm")
@pytest.mark.parametrize(
    ("steps", "touch", "serialized"), [(4, False, [0, 4]), (4, True, [4, 4]), (1, False, [0, 1])]
)
def test_wgmma_serialized_by_ptxas(tmp_path, steps, touch, serialized):
    cubin, output = compiled(tmp_path, hopper.product(steps, touch))
    assert ("are serialized" in output) == touch
    (k,) = sc.analyze(cubin)
    m = sc.main_loop(k)
    assert m["serialized_wgmma"] == k["serialized_wgmma"] == serialized
    assert m["wgmma_waits"]["depbars"] == (4 if touch else 1)
    assert m["wgmma_waits"]["alone"] == (4 if touch else steps == 1)
    text = sc.to_text([k])
    assert ("SERIALIZED WGMMA: 4 of 4: each" in text) == touch
    assert ("SERIALIZED" in text) == touch
    json.loads(sc.to_json([k]))


@pytest.mark.usefixtures("nvcc", "nvdisasm")
def test_serialized_wgmma_lowers_the_estimate(tmp_path):
    est = []
    for touch in (False, True):
        (k,) = sc.analyze(
            compiled(tmp_path, hopper.product(16, touch))[0], loop_warps={"L0": 4}, smem=200 << 10
        )
        est.append(sc.main_loop(k)["bounds"])
    assert est[0]["units"] == est[1]["units"] == 1
    assert est[1]["est_m"] < 0.6 * est[0]["est_m"]
    assert est[1]["limiter_a"] == "wgmma waits"


FIRST = "threadIdx.x < 128"


@pytest.mark.usefixtures("nvcc", "nvdisasm")
@pytest.mark.parametrize(
    ("threads", "who", "barrier", "cta", "own"),
    [
        (384, FIRST, hopper.bar("bar.sync 0, 128;"), 0, 4),
        (384, FIRST, hopper.bar("bar.sync 1, 128;"), 0, 4),
        (384, FIRST, hopper.bar("bar.sync 1, %0;", "count"), 0, 4),
        (384, "threadIdx.x >= 128", hopper.bar("bar.sync %0, 128;", "threadIdx.x / 128"), 0, 8),
        (384, "true", hopper.bar("bar.sync 0, 384;"), 1, 12),
        (384, "true", "__syncthreads();", 1, 12),
        (128, "true", hopper.bar("bar.sync 0, 128;"), 1, 4),
    ],
)
def test_barriers_of_a_larger_cta(tmp_path, threads, who, barrier, cta, own):
    (k,) = sc.analyze(
        compiled(tmp_path, hopper.product(8, False, threads, who, barrier))[0], smem=200 << 10
    )
    m = sc.main_loop(k)
    assert k["threads"] == threads
    assert m["cta_barriers"] == cta
    assert m["barriers"]["partition"] == 1 - cta
    assert m["own_warps"] == m["bounds"]["warps"] == own
    (free,) = sc.analyze(
        compiled(tmp_path, hopper.product(8, False, threads, who))[0], smem=200 << 10
    )
    drop = sc.main_loop(free)["bounds"]["est_m"] - m["bounds"]["est_m"]
    assert drop > 0.1 if cta and own > 4 else abs(drop) < 0.02
    assert [p["warps"] for p in k["partitions"]] == (
        [] if own * 32 == threads else [list(range(4))] if who == FIRST else [list(range(4, 12))]
    )


@pytest.mark.usefixtures("nvcc", "nvdisasm")
def test_cta_size_from_the_caller(tmp_path):
    cubin, _ = compiled(
        tmp_path,
        hopper.product(
            threads=384, who=FIRST, barrier=hopper.bar("bar.sync 0, 128;"), bounds=False
        ),
    )
    for n, cta in ((12, 0), (4, 1), (None, 1)):  # None without launch bounds: 128 threads
        (k,) = sc.analyze(cubin, warps=n)
        assert sc.main_loop(k)["cta_barriers"] == cta


@pytest.mark.usefixtures("nvcc", "nvdisasm")
def test_warp_specialized_kernel(tmp_path):
    cubin, output = compiled(tmp_path, hopper.specialized())
    assert "setmaxnreg ignored" not in output
    (k,) = sc.analyze(cubin, smem=100 << 10)
    assert k["threads"] == 384
    assert k["regs"] == 168
    parts = {p["role"]: p for p in k["partitions"]}
    assert (parts["load"]["warps"], parts["load"]["regs"]) == ([0, 1, 2, 3], 24)
    assert (parts["mma"]["warps"], parts["mma"]["regs"]) == (list(range(4, 12)), 240)
    assert k["register_pool"] == [2016, 2016]
    m = sc.main_loop(k)
    assert m["name"] in parts["mma"]["loops"]
    assert m["bounds"]["warps"] == 8
    assert m["bounds"]["units"] == 2
    assert m["barriers"] == {"cta": 0, "partition": 1, "ordered": 1, "lockstep_warps": 4}
    assert m["pingpong"]["ids"] == [8, 9]
    assert m["pingpong"]["threads"] == 256
    assert m["pingpong"]["units"] == 2
    assert m["pingpong"]["mufu_share"] == 0.5  # 64 MUFUs per thread take twice as long as 4 wgmmas
    (over,) = sc.analyze(cubin, smem=100 << 10, loop_warps={m["name"]: 4})
    assert sc.main_loop(over)["bounds"]["units"] == 1
    text = sc.to_text([k])
    assert "partition warps 4-11: mma, 240 registers (setmaxnreg)" in text
    assert "ping-pong of 2 warpgroups" in text


def test_gluon_partitions(nvdisasm):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("requires Triton 3.9")
    from support import gluon_product as gk

    sig = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "trips": "i32", "stride": "i32"}
    (k,) = sc.analyze_jit(
        gk.mm, sig, {"BM": 64, "BN": 128, "BK": 64}, 90, num_warps=4, divisible_by_16=("stride",)
    )
    assert k["threads"] == 256
    assert [(p["role"], p["warps"]) for p in k["partitions"]] == [
        ("mma", [0, 1, 2, 3]),
        ("load", [4, 5, 6, 7]),
    ]
    assert k["partitions"][1]["regs"] == 24
    m = sc.main_loop(k)
    assert m["own_warps"] == m["bounds"]["warps"] == 4
    assert m["cta_barriers"] == 0
    assert m["serialized_wgmma"] == [0, 4]
    assert [each["dispatch"] for each in k["loops"]] == [False, True, False]


def test_triton_compiled_ahead_of_time(nvdisasm):
    pytest.importorskip("triton")
    from support import triton_product as tk

    for arch in (80, 90):
        (k,) = sc.analyze_jit(
            tk.mm,
            {"A": "*bf16", "B": "*bf16", "C": "*fp32", "K": "i32"},
            {"BM": 64, "BN": 64, "BK": 64},
            arch,
            num_warps=4,
            num_stages=2,
        )
        m = sc.main_loop(k)
        f = m["bounds"]["mflop_per_trip"] * 1e6
        assert abs(f - 2 * 64 * 64 * 64) < 1  # SASS and source have equal FLOPs
        assert ("HGMMA" if arch == 90 else "HMMA") in str(m["tensor_ops"])
