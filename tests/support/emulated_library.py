"""A pytest plugin that runs csrc's CPU operators in another process, under an emulator.

The process runs `emulated_library.cpp`, compiled with csrc for another processor. Its command is
the value of MISTRAL_KERNELS_EMULATOR. Each operator is registered for the CPU, as a library of
csrc would register it, so the tests of csrc run unchanged. Arguments that csrc does not support are
computed in Python, as usual.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shlex
import struct
import subprocess
from typing import Any

import torch

from mistral_kernels.ops import compiler, extension

VARIABLE = "MISTRAL_KERNELS_EMULATOR"
_DTYPES = {  # values of torch::headeronly::ScalarType
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.complex64: 9,
    torch.bool: 11,
    torch.bfloat16: 15,
}
_TORCH_DTYPES = {number: dtype for dtype, number in _DTYPES.items()}


class _Process:
    """The process that runs the operators."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self._process.kill)
        self._library = torch.library.Library("mistral_kernels", "FRAGMENT")
        for schema in self._read_bytes().decode().splitlines():
            self._library.define(schema)
        for name in self._read_bytes().decode().splitlines():
            schema = getattr(torch.ops.mistral_kernels, name).default._schema
            tensors = any("Tensor" in str(x.type) for x in schema.arguments)
            key = "CPU" if tensors else "CompositeExplicitAutograd"
            self._library.impl(name, self._caller(name, schema), key)
            self._write(_number(len(schema.arguments)) + _number(len(schema.returns)))

    def _caller(self, name: str, schema: Any) -> Any:
        def call(*args: Any) -> Any:
            storages: dict[int, torch.UntypedStorage] = {}
            types = [x.type for x in schema.arguments]
            values = b"".join(
                _encoded(x, kind, storages) for x, kind in zip(args, types, strict=True)
            )
            message = [_text(name), _number(torch.get_num_threads()), _number(len(storages))]
            message += [_text(ctypes.string_at(p, x.nbytes())) for p, x in storages.items()]
            results = [{"Tensor": "t", "str": "s"}.get(str(x.type), "b") for x in schema.returns]
            self._write(b"".join((*message, values, _text("".join(results)))))
            outcome = chr(self._read_number())
            if outcome == "p":
                return getattr(torch.ops.mistral_kernels, f"{name}_python")(*args)
            if outcome == "e":
                raise RuntimeError(self._read_bytes().decode())
            for pointer in storages:
                data = self._read_bytes()
                ctypes.memmove(pointer, data, len(data))
            outputs = [self._read_result(kind) for kind in results]
            return outputs[0] if len(outputs) == 1 else tuple(outputs) or None

        return call

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise RuntimeError(f"the emulator ended with code {self._process.wait()}")
        return data

    def _read_number(self) -> int:
        (number,) = struct.unpack("q", self._read(8))
        return int(number)

    def _read_bytes(self) -> bytes:
        return self._read(self._read_number())

    def _read_result(self, kind: str) -> Any:
        if kind == "s":
            return self._read_bytes().decode()
        number = self._read_number()
        if kind == "b":
            return number
        sizes, strides = ([self._read_number() for _ in range(self._read_number())] for _ in "12")
        storage = torch.frombuffer(bytearray(self._read_bytes() + bytes(8)), dtype=torch.uint8)
        x = torch.empty(0, dtype=_TORCH_DTYPES[number])
        return x.set_(storage.clone().untyped_storage(), 0, sizes, strides)  # type: ignore[call-overload]


def _number(x: int) -> bytes:
    return struct.pack("q", x)


def _numbers(x: Any) -> bytes:
    return _number(len(x)) + b"".join(map(_number, x))


def _text(x: str | bytes) -> bytes:
    data = x.encode() if isinstance(x, str) else x
    return _number(len(data)) + data


def _encoded(x: Any, kind: Any, storages: dict[int, torch.UntypedStorage]) -> bytes:
    """Return the message of an argument of the type `kind`. Add the storage of a tensor."""
    if kind.kind() == "OptionalType":
        if x is None:
            return _number(ord("n"))
        return _number(ord("o")) + _encoded(x, kind.getElementType(), storages)
    if kind.kind() == "ListType":
        values = b"".join(_encoded(y, kind.getElementType(), storages) for y in x)
        return _number(ord("l")) + _number(len(x)) + values
    if kind.kind() == "TensorType":
        storage = x.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        index = list(storages).index(storage.data_ptr())
        offset = x.storage_offset() * x.element_size()
        head = (ord("t"), index, offset, _DTYPES[x.dtype])
        return b"".join(map(_number, head)) + _numbers(x.shape) + _numbers(x.stride())
    if kind.kind() == "StringType":
        return _number(ord("s")) + _text(x)
    return _number(ord("b")) + struct.pack("d" if kind.kind() == "FloatType" else "q", x)


compiler.INSTRUCTION_SETS.clear()
compiler.INSTRUCTION_SETS.update(compiler.instruction_sets_of("aarch64"))
_process = _Process(shlex.split(os.environ[VARIABLE]))
_best = torch.ops.mistral_kernels.instruction_sets().split()[0]
extension._libraries["cpu"] = extension._Library(True, "emulated", _best)
extension.apply_backend_setting()
