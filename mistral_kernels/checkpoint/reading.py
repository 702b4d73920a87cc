"""Reading weight files: their headers all at once, their tensors one at a time, memory-mapped."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mistral_kernels.checkpoint.names import (
    EMBEDDING,
    HEAD,
    expected_shapes,
    interleaved_to_half,
    is_derived,
    num_rotary_heads,
    unwrapped,
)
from mistral_kernels.checkpoint.pickles import list_pickled
from mistral_kernels.checkpoint.stored import (
    ALIGNMENT,
    FLOAT_TYPES,
    StoredTensor,
    list_safetensors,
    map_file,
)
from mistral_kernels.model.config import ConfigError, MistralConfig
from mistral_kernels.utils.files import CheckpointError, is_taken, read_json

CONFIG_LIMIT = 4 << 20  # bytes of a configuration file
_WORTH_A_MAPPING = 1 << 20  # bytes
# Parts of tensor names that betray another architecture, and what it is.
_FOREIGN_NAMES = {
    "a mixture of experts": r"experts?\.|block_sparse_moe|feed_forward\.gate\.|\.router\.",
    "a vision encoder": r"^(model\.)?(vision_|multi_modal_projector|patch_merger|mm_projector)",
    "quantized weights": r"qscale_|(weight|input|k|v)_scale|qweight|qzeros|\.SCB$|absmax|quant_map",
    "LoRA adapters": r"lora_",
}
_NO_HEAD = "; this is a base model without an output head: save the model that has one"

# Which part of a tensor: a slice of its rows, and of its columns if not all of them.
Part = tuple[slice, ...]


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """Return the part of a tensor that is all of it."""
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
        """Yield each tensor under its HF name and in HF's layout, in the order of `stored`.

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
        contents, current, used = None, None, 0
        for name, reading in zip(self.stored, readings, strict=True):
            file, cost = reading.stored.file, reading.stored_bytes + reading.copied_bytes
            if contents is None or file != current or used + cost > budget:
                contents = None  # unmaps before the file is mapped afresh
                contents, current, used = map_file(file), file, 0
            used += cost
            tensor = reading.of(reading.stored.read(contents))
            yield name, tensor
            del tensor

    def mapped(self, *names: str) -> Tensor | None:
        """Return the named tensors, mapped, as one tensor of all their rows.

        Writes do not reach the file.

        None where they have to be copied: not one behind the other, of several types, permuted or
        transposed, smaller than it is worth, or not from a boundary of `ALIGNMENT` bytes.
        """
        parts = [self.stored[name] for name in names]
        first = parts[0]
        begin = end = first.begin
        if begin % ALIGNMENT:
            return None
        for name, part in zip(names, parts, strict=True):
            beside = (part.file, part.dtype, part.begin) == (first.file, first.dtype, end)
            if not beside or part.strides or self._rotary_heads(name):
                return None
            end += part.num_bytes
        if end - begin < _WORTH_A_MAPPING:
            return None
        contents = map_file(first.file, end)
        return contents[begin:end].view(first.dtype).view(-1, *first.shape[1:]).detach()

    def _rotary_heads(self, name: str) -> int:
        """Return how many heads of the tensor have their rows in another order than HF's."""
        return num_rotary_heads(name, self.config) if self.format == "raw" else 0


class _Reading:
    """Part of a stored tensor: the pages of its file that it takes, and its steps from them."""

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


