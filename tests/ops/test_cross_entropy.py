"""linear_cross_entropy: values and gradients on every backend, chunks and memory."""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch
from support.allocations import Allocations
from support.backends import select_backend
from support.helpers import FLOATS, assert_loss_matches

from mistral_kernels.ops import cross_entropy, reference
from mistral_kernels.ops.cross_entropy import linear_cross_entropy

FULL_SIZE = 4096, 1024, 32000  # tokens, hidden size, vocabulary size: the logits have 0.5 GB


@pytest.fixture(params=["torch", "csrc", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request, device):
    """Run the test in PyTorch (as without a compiler), in csrc and in Triton."""
    return select_backend(request, device)


def make_inputs(num_tokens, hidden_size, vocab_size, dtype, device):
    hidden = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, device=device).to(dtype)
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}


def make_targets(num_tokens, vocab_size, device, ignore_index=-100):
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    targets[::3] = ignore_index
    return targets


def assert_matches(inputs, targets, **options):
    definition = functools.partial(reference.linear_cross_entropy, **options)
    assert_loss_matches(
        functools.partial(linear_cross_entropy, **options),
        reference.eager_arithmetic()(definition),
        {**inputs, "targets": targets},
        summed=options.get("reduction") == "sum",
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 7), (65, 64, 1000), (111, 7, 63), (5, 9, 9001)], ids=str)
def test_values_and_gradients(shape, dtype, reduction, backend, device):
    inputs = make_inputs(*shape, dtype, device)
    targets = make_targets(shape[0] + 1, shape[2], device)[1:]
    assert_matches(inputs, targets, reduction=reduction)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"softcap": 3.0},
        {"label_smoothing": 1.0, "z_loss": 0.1, "softcap": 20.0, "reduction": "sum"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(dtype, options, backend, device):
    inputs = make_inputs(65, 64, 1000, dtype, device)
    assert_matches(inputs, make_targets(65, 1000, device), **options)


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 20, 33])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chunks(tokens, dtype, device, monkeypatch):
    """Chunks of 10 tokens, full and partial."""
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, device.type, 10 * 50 + 49)
    inputs = make_inputs(tokens, 16, 50, dtype, device)
    assert_matches(inputs, make_targets(tokens + 1, 50, device)[1:])


def test_vocabulary_larger_than_a_chunk(device, monkeypatch):
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, device.type, 7)
    inputs = make_inputs(5, 16, 50, torch.float32, device)
    assert_matches(inputs, make_targets(5, 50, device))


@pytest.mark.parametrize("ignore_index", [-1, 0, 49, 1000])
def test_ignore_index(ignore_index, backend, device):
    inputs = make_inputs(20, 16, 50, torch.float32, device)
    targets = make_targets(20, 50, device, ignore_index)
    assert_matches(inputs, targets, ignore_index=ignore_index)


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_counted_tokens(num_tokens, backend, device):
    """The sum is 0, the mean is NaN, and the gradients of both are 0, as in PyTorch."""
    inputs = make_inputs(num_tokens, 16, 50, torch.float32, device)
    targets = torch.full((num_tokens,), -100, device=device)
    for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
        loss = linear_cross_entropy(**inputs, targets=targets, reduction=reduction)
        assert loss.item() == pytest.approx(expected, nan_ok=True)
        for gradient in torch.autograd.grad(loss, list(inputs.values())):
            assert (gradient == 0).all()


def test_vocabulary_of_one_class(device):
    inputs = make_inputs(4, 16, 1, torch.float32, device)
    loss = linear_cross_entropy(**inputs, targets=torch.zeros(4, dtype=torch.int64, device=device))
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, list(inputs.values())))


def test_logits_of_all_tokens_are_never_allocated(device):
    tokens, vocab_size, logits = 4096, 32000, 4096 * 32000
    inputs = make_inputs(tokens, 8, vocab_size, torch.float32, device)
    targets = make_targets(tokens, vocab_size, device)
    with Allocations() as seen:
        linear_cross_entropy(**inputs, targets=targets).backward()
    assert seen.largest_new <= cross_entropy._CHUNK_ELEMENTS[device.type] < logits / 3


@pytest.mark.slow
def test_as_accurate_as_eager_at_full_width(device):
    tokens, hidden, vocab = FULL_SIZE[0] // 4, *FULL_SIZE[1:]
    inputs = make_inputs(tokens, hidden, vocab, torch.float32, device)
    with torch.no_grad():
        inputs["weight"] /= 32  # logits of about unit size, as in a model
    assert_matches(inputs, torch.randint(vocab, (tokens,), device=device))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backward", [False, True], ids=["evaluation", "training"])
