"""Read checkpoints: check the headers of all weight files, then read memory-mapped tensors."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
    unwrap_name,
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
# Smaller tensors are copied: mapping each of them costs more than the copy.
_MIN_MAPPED_BYTES = 1 << 20
# Unsupported features, and patterns of tensor names by which they are recognized.
_FOREIGN_NAMES = {
    "a mixture of experts": r"experts?\.|block_sparse_moe|feed_forward\.gate\.|\.router\.",
    "a vision encoder": r"^(model\.)?(vision_|multi_modal_projector|patch_merger|mm_projector)",
    "quantized weights": r"qscale_|(weight|input|k|v)_scale|qweight|qzeros|\.SCB$|absmax|quant_map",
    "LoRA adapters": r"lora_",
}
# What to do, for some of these features.
_FOREIGN_REMEDIES = {
    "quantized weights": "; give the original, unquantized checkpoint",
    "LoRA adapters": "; merge them into the weights first, with merge_and_unload() of PEFT",
}
_NO_HEAD = "; this is a base model without an output head: save the model that has one"

# Part of a tensor to read: a slice of its rows, and optionally a slice of its columns.
Part = tuple[slice, ...]


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """Return a slice of all rows; this function is the default `part_of` of `Checkpoint.tensors`.

    Args:
        name: HF name of the tensor; ignored.
        shape: Shape of the tensor; ignored.

    Returns:
        One slice that selects all rows.

    Example:
        >>> from mistral_kernels.checkpoint import whole
        >>> whole("model.norm.weight", (192,))
        (slice(None, None, None),)
    """
    return (slice(None),)


@dataclass(frozen=True)
class Checkpoint:
    """Opened checkpoint: all names, shapes and dtypes are checked, no weight has been read.

    Attributes:
        path: Folder of the checkpoint.
        format: "raw" (Mistral's own format) or "hf" (Hugging Face's format).
        config: Configuration of the model.
        stored: File, offset, shape and dtype of each tensor by its HF name, in the order in which
            the files hold them.
        generation: Contents of generation_config.json; empty without this file.

    Example:
        >>> from mistral_kernels.checkpoint import open_checkpoint, resolve
        >>> checkpoint = open_checkpoint(resolve("tiny"))
        >>> total = 0
        >>> for name, tensor in checkpoint.tensors():
        ...     total += tensor.numel()
        ...     del tensor  # release the mapped pages before the next tensor is read
        >>> total == checkpoint.num_parameters
        True
    """

    path: Path
    format: Literal["raw", "hf"]
    config: MistralConfig
    stored: Mapping[str, StoredTensor]
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each stored tensor, by its HF name."""
        return {name: stored.dtype for name, stored in self.stored.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Most frequent dtype, counted by elements."""
        counts: dict[torch.dtype, int] = {}
        for stored in self.stored.values():
            counts[stored.dtype] = counts.get(stored.dtype, 0) + math.prod(stored.shape)
        return max(counts, key=lambda dtype: counts[dtype])

    @property
    def num_parameters(self) -> int:
        """Number of elements of all stored tensors."""
        return sum(math.prod(stored.shape) for stored in self.stored.values())

    @property
    def num_bytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(stored.num_bytes for stored in self.stored.values())

    def tensors(
        self, part_of: Callable[[str, tuple[int, ...]], Part] = whole
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF name and the tensor, in HF layout, of each entry of `stored`, in order.

        A yielded tensor is a view of a memory-mapped file. Copy it, and release it before the next
        iteration (`del tensor` at the end of the loop body): pages that were read count as memory
        of this process while they are mapped. The file is unmapped and mapped again before the
        bytes read from one mapping exceed the size of the largest tensor (or part). Therefore the
        mapped memory in use never exceeds this size.

        Args:
            part_of: Function that returns the part to read of a tensor, given its HF name and
                shape. By default tensors are read whole.
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
                contents = None  # unmap the file before it is mapped again
                contents, current, used = map_file(file), file, 0
            used += cost
            tensor = reading.select(reading.stored.read(contents))
            yield name, tensor
            del tensor

    def mapped(self, *names: str) -> Tensor | None:
        """Return a memory-mapped tensor of the rows of all named tensors, or None.

        Writes to the result do not reach the file. None means that the tensors must be copied.
        Tensors can be mapped only under these conditions:

        - They are adjacent in one file, in the order of `names`, and have one dtype.
        - Their rows are contiguous and need no permutation.
        - The first tensor is aligned to `ALIGNMENT` bytes in the file.
        - Together they take at least 1 MiB.
        """
        parts = [self.stored[name] for name in names]
        first = parts[0]
        begin = end = first.begin
        if begin % ALIGNMENT:
            return None
        for name, part in zip(names, parts, strict=True):
            is_adjacent = (part.file, part.dtype, part.begin) == (first.file, first.dtype, end)
            if not is_adjacent or part.strides or self._rotary_heads(name):
                return None
            end += part.num_bytes
        if end - begin < _MIN_MAPPED_BYTES:
            return None
        contents = map_file(first.file, end)
        return contents[begin:end].view(first.dtype).view(-1, *first.shape[1:]).detach()

    def _rotary_heads(self, name: str) -> int:
        """Return the number of heads whose rows must be permuted to the HF order; 0 if none."""
        return num_rotary_heads(name, self.config) if self.format == "raw" else 0


class _Reading:
    """Read of a part of a stored tensor: the selection, and the bytes of memory that it needs.

    Attributes:
        stored: The tensor in its file.
        heads: Number of heads to permute; 0 if the rows are in the HF order.
        rows: Rows to read; whole heads if the heads are permuted.
        part: Part to return, relative to `rows`.
        stored_bytes: Size of `rows` in the file. A slice of the columns needs the same pages.
        copied_bytes: Size of the permuted copy, which exists beside the mapped original.
    """

    def __init__(self, stored: StoredTensor, part: Part, heads: int) -> None:
        rows = range(stored.shape[0])[part[0]]
        size = stored.shape[0] // heads if heads else 1  # number of rows that are permuted together
        first, last = rows.start // size, -(-rows.stop // size)
        self.stored, self.heads = stored, last - first if heads else 0
        self.rows = slice(first * size, last * size)
        self.part = (slice(rows.start - first * size, rows.stop - first * size), *part[1:])
        self.stored_bytes = stored.num_bytes // stored.shape[0] * (last - first) * size
        self.copied_bytes = self.stored_bytes if heads else 0

    def select(self, tensor: Tensor) -> Tensor:
        """Return the part of the whole tensor `tensor`, in the HF order."""
        tensor = tensor[self.rows]
        if self.heads:
            # Allocate by mmap: malloc may not return freed memory to the operating system.
            scratch = torch.frombuffer(mmap(-1, self.copied_bytes), dtype=tensor.dtype)
            tensor = interleaved_to_half(tensor, self.heads, out=scratch.view(tensor.shape))
        return tensor[self.part]


def read_config(path: Path, parse: Callable[[dict[str, Any]], MistralConfig]) -> MistralConfig:
    """Read the JSON file at `path` and return the configuration that `parse` returns."""
    with name_file_in_errors(path):
        return parse(read_json(path, limit=CONFIG_LIMIT))


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Prefix the message of a `ConfigError` raised in the block with the path of the file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_weights(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return the weight file `stem + suffix`, or else all of its shards; an empty list if none.

    The names of the shards are read from the index file if there is one. Otherwise they are derived
    from the count that each name contains, for example 3 in `model-00001-of-00003.safetensors`.

    Raises:
        CheckpointError: A shard is missing.
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
        digits = source.removesuffix(suffix).rpartition("-of-")[2]
        if not digits.isdecimal():
            return []
        shards = [name for name in shards if name.endswith(f"-of-{digits}{suffix}")]
        # The name of a file can contain any count. Therefore the list of expected names has at
        # most one entry more than there are files.
        count = int(digits)
        names = [
            f"{stem}-{i + 1:0{len(digits)}}-of-{digits}{suffix}"
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
    """Return the file names in an index; raise if a name points to another folder."""
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
    """Check the names, shapes and dtypes of all tensors in `files` by their headers.

    Args:
        files: Weight files.
        names: Mapping from each name that a file may use to the HF name, including the output head.
        config: Configuration of the model.

    Returns:
        The configuration and the tensors by HF name. The configuration is changed in one case: it
        ties the embeddings, but the stored head differs from the embedding. Then both tensors are
        kept and `tie_word_embeddings` becomes False, as in transformers.

    Raises:
        CheckpointError: A tensor is missing, unexpected, duplicated, or of a wrong shape or dtype.
    """
    shapes = expected_shapes(replace(config, tie_word_embeddings=False))
    files = list(files)
    matched: dict[str, StoredTensor] = {}
    for file in files:
        for stored in _list_tensors(file):
            if is_derived(stored.name):
                continue
            hf_name = names.get(unwrap_name(stored.name))
            if hf_name is None:
                missing = next((name for name in names if names[name] not in matched), None)
                raise CheckpointError(_unexpected_message(stored, missing))
            if hf_name in matched:
                raise CheckpointError(_duplicate_message(stored, matched[hf_name]))
            _check_kind(stored)
            if stored.shape != shapes[hf_name]:
                raise CheckpointError(
                    f"{file}: tensor {stored.name!r} must have shape {shapes[hf_name]}, "
                    f"got {stored.shape}"
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
            + (_NO_HEAD if absent == [HEAD] else "; download or save the checkpoint again")
        )
    return config, matched


def _list_tensors(file: Path) -> list[StoredTensor]:
    return list_safetensors(file) if file.suffix == ".safetensors" else list_pickled(file)


def _unexpected_message(stored: StoredTensor, missing: str | None) -> str:
    for what, pattern in _FOREIGN_NAMES.items():
        if re.search(pattern, stored.name):
            return (
                f"{stored.file}: the checkpoint has {what} (tensor {stored.name!r}); "
                "only dense, unquantized Mistral decoders are supported"
                + _FOREIGN_REMEDIES.get(what, "")
            )
    hint = f", such as {missing!r}" if missing else ""
    return (
        f"{stored.file}: unexpected tensor {stored.name!r}; "
        f"expected the names of a dense Mistral decoder{hint}"
    )


def _duplicate_message(stored: StoredTensor, other: StoredTensor) -> str:
    if stored.file == other.file:
        return f"{stored.file}: {other.name!r} and {stored.name!r} are the same tensor"
    return (
        f"{stored.file}: tensor {stored.name!r} is also in {other.file.name}; "
        "tensor-parallel shards are not supported: merge them into one file first"
    )


def _check_kind(stored: StoredTensor) -> None:
    if stored.kind in FLOAT_TYPES:
        return
    tensor = f"tensor {stored.name!r}"
    if stored.kind.startswith(("I8", "U8", "F8", "F4", "F6")):
        raise CheckpointError(
            f"{stored.file}: the checkpoint has quantized weights ({tensor} is stored as "
            f"{stored.kind}); only {', '.join(FLOAT_TYPES)} are supported"
            + _FOREIGN_REMEDIES["quantized weights"]
        )
    raise CheckpointError(
        f"{stored.file}: {tensor} must be stored as {', '.join(FLOAT_TYPES)}, got {stored.kind}"
    )


def _are_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two stored tensors have the same dtype and the same bytes."""
    if (a.file, a.begin, a.strides) == (b.file, b.begin, b.strides):
        return a.kind == b.kind
    if a.kind != b.kind:
        return False
    x, y = (each.read(map_file(each.file)) for each in (a, b))
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))
