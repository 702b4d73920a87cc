"""Linear layer and cross entropy, without the logits of all tokens in memory.

    z = softcap * tanh(W h / softcap), or W h without a softcap
    loss of a token = logsumexp(z) - (1 - e) z[target] - e mean(z) + z_loss * logsumexp(z)^2
    d loss / dz = softmax(z) (1 + 2 z_loss logsumexp(z)) - (1 - e) onehot(target) - e / vocab

e is the label smoothing. The result is the mean or the sum over tokens, in nats.

When a model of 7B parameters is trained, its logits (tokens x vocabulary) are larger than any other
tensor. Here the logits exist for one chunk of tokens at a time. The gradients of the chunk are also
computed in the forward pass, as soon as its logits exist (as in arXiv:2410.10989). `ops.matmul`
computes the matrix products. One kernel (Triton or csrc) overwrites the logits with their gradient:
it reads each row of logits twice and writes the row once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistral_kernels.ops import launch_configs
from mistral_kernels.ops.checks import (
    can_read,
    check_dtype,
    check_same_dtype,
    check_shape,
    check_softcap,
    check_tensors,
    check_unit_stride,
    check_writable,
)
from mistral_kernels.ops.device_functions import tanh
from mistral_kernels.ops.dispatch import device_guard
from mistral_kernels.ops.lazy_triton import jit
from mistral_kernels.ops.matmul import add_product, multiply
from mistral_kernels.ops.operator import (
    Function,
    Operator,
    absent,
    in_transform,
    needs_gradient,
    refuse_second_derivative,
)

if TYPE_CHECKING:
    import triton.language as tl

# Elements of the logits of one chunk: 32 MiB of float32 on a CPU. Chunks are larger on a GPU
# because the products of every chunk read the whole weight.
_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 25}


@jit
def _softmax_kernel(
    logits_ptr, targets_ptr, scale_ptr, losses_ptr, logits_stride,
    ignore_index, label_smoothing, z_loss, softcap,
    VOCAB: tl.constexpr, SOFTCAP: tl.constexpr, NEEDS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one row's loss, and overwrite the row's logits with their gradient times `scale`."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    target = tl.where(counted, target, 0)
    logits_ptr += row * logits_stride

    lane_max = tl.full([BLOCK], -1.0e38, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_total = tl.zeros([BLOCK], tl.float32)
    lane_target = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, VOCAB, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + col, mask=col < VOCAB, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * tanh(z / softcap)
        lane_total += z  # lanes past the end add 0: they load 0, and tanh(0) is 0
        lane_target += tl.where(col == target, z, 0.0)
        z = tl.where(col < VOCAB, z, float("-inf"))
        new_max = tl.maximum(lane_max, z)
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.exp(z - new_max)
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    # Keep the sum relative to the maximum: terms added to a large maximum would be rounded away.
    row_sum = tl.sum(lane_sum * tl.exp(lane_max - row_max), 0)
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    smooth = label_smoothing / VOCAB
    loss = log_sum + (1.0 - label_smoothing) * (row_max - tl.sum(lane_target, 0))
    if label_smoothing > 0.0:  # 0 times an infinite total would be NaN
        loss += label_smoothing * (row_max - tl.sum(lane_total, 0) / VOCAB)
    loss += z_loss * lse * lse
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))

    if NEEDS_GRADIENT:
        scale = tl.where(counted, tl.load(scale_ptr), 0.0)
        slope = (1.0 + 2.0 * z_loss * lse) / row_sum
        for first in tl.range(0, VOCAB, BLOCK):
            col = first + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + col, mask=col < VOCAB, other=0.0).to(tl.float32)
            if SOFTCAP:
                capped = tanh(z / softcap)
                z = softcap * capped
            dz = tl.exp(z - row_max) * slope - smooth
            dz -= tl.where(col == target, 1.0 - label_smoothing, 0.0)
            if SOFTCAP:
                dz *= 1.0 - capped * capped
            dz = (dz * scale).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + col, dz, mask=col < VOCAB)


def _softmax_triton(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_gradient: bool,
) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    config = launch_configs.cross_entropy(logits.shape[1])
    with device_guard(logits):
        _softmax_kernel[(len(logits),)](
            *(logits, targets, scale, losses, logits.stride(0)),
            *(ignore_index, label_smoothing, z_loss, softcap),
            VOCAB=logits.shape[1],  # constexpr, so that masked accesses are vectors of 16 bytes
            SOFTCAP=softcap > 0,
            NEEDS_GRADIENT=needs_gradient,
            **config,
        )
    return losses


def _softmax_torch(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_gradient: bool,
) -> Tensor:
    counted = targets != ignore_index
    target = targets.masked_fill(~counted, 0).unsqueeze(1)
    z = logits.to(scale.dtype)
    cap_slope = None
    if softcap:
        capped = torch.tanh(z / softcap)
        z, cap_slope = softcap * capped, 1 - capped.square_()
    # Keep log_sum relative to the maximum, as the kernel does.
    z_max = z.amax(1, keepdim=True)
    z = z.sub_(z_max)
    # Take 16 rows at a time: logsumexp copies its input.
    log_sum = torch.cat([x.logsumexp(dim=1, keepdim=True) for x in z.split(16)])
    lse = log_sum + z_max
    losses = log_sum - (1 - label_smoothing) * z.gather(1, target) + z_loss * lse.square()
    if label_smoothing:
        losses -= label_smoothing * z.mean(1, keepdim=True)
    losses = losses.squeeze(1).masked_fill(~counted, 0)
    if not needs_gradient:
        return losses
    # Overwrite the logits with their gradient.
    dz = z.sub_(log_sum).exp_()
    if z_loss:
        dz *= 1 + 2 * z_loss * lse
    if label_smoothing:
        dz -= label_smoothing / dz.shape[1]
    dz.scatter_add_(1, target, dz.new_full(target.shape, label_smoothing - 1))
    if cap_slope is not None:
        dz *= cap_slope
    dz *= torch.where(counted, scale, 0).unsqueeze(1)
    if dz.data_ptr() != logits.data_ptr():
        logits.copy_(dz)
    return losses


def _empty_losses(logits: Tensor, targets: Tensor, scale: Tensor, *args: Any) -> Tensor:
    return scale.new_empty(len(logits))


def _check_softmax(logits: Tensor, targets: Tensor, scale: Tensor, *args: Any) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (rows, vocab_size), got {tuple(logits.shape)}")
    check_unit_stride("logits", logits)
    check_writable("logits", logits)
    check_dtype("scale", scale, torch.promote_types(logits.dtype, torch.float32))
    check_shape("scale", scale, ())
    _check_targets(targets, logits.shape[0], logits.shape[1], *args[:-1])


_softmax_op = Operator(
    "cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, Tensor scale, int ignore_index, float label_smoothing,"
    " float z_loss, float softcap, bool needs_gradient) -> Tensor losses",
    fake=_empty_losses,
    check=_check_softmax,
    torch=_softmax_torch,
    triton=_softmax_triton,
    csrc=("cpu",),
)


Outputs = tuple[Tensor, Tensor, Tensor]  # loss, dhidden, dweight; `absent` if not computed


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> Outputs:
    options = ignore_index, label_smoothing, z_loss, softcap
    targets = targets.contiguous()
    outputs = _empty_outputs(hidden, weight, needs_dhidden, needs_dweight)
    total, dhidden, dweight_out = (
        x if need else None
        for x, need in zip(outputs, (True, needs_dhidden, needs_dweight), strict=True)
    )
    assert total is not None
    total.zero_()
    scale = torch.ones_like(total)
    if mean:
        scale /= (targets != ignore_index).sum()
    dweight = dweight_out  # accumulated in place, or in float32 if its dtype is narrower
    if dweight is not None:
        wide = dweight.dtype == total.dtype
        dweight = dweight.zero_() if wide else torch.zeros_like(weight, dtype=total.dtype)
    num_tokens, vocab_size = len(hidden), len(weight)
    rows = max(1, _CHUNK_ELEMENTS[hidden.device.type] // vocab_size)
    rows -= rows % min(rows, 64)  # a multiple of the products' tiles
    logits = hidden.new_empty(min(rows, num_tokens), vocab_size)
    for start in range(0, num_tokens, rows):
        chunk = slice(start, start + rows)
        inputs = hidden[chunk]
        z = multiply(logits[: len(inputs)], inputs, weight.mT)
        needs_dlogits = needs_dhidden or needs_dweight
        total += _softmax_op(z, targets[chunk], scale, *options, needs_dlogits).sum()
        if dhidden is not None:
            multiply(dhidden[chunk], z, weight)
        if dweight is not None:
            add_product(dweight, z.mT, inputs)
    if dweight_out is not None and dweight is not None and dweight is not dweight_out:
        dweight_out.copy_(dweight)
    return total * scale, *outputs[1:]


def _empty_outputs(hidden: Tensor, weight: Tensor, *args: Any) -> Outputs:
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    dhidden, dweight = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else absent(x)
        for x, need in zip((hidden, weight), args[-2:], strict=True)
    )
    return loss, dhidden, dweight


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, *args: Any
) -> None:
    check_same_dtype("weight", weight, "hidden", hidden)
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or not len(weight)
    ):
        raise ValueError(
            "hidden and weight must be (num_tokens, hidden_size) and (vocab_size, hidden_size), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    _check_targets(targets, hidden.shape[0], weight.shape[0], ignore_index, *args[:3])


def _check_targets(
    targets: Tensor,
    num_tokens: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    check_shape("targets", targets, (num_tokens,))
    check_dtype("targets", targets, torch.int64)
    if can_read(targets):
        stray = targets[((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)]
        if len(stray):
            raise ValueError(
                f"targets must be in [0, {vocab_size}) or {ignore_index}, got {stray[0]}"
            )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be >= 0 and finite, got {z_loss}")
    check_softcap(softcap)


_forward_op = Operator(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool mean,"
    " float label_smoothing, float z_loss, float softcap, bool needs_dhidden, bool needs_dweight)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight)",
    fake=_empty_outputs,
    check=_check,
    torch=_forward,
    triton=_forward,
)


def _scaled(gradients: tuple[Tensor | None, ...], dloss: Tensor) -> tuple[Tensor | None, ...]:
    """Multiply the gradients by dloss, in place unless autograd may need the gradients again."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or in_transform()
        or torch._C._functorch.is_legacy_batchedtensor(dloss)  # is_grads_batched=True
        # True if the backward pass retains the graph, and outside of a backward pass.
        or torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        return tuple(None if grad is None else grad * dloss for grad in gradients)
    # Detach: the gradients are results of the forward pass and have its history.
    gradients = tuple(None if grad is None else grad.detach() for grad in gradients)
    if can_read(dloss) and dloss == 1:
        return gradients
    return tuple(None if grad is None else grad.mul_(dloss) for grad in gradients)


