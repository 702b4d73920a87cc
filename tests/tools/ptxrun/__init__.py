"""Execute compiled PTX for sm_80 and sm_90a on the CPU."""

from .buffers import register, unregister
from .build import missing
from .cuda import compile_cuda
from .errors import (
    BuildError,
    DivergenceError,
    ExecutionError,
    LaunchError,
    MemoryFault,
    PtxRunError,
    PtxSyntaxError,
    RaceError,
    Trap,
    UnsupportedPtx,
)
from .launch import Kernel, Module, load
from .options import Options, options
from .profiling import Profile, last_profile, profiles, report, reset_profile
from .resources import resource_usage
from .triton_driver import install, installed, running

__all__ = [
    "BuildError",
    "DivergenceError",
    "ExecutionError",
    "Kernel",
    "LaunchError",
    "MemoryFault",
    "Module",
    "Options",
    "Profile",
    "PtxRunError",
    "PtxSyntaxError",
    "RaceError",
    "Trap",
    "UnsupportedPtx",
    "compile_cuda",
    "install",
    "installed",
    "last_profile",
    "load",
    "missing",
    "options",
    "profiles",
    "register",
    "report",
    "reset_profile",
    "resource_usage",
    "running",
    "unregister",
]
