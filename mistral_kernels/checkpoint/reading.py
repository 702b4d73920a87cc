"""Reading weight files: their headers all at once, their tensors one at a time, memory-mapped."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral_kernels.checkpoint.files import CheckpointError, read_json
from mistral_kernels.checkpoint.names import (
    expected_shapes,
    interleaved_to_half,
    is_redundant,
    num_rotary_heads,
)
from mistral_kernels.model.config import ConfigError, MistralConfig

# The types in which unquantised weights are stored, by safetensors' name.
FLOAT_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_WORTH_A_MAPPING = 1 << 20  # bytes
# Of weights in memory, of large tensors in files that we write, and of those that are used where
# they lie: what a processor fetches unasked ends with a page, and rows that lie across pages are
# read a twentieth to an eighth more slowly.
ALIGNMENT = 4096

# Parts of tensor names that betray another architecture, and what it is.
_FOREIGN_NAMES = {
    "a mixture of experts": r"experts?\.|block_sparse_moe|feed_forward\.gate\.|\.router\.",
    "a vision encoder": r"^(model\.)?(vision_|multi_modal_projector|patch_merger|mm_projector)",
    "quantised weights": r"qscale_|(weight|input|k|v)_scale|qweight|qzeros|\.SCB$|absmax|quant_map",
    "LoRA adapters": r"lora_",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it.

    `begin`: of a safetensors file, the byte at which its data begin.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Which part of a tensor: a slice of its rows, and of its columns if not all of them.
Part = tuple[slice, ...]


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """All of any tensor."""
    return (slice(None),)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every name and shape is checked, no weight has been read.

    `stored` maps HF's name of each tensor to its place, in the order of the files.
    """

    path: Path
    format: Literal["raw", "hf"]
    config: MistralConfig
    stored: Mapping[str, StoredTensor]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type in which each tensor is stored, under its HF name."""
        return {name: stored.dtype for name, stored in self.stored.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the weights, by count of elements."""
        counts: dict[torch.dtype, int] = {}
        for stored in self.stored.values():
            counts[stored.dtype] = counts.get(stored.dtype, 0) + math.prod(stored.shape)
        return max(counts, key=lambda dtype: counts[dtype])

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(stored.shape) for stored in self.stored.values())

    @property
    def num_bytes(self) -> int:
        """The size of the weights as stored."""
        return sum(stored.num_bytes for stored in self.stored.values())

    def tensors(
        self, part_of: Callable[[str, tuple[int, ...]], Part] = whole
    ) -> Iterator[tuple[str, Tensor]]:
        """Each tensor under its HF name and in HF's layout, in the order of `stored`.

        `part_of`, given a tensor's name and shape, says which part of it to read.

        A tensor is a view of the mapped file, valid until the next step: copy it, and drop it
        before asking for the next (`del tensor` at the loop's end), since pages that were read
        count as this process's memory for as long as they are mapped. So a mapping is kept only
        until as many bytes were read as the largest tensor (or part) takes, and no more is ever
        held.
        """
        readings = [
            _Reading(stored, part_of(name, stored.shape), self._rotary_heads(name))
            for name, stored in self.stored.items()
        ]
        budget = max(reading.stored_bytes for reading in readings)
        get, current, used = None, None, 0
        for name, reading in zip(self.stored, readings):
            file, cost = reading.stored.file, reading.stored_bytes + reading.copied_bytes
            if get is None or file != current or used + cost > budget:
                get = None  # unmaps before the file is mapped afresh
                get, current, used = _open(file, self.config), file, 0
            used += cost
            tensor = reading.of(get(reading.stored.name))
            yield name, tensor
            del tensor

    def mapped(self, *names: str) -> Tensor | None:
        """Tensors that stay where they lie, as one of all their rows; writes do not reach the file.

        None where they have to be copied: not one behind the other, of several types, permuted on
        the way, in a pickle, smaller than it is worth, or not from a boundary of `ALIGNMENT` bytes.
        """
        parts = [self.stored[name] for name in names]
        first = parts[0]
        begin = end = first.begin
        if begin is None or end is None or begin % ALIGNMENT:
            return None
        for name, part in zip(names, parts):
            beside = (part.file, part.dtype, part.begin) == (first.file, first.dtype, end)
            if not beside or self._rotary_heads(name):
                return None
            end += part.num_bytes
        if end - begin < _WORTH_A_MAPPING:
            return None
        file = torch.from_file(str(first.file), shared=False, size=end, dtype=torch.uint8)
        return file[begin:].view(first.dtype).view(-1, *first.shape[1:]).detach()

    def _rotary_heads(self, name: str) -> int:
        """How many heads of the tensor have their rows in another order than HF's."""
        return num_rotary_heads(name, self.config) if self.format == "raw" else 0


