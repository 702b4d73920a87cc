"""Memory of tensors and NumPy arrays that kernels may access."""

from __future__ import annotations

import ctypes
import struct
import weakref

from .errors import LaunchError

CONST = 1  # flag of a range that kernels may only read

_registered = {}


def register(tensor):
    """Allow kernels to access the storage of `tensor` through pointers they load from memory."""
    is_tensor = hasattr(tensor, "untyped_storage")
    _registered[extent(tensor)] = weakref.ref(tensor) if is_tensor else lambda: tensor
    return tensor


def unregister(tensor):
    """Undo `register`."""
    _registered.pop(extent(tensor), None)


def is_buffer(x):
    return hasattr(x, "untyped_storage") or hasattr(x, "__array_interface__")


def extent(x):
    """Return (address, bytes) of the storage that `x` is a view of."""
    if hasattr(x, "untyped_storage"):
        storage = x.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    base = x
    while hasattr(getattr(base, "base", None), "__array_interface__"):
        base = base.base
    start, first = (y.__array_interface__["data"][0] for y in (base, x))
    return start, base.nbytes if start <= first else x.nbytes


def address(x):
    """Return the address of the first element of `x`."""
    if not hasattr(x, "data_ptr"):
        return x.__array_interface__["data"][0]
    if x.device.type != "cpu":
        raise LaunchError(f"tensors must be on the CPU, got one on {x.device}")
    return x.data_ptr()


def pack_arguments(name, params, size, args):
    """Return the parameter block of a launch and its (parameter, tensor) pairs.

    `params` holds (name, offset, bytes, type, count, alignment) per parameter; `size` is the size
    of the block in bytes.
    """
    if len(args) != len(params):
        listed = ", ".join(p[3] + (f"[{p[4]}]" if p[4] is not None else "") for p in params)
        raise LaunchError(
            f"kernel {name} takes {len(params)} parameters ({listed}), got {len(args)}"
        )
    block = bytearray(max(16, size + 16))
    buffers = []
    for (param, offset, n, kind, _, _), x in zip(params, args, strict=True):
        if is_buffer(x):
            if n != 8:
                raise LaunchError(f"{name}: parameter {param} must be a {kind}, got a tensor")
            buffers.append((param, x))
            value = struct.pack("<Q", address(x))
        else:
            value = _pack(f"{name}: parameter {param}", n, kind, x)
        block[offset : offset + len(value)] = value
    return block, buffers


def _pack(what, n, kind, x):
    """Return `x` as the `n` bytes of a parameter of type `kind`."""
    if x is None:
        return bytes(n)
    if isinstance(x, (bytes, bytearray, ctypes.Structure)):
        if len(bytes(x)) > n:
            raise LaunchError(f"{what} must have {n} bytes, got {len(bytes(x))}")
        return bytes(x)
    if isinstance(x, bool):
        return int(x).to_bytes(n, "little")
    is_integer = isinstance(x, int) or (hasattr(x, "__index__") and not isinstance(x, float))
    if is_integer and kind not in ("f32", "f64"):
        return (int(x) & ((1 << (8 * n)) - 1)).to_bytes(n, "little")
    if not is_integer and not isinstance(x, float) and not hasattr(x, "__float__"):
        raise LaunchError(f"{what} must be a tensor, number or bytes, got {type(x).__name__}")
    x = float(x)
    if n == 8:
        return struct.pack("<d", x)
    if n == 4:
        return bytes(ctypes.c_float(x))  # infinity on overflow; struct.pack would raise
    if n == 2:
        return struct.pack("<e", x)
    raise LaunchError(f"{what} must be a {kind}, got a float")


def accessible_ranges(buffers, variables, block):
    """Return the sorted, disjoint (start, end, name, flags) of the memory a launch may access.

    `buffers` holds (name, tensor) pairs, `variables` the (name, state space, address, bytes) of
    the module's variables, and `block` the (address, bytes) of the parameters.
    """
    ranges = {}
    for name, x in buffers:
        ranges.setdefault(extent(x), (name, 0))
    for key, alive in list(_registered.items()):
        if alive() is None:
            del _registered[key]
        else:
            ranges.setdefault(key, ("registered", 0))
    for name, space, start, n in variables:
        ranges.setdefault((start, n), (name, CONST if space == "const" else 0))
    ranges.setdefault(block, ("parameters", CONST))
    merged = []
    for (start, n), (name, flags) in sorted(ranges.items()):
        if n == 0:
            continue
        if merged and start < merged[-1][1]:
            first, end, names, mask = merged[-1]
            merged[-1] = (first, max(end, start + n), f"{names}/{name}", flags & mask)
        else:
            merged.append((start, start + n, name, flags))
    return merged
