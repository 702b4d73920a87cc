"""Triton and C++ kernels, flash-attn 2's functions on top of them, and the Mistral model.

Operators take and return plain tensors and are differentiable. `MistralForCausalLM` and
`MistralTokenizer` load checkpoints, and `mistral_kernels.generate` generates text with them.
Importing this package uses no GPU and imports neither triton nor transformers.
"""

from mistral_kernels.cli import startup  # noqa: F401  # must be imported first

# isort: split
from mistral_kernels.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.generation_config import GenerationConfig
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops.attention import attention, rolling_cache_attention
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rolling_cache import rolling_cache_update_
from mistral_kernels.ops.rotary import apply_rotary, apply_rotary_, rotary_tables
from mistral_kernels.ops.swiglu import swiglu
from mistral_kernels.text.pipeline import pipeline
from mistral_kernels.tokenizer import AutoTokenizer, MistralTokenizer

AutoModelForCausalLM = MistralForCausalLM  # so that only the import of a model card changes

__version__ = "0.1.0"

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralTokenizer",
    "RollingCache",
    "Sampler",
    "apply_rotary",
    "apply_rotary_",
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "linear_cross_entropy",
    "pipeline",
    "rms_norm",
    "rolling_cache_attention",
    "rolling_cache_update_",
    "rotary_tables",
    "swiglu",
]
