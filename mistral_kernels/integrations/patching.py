"""Patch one transformers model to use these kernels, and undo the patch.

    handle = apply_mistral_kernels(model)      # or: with apply_mistral_kernels(model): ...
    print(handle)                              # what was patched, what was skipped, and why
    handle.undo()

Only the `forward` and `config` attributes of the model's own modules are replaced, never a class or
a function that models share. Each replacement runs the original when `handle.on` is False, so
`undo` also affects replacements inside other wrappers and in deep copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mistral_kernels.integrations import patched_modules
from mistral_kernels.integrations.patch_handle import ABSENT, PARTS, Handle, patch_of
from mistral_kernels.integrations.patched_modules import Forward, method_of
from mistral_kernels.integrations.transformers_attention import NAME, register

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")

# Supported modules, by class name. Liger replaces transformers' classes by its own.
_LLAMAS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GEMMAS = ("Gemma", "Gemma2", "Gemma3")
_NORMS = {f"{family}RMSNorm" for family in _LLAMAS} | {"LigerRMSNorm"}
_MLPS = {f"{family}MLP" for family in _LLAMAS + _GEMMAS} | {"LigerSwiGLUMLP"}
_ATTENTIONS = {f"{family}Attention" for family in _LLAMAS + _GEMMAS}
_MAX_HEAD_DIM = 256


def apply_mistral_kernels(
    model: nn.Module,
    attention: bool = True,
    rms_norm: bool = True,
    rotary: bool = True,
    swiglu: bool = True,
    cross_entropy: bool = True,
) -> Handle:
    """Patch one transformers model to use these kernels, until `undo()` of the returned handle.

    The model may be patched before or after its weights are loaded, before or after PEFT wraps it,
    and together with Liger: if a module is patched twice, the later patch is active. Unsupported
    modules stay unchanged, and `repr` of the handle lists the reasons. Modules that are already
    patched stay with the handle that patched them.

    A deep copy of the model, or of a layer, is patched with its own parameters; the same handle
    undoes it. A pickle contains an unpatched model. Do not apply or undo a patch while another
    thread runs the model. Do not wrap the model in `nn.DataParallel`: its replicas are unpatched.

    Args:
        model: a Mistral, Llama, Qwen2, Qwen3 or Gemma model of transformers, or a module that
            contains one. Gemma's norms and MLPs compute another function and are skipped.
        attention: use the attention of `attn_implementation="mistral_kernels"`. Until `undo`, the
            `config` of the model and of its attentions is a view of the original config.
        rms_norm: patch all RMS norms, including those of queries and keys.
        rotary: rotate queries and keys in one launch, with float32 tables.
        swiglu: patch MLPs whose activation is SiLU. Their projections run unchanged, including
            LoRA.
        cross_entropy: in training (`model.train()`) with `labels`, compute the loss directly from
            the last hidden states. `logits` is None then.

    Returns:
        The handle: `print(handle)` lists the patched and the skipped modules, `handle.undo()`
        restores the original objects. It is also a context manager that calls `undo` at the end.

    Raises:
        TypeError: `model` is not a transformers model and does not contain one.
        ValueError: the model has an unsupported type.

    Example:
        >>> import torch
        >>> import transformers
        >>> from mistral_kernels.integrations.transformers import apply_mistral_kernels
        >>> config = transformers.MistralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        >>> model = transformers.MistralForCausalLM(config).train()
        >>> ids = torch.arange(12).view(2, 6)
        >>> expected = model(ids, labels=ids).loss
        >>> with apply_mistral_kernels(model, attention=False, rms_norm=False) as handle:
        ...     output = model(ids, labels=ids)
        >>> torch.allclose(output.loss, expected, rtol=1e-5)
        True
        >>> output.logits is None
        True
        >>> print(handle)
        mistral_kernels in MistralForCausalLM, undone:
          rotary: 3 changed: model.layers.*.self_attn, model.rotary_emb
          swiglu: 2 changed: model.layers.*.mlp
          cross_entropy: 1 changed: MistralForCausalLM
    """
    outer = next(_models(model), None)
    if outer is None:
        raise TypeError(
            "model must be a transformers PreTrainedModel or contain one, got "
            f"{type(model).__name__}"
        )
    if outer.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model must be of type {', '.join(MODEL_TYPES)}, got {outer.config.model_type!r}"
        )
    plan = _Plan(outer)
    requested = zip(PARTS, (attention, rms_norm, rotary, swiglu, cross_entropy), strict=True)
    for part in (part for part, is_requested in requested if is_requested):
        getattr(plan, part)()
    handle = plan.handle
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    for part, module, name, value in plan.replacements:
        handle.changed.setdefault(part, []).append(names.get(module, ""))
        handle.replace(module, name, value)
    handle.on = True
    return handle


def _kind(module: nn.Module) -> str:
    """Return a module's class name, with its Python module unless transformers' or Liger's."""
    cls = type(module)
    is_supported = cls.__module__.startswith(("transformers.models.", "liger_kernel."))
    return cls.__name__ if is_supported else f"{cls.__module__}.{cls.__name__}"


