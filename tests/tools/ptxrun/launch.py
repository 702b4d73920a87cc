"""PTX modules, their kernels, and launches."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import threading

from . import build, profiling
from .buffers import CONST, accessible_ranges, pack_arguments
from .codegen import generate
from .errors import LaunchError
from .faults import launch_error
from .options import Options
from .parser import parse
from .resources import assemble, resource_usage

PROFILE, RACECHECK = 1, 2  # flags of a launch
SHARED_SM_90 = 232448  # bytes of shared memory per block

U8, U32, I32, U64, I64, POINTER = (
    ctypes.c_uint8,
    ctypes.c_uint32,
    ctypes.c_int32,
    ctypes.c_uint64,
    ctypes.c_int64,
    ctypes.c_void_p,
)


class _Range(ctypes.Structure):
    _fields_ = [
        ("lo", U64),
        ("hi", U64),
        ("touch", POINTER),
        ("wr", POINTER),
        ("rd", POINTER),
        ("id", I32),
        ("flags", I32),
    ]


class _Error(ctypes.Structure):
    _fields_ = [
        ("kind", I32),
        ("line", I32),
        ("thread", I32),
        ("ctaid", I32 * 3),
        ("addr", U64),
        ("aux", I64),
        ("msg", ctypes.c_char * 4096),
    ]


class _Accesses(ctypes.Structure):
    _fields_ = [(n, U64) for n in ("req", "lanes", "bytes", "sect", "wave", "ideal")]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("k", POINTER),
        ("params", POINTER),
        ("grid", U32 * 3),
        ("block", U32 * 3),
        ("dynshared", U32),
        ("flags", U32),
        ("ranges", POINTER),
        ("nranges", I32),
        ("pad", I32),
        ("maxsteps", U64),
        ("pblk", POINTER),
        ("plane", POINTER),
        ("pdiv", POINTER),
        ("mem", POINTER),
        ("err", POINTER),
        ("cta_begin", U32),
        ("cta_step", U32),
        ("seed", U64),
    ]


class Module:
    """PTX module. The text is parsed when it is first needed."""

    def __init__(self, text):
        self.text = text
        self._kernels = {}
        target = re.search(r"(?m)^\s*\.target\s+sm_(\d+)", text)
        self.arch = int(target[1]) if target else 80

    @functools.cached_property
    def mod(self):
        return parse(self.text)

    @property
    def kernels(self):
        """Names of the entry functions."""
        return [name for name, function in self.mod.funcs.items() if function.kind == "entry"]

    def kernel(self, name):
        """Return a kernel by its mangled name, or by a unique part of its demangled name."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, self._resolve(name))
        return self._kernels[name]

    def _resolve(self, name):
        if re.search(r"\.entry\s+" + re.escape(name) + r"\s*[(\n{]", self.text):
            return name
        mangled = self.kernels
        try:
            text = "\n".join(mangled)
            demangler = subprocess.run(["c++filt"], input=text, capture_output=True, text=True)
            demangled = demangler.stdout.split("\n")[: len(mangled)]
        except OSError:
            demangled = mangled
        found = [k for k, d in zip(mangled, demangled, strict=True) if name in d or name in k]
        if len(found) == 1:
            return found[0]
        count = "more than one" if found else "no"
        raise LaunchError(f"{count} kernel matches {name!r}; the module has {demangled}")

    def __getitem__(self, name):
        return self.kernel(name)

    def resource_usage(self, arch=None):
        """Return registers, stack and static shared memory per kernel, as ptxas allocates them."""
        return resource_usage(
            assemble(self.text, arch or ("sm_90a" if self.arch == 90 else "sm_80"))
        )


def load(ptx):
    """Return the `Module` of PTX text or bytes."""
    return Module(ptx.decode() if isinstance(ptx, bytes) else ptx)


