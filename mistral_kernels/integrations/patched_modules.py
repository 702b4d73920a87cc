"""Replacements of modules' forwards and configs, for `apply_mistral_kernels`.

A replaced forward is a method: bound to its module, as others expect to find it there. A deep copy
of it is bound to the copy of the module. A pickle of it is the class's own forward.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from mistral_kernels.integrations.patch_handle import Handle, Patch, patch_of
from mistral_kernels.integrations.transformers_attention import autocast_dtype
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rotary import apply_rotary
from mistral_kernels.ops.swiglu import swiglu

Forward = Callable[..., Any]  # unbound: the module is its first argument


def method_of(module: nn.Module) -> tuple[str, Forward]:
    """Return the name under which a module keeps its forward, and the function, not patched."""
    # Where accelerate has hooked a module, the hook's forward calls this one.
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    method = getattr(module, name)
    patch = patch_of(method)
    if patch is not None:
        return name, patch.original
    if isinstance(method, MethodType) and method.__self__ is module:
        return name, method.__func__
    return name, functools.wraps(method)(lambda self, *args, **kwargs: method(*args, **kwargs))


def patched_forward(handle: Handle, ours: Forward, original: Forward, replaced: Any) -> Forward:
    """Return a function that is `ours` while the handle is on, and otherwise `original`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if handle.on else original)(self, *args, **kwargs)

    result: Any = forward  # a method is pickled by this name, "forward"
    result.__module__, result.__doc__ = original.__module__, original.__doc__
    # Not `__wrapped__`: accelerate takes off whatever has it.
    result.__signature__ = inspect.signature(original)
    result._mistral_kernels_patch = Patch(handle, forward, original, replaced)
    return forward


def rms_norm_forward(_: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        # As x * weight promotes them: fine-tuning may keep the weights of norms in float32.
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)

    return forward