def test_peak_memory(backward):
    """The process uses less than a tenth of the logits' memory, besides inputs and gradients."""
    code = f"""
import re, torch
from pathlib import Path
from mistral_kernels.ops.cross_entropy import linear_cross_entropy
torch.set_num_threads(1)
def peak():  # not ru_maxrss, which starts with the size of the parent process
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) << 10
def make(tokens, hidden_size, vocab_size):
    hidden = torch.randn(tokens, hidden_size, requires_grad={backward})
    weight = torch.randn(vocab_size, hidden_size, requires_grad={backward})
    return hidden, weight, torch.randint(vocab_size, (tokens,))
linear_cross_entropy(*make(8, 16, 64))
inputs = make(*{FULL_SIZE})
before = peak()
loss = linear_cross_entropy(*inputs)
if loss.requires_grad:
    (3 * loss).backward()
print(peak() - before - sum(4 * x.numel() for x in inputs if x.requires_grad))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokens, _, vocab_size = FULL_SIZE
    assert int(done.stdout) < tokens * vocab_size * 4 / 10


def test_no_gradient_is_computed_under_no_grad(device):
    inputs = make_inputs(2, 64, 1000, torch.float32, device)
    with torch.no_grad(), Allocations() as seen:
        loss = linear_cross_entropy(**inputs, targets=make_targets(2, 1000, device))
    assert not loss.requires_grad
    assert seen.largest_new == 2 * 1000  # the logits; dweight would have 64 * 1000


def test_gradients_scale_with_the_loss(device, torch_backend):
    inputs = make_inputs(4, 3, 5, torch.float64, device)
    targets = make_targets(4, 5, device)
    assert torch.autograd.gradcheck(
        lambda h, w: 7 * linear_cross_entropy(h, w, targets), tuple(inputs.values())
    )


def test_backward_twice(device):
    """Each backward pass of a retained graph returns correct gradients and keeps earlier ones."""
    inputs = make_inputs(4, 3, 5, torch.float32, device)
    targets = make_targets(4, 5, device)
    leaves = list(inputs.values())

    def fresh(factor):
        return torch.autograd.grad(factor * linear_cross_entropy(**inputs, targets=targets), leaves)

    loss = linear_cross_entropy(**inputs, targets=targets)
    factors = (3.0, 1.0, 0.0, 1.0, 2.0)
    results = [torch.autograd.grad(x * loss, leaves, retain_graph=True) for x in factors]
    results[1][0].zero_()
    results.append(torch.autograd.grad(5 * loss, leaves))
    for i, (factor, gradients) in enumerate(zip((*factors, 5.0), results, strict=True)):
        for gradient, expected in zip(gradients, fresh(factor), strict=True):
            assert (i == 1 and gradient is results[1][0]) or torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_allocates_no_gradients(dtype, factor, device):
    inputs = make_inputs(20, 16, 50, dtype, device)
    loss = factor * linear_cross_entropy(**inputs, targets=make_targets(20, 50, device))
    with Allocations() as seen:
        loss.backward()
    assert seen.largest_new == 1


def test_accumulated_gradients(device):
    """Two losses accumulate into leaves that already have a gradient."""
    inputs = make_inputs(20, 16, 50, torch.float32, device)
    halves = [make_targets(20, 50, device) for _ in range(2)]
    for _ in range(2):
        sum(linear_cross_entropy(**inputs, targets=half) for half in halves).backward()
    expected = [
        torch.autograd.grad(linear_cross_entropy(**inputs, targets=half), list(inputs.values()))
        for half in halves
    ]
    for x, *gradients in zip(inputs.values(), *expected, strict=True):
        torch.testing.assert_close(x.grad, 2 * sum(gradients))


def test_operator_checks_targets(device):
    """Compiled code calls the operator: a target outside the vocabulary raises there, too."""
    if device.type != "cpu":
        pytest.skip("targets on a GPU are not checked; the kernel then finds no target")
    inputs = [x.detach() for x in make_inputs(3, 4, 5, torch.float32, device).values()]
    for target in (5, -1, 2**40):
        arguments = (torch.tensor([0, target, 1]), -100, True, 0.0, 0.0, 0.0, True, True)
        with pytest.raises(ValueError, match="must be in"):
            torch.ops.mistral_kernels.linear_cross_entropy(*inputs, *arguments)