class LinearCrossEntropyFunction(Function):
    """Autograd function of `linear_cross_entropy`; the forward pass computes the gradients."""

    public_name = "linear_cross_entropy"

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, *args: Any) -> Outputs:
        """Return the loss and the gradients of hidden and weight."""
        return _forward_op(hidden, weight, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        """Save the gradients."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        ctx.mask = inputs[-2:]
        # torch.compile passes zeros to `backward` in place of None, and has no second derivative.
        if torch.compiler.is_compiling():
            ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor | None, ddhidden: Tensor | None, ddweight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times `dloss`."""
        second = ddhidden is not None or ddweight is not None
        if second and not torch.compiler.is_compiling():
            refuse_second_derivative("linear_cross_entropy")
        gradients: tuple[Tensor | None, ...] = (None, None)
        if dloss is not None:
            needed = (
                x if need else None for x, need in zip(ctx.saved_tensors, ctx.mask, strict=True)
            )
            gradients = _scaled(tuple(needed), dloss)
        return *gradients, *[None] * 8


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Compute the cross entropy, in nats, of the logits hidden @ weight^T.

    The logits of all tokens never exist at once (arXiv:2410.10989). Memory therefore does not grow
    with num_tokens * vocab_size. The function is differentiable once in hidden and weight. The
    forward pass computes the gradients that are needed.

    Args:
        hidden: (num_tokens, hidden_size), float16, bfloat16, float32 or, on the torch backend,
            float64.
        weight: (vocab_size, hidden_size), dtype of hidden. A weight without `requires_grad` saves
            one of three matrix products.
        targets: (num_tokens,) int64, each in [0, vocab_size) or equal to `ignore_index`.
        ignore_index: tokens with this target are excluded from the sum and from the mean.
        reduction: "mean" or "sum" over the tokens that are not excluded.
        label_smoothing: e in [0, 1]: the target class has probability 1 - e + e / vocab_size, and
            each other class e / vocab_size (arXiv:1512.00567).
        z_loss: >= 0; adds z_loss * logsumexp^2 to the loss of each token (arXiv:2204.02311).
        softcap: replaces each logit z by softcap * tanh(z / softcap); 0 for no softcap.

    Returns:
        A float32 scalar (float64 for float64 inputs). The mean over no tokens is NaN, as in
        PyTorch.

    Raises:
        ValueError: a shape, device or value does not fit (targets are checked on the CPU only).
        TypeError: a dtype does not fit.

    Example:
        >>> import torch
        >>> from mistral_kernels import linear_cross_entropy
        >>> hidden = torch.zeros(4, 8, requires_grad=True)  # equal logits for all 10 classes
        >>> weight = torch.randn(10, 8)
        >>> targets = torch.tensor([3, 1, -100, 7])  # the third token does not count
        >>> loss = linear_cross_entropy(hidden, weight, targets)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # ln(10)
        2.3026
        >>> hidden.grad[2].any()
        tensor(False)
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    args = (targets, ignore_index, reduction == "mean", label_smoothing, z_loss, softcap)
    if needs_gradient(hidden, weight):
        mask = needs_gradient(hidden), needs_gradient(weight)
        return LinearCrossEntropyFunction.call(hidden, weight, *args, *mask)[0]  # type: ignore[no-any-return]
    return _forward_op(hidden, weight, *args, False, False)[0]
