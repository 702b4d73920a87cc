"""Helpers of operator tests: the tolerance rule, and compilation for GPUs that are absent."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sasscost
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Allowed difference of two float32 sums of many terms of unit size: 32 roundings.
ROUNDINGS = 32 * torch.finfo(torch.float32).eps


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Check the tolerance rule: the error of ``actual`` is at most twice the error of ``plain``.

    ``plain`` is the result of plain PyTorch in the same dtype, ``exact`` that of the reference in
    float64. The rule applies to the largest and to the root-mean-square error. One rounding of the
    result and ``ROUNDINGS`` are always allowed, because ``plain`` may be exact by chance.
    """
    assert actual.dtype == plain.dtype, f"{what}: dtype must be {plain.dtype}, got {actual.dtype}"
    assert actual.shape == plain.shape == exact.shape, (
        f"{what}: shape must be {tuple(exact.shape)}, got {tuple(actual.shape)}"
    )
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), (
        f"{what}: {(~torch.isfinite(actual)).sum()} values not finite"
    )

    def slack(size: float) -> float:
        return torch.finfo(actual.dtype).eps * size + ROUNDINGS * max(size, 1.0)

    for name, norm in (("largest", _largest), ("rms", _rms)):
        error, allowed = norm(actual - exact), 2 * norm(plain - exact) + slack(norm(exact))
        assert error <= allowed, (
            f"{what}: {name} error must be at most {allowed:.3g}, got {error:.3g}; error of plain "
            f"PyTorch in {plain.dtype}: {norm(plain - exact):.3g}, {name} value: {norm(exact):.3g}"
        )


def assert_same_text(
    actual: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    logits: Callable[[Tensor], Tensor],
) -> None:
    """Check that greedy tokens are equal, up to the first near tie between two logits.

    Rounding may swap two tokens whose logits are nearly equal; the texts differ from there on.
    ``logits`` maps token ids (1, seqlen) to logits (1, seqlen, vocab_size).
    """
    assert list(map(len, actual)) == list(map(len, expected))
    for ours, theirs in zip(actual, expected, strict=True):
        i = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if i is not None:
            assert i > 0, "the first tokens must be equal"
            with torch.no_grad():
                after = logits(torch.as_tensor(theirs[:i])[None])[0, -1].double()
            gap = after[ours[i]] - after[theirs[i]]
            assert gap.abs() <= 1e-4 * after.abs().max(), (
                f"token {i} differs: expected {theirs}, got {ours}"
            )


def unpadded(text: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Return the rows of `text` without the left padding of their prompts."""
    return [row[n:].tolist() for row, n in zip(text, (attention_mask == 0).sum(1), strict=True)]


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def values_and_gradients(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    cotangents: list[Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the outputs of ``function(**inputs)`` and their gradients, by name.

    Convert floating-point inputs to ``dtype``, if it is given.
    """
    leaves = {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point() and dtype is not None
        else x.detach().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    results = {
        f"{'differentiable ' if y.requires_grad else ''}output {i}": y.detach()
        for i, y in enumerate(outputs)
    }
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if used:
        gradients = torch.autograd.grad(
            [y for y, _ in used], list(wanted.values()), [g for _, g in used]
        )
        results.update(
            (f"gradient of {name}", g) for name, g in zip(wanted, gradients, strict=True)
        )
    return results


def assert_matches_reference(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    strided_gradients: bool = False,
) -> None:
    """Check all outputs and gradients by the tolerance rule, against plain PyTorch."""
    with torch.no_grad():
        outputs = reference(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [
        torch.randn(*y.shape, 2, device=y.device).to(y.dtype)[..., 0]
        if strided_gradients
        else torch.randn(y.shape, device=y.device).to(y.dtype)
        for y in outputs
    ]
    actual = values_and_gradients(function, inputs, cotangents)
    plain = values_and_gradients(reference, inputs, cotangents)
    exact = values_and_gradients(reference, inputs, cotangents, torch.float64)
    assert actual.keys() == exact.keys()
    for what in exact:
        assert_as_accurate(actual[what], plain[what], exact[what], what)


def assert_loss_matches(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: dict[str, Any],
    strided_gradients: bool = False,
    summed: bool = False,
) -> None:
    """Check a loss of hidden, weight and targets, and its gradients.

    Plain PyTorch may compute one number, the loss, exactly by chance. The bound of its error is
    therefore two roundings of the logits (per token, if ``summed``) and two of the loss, which is
    float32 or wider. The tolerance rule applies to the gradients.
    """
    hidden, weight, targets = (inputs[name] for name in ("hidden", "weight", "targets"))
    scale = [torch.tensor(1.5, device=targets.device)]
    actual = values_and_gradients(function, inputs, scale)
    plain = values_and_gradients(reference, inputs, scale)
    exact = values_and_gradients(reference, inputs, scale, torch.float64)
    assert actual.keys() == exact.keys()
    (output,) = (name for name in actual if "output" in name)
    loss, exact_loss = actual.pop(output), exact[output]
    assert loss.dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert loss.shape == ()
    logits = hidden.double() @ weight.double().T
    bound = 2 * torch.finfo(hidden.dtype).eps * logits.abs().max()
    bound = bound * (len(targets) if summed else 1)
    bound += 2 * torch.finfo(loss.dtype).eps * exact_loss.abs()
    assert (loss - exact_loss).abs() <= bound
    for what, gradient in actual.items():
        assert_as_accurate(gradient, plain[what], exact[what], what)


class Target(NamedTuple):
    """Properties of a GPU: Triton backend, architecture, shared memory in bytes, and sizes."""

    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    multiprocessors: int

    def dtypes(self) -> tuple[torch.dtype, ...]:
        return FLOATS[:2] if self.arch == 75 else FLOATS  # Turing has no bf16


TARGETS = {
    "sm_75": Target("cuda", 75, 32, 64 << 10, 40),
    "sm_80": Target("cuda", 80, 32, 163 << 10, 108),
    "sm_86": Target("cuda", 86, 32, 99 << 10, 84),
    "sm_89": Target("cuda", 89, 32, 99 << 10, 128),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 132),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 148),
    "sm_120": Target("cuda", 120, 32, 99 << 10, 188),
    "gfx90a": Target("hip", "gfx90a", 64, 64 << 10, 104),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 304),
    "gfx1100": Target("hip", "gfx1100", 32, 64 << 10, 48),
    "gfx1201": Target("hip", "gfx1201", 32, 64 << 10, 32),
}


