"""Tensor parallelism: one Mistral over the ranks of torch.distributed's group, to generate text.

Each rank holds the projections of its own query and key/value heads, its columns of the MLP and its
rows of the vocabulary. Attention, the MLP and the rolling cache of a rank are those of a smaller
model. One all-reduce after attention and one after the MLP add up the ranks' parts of the hidden
state, as in Megatron-LM (arXiv:1909.08053). A third completes the embedding, and an all-gather
gives every rank all logits, so that all choose the same tokens. Where there are more ranks than
key/value heads, several hold the same head.

`benchmarks/parallel_model.py` models the time of a step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mistral_kernels import checkpoint
from mistral_kernels.checkpoint.names import expected_shapes
from mistral_kernels.distributed.process_group import check_same
from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.config import ConfigError, MistralConfig
from mistral_kernels.model.layers import Linear
from mistral_kernels.model.transformer import MistralForCausalLM


@dataclass(frozen=True)
class Share:
    """Part of a model that rank `rank` of `size` holds.

    Raises `ConfigError` if heads or the MLP cannot be divided.
    """

    config: MistralConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        for name in ("num_attention_heads", "intermediate_size"):
            if getattr(config, name) % size:
                raise ConfigError(
                    f"{size} ranks cannot share a model of {name} {getattr(config, name)}: "
                    "start a number of ranks that divides it"
                )
        kv_heads = config.num_key_value_heads
        if kv_heads % size and size % kv_heads:
            raise ConfigError(
                f"{size} ranks cannot share a model of num_key_value_heads {kv_heads}: start a "
                "number of ranks that divides it or is a multiple of it"
            )

    @property
    def local_config(self) -> MistralConfig:
        """The configuration of this rank's part, except that its vocabulary is whole."""
        return replace(
            self.config,
            num_attention_heads=self.config.num_attention_heads // self.size,
            num_key_value_heads=max(1, self.config.num_key_value_heads // self.size),
            intermediate_size=self.config.intermediate_size // self.size,
        )

    @property
    def vocabulary(self) -> range:
        """The tokens whose rows of the embedding and of the head are this rank's."""
        count = -(-self.config.vocab_size // self.size)
        return range(self.config.vocab_size)[self.rank * count : (self.rank + 1) * count]

    def part_of(self, name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        """Return the rows and columns of the tensor `name`, whose whole shape is `shape`."""
        layer = name.split(".")[-2]
        if layer in ("embed_tokens", "lm_head"):
            return (slice(self.vocabulary.start, self.vocabulary.stop),)
        if layer in ("o_proj", "down_proj"):
            return slice(None), self._even(shape[1])
        if layer in ("k_proj", "v_proj"):
            heads = self.config.num_key_value_heads
            first, count = self.rank * heads // self.size, max(1, heads // self.size)
            return (slice(first * self.config.head_dim, (first + count) * self.config.head_dim),)
        if layer in ("q_proj", "gate_proj", "up_proj"):
            return (self._even(shape[0]),)
        return checkpoint.whole(name, shape)

    def _even(self, length: int) -> slice:
        count = length // self.size
        return slice(self.rank * count, (self.rank + 1) * count)


class ParallelMistralForCausalLM(MistralForCausalLM):
    """Share of a model that this rank holds, for inference. Every call is a collective one.

    Each rank makes the same calls with the same arguments, and has the same results.
    `config` is that of the share. Weights come from `from_pretrained` alone.
    """

    def __init__(self, config: MistralConfig) -> None:
        self.share = Share(config, dist.get_rank(), dist.get_world_size())
        with torch.device("meta"):
            super().__init__(self.share.local_config)
            vocabulary = self.share.vocabulary
            self.model.embed_tokens = ParallelEmbedding(vocabulary, config.hidden_size)
            self.lm_head = ParallelHead(config.hidden_size, len(vocabulary), config.vocab_size)
            for layer in self.model.layers:
                for block, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
                    own = getattr(block, name)
                    setattr(block, name, RowParallelLinear(own.in_features, own.out_features))
        self._tie_weights()
        self.requires_grad_(False)

    def part_of(self, name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        return self.share.part_of(name, shape)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> ParallelMistralForCausalLM:
        """Load as `MistralForCausalLM.from_pretrained` does; each rank reads its own share alone.

        Raises `ValueError` where the ranks were given different checkpoints or options, and
        `ConfigError` where their number cannot share the model.
        """
        folder = checkpoint.resolve(path)
        check_same("the checkpoint", _fingerprint(checkpoint.open_checkpoint(folder)))
        for name, value in options.items():
            if name != "device":
                check_same(name, value)
        model = super().from_pretrained(folder, **options)
        assert isinstance(model, cls)
        return model

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a rank holds a part of the model; save it in a single process")


class RowParallelLinear(Linear):
    """The product of a rank's columns of x with its columns of the weight, summed over ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return _all_reduce(super().forward(x))


class ParallelEmbedding(nn.Module):
    """Embeddings of all tokens, of which this rank holds those in `vocabulary`."""

    def __init__(self, vocabulary: range, hidden_size: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.empty(len(vocabulary), hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(tokens, hidden_size) of ids (tokens,)."""
        rows = input_ids - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= len(self.vocabulary))
        rows = rows.masked_fill(elsewhere, 0)
        return _all_reduce(F.embedding(rows, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0))


class ParallelHead(Linear):
    """Logits of all `vocab_size` tokens, of which this rank computes its own."""

    def __init__(self, in_features: int, out_features: int, vocab_size: int) -> None:
        super().__init__(in_features, out_features)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, vocab_size) of x (tokens, in_features)."""
        own, size = super().forward(x), dist.get_world_size()
        # The last ranks may have fewer tokens than the first.
        own = F.pad(own, (0, -(-self.vocab_size // size) - own.shape[1]))
        parts = _all_gather(own, size).unflatten(0, (size, -1))
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]  # type: ignore[no-any-return]


# The functional collectives, which torch.compile traces and CUDA graphs record. By these operators,
# since what the Python functions over them return is a subclass of Tensor that kernels refuse.


def _all_reduce(x: Tensor) -> Tensor:
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(x, "sum", _group_name()))  # type: ignore[no-any-return]


def _all_gather(x: Tensor, size: int) -> Tensor:
    """Return the x (rows, columns) of all ranks, one below the other."""
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_gather_into_tensor(x, size, _group_name()))  # type: ignore[no-any-return]


def _group_name() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def _fingerprint(stored: checkpoint.Checkpoint) -> str:
    """Return a hash of a checkpoint's configuration, all norms and one row of each matrix."""

    def sample(name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        return (slice(1),) if len(shape) == 2 else checkpoint.whole(name, shape)

    digest = hashlib.sha256(repr(stored.config).encode())
    for name, tensor in stored.tensors(sample):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        del tensor
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    cache: int


def memory_per_rank(
    config: MistralConfig,
    size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    max_length: int = 32768,
) -> Memory:
    """Return the memory of a model and its cache on the first of `size` ranks, which has the most.

    The activations of one prefill pass, PyTorch and NCCL need more.
    """
    share = Share(config, 0, size)
    elements = 0
    for name, shape in expected_shapes(config).items():
        elements += torch.empty(shape, device="meta")[share.part_of(name, shape)].numel()
    cache = RollingCache(share.local_config, batch, max_length, dtype, "meta")
    return Memory(elements * dtype.itemsize, cache.nbytes)
