"""List the tensors of safetensors files by their headers, and map weight files into memory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral_kernels.utils.files import CheckpointError, check_regular, read_bytes

# Dtypes of unquantized weights, by their names in safetensors.
FLOAT_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

# Alignment of weights in memory and in files, in bytes. The hardware prefetcher stops at the end of
# a page: rows that cross pages are read 5 to 12 % more slowly.
ALIGNMENT = 4096

# Largest size in bytes of the header of a file, which describes its tensors. The description of a
# tensor takes about 100 bytes; parsed to Python objects, it takes 24 times as much.
HEADER_LIMIT = 8 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a weight file, as described by the header of the file.

    Attributes:
        name: Name of the tensor in the file.
        file: Path of the file.
        shape: Shape of the tensor.
        kind: Dtype by its name in safetensors, for example "BF16" or "I64".
        begin: Offset of the data in the file, in bytes.
        strides: Strides in elements; None for a contiguous tensor.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str
    begin: int
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor; `kind` must be one of `FLOAT_TYPES`."""
        return FLOAT_TYPES[self.kind]

    @property
    def num_bytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, contents: Tensor) -> Tensor:
        """Return the tensor, given the mapped bytes of its file.

        The result is a view of `contents` if the tensor is contiguous and aligned to its itemsize,
        else a copy.
        """
        strides = self.strides or contiguous_strides(self.shape)
        extent = count_elements(self.shape, strides)
        end = self.begin + extent * self.dtype.itemsize
        if end > contents.numel():
            raise _shortened(self.file)
        data = contents[self.begin : end]
        if self.begin % self.dtype.itemsize:
            data = data.clone()  # a view of another dtype must be aligned
        return data.view(self.dtype).as_strided(self.shape, strides).contiguous()


def check_content(file: Path) -> None:
    """Raise CheckpointError unless `file` is a regular file, and not a pointer of Git LFS."""
    if check_regular(file) < 1000 and read_bytes(file).startswith(b"version https://git-lfs."):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file; run `git lfs pull` in its folder"
        )


def check_cast(name: str, tensor: Tensor, cast: Tensor) -> None:
    """Raise CheckpointError if `cast`, a cast of `tensor`, is infinite where `tensor` is finite.

    `name`: name of the tensor in the error message.
    """
    widest = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else math.inf
    if torch.finfo(cast.dtype).max >= widest or cast.is_meta or not cast.numel():
        return
    # aminmax is 10 times as fast as isinf, and allocates no temporary tensor.
    if all(map(math.isfinite, map(Tensor.item, cast.aminmax()))):
        return
    low, high = (x.item() for x in tensor.where(tensor.isfinite(), 0).aminmax())
    largest = torch.tensor(max(-low, high), dtype=torch.float64)
    if largest.to(cast.dtype).isfinite():
        return
    wider = [x for x in (torch.bfloat16, torch.float32, torch.float64) if largest.to(x).isfinite()]
    names = [str(dtype).removeprefix("torch.") for dtype in (cast.dtype, *wider[:2])]
    raise CheckpointError(
        f"tensor {name!r} has values beyond {names[0]}'s range; use {' or '.join(names[1:])}"
    )


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def count_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of storage elements from the first to the last element of a tensor."""
    if not all(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def map_file(file: Path, needed: int = 0) -> Tensor:
    """Map a file of at least `needed` bytes as a uint8 tensor; writes do not reach the file."""
    size = check_regular(file)
    if size < needed:
        raise _shortened(file)
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)


def list_safetensors(file: Path) -> list[StoredTensor]:
    """List the tensors of a safetensors file in the order of their data; read only its header.

    Raises:
        CheckpointError: The file is not valid. The safetensors library checks that the header is
            well-formed, and that the tensors fill the file without gaps or overlaps.
    """
    check_content(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > HEADER_LIMIT:
            raise _invalid_file(file, f"a header of {length} bytes, more than {HEADER_LIMIT}")
        encoded = opened.read(length)
    try:
        with safe_open(file, framework="pt") as checked:
            names = checked.offset_keys()
        header = json.loads(encoded)
    except (SafetensorError, OSError, ValueError) as error:
        raise _invalid_file(file, str(error)) from None
    found = []
    for name in names:
        tensor = header[name]
        begin = 8 + length + tensor["data_offsets"][0]
        found.append(StoredTensor(name, file, tuple(tensor["shape"]), tensor["dtype"], begin))
    return found


def _shortened(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} has become shorter since it was opened")


def _invalid_file(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a valid safetensors file ({reason}); download or copy it again"
    )
