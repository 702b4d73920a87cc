"""Names of the operators that Python declares."""

from __future__ import annotations

import torch

NAMESPACE = "mistral_kernels::"


def declared_operators() -> set[str]:
    """Return the names without the namespace; operators that only csrc has are not declared."""
    # A declared operator has a fake, so a kernel for the Meta key.
    return {
        name.removeprefix(NAMESPACE)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(NAMESPACE)
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")
    }
