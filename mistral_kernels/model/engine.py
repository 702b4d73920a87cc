"""Decode engines: append one token per sequence to a cache and return the next token's logits.

`engine_for` chooses an engine once per generation. On one device, all engines return the same bits.

| engine            | runs                                  | chosen for                         |
| ----------------- | ------------------------------------- | ---------------------------------- |
| `CudaGraphEngine` | the modules, recorded in a CUDA graph | CUDA                               |
| `CpuEngine`       | the decoder of csrc, in one call      | the CPU, if `_can_use_csrc`        |
| `ModuleEngine`    | the modules                           | everything else                    |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.decoder import CausalLM, MistralModel, without_autocast
from mistral_kernels.model.layers import MLP, Attention, DecoderLayer, FusedLinear, Linear, RMSNorm
from mistral_kernels.model.sampling import NextTokens
from mistral_kernels.ops import extension
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.linear import KERNEL_ROWS
from mistral_kernels.ops.operator import in_transform


class Engine(Protocol):
    """Decode steps of one model with one cache.

    Attributes:
        asynchronous: whether `step` returns before the device has run the step.
    """

    asynchronous: bool

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token per sequence to the cache and return the logits after it.

        Args:
            token_ids: (batch,) int64 or int32, on the model's device.

        Returns:
            (batch, vocab_size), in the model's dtype. The next step may overwrite the tensor.

        Raises:
            ValueError: the cache has another batch size, is full, or is interrupted.
        """


def engine_for(model: CausalLM, cache: RollingCache, newest: NextTokens | None = None) -> Engine:
    """Return the fastest engine that can run this model with this cache.

    The choice depends on the model's present state, such as its hooks. With `newest`, each step
    also chooses the next tokens from its logits.

    Raises:
        ValueError: the cache was made for another model, dtype or device.
    """
    model.model.check_cache(cache)
    if model.device.type == "cuda":
        return CudaGraphEngine(model, cache, newest)
    if _can_use_csrc(model, cache):
        return CpuEngine(model, cache, newest)
    return ModuleEngine(model, cache, newest)


class ModuleEngine:
    """Engine that calls the model's modules."""

    asynchronous = False

    def __init__(
        self, model: CausalLM, cache: RollingCache, newest: NextTokens | None = None
    ) -> None:
        self.model, self.cache, self.newest = model, cache, newest

    def step(self, token_ids: Tensor) -> Tensor:
        """See `Engine.step`."""
        packing = self.cache.packing([1] * token_ids.shape[0])
        with without_autocast(token_ids.device):
            hidden = self.model.model(token_ids, packing, self.cache)
            logits: Tensor = self.model.lm_head(hidden)
        if self.newest is not None:
            self.newest.choose(logits)
        return logits


class CudaGraphEngine(ModuleEngine):
    """Engine that records a step in a CUDA graph and replays the graph.

    The graph contains the modules and the choice of the next tokens. No shape in a step depends on
    the position, and the host reads nothing, so one graph is valid for every position, before and
    after the rings wrap. The first step calls the modules, which compiles their kernels. The second
    step is recorded. When the rotary tables grow, they are new tensors, and the graph is recorded
    again.
    """

    asynchronous = True

    def __init__(
        self, model: CausalLM, cache: RollingCache, newest: NextTokens | None = None
    ) -> None:
        super().__init__(model, cache, newest)
        if newest is None:
            self._generator = None
            self._token_ids = torch.zeros(cache.batch, dtype=torch.long, device=model.device)
        else:
            self._generator = newest.sampler.generator
            self._token_ids = newest.token_ids
        self._logits: Tensor
        self._replay: Callable[[], None] | None = None
        self._num_positions = 0  # number of positions in the rotary tables that the graph reads

    def step(self, token_ids: Tensor) -> Tensor:
        """See `Engine.step`."""
        cache, new = self.cache, [1] * token_ids.shape[0]
        if cache.end_of(new) > self._num_positions:
            logits = super().step(token_ids)
            self._replay, self._num_positions = None, self.model.model.num_positions
            return logits
        if token_ids is not self._token_ids:
            self._token_ids.copy_(token_ids)
        if self._replay is None:
            lengths = cache.host_lengths
            self._replay = capture(self._record, self._generator)
            cache.host_lengths = lengths  # undo: recording adds 1 but appends no token
        self._replay()
        cache.advance_host(new)
        return self._logits

    def _record(self) -> None:
        self._logits = super().step(self._token_ids)


