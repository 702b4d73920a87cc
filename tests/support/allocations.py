"""Count the allocations of an operation, and the attention scores that it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mistral_kernels.ops import dispatch


class Allocations(TorchDispatchMode):
    """Mode that counts new tensors and attention scores.

    Attributes:
        largest_new: elements of the largest new tensor.
        total_new: bytes of all new tensors.
        scores: elements of all query-key products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest_new = 0
        self.total_new = 0
        self.scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mistral_kernels":  # count inside the operators written in Python
            is_in_csrc = func.has_kernel_for_dispatch_key("CPU")
            if is_in_csrc and not dispatch.uses_csrc("cpu"):
                func = getattr(torch.ops.mistral_kernels, f"{func._opname}_python").default
                is_in_csrc = False
            if not is_in_csrc:
                with self:
                    return func._op_dk(
                        DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {})
                    )
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
