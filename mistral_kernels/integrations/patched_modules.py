"""What `apply_mistral_kernels` puts in the place of a module's forward and of its config.

A forward is made from `original`, the function that stood there, and `serves`, which says whether
the running call is served by these kernels; it is not, `original` serves it. One function is bound
to all modules of a kind, and finds everything of theirs in `self`. No module is changed here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from mistral_kernels.ops.cross_entropy import linear_cross_entropy
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rotary import apply_rotary
from mistral_kernels.ops.swiglu import swiglu

Forward = Callable[..., Any]
Serves = Callable[[], bool]


def rms_norm_forward(original: Forward, serves: Serves) -> Forward:
    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not serves():
            return original(self, hidden_states)
        # As x * weight promotes them: fine-tuning may keep the weights of norms in float32.
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)

    return forward


def swiglu_forward(original: Forward, serves: Serves) -> Forward:
    @functools.wraps(original)
    def forward(self: Any, x: Tensor) -> Any:
        if not serves():
            return original(self, x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def rotary_tables_forward(original: Forward, serves: Serves) -> Forward:
    """cos and sin in float32; which rope it is, and its scaling, stay the module's affair."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if serves():  # of x, only device and dtype are looked at
            x = x.new_empty(0, dtype=torch.float32)
        return original(self, x, *args, **kwargs)

    return forward


def rotary_attention_forward(original: Forward, serves: Serves) -> Forward:
    """The attention's own code, but in it `apply_rotary_pos_emb` is ours."""
    ours = _with_globals(original, apply_rotary_pos_emb=_apply_rotary_pos_emb)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if serves() else original)(self, *args, **kwargs)

    return forward


def calls_rotary(forward: Any) -> bool:
    """Whether `rotary_attention_forward` can be made of it: decorators are closures over it."""
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        cells = getattr(forward, "__closure__", None) or ()
        if not any(cell.cell_contents is inner for cell in cells):
            return False
        forward = inner
    return isinstance(forward, FunctionType) and "apply_rotary_pos_emb" in forward.__code__.co_names


def _apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k: (batch, heads, seqlen, head_dim); cos, sin: (batch or 1, seqlen, head_dim), each angle
    twice."""
    batch, _, seqlen, head_dim = q.shape
    cos, sin = (table[..., : head_dim // 2].flatten(0, -2) for table in (cos, sin))
    rows = torch.arange(cos.shape[0], device=q.device).view(-1, seqlen).expand(batch, seqlen)
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rows)
    return q.transpose(1, 2), k.transpose(1, 2)


def _with_globals(function: Any, **names: Any) -> Forward:
    """A copy of `function`, and of its decorators, that reads these names as its globals."""
    inner = getattr(function, "__wrapped__", None)
    closure, scope = function.__closure__, function.__globals__
    if inner is None:
        scope = {**scope, **names}
        del scope["__name__"]  # or torch.compile would look names up in the module of that name
    else:
        new = _with_globals(inner, **names)
        closure = tuple(
            CellType(new) if cell.cell_contents is inner else cell for cell in closure or ()
        )
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def loss_obstacle(model: Any) -> str | None:
    """Why the loss of a causal language model cannot be had from its last hidden states."""
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
    """Training with labels: the loss without the logits. All else goes to `original`."""
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
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
    """transformers' ForCausalLMLoss of hidden (batch, seqlen, hidden_size) and labels (batch,
    seqlen)."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as lm_head would
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    reduction = "mean" if num_items_in_batch is None else "sum"
    hidden = hidden.reshape(-1, hidden.shape[-1])
    loss = linear_cross_entropy(hidden, weight, targets, ignore_index, reduction, softcap=softcap)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def config_view(config: Any, attn_implementation: str, serves: Serves) -> Any:
    """The same config: all attributes are shared, but a call that is served reads another
    `_attn_implementation`, until somebody sets one.

    Its class goes by the name of the config's, by which transformers looks classes up. A copy, or
    a pickle, of it is a plain config.
    """
    plain, attributes, field = type(config), vars(config), "_attn_implementation_internal"
    was_set: list[str] = []

    def read(self: Any) -> Any:
        return attn_implementation if serves() and not was_set else vars(self).get(field)

    def write(self: Any, value: str) -> None:
        if value == read(self):  # as a model made from this config does
            return
        vars(self)[field] = value
        if vars(self) is attributes:  # and not a new config of this class, as saving makes one
            was_set.append(value)

    def reduce(self: Any, protocol: Any) -> Any:
        return _sharing(plain, vars(self)).__reduce_ex__(protocol)

    namespace = {
        field: property(read, write),
        "__reduce_ex__": reduce,
        "__init__": plain.__init__,
        **{name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    metaclass: Any = type(plain)
    return _sharing(metaclass(plain.__name__, (plain,), namespace), attributes)


def _sharing(cls: type, attributes: dict[str, Any]) -> Any:
    """An instance of `cls` that lives on these very attributes."""
    instance: Any = object.__new__(cls)
    object.__setattr__(instance, "__dict__", attributes)
    return instance
