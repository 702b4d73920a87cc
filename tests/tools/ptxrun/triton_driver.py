"""Triton driver that executes compiled PTX on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import sys
import threading

from . import profiling
from .errors import LaunchError, PtxRunError
from .launch import load
from .options import Options
from .options import options as changed_options

# Properties that the driver reports, of these GPUs: A100, RTX 3090 Ti, RTX 4090, H100.
PROPERTIES = {
    80: {
        "max_shared_mem": 166912,
        "multiprocessor_count": 108,
        "sm_clock_rate": 1410000,
        "mem_clock_rate": 1215000,
        "mem_bus_width": 5120,
    },
    86: {
        "max_shared_mem": 101376,
        "multiprocessor_count": 84,
        "sm_clock_rate": 1695000,
        "mem_clock_rate": 9751000,
        "mem_bus_width": 384,
    },
    89: {
        "max_shared_mem": 101376,
        "multiprocessor_count": 128,
        "sm_clock_rate": 2520000,
        "mem_clock_rate": 10501000,
        "mem_bus_width": 384,
    },
    90: {
        "max_shared_mem": 232448,
        "multiprocessor_count": 132,
        "sm_clock_rate": 1980000,
        "mem_clock_rate": 2619000,
        "mem_bus_width": 5120,
    },
}


class _ThreadState(threading.local):
    compiled = None  # the CompiledKernel whose binary is being loaded
    dry = False  # compile without executing
    tuned = None  # the autotuner run in which a configuration has already compiled


_state = _ThreadState()


@functools.lru_cache(maxsize=512)
def _module(ptx):
    return load(ptx)


class _Function:
    """Handle of a loaded kernel, which is translated at its first launch."""

    def __init__(self, name, ptx):
        self.name, self.ptx = name, ptx

    @functools.cached_property
    def kernel(self):
        return _module(self.ptx).kernel(self.name)


class Utils:
    """Functions of the driver for devices and binaries."""

    def __init__(self, capability):
        self.capability = capability

    def load_binary(self, name, binary, shared, device):
        if _state.compiled is None or "ptx" not in _state.compiled.asm:
            raise PtxRunError(f"no PTX is available for {name}")
        function = _Function(name, _state.compiled.asm["ptx"])
        return function, function, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device=0):
        return dict(PROPERTIES[self.capability], max_num_regs=65536, warpSize=32)

    def set_printf_fifo_size(self, n):
        pass

    def get_current_device(self):
        return self.capability

    def set_current_device(self, device):
        pass

    def get_default_stream(self, device=0):
        return 0

    def is_stream_capturing(self, stream=0):
        return False

    def get_device_capability(self, device=0):
        return divmod(self.capability, 10)


def tensor_map(address, elem_type, elem_bytes, box, shape, strides, swizzle=0, nan_fill=False):
    """Return a tensor map in ptxrun's own 128-byte format, `struct TMap` of rt/hopper.h.

    `box`, `shape` and `strides` (in elements) are in the order of the tensor's dimensions.
    `elem_type` and `swizzle` are the numbers of `tensormap.replace`.
    """

    def padded(values, count):
        return (list(values) + [0] * count)[:count]

    return struct.pack(
        "<Q4Q5I5H5B6B11xI32x",
        address,
        *padded([s * elem_bytes for s in reversed(strides[:-1])], 4),
        *padded(reversed(shape), 5),
        *padded(reversed(box), 5),
        *padded([1] * len(shape), 5),
        len(shape) - 1,
        elem_type,
        0,
        swizzle,
        int(nan_fill),
        0,
        0x7FF,
    )


def _descriptor_arguments(descriptor, meta):
    """Return the kernel arguments of a host-side descriptor: map, shape and strides."""
    if meta.get("is_im2col") or meta.get("fp4_padded"):
        raise LaunchError("tensor descriptors must be tiled, got im2col or fp4")
    tf32 = getattr(descriptor, "round_f32_to_tf32", False)
    mapped = tensor_map(
        descriptor.base.data_ptr(),
        11 if tf32 else meta["elem_type"],
        meta["elem_size"],
        meta["block_size"],
        descriptor.shape,
        descriptor.strides,
        meta["swizzle"],
        descriptor.padding == "nan",
    )
    return [mapped, *descriptor.shape, *descriptor.strides]


def _workspace(name, size, align, stream):
    """Allocate a launch's workspace, with the allocator of `triton.set_allocator` as on a GPU."""
    import torch

    if name != "global_scratch":
        return torch.zeros(size, dtype=torch.uint8)
    from triton.runtime import _allocation

    buffer = _allocation._allocator.get()(size, align, stream)
    if not hasattr(buffer, "untyped_storage"):
        raise LaunchError("the allocator set with triton.set_allocator must return a CPU tensor")
    return buffer


