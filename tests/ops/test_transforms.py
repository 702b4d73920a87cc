"""The operators under PyTorch's transforms: torch.func, forward mode, fake tensors, tracing.

A transformed call returns the results of the plain call, or raises an error that names the
operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.operator_case import Missing, OperatorCase
from support.operators import OPERATORS
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import mistral_kernels as mk

KV_HEADS, HEAD_DIM = 2, 16
ROWS = [
    case
    for case in OPERATORS
    if not isinstance(case.transforms, Missing) and "triton" in case.backends
]
every_case = pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)


def split(
    case: OperatorCase, device: str | torch.device = "cpu"
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a function of the differentiable inputs with one output, and its arguments."""
    inputs = case.sample(7, device=device)
    arguments = [inputs[name].detach() for name in case.differentiable]

    def function(*given: Tensor) -> Tensor:
        outputs = case.outputs({**inputs, **dict(zip(case.differentiable, given, strict=True))})
        return torch.cat([y.flatten() for y in outputs]) if len(outputs) > 1 else outputs[0]

    return function, arguments


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments).square().sum()


def plain_gradients(function: Callable[..., Tensor], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    return torch.autograd.grad(scalar(function)(*leaves), leaves)


def examples(arguments: list[Tensor], count: int = 3) -> list[Tensor]:
    return [torch.stack([torch.randn_like(x) for _ in range(count)]) for x in arguments]


def numbers(arguments: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(arguments)))


