"""Memory that decode steps stream through: weights, and the rings of a cache."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.zeros`, but on the CPU in pages of 2 MB, where the system has such.

    A step reads more than the processor keeps translations of small pages for: on Zen 4 eight texts
    take 3 to 10 percent less time so. Like `torch.zeros`, it takes memory when that is written to.
    """
    device, size = torch.device(device), math.prod(shape)
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    except (OSError, OverflowError):  # PyTorch says it better
        return torch.zeros(shape, dtype=dtype)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    # Detached, it is nobody's view: of these autograd lets some operators write no more than one.
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape)).detach()