class _Arguments:
    """Arguments of a launch, one per PTX parameter: tuples and descriptors are unpacked."""

    def __init__(self, signature, arguments, descriptors):
        self.values, self.names, self.bases = [], [], []
        self._descriptors = iter(descriptors or ())
        for (name, kind), x in zip(signature.items(), arguments, strict=True):
            self._append(kind, x, str(name))

    def append(self, name, x):
        self.names.append(name)
        self.values.append(x)

    def _append(self, kind, x, name):
        if isinstance(kind, tuple):
            for i, (inner, y) in enumerate(zip(kind, x, strict=True)):
                self._append(inner, y, f"{name}[{i}]")
        elif kind == "constexpr":
            pass
        elif isinstance(kind, str) and kind.startswith("tensordesc"):
            meta = next(self._descriptors, None)
            if meta is None:  # Triton has replaced the descriptor by plain arguments
                from triton.backends.driver import decompose_descriptor

                unpacked = decompose_descriptor(x)
            else:
                self.bases.append((name, x.base))
                unpacked = _descriptor_arguments(x, meta)
            for i, y in enumerate(unpacked):
                self.append(f"{name}.{i}", y)
        elif kind in ("fp16", "bf16", "fp32", "f32", "fp64") and x is not None:
            self.append(name, float(x))
        elif hasattr(x, "data_ptr") and not hasattr(x, "untyped_storage"):
            self.append(name, getattr(x, "base", x))  # a reinterpreted tensor
        else:
            self.append(name, x)


class Launcher:
    """Launcher of a compiled kernel, called by CompiledKernel.run."""

    def __init__(self, src, metadata):
        if getattr(metadata, "num_ctas", 1) != 1:
            raise LaunchError(f"num_ctas must be 1, got {metadata.num_ctas}")
        self.metadata = metadata
        self.signature = dict(src.signature)

    def __call__(
        self,
        grid_x,
        grid_y,
        grid_z,
        stream,
        function,
        kernel_metadata,
        launch_metadata,
        enter_hook,
        exit_hook,
        *args,
    ):
        if _state.dry:
            return
        metadata, kernel = self.metadata, function.kernel
        descriptors = getattr(metadata, "tensordesc_meta", None)
        arguments = _Arguments(self.signature, args, descriptors)
        missing = len(kernel.params) - len(arguments.values)
        if missing < 0:
            raise LaunchError(
                f"{kernel.name} takes {len(kernel.params)} parameters, got {len(arguments.values)}"
            )
        ctas = grid_x * grid_y * grid_z
        for name in ("global_scratch", "profile_scratch")[:missing]:
            size = ctas * (getattr(metadata, f"{name}_size", 0) or 0)
            align = getattr(metadata, f"{name}_align", 1) or 1
            arguments.append(name, _workspace(name, size, align, stream) if size else None)
        arguments.values += [None] * (len(kernel.params) - len(arguments.values))
        if callable(enter_hook):
            enter_hook(launch_metadata)
        kernel.launch(
            (grid_x, grid_y, grid_z),
            (32 * metadata.num_warps, 1, 1),
            arguments.values,
            max(0, metadata.shared - kernel.desc["shared_static"]),
            names=arguments.names,
            more=arguments.bases,
        )
        if callable(exit_hook):
            exit_hook(launch_metadata)


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 0.0


class _DeviceInterface:
    Event = _Event

    @staticmethod
    def synchronize(*args):
        pass

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def is_available():
        return True


class _PtxRun:
    """Marker class of the drivers that `make_driver` returns."""


