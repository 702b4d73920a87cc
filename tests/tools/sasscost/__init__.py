"""Static costs of CUDA machine code: loops, instruction mix, occupancy, tensor core bounds."""

from .arch import ARCHS, get_arch, occupancy
from .bounds import bounds, combine
from .model import analyze, analyze_kernel, main_loop
from .report import to_json, to_text
from .triton_front import analyze_compiled, analyze_jit, compile_aot

__all__ = [
    "ARCHS",
    "analyze",
    "analyze_compiled",
    "analyze_jit",
    "analyze_kernel",
    "bounds",
    "combine",
    "compile_aot",
    "get_arch",
    "main_loop",
    "occupancy",
    "to_json",
    "to_text",
]
