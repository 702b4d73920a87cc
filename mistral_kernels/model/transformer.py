"""`MistralForCausalLM`: loads and saves checkpoints, and generates tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property
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
from mistral_kernels.model.generate import generate
from mistral_kernels.model.generation_config import GenerationConfig
from mistral_kernels.model.layers import FusedLinear, Linear
from mistral_kernels.model.memory import zeros
from mistral_kernels.model.quantization import destinations as quantized_destinations
from mistral_kernels.model.quantization import make_weights_int8
from mistral_kernels.ops import extension

_log = logging.getLogger("mistral_kernels")


class MistralForCausalLM(CausalLM):
    """Mistral language model whose state dict has Hugging Face's parameter names.

    A new model has random weights from a normal distribution with standard deviation 0.02, in
    float32; norm weights are 1. `from_pretrained` loads a checkpoint. `forward` takes token ids,
    (batch, seqlen), and returns logits, (batch, seqlen, vocab_size). It is differentiable.

    Args:
        config: the architecture.

    Attributes:
        config: the architecture.
        model: the decoder without the head.
        lm_head: the head.
        generation_config: settings of `generate`, a `GenerationConfig`, which may be changed or
            replaced, also by transformers' class.

    Example:
        >>> import torch
        >>> from mistral_kernels import MistralConfig, MistralForCausalLM
        >>> config = MistralConfig(
        ...     vocab_size=64,
        ...     hidden_size=32,
        ...     intermediate_size=48,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ...     head_dim=8,
        ...     sliding_window=16,
        ... )
        >>> model = MistralForCausalLM(config)
        >>> input_ids = torch.randint(64, (2, 20))
        >>> logits = model(input_ids)
        >>> logits.shape
        torch.Size([2, 20, 64])
        >>> loss = torch.nn.functional.cross_entropy(
        ...     logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        ... )
        >>> loss.backward()
        >>> model.lm_head.weight.grad.shape
        torch.Size([64, 32])
    """

    generate = generate
    stream = generation.stream
    prefill = generation.prefill
    decode = generation.decode

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """Settings of `generate`, which may be changed or replaced."""
        return GenerationConfig.from_model_config(self.config)

    def _allocate(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Allocate every parameter. `to_empty` would import modules, which takes one second."""
        for module in self.modules():
            for name, meta in list(module.named_parameters(recurse=False)):
                own = dtype if meta.is_floating_point() else meta.dtype
                memory = zeros(meta.shape, own, device, large_pages=own == torch.int8)
                setattr(module, name, nn.Parameter(memory, meta.requires_grad))
        self._tie_weights()

    def part_of(self, name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        """Return the part of the checkpoint tensor `name` that this model holds: all of it."""
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
        """Load a raw or Hugging Face checkpoint.

        The peak memory is the size of the model plus one tensor. On the CPU, safetensors weights
        that are page-aligned and in the dtype and order of the model are memory-mapped: the system
        reads them at first use. `convert` and `save_pretrained` write such files. A mapped file may
        be renamed, replaced or removed, but must not be written to.

        Args:
            path: a folder, a Hugging Face hub id, or "tiny" for the bundled model.
            dtype: data type of the weights in memory; None: the data type of most stored weights.
            device: device of the weights.
            quantize: "int8": hold the projections and the head in 8 bits, which makes decode steps
                on the CPU nearly twice as fast (see `ops.linear_int8`). Embedding, norms and
                activations keep `dtype`. A quantized model cannot be trained or saved. None: do not
                quantize.
            **overrides: configuration fields to replace, such as `sliding_window=1024`; see
                `MistralConfig.with_replaced`.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: a file or a tensor is missing, corrupt, has the wrong shape, or has
                values beyond the range of `dtype`.
            ConfigError: the checkpoint is not a dense Mistral, or an override changes a field that
                the weights determine.
            TypeError: an override is not a configuration field, or `dtype` has the wrong type.
            ValueError: `quantize` is neither None nor "int8".
            NotImplementedError: `quantize` is given, and `device` is not the CPU.

        Example:
            >>> from mistral_kernels import MistralForCausalLM
            >>> model = MistralForCausalLM.from_pretrained("tiny", sliding_window=64)
            >>> model.dtype, model.config.num_hidden_layers, model.config.sliding_window
            (torch.bfloat16, 6, 64)
        """
        check_fields(overrides, "dtype, device and quantize")
        if not isinstance(dtype, (torch.dtype, type(None))):
            raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
        if quantize and torch.device(device).type != "cpu":
            raise NotImplementedError(
                f"device must be the CPU with quantize={quantize!r}, got {device}; leave out "
                "quantize"
            )
        stored = checkpoint.open_checkpoint(checkpoint.resolve(path))
        for note in stored.config.notes:
            _log.warning("%s", note)
        with torch.device("meta"):
            model = cls(stored.config.with_replaced(**overrides))
        if quantize:
            if not extension.load("cpu"):
                _log.warning("%s: slower than unquantized weights", extension.status("cpu"))
            make_weights_int8(model)
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
                del tensor  # unmap its pages before the next tensor is read
        if quantize and model.config.tie_word_embeddings:
            destinations["lm_head.weight"].copy_(model.model.embed_tokens.weight)
        model.generation_config = GenerationConfig.from_model_config(
            model.config, stored.generation
        )
        return model.eval()

    def save_pretrained(
        self, directory: str | Path, format: str = "hf", extra_files: Iterable[Path] = ()
    ) -> None:
        """Write a checkpoint folder. The folder appears under its name only when it is complete.

        Args:
            directory: the folder to write.
            format: "hf" for Hugging Face's format, "raw" for Mistral's.
            extra_files: files to copy into the folder, such as those of a tokenizer.

        Raises:
            ValueError: `format` is neither "hf" nor "raw".
            NotImplementedError: the model is quantized.
        """
        save = {"hf": checkpoint.save_hf, "raw": checkpoint.save_raw}.get(format)
        if save is None:
            raise ValueError(f"format must be 'hf' or 'raw', got {format!r}")
        tensors = self.state_dict().items()
        save(tensors, self.config, directory, dtype=self.dtype, extra_files=extra_files)

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes, including the scales of quantized weights."""
        scales = (module.scales for module in self.modules() if isinstance(module, Linear))
        tensors = (*self.parameters(), *(x for x in scales if x is not None))
        return sum(tensor.nbytes for tensor in tensors)


def _map(stored: checkpoint.Checkpoint, model: nn.Module) -> set[str]:
    """Memory-map the weights that are stored as the model needs them; return their names."""
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
