"""Patch one transformers model to use these kernels, and undo it.

    handle = apply_mistral_kernels(model)      # or: with apply_mistral_kernels(model): ...
    print(handle)                              # what was changed; what was not, and why
    handle.undo()

`forward` and `config` of the model's own modules are replaced, never a class or a function that
models share. Each replacement calls the original while `handle.on` is False, so `undo` also reaches
replacements that are inside other wrappers and in deep copies.
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

# The modules that are supported, by the names of their classes. Liger's replace transformers'.
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
    """Patch one transformers model to use these kernels, until `undo()` of the handle.

    Before or after its weights are loaded, before or after PEFT wraps it, beside Liger: of two
    patches of a module, the later one serves. What is not supported stays as it is, and `repr` of
    the handle gives the reason. What is patched already stays with the handle that patched it.

    A deep copy of the model, or of a layer, is patched on its own parameters, and undone by the
    same handle. A pickle is an unpatched model. Do not apply or undo while another thread runs the
    model, and do not wrap the model in `nn.DataParallel`, which copies no patches.

    Args:
        model: a Mistral, Llama, Qwen2, Qwen3 or Gemma of transformers, or a module that wraps one.
            Gemma's norms and MLPs compute something else and are skipped.
        attention: as `attn_implementation="mistral_kernels"` does. Meanwhile `config` of the model
            and its attentions is a view of the config they had.
        rms_norm: all norms, those of queries and keys included.
        rotary: queries and keys in one launch, with tables in float32.
        swiglu: MLPs whose activation is SiLU. Their projections run as they are, LoRA included.
        cross_entropy: of a model that trains (`model.train()`) and is given `labels`: the loss
            comes straight from the last hidden states, and `logits` is None.

    Raises:
        TypeError: `model` is no transformers model and holds none.
        ValueError: naming the type of model, which is not one of those.
    """
    outer = next(_models(model), None)
    if outer is None:
        raise TypeError(
            f"model must be a transformers PreTrainedModel, or hold one, got {type(model).__name__}"
        )
    if outer.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model must be of type {', '.join(MODEL_TYPES)}, got {outer.config.model_type!r}"
        )
    plan = _Plan(outer)
    wanted = zip(PARTS, (attention, rms_norm, rotary, swiglu, cross_entropy), strict=True)
    for part in (part for part, is_wanted in wanted if is_wanted):
        getattr(plan, part)()
    handle = plan.handle
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    for part, module, name, value in plan.replacements:
        handle.changed.setdefault(part, []).append(names.get(module, ""))
        handle.put(module, name, value)
    handle.on = True
    return handle


def _kind(module: nn.Module) -> str:
    """Return the name of a module's class; with its origin, unless transformers or Liger."""
    cls = type(module)
    known = cls.__module__.startswith(("transformers.models.", "liger_kernel."))
    return cls.__name__ if known else f"{cls.__module__}.{cls.__name__}"


def _models(module: nn.Module) -> Iterator[PreTrainedModel]:
    return (x for x in module.modules() if isinstance(x, PreTrainedModel))


class _Plan:
    """Replacements in one model, and a handle with the reasons for what is not replaced.

    Planning changes nothing.
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
        key = make, original, id(current)  # one function for all modules of a kind
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
                why = "multiplies by 1 + weight" if "Gemma" in kind else "is not known"
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
                self.skip("swiglu", f"{kind} is not known")
            elif activation not in ("SiLU", "SiLUActivation"):
                self.skip("swiglu", f"{kind} has {activation}, not SiLU")
            else:
                self.replace_forward("swiglu", module, patched_modules.swiglu_forward)

    def rotary(self) -> None:
        """Replace rotation in all attentions or in none: they must agree with the tables."""
        attentions = self._attentions("rotary")
        for module in attentions:
            if patched_modules.rotary_attention_forward(method_of(module)[1]) is None:
                self.skip("rotary", f"a {type(module).__name__} has another forward")
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
            self.skip("attention", f"config.attention_dropout is {dropout}; there is none in ours")
        if head_dim > _MAX_HEAD_DIM:
            self.skip("attention", f"head_dim is {head_dim}; ours goes to {_MAX_HEAD_DIM}")
        if getattr(config, "use_bidirectional_attention", False):
            self.skip("attention", "config.use_bidirectional_attention: ours is causal here")
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
                self.skip("attention", f"the config says attn_implementation={NAME!r} already")
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
                self.skip(part, f"{kind} is not known")
        return found

    def cross_entropy(self) -> None:
        _, forward = method_of(self.outer)
        home = forward.__module__
        is_own = forward is type(self.outer).forward and home.startswith("transformers.")
        reason = patched_modules.loss_obstacle(self.outer)
        if not reason and not is_own and not home.startswith("liger_kernel."):
            reason = f"somebody replaced the forward of {type(self.outer).__name__}"
        if reason:  # a wrapper must not be lost
            self.skip("cross_entropy", reason)
        else:
            self.replace_forward("cross_entropy", self.outer, patched_modules.loss_forward)
