"""Training on several ranks: FSDP2 shards the weights, their gradients and AdamW's averages.

The parameters are float32 shards. For each layer, FSDP gathers the weights in the compute dtype and
frees them after the layer. Gradients are averaged in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mistral_kernels.checkpoint import Part, save_hf
from mistral_kernels.checkpoint.stored import check_cast
from mistral_kernels.distributed.process_group import World
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.training.corpus import Corpus
from mistral_kernels.training.loop import packed_loss

PartOf = Callable[[str, tuple[int, ...]], Part]


def sharded_model(
    config: MistralConfig,
    tensors: Callable[[PartOf], Iterable[tuple[str, Tensor]]],
    dtype: torch.dtype,
    world: World,
) -> MistralForCausalLM:
    """Create a model of which each rank holds a float32 shard of every weight.

    A rank reads only its shard. Its peak memory is its shard and one whole layer.

    Args:
        config: configuration of the model.
        tensors: function that yields the weights, with the signature of `Checkpoint.tensors`.
        dtype: dtype of the computation; the weights are rounded to it.
        world: rank and device of this process, and the number of ranks.
    """
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    row_ranges = _row_ranges(model)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        # Do not cast inputs: some are float32 tables.
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
    }
    for layer in model.model.layers:
        fully_shard(layer.to_empty(device=world.device), **options)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.to_empty(device=world.device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    fully_shard(model, **options)
    # The loss needs the whole weight of the head. FSDP gathers it only in a forward of the root.
    model.packed_loss = MethodType(packed_loss, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "packed_loss")

    weights = dict(model.named_parameters())

    def own(name: str) -> tuple[slice, Tensor]:
        """Return this rank's rows of a tensor, and the part of its shard that receives them."""
        weight, first, rows = row_ranges[name]
        shard: Tensor = weights[weight].detach().to_local()  # type: ignore[attr-defined]
        start = world.rank * -(-len(weights[weight]) // world.size)  # FSDP divides like torch.chunk
        low = max(start, first)
        high = max(low, min(start + len(shard), first + rows))
        return slice(low - first, high - first), shard[low - start : high - start]

    for name, tensor in tensors(lambda name, _: (own(name)[0],)):
        cast = tensor.to(dtype)
        check_cast(name, tensor, cast)
        own(name)[1].copy_(cast)
        del tensor, cast  # a memory-mapped tensor occupies memory until it is freed
    return model


def _row_ranges(model: MistralForCausalLM) -> dict[str, tuple[str, int, int]]:
    """Return the parameter, the first row in it, and the number of rows of each state dict tensor.

    A parameter may hold several tensors. Tied weights are listed under the first of their names.
    """
    names = {weight: name for name, weight in model.named_parameters()}
    ranges = {}
    for prefix, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            row = 0
            for name, part in module.state_dict(prefix=f"{prefix}.").items():
                ranges[name] = names[weight], row, len(part)
                row += len(part)
    return ranges


def local_sequences(batch: Sequence[Tensor], world: World) -> list[Tensor]:
    """Return this rank's sequences of a batch: at least one, and similar token counts per rank."""
    loads = [0] * world.size  # tokens
    shares: list[list[Tensor]] = [[] for _ in loads]
    for sequence in sorted(batch, key=len, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += len(sequence)
        shares[lightest].append(sequence)
    return shares[world.rank]


class Sharded:
    """Backend of a `sharded_model`, which all ranks train together; see `loop.Backend`.

    Every rank draws the whole batch and computes only its own sequences. A batch must have at least
    one sequence per rank. Losses are those of the whole batch.
    """

    def __init__(self, model: MistralForCausalLM, dtype: torch.dtype, world: World) -> None:
        self.model, self.dtype, self.world = model, dtype, world
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())

    def backward(self, corpus: Corpus, batch: Sequence[Tensor]) -> float:
        """Compute the gradients of this rank's sequences; return the loss of the whole batch."""
        own = local_sequences(batch, self.world)
        part = sum(map(len, own)) / sum(map(len, batch))
        loss = self._packed_loss(corpus, own) * part
        (loss * self.world.size).backward()  # FSDP averages the gradients over the ranks
        return self._sum(loss)

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to an L2 norm of `max_norm`; return their norm before."""
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm)
        return norm.full_tensor().item()  # type: ignore[no-any-return]

    def update_weights(self) -> None:
        """Do nothing: FSDP rounds `parameters` when it gathers them."""

    @torch.no_grad()
    def held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        """Return the mean loss per token of `tokens` as one sequence, averaged over the ranks.

        Every rank computes the whole sequence; the losses of the ranks differ by rounding.
        """
        loss = self._packed_loss(corpus, [tokens])
        self.model.reshard()  # type: ignore[operator]  # otherwise the root stays gathered
        return self._sum(loss) / self.world.size

    def write(self, directory: Path, extra_files: Iterable[Path]) -> None:
        """Gather one weight at a time on all ranks; rank 0 writes the checkpoint."""
        tensors = whole_tensors(self.model)
        if self.world.is_main:
            config = self.model.config
            save_hf(tensors, config, directory, dtype=self.dtype, extra_files=extra_files)
        for _ in tensors:
            pass

    def _packed_loss(self, corpus: Corpus, targets: Sequence[Tensor]) -> Tensor:
        return self.model.packed_loss(corpus, targets)  # type: ignore[operator, no-any-return]

    def _sum(self, value: Tensor) -> float:
        """Return the sum over the ranks, bitwise equal on all ranks."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total.item()


def whole_tensors(model: MistralForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of a sharded model, one gathered tensor at a time, on all ranks."""
    for prefix, module in model.named_modules():
        for _ in module.parameters(recurse=False):
            for name, tensor in module.state_dict(prefix=f"{prefix}.").items():
                yield name, tensor.full_tensor()