class _Reading:
    """A part of a stored tensor: which pages of its file that takes, and how it is made of them."""

    def __init__(self, stored: StoredTensor, part: Part, heads: int) -> None:
        rows = range(stored.shape[0])[part[0]]
        size = stored.shape[0] // heads if heads else 1  # rows that are permuted among themselves
        first, last = rows.start // size, -(-rows.stop // size)
        self.stored, self.heads = stored, last - first if heads else 0
        self.rows = slice(first * size, last * size)
        self.part = (slice(rows.start - first * size, rows.stop - first * size), *part[1:])
        # Rows are contiguous, so that a part of each takes as many pages as the whole.
        self.stored_bytes = stored.num_bytes // stored.shape[0] * (last - first) * size
        # What is permuted is a copy beside the mapped original.
        self.copied_bytes = self.stored_bytes if heads else 0

    def of(self, tensor: Tensor) -> Tensor:
        tensor = tensor[self.rows]
        if self.heads:
            # In a mapping of its own: what malloc gets back, it may keep from the system.
            scratch = torch.frombuffer(mmap(-1, self.copied_bytes), dtype=tensor.dtype)
            tensor = interleaved_to_half(tensor, self.heads, out=scratch.view(tensor.shape))
        return tensor[self.part]


def read_config(
    path: Path, parse: Callable[[dict[str, Any]], MistralConfig], contents: dict[str, Any]
) -> MistralConfig:
    """`parse(contents)`, with the file named in its error."""
    try:
        return parse(contents)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_weights(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The file `stem.suffix`, or else all its shards, by their index or by their numbers.

    Empty if the folder has none; a missing shard raises.
    """
    single = folder / f"{stem}{suffix}"
    index = folder / f"{stem}{suffix}.index.json"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no 'weight_map'")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} points outside its folder: {outside[0]!r}")
        source = index.name
    else:
        found = sorted(path.name for path in folder.glob(f"{stem}-*-of-*{suffix}"))
        if not found:
            return []
        count = found[0].removesuffix(suffix).rpartition("-of-")[2]
        if not count.isdecimal():
            return []
        names = [f"{stem}-{i + 1:0{len(count)}}-of-{count}{suffix}" for i in range(int(count))]
        source = found[0]
    if missing := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(
            f"{folder / missing[0]} is missing: {source} tells of {len(names)} shards, "
            f"{len(missing)} of them not there; download the rest"
        )
    return [folder / name for name in names]


def match_tensors(
    files: Iterable[Path], names: Mapping[str, str], config: MistralConfig
) -> dict[str, StoredTensor]:
    """Check the names, shapes and types of all tensors in `files` by their headers alone.

    `names` gives HF's name of each tensor under the name that the files use; the result is keyed
    by HF's names. Raises `CheckpointError` that names the tensor, its file and what was expected.
    """
    shapes = expected_shapes(config)
    matched: dict[str, StoredTensor] = {}
    files = list(files)
    for file in files:
        for stored in _list(file, config):
            hf_name = names.get(stored.name)
            if hf_name is None:
                missing = next((name for name in names if names[name] not in matched), None)
                raise CheckpointError(_unexpected(stored, missing))
            if hf_name in matched:
                raise CheckpointError(
                    f"{file}: tensor {stored.name!r} is in {matched[hf_name].file.name} as well; "
                    "tensor-parallel shards are not supported: merge them into one file first"
                )
            if stored.shape != shapes[hf_name]:
                raise CheckpointError(
                    f"{file}: tensor {stored.name!r} has shape {stored.shape}, "
                    f"the configuration asks for {shapes[hf_name]}"
                )
            matched[hf_name] = stored
    if missing_names := [name for name in names if names[name] not in matched]:
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
        raise CheckpointError(
            f"{where}: no tensor {missing_names[0]!r} "
            f"({len(missing_names)} of {len(names)} tensors are missing)"
        )
    return matched


def _unexpected(stored: StoredTensor, missing: str | None) -> str:
    for what, pattern in _FOREIGN_NAMES.items():
        if re.search(pattern, stored.name):
            return (
                f"{stored.file}: the checkpoint has {what} (tensor {stored.name!r}); "
                "only dense, unquantised Mistral decoders are supported"
            )
    hint = f", such as {missing!r}" if missing else ""
    return (
        f"{stored.file}: unexpected tensor {stored.name!r}; "
        f"expected the names of a dense Mistral decoder{hint}"
    )


def _list(file: Path, config: MistralConfig) -> list[StoredTensor]:
    """The needed tensors of a file, by its header."""
    found: list[StoredTensor] = []

    def add(name: str, shape: Iterable[int], kind: Any, begin: int | None) -> None:
        if is_redundant(name, config):
            return
        dtype = FLOAT_TYPES.get(kind, kind)
        if dtype not in FLOAT_TYPES.values():
            raise CheckpointError(
                f"{file}: the checkpoint has quantised weights (tensor {name!r} is stored as "
                f"{str(kind).removeprefix('torch.')}); only {', '.join(FLOAT_TYPES)} are supported"
            )
        found.append(StoredTensor(name, file, tuple(shape), dtype, begin))

    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened, file.open("rb") as contents:
            size = int.from_bytes(contents.read(8), "little")
            header = json.loads(contents.read(size))
            for name in opened.offset_keys():
                tensor = header[name]
                begin = 8 + size + tensor["data_offsets"][0]
                add(name, tensor["shape"], tensor["dtype"], begin)
    else:
        for name, tensor in _load_pickle(file).items():
            add(name, tensor.shape, tensor.dtype, None)
    return found


def _open(file: Path, config: MistralConfig) -> Callable[[str], Tensor]:
    """A function that maps a tensor of the file by name; the mapping lives as long as both."""
    if file.suffix == ".safetensors":
        return _open_safetensors(file).get_tensor
    return _load_pickle(file).__getitem__


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); download or copy it again"
        ) from None


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file written by `torch.save`, mapped. No code in it is ever run."""
    try:
        contents = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to run {wanted[1]}" if wanted else "holds more than plain tensors"
        raise CheckpointError(
            f"{file} refused: it {what} when loaded; only files of plain tensors are read"
        ) from None
    except RuntimeError as error:
        if "mmap can only be used" in str(error):
            reason = "not in the format that torch.save writes since PyTorch 1.6; save it anew"
        else:
            reason = f"not whole ({str(error).splitlines()[0]}); download or copy it again"
        raise CheckpointError(f"{file} is {reason}") from None
    if not isinstance(contents, dict) or not contents:
        raise CheckpointError(f"{file} must hold a dict of tensors, not {type(contents).__name__}")
    for name, value in contents.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file} must hold tensors by name, but {name!r} is a {type(value).__name__}"
            )
    return {str(name): tensor.detach() for name, tensor in contents.items()}
