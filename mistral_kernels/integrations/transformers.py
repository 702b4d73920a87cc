"""Switch of transformers' models to these kernels: one word for a model's attention.

    from mistral_kernels.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mistral_kernels")

or `model.set_attn_implementation("mistral_kernels")`, and back to "sdpa". Training and `generate`,
with dynamic and static caches, padded, packed and windowed batches.
"""

from __future__ import annotations

from mistral_kernels.integrations import versions  # noqa: F401  (before what needs the version)
from mistral_kernels.integrations.patch_handle import Handle
from mistral_kernels.integrations.patching import apply_mistral_kernels
from mistral_kernels.integrations.transformers_attention import NAME, register
from mistral_kernels.integrations.transformers_cache import RollingCache

__all__ = ["NAME", "Handle", "RollingCache", "apply_mistral_kernels", "register"]
