"""Names of the operators that Python declares."""

from __future__ import annotations

import torch

NAMESPACE = "mistral_kernels::"


def declared_operators() -> set[str]:
    """Return the names without the namespace. Declared operators have a fake; csrc's own do not."""
    return {
        name.removeprefix(NAMESPACE)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(NAMESPACE)
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")
    }