def read_config(path: Path, parse: Callable[[dict[str, Any]], MistralConfig]) -> MistralConfig:
    """Return the configuration that `parse` finds in the JSON file at `path`."""
    with naming(path):
        return parse(read_json(path, limit=CONFIG_LIMIT))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file `path` in a `ConfigError` that the block raises."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_weights(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return the file `stem.suffix`, or else all its shards, by their index or by their numbers.

    Empty if the folder has none; a missing shard raises.
    """
    single = folder / f"{stem}{suffix}"
    index = folder / f"{stem}{suffix}.index.json"
    if is_taken(single):
        return [single]
    if is_taken(index):
        source, names = index.name, _list_index(index)
        count = len(names)
        num_missing = sum(not is_taken(folder / name) for name in names)
    else:
        shards = sorted(path.name for path in folder.glob(f"{stem}-*-of-*{suffix}"))
        source = shards[0] if shards else ""
        written = source.removesuffix(suffix).rpartition("-of-")[2]
        if not written.isdecimal():
            return []
        shards = [name for name in shards if name.endswith(f"-of-{written}{suffix}")]
        # A file's name can claim any count: no list is longer than that of the files.
        count = int(written)
        names = [
            f"{stem}-{i + 1:0{len(written)}}-of-{written}{suffix}"
            for i in range(min(count, len(shards) + 1))
        ]
        num_missing = count - len(shards)
    for name in names:
        if not is_taken(folder / name):
            raise CheckpointError(
                f"{folder / name} is missing: {source} lists {count} shards, {num_missing} are "
                "absent; download them"
            )
    return [folder / name for name in names]


def _list_index(index: Path) -> list[str]:
    """Return the names of the files that an index lists, all of them in its folder."""
    weight_map = read_json(index, {"weight_map": {...: str}}).get("weight_map")
    if not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map'")
    for name in weight_map.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} points outside its folder: {reprlib.repr(name)}")
    return sorted(set(weight_map.values()))


def match_tensors(
    files: Iterable[Path], names: Mapping[str, str], config: MistralConfig
) -> tuple[MistralConfig, dict[str, StoredTensor]]:
    """Check the names, shapes and types of all tensors in `files` by their headers.

    `names` gives HF's name of each tensor, the output head included, under the name or names that
    the files use. Returned are the tensors by HF's names, and `config` as the tensors have it: if
    it ties the embeddings, but a head is stored that differs from them, both are kept, untied, as
    transformers does. Raises `CheckpointError` that names the tensor, its file and what was
    expected.
    """
    shapes = expected_shapes(replace(config, tie_word_embeddings=False))
    files = list(files)
    matched: dict[str, StoredTensor] = {}
    for file in files:
        for stored in _list_tensors(file):
            if is_derived(stored.name):
                continue
            hf_name = names.get(unwrapped(stored.name))
            if hf_name is None:
                missing = next((name for name in names if names[name] not in matched), None)
                raise CheckpointError(_unexpected(stored, missing))
            if hf_name in matched:
                raise CheckpointError(_repeated(stored, matched[hf_name]))
            _check_kind(stored)
            if stored.shape != shapes[hf_name]:
                raise CheckpointError(
                    f"{file}: tensor {stored.name!r} has shape {stored.shape}, "
                    f"the configuration asks for {shapes[hf_name]}"
                )
            matched[hf_name] = stored
    if config.tie_word_embeddings and (head := matched.pop(HEAD, None)):
        embedding = matched.setdefault(EMBEDDING, head)
        if not _are_equal(embedding, head):
            matched[HEAD] = head
            note = (
                f"tie_word_embeddings = False: the configuration has True, but {head.name} and "
                f"{embedding.name} differ; both are kept"
            )
            config = replace(config, tie_word_embeddings=False, notes=(*config.notes, note))
    needed = expected_shapes(config)
    if absent := [name for name in needed if name not in matched]:
        where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
        name = next(name for name in names if names[name] == absent[0])
        raise CheckpointError(
            f"{where}: no tensor {name!r} ({len(absent)} of {len(needed)} tensors are missing)"
            + (_NO_HEAD if absent == [HEAD] else "")
        )
    return config, matched


def _list_tensors(file: Path) -> list[StoredTensor]:
    return list_safetensors(file) if file.suffix == ".safetensors" else list_pickled(file)


def _unexpected(stored: StoredTensor, missing: str | None) -> str:
    for what, pattern in _FOREIGN_NAMES.items():
        if re.search(pattern, stored.name):
            return (
                f"{stored.file}: the checkpoint has {what} (tensor {stored.name!r}); "
                "only dense, unquantized Mistral decoders are supported"
            )
    hint = f", such as {missing!r}" if missing else ""
    return (
        f"{stored.file}: unexpected tensor {stored.name!r}; "
        f"expected the names of a dense Mistral decoder{hint}"
    )


def _repeated(stored: StoredTensor, other: StoredTensor) -> str:
    if stored.file == other.file:
        return f"{stored.file}: {other.name!r} and {stored.name!r} are the same tensor"
    return (
        f"{stored.file}: tensor {stored.name!r} is in {other.file.name} as well; "
        "tensor-parallel shards are not supported: merge them into one file first"
    )


def _check_kind(stored: StoredTensor) -> None:
    if stored.kind in FLOAT_TYPES:
        return
    of = f"tensor {stored.name!r}"
    if stored.kind.startswith(("I8", "U8", "F8", "F4", "F6")):
        raise CheckpointError(
            f"{stored.file}: the checkpoint has quantized weights ({of} is stored as "
            f"{stored.kind}); only {', '.join(FLOAT_TYPES)} are supported"
        )
    raise CheckpointError(
        f"{stored.file}: {of} must be stored as {', '.join(FLOAT_TYPES)}, got {stored.kind}"
    )


def _are_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two stored tensors have the same type and bytes."""
    if (a.file, a.begin, a.strides) == (b.file, b.begin, b.strides):
        return a.kind == b.kind
    if a.kind != b.kind:
        return False
    x, y = (each.read(map_file(each.file)) for each in (a, b))
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))
