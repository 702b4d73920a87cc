"""Find the tensors in files written by `torch.save`, without executing anything in them.

`torch.load` with memory mapping reads as many bytes as the pickle claims, even if the record is
shorter, compressed or in the other byte order. It then reads past the end of the record. Therefore
this module checks the directory of the archive and interprets the pickle itself. It accepts only
the opcodes that `torch.save` writes, and only the calls that rebuild a dense tensor. No call is
executed: the interpreter returns a description of each tensor.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from mistral_kernels.checkpoint.stored import (
    FLOAT_TYPES,
    HEADER_LIMIT,
    StoredTensor,
    check_content,
    contiguous_strides,
    count_elements,
)
from mistral_kernels.utils.files import CheckpointError

# Largest size of a pickle in bytes. A tensor takes about 140 bytes.
_PICKLE_LIMIT = 1 << 20

_ZIP = b"PK\x03\x04"
_ENCODED_FLAGS = 0x61  # zip flags of an encrypted record or of patch data
# Signature, length of the name, length of the extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")

# Name that safetensors uses for the dtype of each torch storage class.
_KINDS = {
    "torch.BFloat16Storage": "BF16",
    "torch.HalfStorage": "F16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED_GLOBALS = {*_KINDS, _ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER}


class _Global(str):
    """Dotted name of a class or function."""


class _Storage(NamedTuple):
    kind: str
    key: str
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Record(NamedTuple):
    begin: int
    size: int  # bytes
    crc: int


class _UnsupportedPickle(Exception):
    """Error for an archive or pickle that is well-formed, but is not supported."""


def list_pickled(file: Path) -> list[StoredTensor]:
    """List the tensors of a file written by `torch.save`; read only its directory and its pickle.

    Raises:
        CheckpointError: The file is incomplete or damaged, a record is compressed or not
            little-endian, or the pickle is not a dict of plain tensors.
    """
    check_content(file)
    try:
        with _BoundedFile(file) as opened:
            if opened.read(4) != _ZIP:
                raise CheckpointError(
                    f"{file} is not in the format that torch.save writes since PyTorch 1.6; "
                    "save it again"
                )
            records = _list_records(opened)
            if "byteorder" in records and _read(opened, records["byteorder"]) != b"little":
                raise _UnsupportedPickle(
                    "its byte order is not little-endian; save it again on this machine"
                )
            contents = _interpret(_read(opened, records["data.pkl"], _PICKLE_LIMIT))
        if type(contents) is not dict or not contents:
            kind = "an empty dict" if contents == {} else type(contents).__name__.lstrip("_")
            raise CheckpointError(f"{file} must hold a dict of tensors, got {kind}")
        return [_locate(file, name, value, records) for name, value in contents.items()]
    except CheckpointError:
        raise
    except _UnsupportedPickle as error:
        raise CheckpointError(f"{file} was refused: {error}") from None
    except Exception as error:  # the parsers raise almost any exception for damaged bytes
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{file} is incomplete or damaged ({reason}); download or copy it again"
        ) from None


class _BoundedFile(io.FileIO):
    """File that reads at most `HEADER_LIMIT` bytes per call.

    zipfile reads the directory of an archive in one call, and the archive may claim any size.
    """

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes (-1: all); raise ValueError for more than `HEADER_LIMIT`."""
        if size is None or size < 0:
            size = HEADER_LIMIT + 1
        if len(data := super().read(min(size, HEADER_LIMIT + 1))) > HEADER_LIMIT:
            raise ValueError(f"the zip directory must have at most {HEADER_LIMIT} bytes")
        return data