class Kernel:
    """Kernel of a module, compiled to a shared library and loaded."""

    def __init__(self, module, name):
        self.module, self.name = module, name
        key = build.kernel_key(module.text, name)
        self.library, self.desc = build.build_kernel(key, lambda: generate(module.mod, name))
        self.params = self.desc["params"]
        addresses = (U64 * max(1, len(self.desc["gvars"])))()
        if self.desc["gvars"]:
            self.library.ptxrun_globals(addresses)
        self.variables = [
            (variable, space, addresses[i], size)
            for i, (variable, space, size) in enumerate(self.desc["gvars"])
        ]

    def __repr__(self):
        return f"<ptxrun.Kernel {self.name}>"

    def global_var(self, name):
        """Return a writable memoryview of a .global or .const variable of the module."""
        for variable, _, address, size in self.variables:
            if variable == name:
                return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        raise KeyError(name)

    def launch(self, grid, block, args, shared_bytes=0, names=None, label=None, more=()):
        """Execute the kernel.

        Args:
            grid: number of CTAs, an int or up to three ints.
            block: number of threads per CTA, an int or up to three ints.
            args: one tensor, NumPy array, int, float, bytes or None per parameter.
            shared_bytes: dynamic shared memory per CTA in bytes.
            names: names of the parameters in errors and profiles.
            label: name of the kernel in profiles.
            more: further (name, tensor) pairs that the kernel may access, such as the tensors of
                tensor maps.

        Raises:
            LaunchError: a GPU would reject the launch.
            ExecutionError: the kernel does something invalid.
        """
        grid, block = _three(grid), _three(block)
        self._check(grid, block, shared_bytes)
        if 0 in grid:
            return
        data, buffers = pack_arguments(self.name, self.params, self.desc["param_bytes"], list(args))
        if names:
            position = {p[0]: i for i, p in enumerate(self.params)}
            shown = {n: names[i] if i < len(names) else n for n, i in position.items()}
            buffers = [(shown[n], x) for n, x in buffers]
        params = _aligned(data)
        variables = self.variables
        ranges = accessible_ranges(
            [*buffers, *more], variables, (ctypes.addressof(params), len(data))
        )
        flags = (PROFILE if Options.profile else 0) | (RACECHECK if Options.racecheck else 0)
        table = _RangeTable(ranges, flags)
        ctas = grid[0] * grid[1] * grid[2]
        count = 1 if flags else max(1, min(Options.threads, ctas))
        runs = [_Run(self, i, count) for i in range(count)]
        for run in runs:
            run.launch.params = ctypes.addressof(params)
            run.launch.grid[:], run.launch.block[:] = grid, block
            run.launch.dynshared, run.launch.flags = shared_bytes, flags
            run.launch.ranges, run.launch.nranges = ctypes.addressof(table.entries), len(ranges)
        _execute(runs)
        for run in runs:
            if run.failed:
                raise launch_error(self, run.error, ranges, block)
        if flags & PROFILE:
            profiling.record(
                self, label or self.name, grid, block, shared_bytes, runs[0], ranges, table.entries
            )

    def _check(self, grid, block, shared_bytes):
        threads = block[0] * block[1] * block[2]
        required, most = self.desc["reqntid"], self.desc["maxntid"]
        if not 1 <= threads <= 1024:
            raise LaunchError(f"{self.name}: threads per block must be 1 to 1024, got {threads}")
        if required and list(required) != block:
            raise LaunchError(f"{self.name}: block must be {required}, got {block}")
        if most and threads > most[0] * most[1] * most[2]:
            raise LaunchError(f"{self.name}: block must be within .maxntid {most}, got {block}")
        if min(grid) < 0 or grid[0] > 2**31 - 1 or grid[1] > 65535 or grid[2] > 65535:
            raise LaunchError(
                f"{self.name}: grid must be 0 to [2147483647, 65535, 65535], got {grid}"
            )
        limit = SHARED_SM_90 if self.module.arch >= 90 else Options.max_shared
        shared = self.desc["shared_static"] + shared_bytes
        if shared > limit:
            raise LaunchError(
                f"{self.name}: shared memory must be at most {limit} bytes, got {shared}"
            )


class _Run:
    """Part of a launch that one host thread executes, with its counters and its error."""

    def __init__(self, kernel, index, count):
        blocks, sites = kernel.desc["nblocks"], len(kernel.desc["sites"])
        self.executions, self.lanes, self.divergences = ((U64 * blocks)() for _ in range(3))
        self.accesses = (_Accesses * max(1, sites))()
        self.error, self.failed = _Error(), 0
        self.launch = _Launch(
            k=ctypes.addressof(ctypes.c_char.in_dll(kernel.library, "ptxrun_desc")),
            maxsteps=Options.max_steps,
            pblk=ctypes.addressof(self.executions),
            plane=ctypes.addressof(self.lanes),
            pdiv=ctypes.addressof(self.divergences),
            mem=ctypes.addressof(self.accesses),
            err=ctypes.addressof(self.error),
            cta_begin=index,
            cta_step=count,
            seed=Options.seed,
        )

    def execute(self):
        self.failed = build.runtime().ptxrun_launch(ctypes.byref(self.launch))


def _execute(runs):
    threads = [threading.Thread(target=run.execute) for run in runs[1:]]
    for thread in threads:
        thread.start()
    runs[0].execute()
    for thread in threads:
        thread.join()


class _RangeTable:
    """Table of accessible ranges for the runtime, with the arrays that its checks need."""

    def __init__(self, ranges, flags):
        self.entries = (_Range * max(1, len(ranges)))()
        self._memory = []
        for i, (start, end, _, range_flags) in enumerate(ranges):
            entry = self.entries[i]
            entry.lo, entry.hi, entry.id, entry.flags = start, end, i, range_flags
            if flags & PROFILE:
                entry.touch = self._zeros(U8, (end - start) // 32 + 2)
            if flags & RACECHECK and not range_flags & CONST:
                entry.wr = self._zeros(U32, end - start)
                entry.rd = self._zeros(U32, end - start)

    def _zeros(self, kind, count):
        self._memory.append((kind * count)())
        return ctypes.addressof(self._memory[-1])


def _aligned(data):
    """Return a copy of `data`, aligned to 64 bytes as tensor maps require."""
    raw = bytearray(len(data) + 192)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(raw)) % 64
    raw[start : start + len(data)] = data
    return (ctypes.c_char * (len(raw) - start)).from_buffer(raw, start)


def _three(shape):
    shape = [int(x) for x in ((shape,) if isinstance(shape, int) else shape)]
    return shape + [1] * (3 - len(shape))