def swiglu_forward(_: Forward) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def rotary_tables_forward(original: Forward) -> Forward:
    """Return a forward that makes cos and sin in float32.

    The kind of rope and its scaling are the module's own.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The module reads nothing of x but its device and dtype.
        return original(self, x.new_empty(0, dtype=torch.float32), *args, **kwargs)

    return forward


def rotary_attention_forward(original: Any) -> Forward | None:
    """Return the attention's own code, in which `apply_rotary_pos_emb` is ours.

    The globals of a function are fixed, so it is copied, and so are the decorators around it, which
    hold it in their closures. None: the attention does not call `apply_rotary_pos_emb`.
    """
    if not isinstance(original, FunctionType):
        return None
    scope, closure = original.__globals__, original.__closure__ or ()
    decorated = getattr(original, "__wrapped__", None)
    if decorated is not None:
        ours = rotary_attention_forward(decorated)
        is_held = [cell.cell_contents is decorated for cell in closure]
        if ours is None or not any(is_held):
            return None
        closure = tuple(
            CellType(ours) if held else x for held, x in zip(is_held, closure, strict=True)
        )
    elif "apply_rotary_pos_emb" in original.__code__.co_names:
        scope = {**scope, "apply_rotary_pos_emb": _apply_rotary_pos_emb}
        del scope["__name__"]  # or torch.compile would look names up in the module of that name
    else:
        return None
    code, name, defaults = original.__code__, original.__name__, original.__defaults__
    result = FunctionType(code, scope, name, defaults, closure)
    result.__kwdefaults__ = original.__kwdefaults__
    return result


def _apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k, (batch, heads, seqlen, head_dim).

    cos and sin are (batch or 1, seqlen, head_dim), each angle twice.
    """
    batch, _, seqlen, head_dim = q.shape
    cos, sin = (table[..., : head_dim // 2].flatten(0, -2) for table in (cos, sin))
    rows = torch.arange(cos.shape[0], device=q.device).view(-1, seqlen).expand(batch, seqlen)
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rows)
    return q.transpose(1, 2), k.transpose(1, 2)


def loss_obstacle(model: Any) -> str | None:
    """Return why the loss of a causal language model needs its logits; None: it does not."""
    head = getattr(model, "lm_head", None)
    if head is None:
        return f"{type(model).__name__} has no lm_head"
    if type(head) is not nn.Linear:
        return f"lm_head is a {type(head).__module__}.{type(head).__qualname__}"
    if head.bias is not None:
        return "lm_head has a bias"
    if "forward" in vars(head) or head._forward_pre_hooks or head._forward_hooks:
        return "lm_head has hooks, or a forward of its own"
    if type(head.weight.data) is not Tensor:
        return f"lm_head.weight is a {type(head.weight.data).__name__}"
    if model.loss_function is not ForCausalLMLoss:
        return "loss_function is not transformers' ForCausalLMLoss"
    return None


def loss_forward(original: Forward) -> Forward:
    """Return a forward that, in training with labels, computes the loss without the logits.

    All other calls go to `original`.
    """
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # strict=False: most arguments are given by keyword.
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels = given.pop("labels", None)
        to_keep = given.pop("logits_to_keep", 0)
        return_dict = given.get("return_dict")
        if return_dict is None:
            return_dict = self.config.return_dict
        is_whole = isinstance(to_keep, int) and to_keep == 0 and return_dict
        if not self.training or labels is None or not is_whole or loss_obstacle(self):
            return original(self, *args, **kwargs)
        outputs = self.model(**given)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        loss = _causal_loss(
            outputs.last_hidden_state, self.lm_head.weight, labels, softcap or 0.0, **given
        )
        rest = {name: x for name, x in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, **rest)

    return forward


def _causal_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return transformers' ForCausalLMLoss.

    hidden is (batch, seqlen, hidden_size) and labels (batch, seqlen).
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    dtype = autocast_dtype(hidden.device)
    if dtype is not None:  # as lm_head would
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    reduction = "mean" if num_items_in_batch is None else "sum"
    hidden = hidden.reshape(-1, hidden.shape[-1])
    loss = linear_cross_entropy(hidden, weight, targets, ignore_index, reduction, softcap=softcap)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def config_view(handle: Handle, config: Any, attn_implementation: str) -> Any:
    """Return a config that shares all attributes of `config`, except for one.

    While the handle is on, and until somebody sets another, its `_attn_implementation` is the one
    given. Its class has the name of the config's, by which transformers looks classes up. A deep
    copy is a view of a copy. A pickle is of `config`.
    """
    cls, attributes, field = type(config), vars(config), "_attn_implementation_internal"
    was_set: list[str] = []

    def plain(self: Any) -> Any:
        # transformers makes other configs of this class, too, when it saves one.
        return config if vars(self) is attributes else _sharing(cls, vars(self))

    def read(self: Any) -> Any:
        is_ours = handle.on and not was_set and vars(self) is attributes
        return attn_implementation if is_ours else vars(self).get(field)

    def write(self: Any, value: str) -> None:
        if value == read(self):  # as a model does with the config that it is made from
            return
        vars(self)[field] = value
        if vars(self) is attributes:
            was_set.append(value)

    def deepcopy(self: Any, memo: Any) -> Any:
        result = copy.deepcopy(plain(self), memo)
        is_ours = read(self) == attn_implementation
        return config_view(handle, result, attn_implementation) if is_ours else result

    namespace = {
        field: property(read, write),
        "__copy__": lambda self: copy.copy(plain(self)),
        "__deepcopy__": deepcopy,
        "__reduce_ex__": lambda self, protocol: (operator.getitem, ([plain(self)], 0)),
        "__init__": cls.__init__,
        **{name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    metaclass: Any = type(cls)
    view = _sharing(metaclass(cls.__name__, (cls,), namespace), attributes)
    type(view)._mistral_kernels_patch = Patch(handle, view, config, config)
    return view


def _sharing(cls: type, attributes: dict[str, Any]) -> Any:
    """Return an instance of `cls` whose attributes are this very dictionary."""
    instance: Any = object.__new__(cls)
    object.__setattr__(instance, "__dict__", attributes)
    return instance
