"""Classes of instructions in a profile."""

from __future__ import annotations

CLASSES = [
    "mma",
    "ldmatrix",
    "fp32_fma",
    "fp32_add_mul",
    "fp32_other",
    "fp16",
    "fp64",
    "int_alu",
    "int_mul",
    "mufu",
    "cvt_pack",
    "cvt",
    "shfl",
    "vote",
    "ld_shared",
    "st_shared",
    "ld_global",
    "st_global",
    "ld_local",
    "st_local",
    "cp_async",
    "atomic",
    "barrier",
    "fence",
    "branch",
    "mov",
    "setp_sel",
    "other",
    "wgmma",
    "tma",
    "tma_store",
    "mbarrier",
]
CLASS_INDEX = {name: i for i, name in enumerate(CLASSES)}
