"""These kernels inside one transformers model, and out again.

    handle = apply_mistral_kernels(model)      # or: with apply_mistral_kernels(model): ...
    print(handle)                              # what was changed; what was not, and why
    handle.undo()

Attributes of the model's own modules are replaced (`forward`, `generate`, `config`), never a class
or a function that other models share; `undo` puts the very objects back. gate.py says how calls in
other threads are served meanwhile.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mistral_kernels.integrations import patched_modules
from mistral_kernels.integrations.gate import Gate, Patch, can_serve_loss, method_of
from mistral_kernels.integrations.patched_modules import Forward, Serves
from mistral_kernels.integrations.transformers_attention import NAME, register

PARTS = ("attention", "rms_norm", "rotary", "swiglu", "cross_entropy")
MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")

# What is known of modules, by the names of their classes; Liger's stand in for transformers'.
_LLAMAS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GEMMAS = ("Gemma", "Gemma2", "Gemma3")
_NORMS = {f"{family}RMSNorm" for family in _LLAMAS} | {"LigerRMSNorm"}
_MLPS = {f"{family}MLP" for family in _LLAMAS + _GEMMAS} | {"LigerSwiGLUMLP"}
_ATTENTIONS = {f"{family}Attention" for family in _LLAMAS + _GEMMAS}
_MAX_HEAD_DIM = 256

_applying = threading.Lock()


def apply_mistral_kernels(
    model: nn.Module,
    attention: bool = True,
    rms_norm: bool = True,
    rotary: bool = True,
    swiglu: bool = True,
    cross_entropy: bool = True,
) -> Handle:
    """Serve one transformers model with these kernels, until `undo()` of the handle.

    Before or after its weights are loaded, before or after PEFT wraps it, beside Liger: in each
    module, who comes last serves. What cannot be served stays as it is: `repr` of the handle says
    why. A part that is on already stays with the handle that switched it on.

    Args:
        model: a Mistral, Llama, Qwen2, Qwen3 or Gemma of transformers, or what wraps one. Gemma's
            norms and MLPs compute something else and are skipped.
        attention: as `attn_implementation="mistral_kernels"` would. Meanwhile `config` of the
            model and its attentions is a view of the config they had.
        rms_norm: of all norms, those of queries and keys too.
        rotary: queries and keys in one launch, with tables in float32.
        swiglu: of MLPs whose activation is SiLU. Their projections run as they are, LoRA included.
        cross_entropy: of a model that trains (`model.train()`) and is given `labels`: the loss
            comes straight from the last hidden states, and `logits` is None.

    Raises:
        TypeError: there is no transformers model in `model`.
        ValueError: naming the type of model, which is not one of those.
    """
    outer = next(iter(_models(model)), None)
    if outer is None:
        raise TypeError(
            f"model must be a transformers PreTrainedModel, or hold one, got {type(model).__name__}"
        )
    if outer.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model is of type {outer.config.model_type!r}; apply_mistral_kernels knows "
            f"{', '.join(MODEL_TYPES)}"
        )
    wanted = zip(PARTS, (attention, rms_norm, rotary, swiglu, cross_entropy))
    with _applying:
        gate = Gate.of(outer.base_model)
        with gate.lock:
            return _apply(gate, outer, model, [part for part, is_wanted in wanted if is_wanted])


def _apply(gate: Gate, outer: PreTrainedModel, model: nn.Module, parts: list[str]) -> Handle:
    plan = _Plan(gate, outer)
    for part in parts:
        if part in gate.on:
            count = gate.replaced(part)
            since = f", but {count} of it replaced since: undo that first" if count else ""
            plan.skip(part, f"already applied{since}")
        elif part in gate.patches:  # undone, but calls inside still use it
            plan.replacements[part] = [(x.module, x.name, x.ours) for x in gate.patches[part]]
        else:
            getattr(plan, part)()
    patches = {
        part: gate.patches.get(part) or [Patch.put(*replacement) for replacement in replacements]
        for part, replacements in plan.replacements.items()
    }
    if patches:
        gate.switch_on(patches, _models(outer))
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    changed = {
        part: [names.get(patch.module, "") for patch in patches[part]] or [names[outer]]
        for part in patches
    }
    return Handle(gate, type(outer).__name__, changed, plan.skipped)


def _kind(module: nn.Module) -> str:
    """The name of its class, and where that is from unless from transformers or Liger."""
    cls = type(module)
    known = cls.__module__.startswith(("transformers.models.", "liger_kernel."))
    return cls.__name__ if known else f"{cls.__module__}.{cls.__name__}"


def _models(module: nn.Module) -> list[PreTrainedModel]:
    return [x for x in module.modules() if isinstance(x, PreTrainedModel)]


class Handle:
    """What one `apply_mistral_kernels` changed. A context manager; `repr` is its report.

    Attributes:
        changed: names of the modules that it changed, by part.
        skipped: why what is not changed is not, by part.
    """

    def __init__(
        self,
        gate: Gate,
        model: str,
        changed: dict[str, list[str]],
        skipped: dict[str, list[str]],
    ) -> None:
        self.changed, self.skipped = changed, skipped
        self._gate, self._model, self._undone = gate, model, False

    def undo(self) -> None:
        """Put back what was there before, the very same objects. Twice is once.

        Returns at once: calls that are inside the model then finish on the kernels they began on,
        and what they use is put back when the last of them ends. An attribute that somebody else
        has replaced since stays as it is, with a warning.
        """
        if not self._undone:
            self._undone = True
            self._gate.switch_off(self.changed)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"mistral_kernels in {self._model}{', undone' if self._undone else ''}:"]
        for part in PARTS:
            names = self.changed.get(part, [])
            if names:
                lines.append(f"  {part}: {len(names)} changed: {', '.join(_grouped(names))}")
            lines += [f"  {part}: skipped: {reason}" for reason in self.skipped.get(part, [])]
        return "\n".join(lines)


def _grouped(names: list[str]) -> list[str]:
    """model.layers.*.mlp for the mlp of all layers."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


