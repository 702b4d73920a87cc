"""Matrix products with many rows: PyTorch's, or csrc's kernel where PyTorch is slow.

PyTorch multiplies bfloat16 and float16 slowly on processors without instructions for them. csrc's
kernel converts both matrices to float32, block by block, and multiplies at the speed of float32.
With AVX2, it multiplies float32 matrices, too: on two Zen 2 cores it is twice as fast as PyTorch.
`kernel_multiplies` alone chooses.

The order of the sums depends on the inner dimension alone. Hence the bits of a product do not
depend on the number of threads, nor on its other rows and columns.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mistral_kernels.ops import extension
from mistral_kernels.ops.checks import (
    check_dtype,
    check_float,
    check_same_dtype,
    check_shape,
    check_unit_stride,
    check_writable,
)
from mistral_kernels.ops.operator import Operator

# The dtypes that PyTorch multiplies at full speed, for each of csrc's instruction sets. PyTorch
# may have instructions for float16, too.
_MULTIPLIED_BY_TORCH = {
    "plain": {torch.float32},
    "avx2": set[torch.dtype](),
    "avx512": {torch.float32},
    "avx512_bf16": {torch.float32, torch.bfloat16},
    "neon_bf16": {torch.float32, torch.bfloat16},
}
# If a product is added to a matrix of a wider dtype, it is computed in blocks of this number of
# elements. On a CPU a block stays in the cache until it is added.
_PRODUCT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


@functools.cache  # called for every product
def multiplied_by_torch(instruction_set: str) -> set[torch.dtype]:
    """Return the dtypes that PyTorch multiplies on a CPU where csrc uses this instruction set."""
    dtypes = _MULTIPLIED_BY_TORCH[instruction_set]
    if instruction_set.startswith("avx512") and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return dtypes | {torch.float16}
    return dtypes


def kernel_multiplies(x: Tensor) -> bool:
    """Return whether csrc's kernel computes the products of many rows of x; load it."""
    return extension.supports(x) and x.dtype not in multiplied_by_torch(extension.instruction_set())


def _check(c: Tensor, a: Tensor, b: Tensor, scales: Tensor | None, accumulate: bool) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            "a and b must be (rows, inner) and (inner, cols), "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    check_shape("c", c, (a.shape[0], b.shape[1]))
    check_unit_stride("c", c)
    check_writable("c", c)
    check_float("a", a)
    if c.dtype not in (a.dtype, torch.promote_types(a.dtype, torch.float32)):
        raise TypeError(f"c must be {a.dtype} or torch.float32 for a of {a.dtype}, got {c.dtype}")
    if scales is None:
        check_same_dtype("b", b, "a", a)
    else:
        check_dtype("b", b, torch.int8)
        check_dtype("scales", scales, torch.float32)
        check_shape("scales", scales, b.shape[1:])


def _matmul_torch(c: Tensor, a: Tensor, b: Tensor, scales: Tensor | None, accumulate: bool) -> None:
    wide = torch.promote_types(a.dtype, torch.float32)
    product = a.to(wide) @ b.to(wide)
    if scales is not None:
        product *= scales
    if accumulate:
        c += product
    else:
        c.copy_(product)


# c = a b, or c += a b if `accumulate`. With `scales`, b is int8 and its columns are multiplied by
# `scales`. c must not share memory with a or b.
_matmul_op = Operator(
    "matmul_",
    "(Tensor(a!) c, Tensor a, Tensor b, Tensor? scales, bool accumulate) -> ()",
    fake=lambda *args: None,
    check=_check,
    torch=_matmul_torch,
    csrc=("cpu",),
)


def _check_accumulate(total: Tensor, x: Tensor) -> None:
    check_shape("x", x, total.shape)
    check_float("x", x)
    check_writable("total", total)


def _accumulate_torch(total: Tensor, x: Tensor) -> None:
    total.add_(x)


# total += x, where total has a wider dtype. PyTorch's `add_` would first convert a copy of x.
_accumulate_op = Operator(
    "accumulate_",
    "(Tensor(a!) total, Tensor x) -> ()",
    fake=lambda *args: None,
    check=_check_accumulate,
    torch=_accumulate_torch,
    csrc=("cpu",),
)


def multiply(out: Tensor, a: Tensor, b: Tensor, scales: Tensor | None = None) -> Tensor:
    """Write a @ b to `out` and return it, without gradients.

    Args:
        out: (rows, cols), dtype of a, contiguous rows.
        a: (rows, inner).
        b: (inner, cols), dtype of a; int8 with `scales`.
        scales: (cols,), float32: factors of the columns of b.
    """
    if scales is not None or kernel_multiplies(a):
        _matmul_op(out, a, b, scales, False)
        return out
    return torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which has the dtype of a or a wider one."""
    if kernel_multiplies(a):
        _matmul_op(total, a, b, None, True)
        return
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    rows = max(1, _PRODUCT_ELEMENTS[total.device.type] // max(1, total.shape[1]))
    product = b.new_empty(min(rows, len(total)), total.shape[1])
    for start in range(0, len(total), rows):
        block = total[start : start + rows]
        _accumulate_op(block, torch.mm(a[start : start + rows], b, out=product[: len(block)]))
