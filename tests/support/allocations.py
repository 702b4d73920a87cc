"""Allocations of an operation and the number of scores it forms, operator by operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Record of the elements of the largest new tensor, the bytes of all, and the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_new = 0
        self.total_new = 0
        self.scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_ours = func.namespace == "mistral_kernels"
        if is_ours and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # look inside our own operators that are written in Python
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        inputs = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _storage(x) not in inputs:
                self.largest_new = max(self.largest_new, x.numel())
                self.total_new += x.numel() * x.element_size()
        name = str(func)
        if "scaled_dot_product" in name and "backward" not in name:
            q, k = args[:2]
            causal = any(x is True for x in (*args[3:], *(kwargs or {}).values()))
            self.scores += q.shape[:-1].numel() * k.shape[-2] // (2 if causal else 1)
        elif name in ("aten.bmm.default", "aten.matmul.default"):
            self.scores += result.numel()
        return result


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