@every_case
def test_gradient_and_vmap(case, backend, device):
    """func.grad, vmap, and each of them around the other return the results of plain calls."""
    function, arguments = split(case, device)
    every = numbers(arguments)
    gradients = torch.func.grad(scalar(function), argnums=every)(*arguments)
    torch.testing.assert_close(gradients, plain_gradients(function, arguments))

    batched = examples(arguments)
    rows = list(zip(*batched, strict=True))
    expected = torch.stack([function(*row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(function)(*batched), expected)
    # All examples share the arguments except the first.
    shared = torch.func.vmap(function, in_dims=(0, *[None] * (len(arguments) - 1)))
    expected = torch.stack([function(x, *arguments[1:]) for x in batched[0]])
    torch.testing.assert_close(shared(batched[0], *arguments[1:]), expected)

    expected = [plain_gradients(function, list(row)) for row in rows]
    expected = tuple(map(torch.stack, zip(*expected, strict=True)))
    per_example = torch.func.vmap(torch.func.grad(scalar(function), argnums=every))(*batched)
    torch.testing.assert_close(per_example, expected)
    together = torch.func.grad(scalar(torch.func.vmap(function)), argnums=every)(*batched)
    torch.testing.assert_close(together, expected)


@every_case
def test_forward_mode_raises(case, device):
    """Tangents are not dropped silently, which would return zeros."""
    function, arguments = split(case, device)
    tangents = [torch.ones_like(x) for x in arguments]
    operator = case.public_name.removeprefix("apply_")
    message = f"{operator}.* has no forward-mode derivative; use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, tuple(arguments), tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(arguments, tangents, strict=True)]
        with pytest.raises(NotImplementedError, match=message):
            function(*duals)
        function(*arguments)  # without tangents the call succeeds


@pytest.mark.parametrize(
    "case",
    [case for case in ROWS if case.twice_differentiable is False],
    ids=lambda case: case.name,
)
def test_second_derivative_raises(case, device):
    function, arguments = split(case, device)

    def slope(x):
        return torch.func.grad(scalar(function))(x, *arguments[1:]).sum()

    with pytest.raises(RuntimeError, match="can be differentiated only once; its grad"):
        torch.func.grad(slope)(arguments[0])


@pytest.mark.parametrize(
    "case", [case for case in ROWS if case.twice_differentiable is True], ids=lambda case: case.name
)
def test_second_derivative_of_a_rotation(case, device):
    """The second derivative of the sum of squares is twice the identity."""
    function, (q, k) = split(case, device)
    slope = torch.func.grad(scalar(function))
    direction = torch.randn_like(q)
    _, pull_back = torch.func.vjp(lambda x: slope(x, k), q)
    torch.testing.assert_close(pull_back(direction)[0], 2 * direction)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@every_case
def test_traced(case, trained, device):
    function, arguments = split(case, device)
    arguments = [x.requires_grad_(trained) for x in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; constants are recorded
        traced = torch.jit.trace(function, tuple(arguments), check_trace=False)
    others = [torch.randn_like(x) for x in arguments]
    torch.testing.assert_close(traced(*others), function(*others))


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@every_case
def test_fake_and_meta_tensors(case, trained):
    """Outputs and gradients have the shapes and dtypes of those of real tensors."""
    function, arguments = split(case)
    expected = function(*arguments)

    def shapes(device: str) -> None:
        function, arguments = split(case, device)
        arguments = [x.requires_grad_(trained) for x in arguments]
        out = function(*arguments)
        assert out.shape == expected.shape
        assert out.dtype == expected.dtype
        assert out.device.type == device
        if trained:
            out.sum().backward()
            assert [x.grad.shape for x in arguments] == [x.shape for x in arguments]

    # In training PyTorch computes it sequence by sequence, which reads `lengths`.
    reads_lengths = trained and case.name == "rolling_cache_attention"
    if not reads_lengths:
        shapes("meta")
    with FakeTensorMode():
        if reads_lengths:
            with pytest.raises(DataDependentOutputException):
                shapes("cpu")
        else:
            shapes("cpu")


def test_cache_update_raises_under_transforms(device):
    """An update writes into its caches, which torch.func cannot follow."""
    k = torch.randn(3, KV_HEADS, HEAD_DIM, device=device)
    caches = [torch.zeros(1, 5, KV_HEADS, HEAD_DIM, device=device) for _ in "kv"]
    lengths = torch.tensor([0], dtype=torch.int32, device=device)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=device)

    def update(k: Tensor) -> Tensor:
        mk.rolling_cache_update_(*caches, k, k, lengths, cu_seqlens, 3)
        return k.sum()

    transforms: dict[str, Any] = {
        "grad": lambda: torch.func.grad(update)(k),
        "vmap": lambda: torch.func.vmap(update)(torch.stack((k, k))),
        "jvp": lambda: torch.func.jvp(update, (k,), (k,)),
    }
    for transform in transforms.values():
        with pytest.raises(NotImplementedError, match="rolling_cache_update_ writes into its cach"):
            transform()
    assert not any(cache.any() for cache in caches)


def test_operators_under_vmap(device):
    """Operators run once per example; a tensor that is written must have a batch dimension."""
    ops = torch.ops.mistral_kernels
    caches = torch.zeros(2, 3, 1, 5, KV_HEADS, HEAD_DIM, device=device)
    k = torch.randn(3, 2, KV_HEADS, HEAD_DIM, device=device)
    lengths = torch.tensor([4], dtype=torch.int32, device=device)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32, device=device)

    def update(k_cache: Tensor, v_cache: Tensor, k: Tensor) -> Tensor:
        ops.rolling_cache_update(k_cache, v_cache, k, k, lengths, cu_seqlens, 2, None, None)
        return k

    torch.func.vmap(update)(*caches, k)
    for cache in caches:
        assert torch.equal(cache[:, 0, [4, 0]], k)
        assert not cache[:, 0, 1:4].any()
    with pytest.raises(NotImplementedError, match=r"^k_cache must have a batch dimension in vmap"):
        torch.func.vmap(update, in_dims=(None, None, 0))(*caches[:, 0], k)
    with pytest.raises(
        NotImplementedError, match=r"vmap over .*swiglu_forward must have a batch size > 0"
    ):
        torch.func.vmap(lambda x: ops.swiglu_forward(x, None))(torch.ones(0, 4, device=device))
