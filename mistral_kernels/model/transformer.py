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
from mistral_kernels.model import generation, pretrained_arguments
from mistral_kernels.model.config import check_fields
from mistral_kernels.model.decoder import CausalLM
from mistral_kernels.model.generate import generate
from mistral_kernels.model.generation_config import GenerationConfig, settings_of
from mistral_kernels.model.layers import FusedLinear, Linear
from mistral_kernels.model.memory import zeros
from mistral_kernels.model.quantization import destinations as quantized_destinations
from mistral_kernels.model.quantization import make_weights_int8
from mistral_kernels.ops import extension
from mistral_kernels.utils.unsupported import check_unsupported

_log = logging.getLogger("mistral_kernels")


class MistralForCausalLM(CausalLM):
    """Mistral language model whose state dict has Hugging Face's parameter names.

    A new model has random weights from a normal distribution with standard deviation 0.02, in
    float32; norm weights are 1. `from_pretrained` loads a checkpoint. A call of the model
    takes token ids, (batch, seqlen), and returns an object with `logits`, (batch, seqlen,
    vocab_size), and with `loss` if labels are given. It is differentiable.

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
        >>> model(input_ids).logits.shape
        torch.Size([2, 20, 64])
        >>> model(input_ids, labels=input_ids).loss.backward()
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
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: torch.device | str | int | dict[str, Any] | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **others: Any,
    ) -> MistralForCausalLM:
        """Load a raw or Hugging Face checkpoint.

        The peak memory is the size of the model plus one tensor. On the CPU, safetensors weights
        that are page-aligned and in the dtype and order of the model are memory-mapped: the system
        reads them at first use. `convert` and `save_pretrained` write such files. A mapped file may
        be renamed, replaced or removed, but must not be written to.

        Args:
            path: a folder, a Hugging Face hub id, or "tiny" for the bundled model.
            dtype: data type of the weights in memory, as a torch.dtype or a string such as
                "bfloat16"; "auto" or None: the data type of most stored weights, which is also the
                default of transformers 5 (that of transformers 4 is float32).
            torch_dtype: the earlier name of `dtype`.
            device: device of the weights; an integer is the index of a GPU; None: the CPU.
            device_map: the same, or {"": device}; "auto": the GPU if there is one, else the CPU. A
                model is not divided among several devices.
            quantize: "int8": hold the projections and the head in 8 bits, which makes decode steps
                on the CPU nearly twice as fast (see `ops.linear_int8`). Embedding, norms and
                activations keep `dtype`. A quantized model cannot be trained or saved. None: do not
                quantize.
            revision: branch, tag or commit of a hub model; None: the main branch.
            cache_dir: folder of downloads; None: huggingface_hub's cache.
            token: access token of the hub; None: the saved one.
            local_files_only: use only files that are on this machine.
            force_download: download the files again.
            **others: configuration fields to replace, such as `sliding_window=1024`; see
                `MistralConfig.with_replaced`. Also other arguments of transformers at values
                without effect, such as `trust_remote_code`. `attn_implementation` is one of them,
                since the kernels of this package are always used.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: a file or a tensor is missing, corrupt, has the wrong shape, or has
                values beyond the range of `dtype`.
            ConfigError: the checkpoint is not a dense Mistral, or an override changes a field that
                the weights determine.
            TypeError: an argument is unknown or has a wrong type.
            ValueError: `quantize`, a dtype or a device has another value, or `dtype` and
                `torch_dtype`, or `device` and `device_map`, differ.
            NotImplementedError: an argument of transformers that is not offered has an effect, such
                as `load_in_4bit=True`, or `quantize` is given and the device is not the CPU.

        Example:
            >>> from mistral_kernels import MistralForCausalLM
            >>> model = MistralForCausalLM.from_pretrained(
            ...     "tiny", dtype="auto", device_map="cpu", sliding_window=64
            ... )
            >>> model.dtype, model.config.num_hidden_layers, model.config.sliding_window
            (torch.bfloat16, 6, 64)
        """
        known = pretrained_arguments.LOADING
        check_unsupported("from_pretrained", {k: v for k, v in others.items() if k in known}, known)
        overrides = {name: value for name, value in others.items() if name not in known}
        check_fields(overrides, "dtype, device, device_map and quantize")
        in_memory = pretrained_arguments.parse_dtype(dtype, torch_dtype)
        target = pretrained_arguments.parse_device(device, device_map)
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
        if quantize and target.type != "cpu":
            raise NotImplementedError(
                f"device must be the CPU with quantize={quantize!r}, got {target}; leave out "
                "quantize"
            )
        folder = checkpoint.resolve(
            path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        stored = checkpoint.open_checkpoint(folder)
        for note in stored.config.notes:
            _log.warning("%s", note)
        with torch.device("meta"):
            model = cls(stored.config.with_replaced(**overrides))
        if quantize:
            if not extension.load("cpu"):
                _log.warning("%s: slower than unquantized weights", extension.status("cpu"))
            make_weights_int8(model)
        model._allocate(in_memory or stored.dtype, target)
        mapped = _map(stored, model) if target.type == "cpu" else set()
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
        self,
        directory: str | Path,
        format: str = "hf",
        extra_files: Iterable[Path] = (),
        *,
        max_shard_size: int | str | None = None,
        is_main_process: bool = True,
        save_function: Any = None,
        **others: Any,
    ) -> None:
        """Write a checkpoint folder. The folder appears under its name only when it is complete.

        Hugging Face's format includes the settings in `generation_config`.

        Args:
            directory: the folder to write.
            format: "hf" for Hugging Face's format, "raw" for Mistral's.
            extra_files: files to copy into the folder, such as those of a tokenizer.
            max_shard_size: largest size of a weight file, in bytes or as a string such as "2GB".
                Only if `format` is "hf"; None: "5GB".
            is_main_process: False: write nothing.
            save_function: has no effect.
            **others: arguments of transformers at values without effect, such as
                `safe_serialization=True`.

        Raises:
            TypeError: an argument is unknown.
            ValueError: `format` is neither "hf" nor "raw", or `max_shard_size` is not a size.
            NotImplementedError: the model is quantized, or an argument of transformers that is not
                offered has an effect.
        """
        check_unsupported("save_pretrained", others, pretrained_arguments.SAVING)
        save = {"hf": checkpoint.save_hf, "raw": checkpoint.save_raw}.get(format)
        if save is None:
            raise ValueError(f"format must be 'hf' or 'raw', got {format!r}")
        options: dict[str, Any] = {}
        if max_shard_size is not None:
            if format == "raw":
                raise ValueError(
                    f"max_shard_size must be None with format='raw', got {max_shard_size!r}"
                )
            options["max_shard_bytes"] = pretrained_arguments.parse_shard_size(max_shard_size)
        if format == "hf":
            options["generation"] = settings_of("model.generation_config", self.generation_config)
        if is_main_process:
            tensors = self.state_dict().items()
            save(
                tensors,
                self.config,
                directory,
                dtype=self.dtype,
                extra_files=extra_files,
                **options,
            )

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of elements of all weights; a tied head is not counted.

        Args:
            only_trainable: count only weights that require a gradient.
            exclude_embeddings: do not count the embedding.
        """
        embedding = self.model.embed_tokens.weight
        return sum(
            weight.numel()
            for weight in self.parameters()
            if (weight.requires_grad or not only_trainable)
            and not (exclude_embeddings and weight is embedding)
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """Save only the input of each layer in training, and recompute the layer in backward.

        Args:
            gradient_checkpointing_kwargs: may have the key "use_reentrant", which has no effect.
            **others: `every_n_layers=1` and `offload=False`, as given by transformers' Trainer.

        Raises:
            TypeError: there is another argument or key.
            NotImplementedError: `every_n_layers` or `offload` has another value.
        """
        given = {**(gradient_checkpointing_kwargs or {}), **others}
        known = pretrained_arguments.CHECKPOINTING
        check_unsupported("gradient_checkpointing_enable", given, known)
        self.model.checkpoint_activations = True

    def gradient_checkpointing_disable(self) -> None:
        """Save all activations in training."""
        self.model.checkpoint_activations = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether only the input of each layer is saved in training."""
        return self.model.checkpoint_activations

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
