"""Tensor parallelism for text generation: one Mistral model over all ranks of the default group.

Each rank holds the projections of its query and key/value heads, its columns of the MLP and its
rows of the vocabulary. Attention, the MLP and the rolling cache of a rank are those of a smaller
model. As in Megatron-LM (arXiv:1909.08053), one all-reduce after attention and one after the MLP
sum the ranks' parts of the hidden state. One further all-reduce completes the embedding, and an
all-gather gives every rank all logits, so that all ranks choose the same tokens. If there are more
ranks than key/value heads, several ranks hold the same head.

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
from mistral_kernels.model.pretrained_arguments import HUB_ARGUMENTS
from mistral_kernels.model.transformer import MistralForCausalLM


@dataclass(frozen=True)
class Share:
    """Part of a model that rank `rank` of `size` holds.

    Raises `ConfigError` if the heads or the MLP cannot be divided among the ranks.
    """

    config: MistralConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        for name in ("num_attention_heads", "intermediate_size"):
            if getattr(config, name) % size:
                raise ConfigError(
                    f"{name} must be divisible by the number of ranks, {size}, got "
                    f"{getattr(config, name)}: start a number of ranks that divides it"
                )
        kv_heads = config.num_key_value_heads
        if kv_heads % size and size % kv_heads:
            raise ConfigError(
                "num_key_value_heads must be a divisor or a multiple of the number of ranks, "
                f"{size}, got {kv_heads}: start another number of ranks"
            )

    @property
    def local_config(self) -> MistralConfig:
        """Configuration of this rank's part, with the vocabulary size of the whole model."""
        return replace(
            self.config,
            num_attention_heads=self.config.num_attention_heads // self.size,
            num_key_value_heads=max(1, self.config.num_key_value_heads // self.size),
            intermediate_size=self.config.intermediate_size // self.size,
        )

    @property
    def vocabulary(self) -> range:
        """Tokens whose rows of the embedding and of the head this rank holds."""
        count = -(-self.config.vocab_size // self.size)
        return range(self.config.vocab_size)[self.rank * count : (self.rank + 1) * count]

    def part_of(self, name: str, shape: tuple[int, ...]) -> checkpoint.Part:
        """Return this rank's rows and columns of the tensor `name`; `shape` is the full shape."""
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
    """Mistral model for inference of which this rank holds a share.

    Every call is a collective operation: all ranks must make the same calls with the same
    arguments, and all get the same results. The attribute `config` is that of the share. Only
    `from_pretrained` loads weights.
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
        """Return this rank's rows and columns of the tensor `name`; `shape` is the full shape."""
        return self.share.part_of(name, shape)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> ParallelMistralForCausalLM:
        """Load like `MistralForCausalLM.from_pretrained`; each rank reads only its share.

        Raises `ValueError` if the ranks have different checkpoints or options, and `ConfigError` if
        the model cannot be divided among the ranks.
        """
        hub = {name: options.pop(name) for name in HUB_ARGUMENTS if name in options}
        folder = checkpoint.resolve(path, **hub)
        check_same("the checkpoint", _fingerprint(checkpoint.open_checkpoint(folder)))
        for name, value in options.items():
            if name not in ("device", "device_map"):
                check_same(name, value)
        model = super().from_pretrained(folder, **options)
        assert isinstance(model, cls)
        return model

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise `NotImplementedError`: a rank holds only a part of the model."""
        raise NotImplementedError(
            "save_pretrained is not supported on a rank, which holds only a part of the model; "
            "save it in a single process"
        )


class RowParallelLinear(Linear):
    """Linear layer with the input dimension divided among the ranks; outputs are summed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (tokens, out_features), the sum over all ranks, for x (tokens, in_features)."""
        return _all_reduce(super().forward(x))


class ParallelEmbedding(nn.Module):
    """Embedding of which this rank holds the rows of the tokens in `vocabulary`."""

    def __init__(self, vocabulary: range, hidden_size: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.empty(len(vocabulary), hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings, (tokens, hidden_size), of `input_ids`, (tokens,)."""
        rows = input_ids - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= len(self.vocabulary))
        rows = rows.masked_fill(elsewhere, 0)
        return _all_reduce(F.embedding(rows, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0))


class ParallelHead(Linear):
    """Language model head of which this rank computes the logits of its own tokens."""

    def __init__(self, in_features: int, out_features: int, vocab_size: int) -> None:
        super().__init__(in_features, out_features)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """Return all logits, (tokens, vocab_size), for x (tokens, in_features)."""
        own, size = super().forward(x), dist.get_world_size()
        # The last ranks may hold fewer rows than the first. An all-gather requires equal sizes.
        own = F.pad(own, (0, -(-self.vocab_size // size) - own.shape[1]))
        parts = _all_gather(own, size).unflatten(0, (size, -1))
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]  # type: ignore[no-any-return]


# Functional collectives, which torch.compile can trace and CUDA graphs can record. The operators
# are called directly: their Python wrappers return a Tensor subclass that the kernels reject.


def _all_reduce(x: Tensor) -> Tensor:
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(x, "sum", _group_name()))  # type: ignore[no-any-return]


def _all_gather(x: Tensor, size: int) -> Tensor:
    """Concatenate `x`, (rows, columns), of all ranks along the rows."""
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_gather_into_tensor(x, size, _group_name()))  # type: ignore[no-any-return]


def _group_name() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def _fingerprint(stored: checkpoint.Checkpoint) -> str:
    """Return a hash of a checkpoint's configuration, norms and the first row of each matrix."""

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
    """Memory of one rank: bytes of its weights and of its cache."""

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
    """Return the memory of a model and its cache on rank 0 of `size`, the largest of all ranks.

    PyTorch, NCCL and the activations of a prefill pass need additional memory.
    """
    share = Share(config, 0, size)
    elements = 0
    for name, shape in expected_shapes(config).items():
        elements += torch.empty(shape, device="meta")[share.part_of(name, shape)].numel()
    cache = RollingCache(share.local_config, batch, max_length, dtype, "meta")
    return Memory(elements * dtype.itemsize, cache.nbytes)