class _Plan:
    """What can be changed in a model, and why the rest cannot. Looking changes nothing."""

    def __init__(self, gate: Gate, outer: PreTrainedModel) -> None:
        self.gate, self.outer = gate, outer
        self.modules = list(gate.base.modules())
        self.replacements: dict[str, list[tuple[nn.Module, str, Any]]] = defaultdict(list)
        self.skipped: dict[str, list[str]] = {}
        self._functions: dict[Any, Forward] = {}

    def skip(self, part: str, reason: str) -> None:
        if reason not in self.skipped.setdefault(part, []):
            self.skipped[part].append(reason)

    def replace_forward(
        self, part: str, module: nn.Module, make: Callable[[Forward, Serves], Forward]
    ) -> None:
        slot, original = method_of(module, "forward")
        if (make, original) not in self._functions:  # one for all modules of a kind
            serves = functools.partial(self.gate.serves, part)
            self._functions[make, original] = make(original, serves)
        bound = MethodType(self._functions[make, original], module)
        self.replacements[part].append((module, slot, bound))

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
        """All or nothing: who reads the tables must agree with who makes them."""
        attentions = self._attentions("rotary")
        for module in attentions:
            if not patched_modules.calls_rotary(method_of(module, "forward")[1]):
                self.skip("rotary", f"a {type(module).__name__} has another forward")
        if "rotary" in self.skipped:
            return
        for module in attentions:
            self.replace_forward("rotary", module, patched_modules.rotary_attention_forward)
        for module in self.modules:
            if type(module).__name__.endswith("RotaryEmbedding"):
                self.replace_forward("rotary", module, patched_modules.rotary_tables_forward)

    def attention(self) -> None:
        attentions = self._attentions("attention")
        config: Any = self.gate.base.config
        dropout = getattr(config, "attention_dropout", 0.0)
        head_dim = max((module.head_dim for module in attentions), default=0)
        if dropout:
            self.skip("attention", f"config.attention_dropout is {dropout}; there is none in ours")
        if head_dim > _MAX_HEAD_DIM:
            self.skip("attention", f"head_dim is {head_dim}; ours goes to {_MAX_HEAD_DIM}")
        if getattr(config, "use_bidirectional_attention", False):
            self.skip("attention", "config.use_bidirectional_attention: ours is causal here")
        if config._attn_implementation == NAME:
            self.skip("attention", f"the config says attn_implementation={NAME!r} already")
        if "attention" in self.skipped:
            return
        register()
        serves = functools.partial(self.gate.serves, "attention")
        views: dict[int, Any] = {}
        for module in [*_models(self.outer), *attentions]:
            plain: Any = vars(module)["config"]
            if id(plain) not in views:
                views[id(plain)] = patched_modules.config_view(plain, NAME, serves)
            self.replacements["attention"].append((module, "config", views[id(plain)]))

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
        """The model's door, which hangs there anyway, leads to it."""
        reason = patched_modules.loss_obstacle(self.outer)
        if not reason and not can_serve_loss(self.outer):
            reason = f"somebody replaced the forward of {type(self.outer).__name__}"
        if reason:
            self.skip("cross_entropy", reason)
        else:
            self.replacements["cross_entropy"] = []