def make_driver(capability, autotune):
    """Return a Triton driver for `capability`. Requires Triton."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class PtxRunDriver(_PtxRun, DriverBase):
        def __init__(self):
            self.utils = Utils(capability)
            self.launcher_cls = Launcher

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            # Triton caches kernels and the shared-memory limit per device: return one device per
            # capability.
            return capability

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device=0):
            return 0

        def get_device_capability(self, device=0):
            return divmod(capability, 10)

        def get_device_interface(self):
            return _DeviceInterface

        def map_python_to_cpp_type(self, kind):
            return kind

        def get_empty_cache_for_benchmark(self):
            return torch.empty(1, dtype=torch.int8)

        def clear_cache(self, cache):
            pass

        def assemble_tensormap_to_arg(self, info, args):
            return args

        def get_benchmarker(self):
            return self.benchmark

        def benchmark(self, function, *args, quantiles=None, **kwargs):
            """Return modeled milliseconds of one call, or the rank of the configuration."""
            if autotune == "model":
                time = profiling.model_time_of(function) * 1e3
            else:
                time = _first_that_compiles(function)
            return [time] * len(quantiles) if quantiles else time

    return PtxRunDriver()


def _first_that_compiles(function):
    """Return 1 for the first configuration of an autotuner run that compiles, 2 for later ones.

    Later configurations are not compiled.
    """
    run = None
    for cell in getattr(function, "__closure__", None) or ():
        tuner = cell.cell_contents
        if hasattr(tuner, "configs") and hasattr(tuner, "nargs"):
            run = tuner, tuner.nargs  # the configurations of a run share these arguments
    last = _state.tuned
    if run is not None and last is not None and last[0] is run[0] and last[1] is run[1]:
        return 2.0
    _state.dry = True
    try:
        function()
    finally:
        _state.dry = False
    _state.tuned = run
    return 1.0


@functools.cache
def _patch_triton():
    """Patch Triton: pass the PTX of kernels to the driver, and let it replace `do_bench`."""
    import triton.testing
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    init_handles, do_bench = CompiledKernel._init_handles, triton.testing.do_bench

    @functools.wraps(init_handles)
    def init_handles_with_ptx(self, *args, **kwargs):
        before, _state.compiled = _state.compiled, self
        try:
            return init_handles(self, *args, **kwargs)
        finally:
            _state.compiled = before

    @functools.wraps(do_bench)
    def do_bench_by_model(function, *args, quantiles=None, return_mode="mean", **kwargs):
        if not isinstance(driver.active, _PtxRun):
            return do_bench(function, *args, quantiles=quantiles, return_mode=return_mode, **kwargs)
        time = driver.active.benchmark(function, quantiles=quantiles)
        return [time] * 5 if return_mode == "all" and not quantiles else time

    CompiledKernel._init_handles = init_handles_with_ptx
    triton.testing.do_bench = do_bench_by_model


def install(capability=80, racecheck=None, profile=None, autotune="first", threads=None):
    """Install a Triton driver that executes kernels on CPU tensors, and return the driver.

    Args:
        capability: compute capability to compile for: 80, 86, 89 or 90 (sm_90a).
        racecheck: value of `Options.racecheck`; None leaves it unchanged.
        profile: value of `Options.profile`; None leaves it unchanged.
        autotune: "first" uses the first configuration that compiles and fits into shared memory;
            "model" executes every configuration once and ranks them by modeled time.
        threads: value of `Options.threads`; None leaves it unchanged.

    Raises:
        LaunchError: an argument is invalid, or TRITON_INTERPRET=1 is set.
    """
    if capability not in PROPERTIES:
        raise LaunchError(f"capability must be one of {sorted(PROPERTIES)}, got {capability}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise LaunchError(
            "TRITON_INTERPRET must be unset, got 1: the interpreter replaces the compiler that "
            "generates PTX"
        )
    if autotune not in ("first", "model"):
        raise LaunchError(f"autotune must be 'first' or 'model', got {autotune!r}")
    from triton.runtime import driver

    _patch_triton()
    active = make_driver(capability, autotune)
    driver.set_active(active)
    Options.max_shared = PROPERTIES[capability]["max_shared_mem"]
    if racecheck is not None:
        Options.racecheck = bool(racecheck)
    if profile is not None:
        Options.profile = bool(profile)
    if threads is not None:
        Options.threads = int(threads)
    return active


def installed():
    """Return whether the active Triton driver is one of ptxrun's."""
    runtime = sys.modules.get("triton.runtime")
    return runtime is not None and isinstance(runtime.driver._active, _PtxRun)


@contextlib.contextmanager
def running(capability=80, **options):
    """Install the driver as `install` does, and restore the driver and `Options` on exit."""
    from triton.runtime import driver

    active = driver._active
    with changed_options():
        try:
            yield install(capability, **options)
        finally:
            driver._active = active
