"""Training on several ranks: FSDP2 shards the weights, their gradients and AdamW's averages.

The parameters are float32 shards: the masters themselves. What the model computes in is gathered
from them, a layer at a time, and dropped behind the layer; gradients are averaged in float32.
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
from mistral_kernels.training.loop import DTYPES, Corpus, Recipe, Run, packed_loss
from mistral_kernels.training.state import Saving

_AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW's, of the gradients and their squares

PartOf = Callable[[str, tuple[int, ...]], Part]


def sharded_model(
    config: MistralConfig,
    tensors: Callable[[PartOf], Iterable[tuple[str, Tensor]]],
    dtype: torch.dtype,
    world: World,
) -> MistralForCausalLM:
    """A model of which each rank holds its share of every weight, in float32.

    It computes in `dtype`, to which its weights are rounded: those that `tensors` reads, as
    `Checkpoint.tensors` does. A rank reads its share alone; its memory is that and one layer.
    """
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    places = _places(model)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        # Not the inputs, among which are float32 tables.
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
    }
    for layer in model.model.layers:
        fully_shard(layer.to_empty(device=world.device), **options)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.to_empty(device=world.device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    fully_shard(model, **options)
    # The loss needs the head's weight, which is whole inside the root's forward alone.
    model.packed_loss = MethodType(packed_loss, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "packed_loss")

    weights = dict(model.named_parameters())

    def own(name: str) -> tuple[slice, Tensor]:
        """Which rows of a tensor are this rank's, and where they go."""
        weight, first, rows = places[name]
        shard: Tensor = weights[weight].detach().to_local()  # type: ignore[attr-defined]
        start = world.rank * -(-len(weights[weight]) // world.size)  # as torch.chunk cuts
        low = max(start, first)
        high = max(low, min(start + len(shard), first + rows))
        return slice(low - first, high - first), shard[low - start : high - start]

    for name, tensor in tensors(lambda name, _: (own(name)[0],)):
        cast = tensor.to(dtype)
        check_cast(name, tensor, cast)
        own(name)[1].copy_(cast)
        del tensor, cast  # a mapped one keeps its pages until it is dropped
    return model


def _places(model: MistralForCausalLM) -> dict[str, tuple[str, int, int]]:
    """For each tensor of a state dict the parameter that holds it, its first row there, its rows.

    A tensor of tied weights lies where its first name does.
    """
    names = {weight: name for name, weight in model.named_parameters()}
    places = {}
    for prefix, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            row = 0
            for name, part in module.state_dict(prefix=f"{prefix}.").items():
                places[name] = names[weight], row, len(part)
                row += len(part)
    return places


def share(batch: Sequence[Tensor], world: World) -> list[Tensor]:
    """This rank's sequences of a batch, about as many tokens as any other's; at least one."""
    loads = [0] * world.size
    shares: list[list[Tensor]] = [[] for _ in loads]
    for sequence in sorted(batch, key=len, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += len(sequence)
        shares[lightest].append(sequence)
    return shares[world.rank]


class ShardedRun(Run):
    """A `sharded_model` on its way, in step with the other ranks, of whom a batch has no fewer.

    Every rank draws the whole batch and computes its sequences of it; losses are those of all.
    """

    def __init__(self, model: MistralForCausalLM, recipe: Recipe, world: World) -> None:
        self.world = world
        super().__init__(model, recipe)
        # AdamW makes these at the first step; a state that is loaded needs them before.
        for weight in self.weights:
            averages = {name: torch.zeros_like(weight) for name in _AVERAGES}
            self.optimizer.state[weight] = {
                "step": torch.zeros((), device=world.device),
                **averages,
            }
        self._keep_best()

    def _masters(self) -> list[Tensor]:
        return self.weights

    def _update_weights(self) -> None:
        pass

    @property
    def state(self) -> dict[str, Any]:
        """With this rank's share of the tensors under the names of the model's parameters."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, weight in self.model.named_parameters():
            tensors[f"master.{name}"] = weight.detach()
            for average in _AVERAGES:
                tensors[f"{average}.{name}"] = self.optimizer.state[weight][average]
        return {**self.progress, "tensors": tensors}

    def restore(self, saving: Saving) -> bool:
        # Fills the tensors in place.
        if (state := saving.load(self.state, self._check_progress)) is None:
            return False
        self._set_progress(state)
        for weight in self.weights:
            self.optimizer.state[weight]["step"].fill_(self.step)
        return True

    def _backward(self, corpus: Corpus, batch: Sequence[Tensor]) -> float:
        own = share(batch, self.world)
        part = sum(map(len, own)) / sum(map(len, batch))
        loss = self._packed_loss(corpus, own) * part
        total = self._sum(loss)
        self._check_finite(total)
        (loss * self.world.size).backward()  # FSDP takes the mean over the ranks
        return total.item()

    def _packed_loss(self, corpus: Corpus, targets: Sequence[Tensor]) -> Tensor:
        return self.model.packed_loss(corpus, targets)  # type: ignore[operator]

    def _sum(self, value: Tensor) -> Tensor:
        """Over the ranks; the same bits on all."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def held_out_loss(self, corpus: Corpus, tokens: Tensor) -> float:
        """Each rank reads all of it, which is one sequence; their losses differ by rounding."""
        loss = self._packed_loss(corpus, [tokens])
        self.model.reshard()  # type: ignore[operator]  # else the root keeps its weights whole
        return self._sum(loss).item() / self.world.size

    def _keep_best(self) -> None:
        dtype = DTYPES[self.recipe.dtype]
        self.best = {
            name: weight.detach().to(dtype, copy=True)
            for name, weight in self.model.named_parameters()
        }

    @torch.no_grad()
    def take_best(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(self.best[name])

    def write(self, directory: Path, extra_files: Iterable[Path]) -> None:
        """The main rank writes, all gather: one weight at a time."""
        tensors = whole_tensors(self.model)
        if self.world.is_main:
            dtype = DTYPES[self.recipe.dtype]
            save_hf(tensors, self.model.config, directory, dtype=dtype, extra_files=extra_files)
        for _ in tensors:
            pass


def whole_tensors(model: MistralForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """A sharded model's state dict, a whole tensor at a time; every rank has to ask for each."""
    for prefix, module in model.named_modules():
        for _ in module.parameters(recurse=False):
            for name, tensor in module.state_dict(prefix=f"{prefix}.").items():
                yield name, tensor.full_tensor()
