"""Public names of the transformers integration.

    from mistral_kernels.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mistral_kernels")

`model.set_attn_implementation("mistral_kernels")` selects the attention of an existing model;
"sdpa" selects PyTorch's attention again. Training and `generate` are supported, with dynamic and
static caches, and with padded, packed and windowed batches.
"""

from __future__ import annotations

from mistral_kernels.integrations import versions  # noqa: F401  (must be imported first)
from mistral_kernels.integrations.patch_handle import Handle
from mistral_kernels.integrations.patching import apply_mistral_kernels
from mistral_kernels.integrations.transformers_attention import NAME, register
from mistral_kernels.integrations.transformers_cache import RollingCache

__all__ = ["NAME", "Handle", "RollingCache", "apply_mistral_kernels", "register"]
