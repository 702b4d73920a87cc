"""Tests of the machine code of the attention kernels: all targets, and costs of main loops."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from support.helpers import TARGETS, compile_only

from mistral_kernels.ops.attention import attention, kernels

triton_version = pytest.importorskip("triton").__version__
pytestmark = pytest.mark.skipif(
    tuple(map(int, triton_version.split(".")[:2])) < (3, 9),
    reason=f"tiles are chosen for the ptxas of Triton 3.9; some spill with Triton {triton_version}",
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = {"_forward_kernel", "_delta_kernel", "_dkdv_kernel", "_dq_kernel"}
# Spills allowed in the few blocks that cross an edge, where ptxas spills column indices.
EDGE_SPILLS = 40


def compiled(target, dtype, head_dim, packed=False, frozen=(), **options):
    """Return the compiled kernels of a forward and backward call with Mistral's heads."""
    with compile_only(target) as kernels:
        shape = (64,) if packed else (1, 64)
        q = torch.randn(*shape, 32, head_dim).to(dtype).requires_grad_("q" not in frozen)
        k, v = (torch.randn(*shape, 8, head_dim).to(dtype).requires_grad_() for _ in range(2))
        lengths = {"cu_seqlens_q": torch.tensor([0, 30, 64], dtype=torch.int32)} if packed else {}
        out = attention(q, k, v, **lengths, **{"sliding_window": 4096, **options})
        out.backward(torch.ones_like(out))
    return {kernel.name: kernel for kernel in kernels}


def may_spill(kernel, head_dim, dtype):
    """Return whether the kernel is a slow path that spills registers.

    Slow paths are multiply-adds on Turing, float32 as three tf32 products, and RDNA 3, where each
    half of a wave holds the operands in full. The forward kernel spills at head_dim 256 only.
    """
    arch = kernel.target.arch
    rdna = str(arch).startswith("gfx1")
    if kernel.name == "_forward_kernel":
        return rdna and head_dim > 128
    return (
        (arch == 75 and head_dim >= 128)
        or (arch == "gfx1100" and head_dim >= 64)
        or ((dtype == F32 or rdna) and head_dim > 128)
        or (dtype == F32 and rdna)
    )


def assert_healthy(kernels, head_dim, dtype):
    for kernel in kernels.values():
        if not may_spill(kernel, head_dim, dtype):
            kernel.assert_healthy(EDGE_SPILLS)


@pytest.fixture(autouse=True)
def triton(set_backend):
    set_backend("triton")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiles_for(target):
    kernels = compiled(target, BF16, 128)
    assert kernels.keys() == KERNELS
    assert_healthy(kernels, 128, BF16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "head_dim"),
    [
        (name, dtype, head_dim)
        for name, target in TARGETS.items()
        for head_dim in (64, 128, 256)
        # float16 does not need more registers than bfloat16.
        for dtype in ((target.dtypes()[-1], F32) if head_dim == 128 else (F16,))
    ],
    ids=str,
)
def test_compile_matrix(target, dtype, head_dim):
    kernels = compiled(target, dtype, head_dim)
    assert kernels.keys() == KERNELS
    assert_healthy(kernels, head_dim, dtype)


OPTIONS = [{"packed": True}, {"sliding_window": 20}, {"frozen": "q"}]
SLOW_FOR_SM_100 = [  # take minutes to compile
    {"sliding_window": None},
    {"sliding_window": None, "causal": False},
    {"softcap": 30.0},
    {"alibi_slopes": torch.ones(32)},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"),
    [
        (target, options)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for options in OPTIONS + (SLOW_FOR_SM_100 if target != "sm_100" else [])
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_compile_options(options, target):
    kernels = compiled(target, BF16, 128, **options)
    assert kernels.keys() == KERNELS - ({"_dq_kernel"} if "frozen" in options else set())
    if not {"softcap", "alibi_slopes"} & options.keys():
        for kernel in kernels.values():  # narrow windows have one loop, with all checks
            kernel.assert_healthy(EDGE_SPILLS, EDGE_SPILLS)


# Bounds for the main loop with a causal window, bf16 and head_dim 128: the maximum of other
# instructions per HMMA-equivalent, and the minimum share of tensor core time, with perfect overlap
# (bound_a) and as estimated (est_m).
COSTS = [
    ("sm_80", "_forward_kernel", 3.4, 1.00, 0.87),
    ("sm_90", "_forward_kernel", 2.75, 1.00, 0.84),
    ("sm_100", "_forward_kernel", 1.95, 0.97, 0.65),
    ("sm_120", "_forward_kernel", 3.3, 1.00, 0.95),
    ("sm_80", "_dkdv_kernel", 1.65, 0.825, 0.825),
    ("sm_80", "_dq_kernel", 1.8, 0.77, 0.77),
    ("sm_90", "_dkdv_kernel", 1.4, 0.995, 0.98),
    ("sm_90", "_dq_kernel", 1.55, 0.995, 0.98),
]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_cost_of_the_main_loops(target):
    kernels = compiled(target, BF16, 128)
    for name, instructions, bound, estimate in [c[1:] for c in COSTS if c[0] == target]:
        loop = kernels[name].main_loop()
        costs = loop["bounds"]
        stats = costs["nonmma_per_hmma_equiv"], costs["bound_a"], costs["est_m"]
        print(target, name, *(f"{x:.3f}" for x in stats), loop["mufu_under_wgmma"])
        assert loop["spills"] == 0
        assert costs["nonmma_per_hmma_equiv"] <= instructions + 0.005
        assert costs["bound_a"] >= bound - 0.005
        assert costs["est_m"] >= estimate
        if target == "sm_90":  # exponentials overlap with matrix products
            hidden, total = loop["mufu_under_wgmma"]
            assert hidden >= total - (name != "_forward_kernel")


@pytest.mark.slow
def test_tensor_core_share_of_backward():
    """Count 5 useful products per pair of tiles; the kernels compute 4 (dk, dv) and 3 (dq)."""
    for target, share in (("sm_80", 0.57), ("sm_90", 0.71)):
        kernels = compiled(target, BF16, 128)
        dkdv, dq = (
            kernels[x].main_loop()["bounds"]["est_m"] for x in ("_dkdv_kernel", "_dq_kernel")
        )
        assert 10 / (8 / dkdv + 6 / dq) >= share


def test_attention_kernels_have_at_most_32_parameters():
    """Tensors are passed as tuples of a pointer and strides, which keeps signatures readable."""
    counts = {}
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                counts[name] = len(inspect.signature(value.fn).parameters)
    assert len(counts) == 5
    assert max(counts.values()) <= 32, counts