def _list_records(opened: _BoundedFile) -> dict[str, _Record]:
    """Check the records of a zip file and return them by their names inside the top folder."""
    records: dict[str, _Record] = {}
    with zipfile.ZipFile(opened) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    for entry, end in zip(entries, ends, strict=True):
        folder, _, name = entry.filename.partition("/")
        if folder != entries[0].filename.partition("/")[0] or name in records:
            raise ValueError(f"unexpected record {entry.filename!r}")
        opened.seek(entry.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(opened.read(30))
        encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
        if signature != _ZIP or opened.read(name_length) != entry.orig_filename.encode(encoding):
            raise ValueError(f"record {name!r} has a damaged header")
        begin = opened.tell() + extra_length
        is_stored = (
            entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & _ENCODED_FLAGS
        )
        if not is_stored or entry.compress_size != entry.file_size:
            raise _UnsupportedPickle(
                f"its record {name!r} is compressed; save it again with torch.save"
            )
        if begin + entry.file_size > end:
            raise ValueError(f"record {name!r} is cut off")
        records[name] = _Record(begin, entry.file_size, entry.CRC)
    return records


def _read(opened: _BoundedFile, record: _Record, limit: int = 16) -> bytes:
    """Return the contents of a record of at most `limit` bytes, after a check of the checksum."""
    if record.size > limit:
        raise ValueError(f"a record has {record.size} bytes, at most {limit} are expected")
    opened.seek(record.begin)
    data = opened.read(record.size)
    if zlib.crc32(data) != record.crc:
        raise ValueError("a record does not match its checksum")
    return data


def _interpret(pickle: bytes) -> Any:
    """Return the contents of a pickle: dicts, lists, tuples, numbers, strings and `_Tensor`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" if argument > 5:
                raise ValueError(f"the pickle protocol must be at most 5, got {argument}")
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                _check_container(list, stack[-2]).append(stack.pop())
            case "APPENDS":
                items = pop_to_mark()
                _check_container(list, stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _check_container(dict, stack[-1])[_check_key(key)] = value
            case "SETITEMS":
                items = pop_to_mark()
                keys = map(_check_key, items[::2])
                _check_container(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_check_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_check_global(module, name))
            case "BINPERSID":
                stack.append(_describe_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_describe_call(function, arguments))
            case "BUILD":
                stack.pop()  # attributes of an OrderedDict, for example _metadata of a state_dict
                _check_container(dict, stack[-1])
            case "STOP":
                return stack.pop()
            case name:
                raise _UnsupportedPickle(f"it holds more than plain tensors (opcode {name})")
    raise EOFError("the pickle has no STOP opcode")


def _check_global(module: Any, name: Any) -> _Global:
    """Return the dotted name of a class or function; raise if the name is not allowed."""
    if type(module) is not str or type(name) is not str:
        raise TypeError("the name of a class is not a string")
    if (full_name := f"{module}.{name}") not in _ALLOWED_GLOBALS:
        if module.partition(".")[0] == "torch":
            raise _UnsupportedPickle(f"it holds more than plain tensors ({full_name})")
        raise _UnsupportedPickle(
            f"it would call {full_name} when loaded; only plain tensors are supported"
        )
    return _Global(full_name)


def _describe_storage(identity: Any) -> _Storage:
    """Return the storage that `identity`, ("storage", class, key, device, size), describes."""
    _, storage_class, key, _, size = identity
    if type(storage_class) is not _Global or type(key) is not str:
        raise TypeError("a storage must be described by its class and its key")
    return _Storage(_KINDS[storage_class], key, _check_count(size))


def _describe_call(function: Any, arguments: Any) -> Any:
    """Return the result of a call that `torch.save` writes: an empty dict or a `_Tensor`."""
    if type(function) is not _Global or type(arguments) is not tuple:
        raise TypeError("a call must have a function and a tuple of arguments")
    if function == _ORDERED_DICT and not arguments:
        return {}
    if function == _REBUILD_PARAMETER and type(arguments[0]) is _Tensor:
        return arguments[0]
    if function == _REBUILD_TENSOR:
        storage, offset, shape, strides, requires_grad, _, *metadata = arguments
        if any(metadata):
            raise _UnsupportedPickle(
                "it holds more than plain tensors (a negated or conjugated tensor)"
            )
        if type(storage) is not _Storage or type(requires_grad) is not bool:
            raise TypeError("a tensor must be described by storage, offset, shape and strides")
        if len(shape) != len(strides) or len(shape) > 64 or len(metadata) > 1:
            raise TypeError("a tensor must be described by storage, offset, shape and strides")
        shape, strides = tuple(map(_check_count, shape)), tuple(map(_check_count, strides))
        return _Tensor(storage, _check_count(offset), shape, strides)
    raise _UnsupportedPickle(f"it holds more than plain tensors ({function})")


def _locate(file: Path, name: Any, value: Any, records: dict[str, _Record]) -> StoredTensor:
    """Return the offset and layout of a tensor; raise if its record does not contain all of it."""
    if type(name) is not str or type(value) is not _Tensor:
        what = type(name if type(name) is not str else value).__name__
        raise CheckpointError(
            f"{file} must map names to tensors, but the entry {name!r} has type {what}"
        )
    storage, offset, shape, strides = value
    if storage.kind not in FLOAT_TYPES:  # listed for error messages, never read
        return StoredTensor(name, file, shape, storage.kind, 0)
    itemsize = FLOAT_TYPES[storage.kind].itemsize
    record = records[f"data/{storage.key}"]
    if record.size != storage.size * itemsize:
        raise ValueError(
            f"the storage of tensor {name!r} has {storage.size * itemsize} bytes, but its record "
            f"has {record.size} bytes"
        )
    if offset + count_elements(shape, strides) > storage.size:
        raise ValueError(f"tensor {name!r} exceeds its storage")
    begin = record.begin + offset * itemsize
    if all(
        size == 1 or stride == expected
        for size, stride, expected in zip(shape, strides, contiguous_strides(shape), strict=True)
    ):
        return StoredTensor(name, file, shape, storage.kind, begin)
    return StoredTensor(name, file, shape, storage.kind, begin, strides)


def _check_container(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value


def _check_key(key: Any) -> str | int:
    if type(key) is str or type(key) is int:
        return key
    # Tuples are refused: hashing a deeply nested tuple would overflow the C stack.
    raise TypeError(f"a key must be a str or an int, got a {type(key).__name__}")


def _check_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        got = repr(value) if type(value) is int else f"a {type(value).__name__}"
        raise TypeError(f"a size must be an integer in [0, 2**63), got {got}")
    return value
