"""Memory that decode steps stream through: weights, and the rings of a cache."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor


def zeros(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    large_pages: bool = False,
) -> Tensor:
    """Return `torch.zeros`, page-aligned on the CPU; see `checkpoint.stored.ALIGNMENT`.

    `large_pages`: in pages of 2 MB, where the system has such. The heads of a cache lie so far
    apart that a processor has to look up a page for every few keys, and weights are read a tenth
    faster, too. But a virtual machine that gives free memory back to its host gets large pages
    slowly, 2.4 GB in 3 s, in place of 0.6: for weights that are only copied it is not worth that.
    (Those that stay in their file may be in large pages unasked, as on ext4 of Linux 6.18.)
    """
    device, size = torch.device(device), math.prod(shape)
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    except (OSError, OverflowError):  # PyTorch says it better
        return torch.zeros(shape, dtype=dtype)
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    # Detached, it is nobody's view: of these autograd lets some operators write no more than one.
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape)).detach()


def physical_memory() -> int | None:
    """Return the bytes of this machine's memory; None where the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