def capture(run: Callable[[], None], generator: torch.Generator | None) -> Callable[[], None]:
    """Record the launches of `run` without running them; return a function that replays them."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class CpuEngine:
    """Engine that runs a whole step in one call of csrc. csrc's decoder keeps the weights alive.

        h = embedding[token_ids]                             for each layer:
        h = h + attention(rotary(x Wqkv^T), cache) Wo^T      x = RMSNorm(h)
        h = h + SwiGLU(x Wup^T) Wdown^T                      x = RMSNorm(h)
        logits = RMSNorm(h) Whead^T

    A step reads every weight once, which evicts Python's code and data from the CPU's caches.
    Therefore one call per layer would cost 0.1 ms per layer, and one call per operator would cost
    several times as much. The weights are passed once, when the engine is created: passing them in
    each call would add 2 % to a step of a model with 160 M parameters. Gradients are not supported.
    """

    asynchronous = False

    def __init__(
        self, model: CausalLM, cache: RollingCache, newest: NextTokens | None = None
    ) -> None:
        self.model, self.cache, self.newest = model.model, cache, newest
        self._vocab_size, self._dtype = model.config.vocab_size, model.dtype
        csrc = torch.ops.mistral_kernels
        self._number = csrc.make_decoder.default(*decoder_arguments(model))
        weakref.finalize(self, csrc.drop_decoder.default, self._number)
        self._step = csrc.decoder_step.default

    def step(self, token_ids: Tensor) -> Tensor:
        """See `Engine.step`.

        Raises:
            RuntimeError: a token id is not in the vocabulary. The cache is then unchanged.
        """
        cache, batch = self.cache, token_ids.shape[0]
        new = [1] * batch
        cos, sin = self.model.rotary_tables(cache.end_of(new), token_ids.device)
        ids = token_ids.long() if token_ids.dtype == torch.int32 else token_ids
        ids = ids.contiguous()
        logits = torch.empty(batch, self._vocab_size, dtype=self._dtype)
        cache.interrupted = True
        try:
            self._step(self._number, ids, cos, sin, cache.keys, cache.values, cache.lengths, logits)
        except RuntimeError:  # csrc checks its arguments before it writes to the cache
            cache.interrupted = False
            raise
        cache.advance_host(new)
        if self.newest is not None:
            self.newest.choose(logits)
        return logits


def decoder_arguments(model: CausalLM) -> tuple[Any, ...]:
    """Return the arguments of csrc's `make_decoder`, in its order.

    The weights are detached tensors, because operations such as `Module.to` replace the `data` of
    the model's own tensors.
    """
    layers: list[Any] = list(model.model.layers)
    weights: list[Tensor | None] = []
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        weights += [layer.input_layernorm.weight.detach()]
        weights += [*_weight_and_scales(attention.qkv_proj), *_weight_and_scales(attention.o_proj)]
        weights += [layer.post_attention_layernorm.weight.detach()]
        weights += [*_weight_and_scales(mlp.gate_up_proj), *_weight_and_scales(mlp.down_proj)]
    return (
        model.model.embed_tokens.weight.detach(),
        weights,
        model.model.norm.weight.detach(),
        *_weight_and_scales(model.lm_head),
        [resolve_window(True, None, x.self_attn.sliding_window).left for x in layers],
        model.config.head_dim,
        model.config.rms_norm_eps,
    )


def _weight_and_scales(linear: Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach(), linear.scales


def _can_use_csrc(model: CausalLM, cache: RollingCache) -> bool:
    """Return whether `CpuEngine` computes the same as the model's modules.

    csrc computes the equations of the modules without calling the modules. Therefore every module
    must be unmodified: a call of the module runs only the original `forward`, on plain tensors.
    """
    modules = (*model.model.modules(), *model.lm_head.modules())
    return (
        cache.batch <= KERNEL_ROWS
        and model.config.head_dim % 8 == 0
        and not torch.is_grad_enabled()
        and not _is_observed()
        and not _has_any_global_hook()
        and all(_is_unmodified(module, model.config.rms_norm_eps) for module in modules)
        and extension.supports(model.model.norm.weight)
    )


def _is_observed() -> bool:
    """Return whether PyTorch must dispatch each operator, as for traces and modes."""
    return (
        torch.compiler.is_compiling()
        or in_transform()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


# The modules that csrc replaces, and their `forward` methods, which csrc computes.
_MODULES: tuple[type[nn.Module], ...] = (
    *(MistralModel, nn.Embedding, nn.ModuleList, DecoderLayer, Attention, MLP),
    *(RMSNorm, Linear, FusedLinear),
)
_FORWARDS = {module: module.forward for module in _MODULES}


def _is_unmodified(module: nn.Module, eps: float) -> bool:
    return (
        getattr(module.forward, "__func__", None) is _FORWARDS.get(type(module), module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and getattr(module, "eps", eps) == eps
        and getattr(module, "max_norm", None) is None  # max_norm: the embedding changes its weight
        and all(type(weight) is nn.Parameter for weight in module.parameters(recurse=False))
    )
