"""Static costs of CUDA machine code: loops, instruction mix, occupancy, tensor core bounds."""

from .arch import ARCHS, get_arch, occupancy
from .bounds import bounds, combine
from .model import analyse, analyse_kernel, main_loop
from .report import to_json, to_text
from .triton_front import analyse_compiled, analyse_jit, compile_aot

__all__ = [
    "ARCHS",
    "analyse",
    "analyse_compiled",
    "analyse_jit",
    "analyse_kernel",
    "bounds",
    "combine",
    "compile_aot",
    "get_arch",
    "main_loop",
    "occupancy",
    "to_json",
    "to_text",
]
