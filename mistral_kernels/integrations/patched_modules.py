"""Replacements of modules' forwards and configs, for `apply_mistral_kernels`.

A replaced forward is a method bound to its module, as other libraries expect. A deep copy of the
method is bound to the copy of the module. A pickle of the method is the forward of the module's
class.
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
    """Return the attribute that holds a module's forward, and the unpatched function."""
    # accelerate's hooks replace `forward` and call the original from `_old_forward`.
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    method = getattr(module, name)
    patch = patch_of(method)
    if patch is not None:
        return name, patch.original
    if isinstance(method, MethodType) and method.__self__ is module:
        return name, method.__func__
    return name, functools.wraps(method)(lambda self, *args, **kwargs: method(*args, **kwargs))


def patched_forward(handle: Handle, ours: Forward, original: Forward, replaced: Any) -> Forward:
    """Return a forward that calls `ours` while `handle.on` is True, and `original` after that."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if handle.on else original)(self, *args, **kwargs)

    result: Any = forward  # a method is pickled by its function's name, "forward"
    result.__module__, result.__doc__ = original.__module__, original.__doc__
    # No `__wrapped__`: accelerate unwraps every function that has this attribute.
    result.__signature__ = inspect.signature(original)
    result._mistral_kernels_patch = Patch(handle, forward, original, replaced)
    return forward


def rms_norm_forward(_: Forward) -> Forward:
    """Return a forward that runs `rms_norm`."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        # Promote as x * weight does: fine-tuning may keep the weights of norms in float32.
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)

    return forward


def swiglu_forward(_: Forward) -> Forward:
    """Return a forward that runs `swiglu` between the MLP's own projections."""

    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def rotary_tables_forward(original: Forward) -> Forward:
    """Return a forward that computes cos and sin in float32.

    The type of rotary embedding and its scaling remain those of the module.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The module reads only the device and the dtype of x.
        return original(self, x.new_empty(0, dtype=torch.float32), *args, **kwargs)

    return forward


def rotary_attention_forward(original: Any) -> Forward | None:
    """Return a copy of an attention's forward that calls our `apply_rotary_pos_emb`.

    A function's globals cannot be replaced. The function is therefore copied, together with the
    decorators around it, which hold it in their closures. Return None if the attention does not
    call `apply_rotary_pos_emb`.
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
        # With `__name__`, torch.compile would look up globals in the module of that name.
        del scope["__name__"]
    else:
        return None
    code, name, defaults = original.__code__, original.__name__, original.__defaults__
    result = FunctionType(code, scope, name, defaults, closure)
    result.__kwdefaults__ = original.__kwdefaults__
    return result


def _apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k, (batch, heads, seqlen, head_dim).

    cos and sin are (batch or 1, seqlen, head_dim); their second half repeats the first.
    """
    batch, _, seqlen, head_dim = q.shape
    cos, sin = (table[..., : head_dim // 2].flatten(0, -2) for table in (cos, sin))
    rows = torch.arange(cos.shape[0], device=q.device).view(-1, seqlen).expand(batch, seqlen)
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rows)
    return q.transpose(1, 2), k.transpose(1, 2)


def loss_obstacle(model: Any) -> str | None:
    """Return why a causal language model needs its logits for the loss, or None."""
    head = getattr(model, "lm_head", None)
    if head is None:
        return f"{type(model).__name__} has no lm_head"
    if type(head) is not nn.Linear:
        return f"lm_head is a {type(head).__module__}.{type(head).__qualname__}"
    if head.bias is not None:
        return "lm_head has a bias"
    if "forward" in vars(head) or head._forward_pre_hooks or head._forward_hooks:
        return "lm_head has hooks or a replaced forward"
    if type(head.weight.data) is not Tensor:
        return f"lm_head.weight is a {type(head.weight.data).__name__}"
    if model.loss_function is not ForCausalLMLoss:
        return "loss_function is not transformers' ForCausalLMLoss"
    return None


def loss_forward(original: Forward) -> Forward:
    """Return a forward that computes the loss without the logits in training with labels.

    All other calls run `original`.
    """
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # strict=False: most arguments are keyword arguments, so `args` is shorter than `names`.
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
    """Compute the loss of transformers' `ForCausalLMLoss` from hidden states.

    `hidden` is (batch, seqlen, hidden_size) and `labels` is (batch, seqlen).
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    dtype = autocast_dtype(hidden.device)
    if dtype is not None:  # cast as autocast casts the inputs of lm_head
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
    """Return a config that shares all attributes of `config` except `_attn_implementation`.

    The value of this attribute is `attn_implementation` until `undo`, or until it is set to another
    value. The class of the view has the same name as the class of `config`, since transformers
    looks up classes by name. A deep copy is a view of a deep copy of `config`. A pickle contains
    `config`.
    """
    cls, attributes, field = type(config), vars(config), "_attn_implementation_internal"
    was_set: list[str] = []

    def plain(self: Any) -> Any:
        # transformers creates further instances of this class when it saves a config.
        return config if vars(self) is attributes else _sharing(cls, vars(self))

    def read(self: Any) -> Any:
        is_ours = handle.on and not was_set and vars(self) is attributes
        return attn_implementation if is_ours else vars(self).get(field)

    def write(self: Any, value: str) -> None:
        # A model sets the value that it has read from its config; this is no change.
        if value == read(self):
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
    """Return an instance of `cls` whose `__dict__` is the object `attributes`, not a copy."""
    instance: Any = object.__new__(cls)
    object.__setattr__(instance, "__dict__", attributes)
    return instance
