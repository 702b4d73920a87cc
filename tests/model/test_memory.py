"""Memory that is page-aligned and in large pages."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from mistral_kernels import MistralForCausalLM
from mistral_kernels.model.memory import zeros

LARGE = 2 << 20

with_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="a kernel without large pages",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (3, LARGE), (0,), (4, 0)], ids=str)
@pytest.mark.parametrize("large_pages", [False, True])
def test_zeros_are_contiguous_page_aligned_and_writable(large_pages, shape, dtype):
    x = zeros(shape, dtype, "cpu", large_pages)
    assert x.shape == shape
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert not x._is_view()
    assert not x.any()
    x.fill_(1)
    assert x.sum(dtype=torch.int64) == x.numel()
    assert not zeros(shape, dtype, "cpu").any()
    assert x.data_ptr() % mmap.PAGESIZE == 0


def test_other_devices_have_ordinary_zeros():
    x = zeros((2, 3), torch.float16, "meta")
    assert x.is_meta
    assert x.shape == (2, 3)
    assert x.dtype == torch.float16


def test_too_large_sizes_raise_an_error():
    with pytest.raises(RuntimeError, match=r"(?i)memory|overflow"):
        zeros((1 << 55,), torch.float32, "cpu")


def test_a_view_keeps_the_memory():
    x = zeros((1000,), torch.float32, "cpu")
    part = x[10:20]
    part += 3
    del x
    assert part.tolist() == [3.0] * 10


def has_large_pages(x: torch.Tensor) -> bool:
    """Return whether the memory mapping of `x` has the flag of MADV_HUGEPAGE."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= x.data_ptr() < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("the tensor has no memory mapping")


@with_large_pages
def test_rings_are_in_large_pages():
    model = MistralForCausalLM.from_pretrained("tiny", dtype=torch.float32)  # copies the weights
    cache = model.new_cache(1, 8)
    assert all(has_large_pages(x) for x in (*cache.keys, *cache.values))
    assert not any(has_large_pages(x) for x in model.parameters())


@with_large_pages
def test_quantized_weights_are_in_large_pages():
    """Other weights are in small pages, whose allocation is faster."""
    model = MistralForCausalLM.from_pretrained("tiny", quantize="int8")
    assert all(has_large_pages(x) == (x.dtype == torch.int8) for x in model.parameters())
