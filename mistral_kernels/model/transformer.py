"""Mistral: checkpoints to models, and models to text."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mistral_kernels import checkpoint
from mistral_kernels.checkpoint.stored import check_cast
from mistral_kernels.model import generation
from mistral_kernels.model.config import check_fields
from mistral_kernels.model.decoder import CausalLM
from mistral_kernels.model.layers import FusedLinear, Linear
from mistral_kernels.model.memory import zeros
from mistral_kernels.model.quantization import destinations as quantized_destinations
from mistral_kernels.model.quantization import hold_int8
from mistral_kernels.ops import extension

_log = logging.getLogger("mistral_kernels")


class MistralForCausalLM(CausalLM):
    """A Mistral language model, under Hugging Face's parameter names.

    A new model has random weights (normal, standard deviation 0.02); `from_pretrained` reads a
    checkpoint.
    """

    generate = generation.generate
    stream = generation.stream
    prefill = generation.prefill
    decode = generation.decode

    def _allocate(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Give every parameter memory; `to_empty` would import for a second first."""
        for module in self.modules():
            for name, meta in list(module.named_parameters(recurse=False)):
                own = dtype if meta.is_floating_point() else meta.dtype
                memory = zeros(meta.shape, own, device, large_pages=own == torch.int8)
                setattr(module, name, nn.Parameter(memory, meta.requires_grad))
        self._tie_weights()

    def part_of(self, name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        """Which part of the tensor `name` of a checkpoint this model holds: all of it."""
        return checkpoint.whole(name, shape)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        **overrides: Any,
    ) -> MistralForCausalLM:
        """Load a raw or Hugging Face checkpoint; peak memory is the model and one tensor.

        On the CPU, weights that need no change (of safetensors, in the stored dtype and order, on
        boundaries of pages, as `convert` and `save_pretrained` write them) are not copied but
        mapped, and read when first used. The file may be renamed, replaced or removed meanwhile,
        but not written to.

        Args:
            path: a folder, a Hugging Face hub id, or "tiny" for the bundled model.
            dtype: of the weights in memory; None: as most of them are stored.
            device: where they go.
            quantize: "int8": the projections and the head are held in 8 bits, which makes decode
                steps on the CPU nearly twice as fast (see `ops.linear_int8`); embedding, norms and
                activations keep `dtype`. Such a model cannot be trained or saved.
            overrides: configuration fields to replace, such as `sliding_window=1024`; see
                `MistralConfig.with_replaced`.

        Raises:
            CheckpointError: naming the file or tensor that is missing, corrupt or does not fit, or
                has values beyond the range of `dtype`.
            ConfigError: for a model that is not a dense Mistral, and for overrides of fields that
                the weights determine.
            TypeError: for an override that is no field, and a `dtype` of another type.
            ValueError: for an unknown `quantize`.
            NotImplementedError: for `quantize` anywhere but on the CPU.
        """
        check_fields(overrides, "dtype, device and quantize")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
        if quantize and torch.device(device).type != "cpu":
            raise NotImplementedError(
                f"quantize={quantize!r} is for the CPU; leave it out on {device}"
            )
        stored = checkpoint.open_checkpoint(checkpoint.resolve(path))
        for note in stored.config.notes:
            _log.warning("%s", note)
        with torch.device("meta"):
            model = cls(stored.config.with_replaced(**overrides))
        if quantize:
            if not extension.load("cpu"):
                _log.warning("%s: slower than unquantised weights", extension.status("cpu"))
            hold_int8(model)
        model._allocate(dtype or stored.dtype, device)
        mapped = _map(stored, model) if torch.device(device).type == "cpu" else set()
        destinations = quantized_destinations(model) if quantize else model.state_dict()
        with tqdm(total=stored.num_bytes, unit="B", unit_scale=True, delay=2) as progress:
            for name, tensor in stored.tensors(model.part_of):
                if name not in mapped:
                    destination = destinations[name]
                    destination.copy_(tensor)
                    cast = destination if isinstance(destination, Tensor) else destination.scales
                    check_cast(name, tensor, cast)
                progress.update(stored.stored[name].num_bytes)
                del tensor  # its pages are unmapped before the next one's are read
        if quantize and model.config.tie_word_embeddings:
            destinations["lm_head.weight"].copy_(model.model.embed_tokens.weight)
        return model.eval()

    def save_pretrained(
        self, directory: str | Path, format: str = "hf", extra_files: Iterable[Path] = ()
    ) -> None:
        """Write a checkpoint folder, "hf" or "raw", with copies of `extra_files` (a tokenizer's).

        The folder appears under its name only when it is whole.
        """
        save = {"hf": checkpoint.save_hf, "raw": checkpoint.save_raw}.get(format)
        if save is None:
            raise ValueError(f"format must be 'hf' or 'raw', got {format!r}")
        tensors = self.state_dict().items()
        save(tensors, self.config, directory, dtype=self.dtype, extra_files=extra_files)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they lie in memory."""
        scales = (module.scales for module in self.modules() if isinstance(module, Linear))
        tensors = (*self.parameters(), *(x for x in scales if x is not None))
        return sum(tensor.nbytes for tensor in tensors)


def _map(stored: checkpoint.Checkpoint, model: nn.Module) -> set[str]:
    """Lets weights that are as they were stored lie in their files; names what they hold."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            tensors = {name: parameter}
            if isinstance(module, FusedLinear):
                tensors = module.parts_in_state_dict(f"{prefix}.")
            files = [stored.stored.get(name) for name in tensors]
            if any(
                file is None or (file.dtype, file.shape) != (x.dtype, x.shape)
                for file, x in zip(files, tensors.values(), strict=True)
            ):
                continue
            mapped = stored.mapped(*tensors)
            if mapped is not None:
                parameter.data = mapped
                found |= tensors.keys()
    return found