class CompiledKernel(NamedTuple):
    """Compiled kernel: its files in Triton's cache, by suffix."""

    name: str
    target: Target
    files: dict[str, Path]

    def assert_healthy(self, edge_spills: int = 0, main_spills: int = 0) -> None:
        """Check spills in loops, tensor memory, and that ptxas allocated registers.

        The main loop, which has most of the matrix products, may have `main_spills` spills, and
        each other loop `edge_spills`. ptxas falls back to 32 registers when its allocation fails.
        Above 512 columns of tensor memory, Triton compiles a kernel that only traps. Shared memory
        needs no check: Triton raises OutOfResources above the limit.
        """
        if self.target.backend == "hip":
            spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", self.files["amdgcn"].read_text())
            assert spills, f"{self.name}: no spill count in the assembly"
            assert set(spills) == {"0"}, f"{self.name}: register spills must be 0, got {spills}"
            return
        # sasscost has no rates for sm_75, and a count of spills needs none.
        arch = f"sm_{max(80, self.target.arch)}"
        metadata = json.loads(self.files["json"].read_text())
        assert (metadata.get("tmem_size") or 0) <= 512, (
            f"{self.name}, {arch}: more than 512 columns of tensor memory"
        )
        for kernel in sasscost.analyze(self.files["cubin"].read_bytes(), arch=arch):
            main = (sasscost.main_loop(kernel) or {}).get("name")
            for loop in kernel["loops"]:
                allowed = main_spills if loop["name"] == main else edge_spills
                assert loop["spills"] <= allowed, (
                    f"{self.name}, {arch}: {loop['spills']} spills in a loop, {allowed} allowed"
                )
            assert not (kernel["regs"] == 32 and kernel["stack"]), (
                f"{self.name}: ptxas did not allocate registers"
            )

    def main_loop(self) -> dict[str, Any]:
        """Return the statistics that sasscost computes for the main loop."""
        shared = json.loads(self.files["json"].read_text())["shared"]
        arch = f"sm_{self.target.arch}"
        (kernel,) = sasscost.analyze(self.files["cubin"].read_bytes(), arch=arch, smem=shared)
        return sasscost.main_loop(kernel)


class _CompileOnlyDriver:
    """Triton driver for a GPU that is absent: a launch compiles the kernel and does not run it."""

    def __init__(self, name: str, kernels: list[CompiledKernel]) -> None:
        self.target = TARGETS[name]
        self.index = 1000 + list(TARGETS).index(name)  # Triton caches kernels by device index
        self.kernels = kernels
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.shared_memory,
            "multiprocessor_count": self.target.multiprocessors,
        }

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def load_binary(self, *args: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, maximum threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def on_load(self, module: Any, function: Any, name: str, files: dict[str, str], _: Any) -> None:
        paths = {Path(path).suffix[1:]: Path(path) for path in files.values()}
        self.kernels.append(CompiledKernel(name, self.target, paths))


@contextlib.contextmanager
def compile_only(name: str) -> Iterator[list[CompiledKernel]]:
    """Compile kernels for a target when Triton launches them on CPU tensors; yield the kernels.

    The package's own launch code runs with the properties of the target, so the compiled kernels
    are those of a user of that GPU, with the same launch parameters and alignments.
    """
    triton = pytest.importorskip("triton")
    driver = triton.runtime.driver
    kernels: list[CompiledKernel] = []
    stub = _CompileOnlyDriver(name, kernels)
    hooks = triton.knobs.runtime.kernel_load_end_hook
    previous = driver._active
    driver.set_active(stub)
    hooks.add(stub.on_load)
    try:
        yield kernels
    finally:
        hooks.remove(stub.on_load)
        driver.set_active(previous)