def _models(module: nn.Module) -> Iterator[PreTrainedModel]:
    return (x for x in module.modules() if isinstance(x, PreTrainedModel))


class _Plan:
    """Planned replacements in one model, and a handle with the reasons for skipped modules.

    The methods that are named after parts, such as `rms_norm`, do not change the model.
    """

    def __init__(self, outer: PreTrainedModel) -> None:
        self.outer, self.handle = outer, Handle(type(outer).__name__)
        self.modules = list(outer.base_model.modules())
        self.replacements: list[tuple[str, nn.Module, str, Any]] = []  # part, module, name, value
        self._forwards: dict[Any, Forward] = {}

    def skip(self, part: str, reason: str) -> None:
        reasons = self.handle.skipped.setdefault(part, [])
        if reason not in reasons:
            reasons.append(reason)

    def replace_forward(self, part: str, module: nn.Module, make: Callable[[Forward], Any]) -> None:
        name, original = method_of(module)
        current = vars(module).get(name, ABSENT)
        patch = patch_of(current)
        if patch is not None and patch.handle.on:
            self.skip(part, "already applied")
            return
        key = make, original, id(current)  # one function for all modules of a class
        if key not in self._forwards:
            self._forwards[key] = patched_modules.patched_forward(
                self.handle, make(original), original, current
            )
        forward = MethodType(self._forwards[key], module)
        self.replacements.append((part, module, name, forward))

    def rms_norm(self) -> None:
        for module in self.modules:
            kind = _kind(module)
            if not kind.endswith("Norm"):
                continue
            if kind not in _NORMS or getattr(module, "offset", None):
                why = "multiplies by 1 + weight" if "Gemma" in kind else "is not supported"
                self.skip("rms_norm", f"{kind} {why}")
            else:
                self.replace_forward("rms_norm", module, patched_modules.rms_norm_forward)

    def swiglu(self) -> None:
        for module in self.modules:
            kind = _kind(module)
            if not kind.endswith("MLP"):
                continue
            activation = type(getattr(module, "act_fn", nn.SiLU())).__name__
            if kind not in _MLPS:
                self.skip("swiglu", f"{kind} is not supported")
            elif activation not in ("SiLU", "SiLUActivation"):
                self.skip("swiglu", f"{kind} has {activation}, not SiLU")
            else:
                self.replace_forward("swiglu", module, patched_modules.swiglu_forward)

    def rotary(self) -> None:
        """Replace the rotation in all attentions or in none: all read the same tables."""
        attentions = self._attentions("rotary")
        for module in attentions:
            if patched_modules.rotary_attention_forward(method_of(module)[1]) is None:
                self.skip("rotary", f"a {type(module).__name__} has an unsupported forward")
        if "rotary" in self.handle.skipped:
            return
        for module in attentions:
            self.replace_forward("rotary", module, patched_modules.rotary_attention_forward)
        for module in self.modules:
            if type(module).__name__.endswith("RotaryEmbedding"):
                self.replace_forward("rotary", module, patched_modules.rotary_tables_forward)

    def attention(self) -> None:
        attentions = self._attentions("attention")
        config: Any = self.outer.base_model.config
        dropout = getattr(config, "attention_dropout", 0.0)
        head_dim = max((module.head_dim for module in attentions), default=0)
        if dropout:
            self.skip("attention", f"config.attention_dropout is {dropout}; it must be 0")
        if head_dim > _MAX_HEAD_DIM:
            self.skip("attention", f"head_dim is {head_dim}; it must be at most {_MAX_HEAD_DIM}")
        if getattr(config, "use_bidirectional_attention", False):
            self.skip("attention", "config.use_bidirectional_attention is set; it must not be")
        if "attention" in self.handle.skipped:
            return
        register()
        views: dict[int, Any] = {}
        for module in [*_models(self.outer), *attentions]:
            plain: Any = vars(module)["config"]
            patch = patch_of(plain)
            if patch is not None and patch.handle.on:
                self.skip("attention", "already applied")
            elif plain._attn_implementation == NAME:
                self.skip("attention", f"the config already has attn_implementation={NAME!r}")
            else:
                if id(plain) not in views:
                    views[id(plain)] = patched_modules.config_view(self.handle, plain, NAME)
                self.replacements.append(("attention", module, "config", views[id(plain)]))

    def _attentions(self, part: str) -> list[Any]:
        found = []
        for module in self.modules:
            kind = _kind(module)
            if kind in _ATTENTIONS:
                found.append(module)
            elif kind.endswith("Attention"):
                self.skip(part, f"{kind} is not supported")
        return found

    def cross_entropy(self) -> None:
        _, forward = method_of(self.outer)
        home = forward.__module__
        is_own = forward is type(self.outer).forward and home.startswith("transformers.")
        reason = patched_modules.loss_obstacle(self.outer)
        if not reason and not is_own and not home.startswith("liger_kernel."):
            # The replacement would not call a wrapper that other code put around the forward.
            reason = f"the forward of {type(self.outer).__name__} was replaced by other code"
        if reason:
            self.skip("cross_entropy", reason)
        else:
            self.replace_forward("cross_entropy", self.outer, patched_modules.loss_forward)
