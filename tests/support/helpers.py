"""Helpers of operator tests: the tolerance rule, and compilation for GPUs that are not here."""

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


# Roundings of float32 that sums of many terms of unit size may differ by, whoever adds them.
ROUNDINGS = 32 * torch.finfo(torch.float32).eps


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Check the tolerance rule: the error of ``actual`` is at most twice that of ``plain``.

    ``plain`` is plain PyTorch in the same dtype and ``exact`` the float64 reference. Both the
    largest and the root-mean-square error must hold. Since ``plain`` may be exact by luck, one
    rounding of the result and ``ROUNDINGS`` on the way to it are always allowed.
    """
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == plain.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: {(~torch.isfinite(actual)).sum()} not finite"

    def slack(size: float) -> float:
        return torch.finfo(actual.dtype).eps * size + ROUNDINGS * max(size, 1.0)

    for name, norm in (("largest", _largest), ("rms", _rms)):
        error, allowed = norm(actual - exact), 2 * norm(plain - exact) + slack(norm(exact))
        assert error <= allowed, (
            f"{what}: {name} error {error:.3g} exceeds {allowed:.3g}; "
            f"plain PyTorch in {plain.dtype}: {norm(plain - exact):.3g}, values: {norm(exact):.3g}"
        )


def assert_same_text(
    actual: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    logits: Callable[[Tensor], Tensor],
) -> None:
    """Check for equal greedy tokens, up to a choice between two that rounding may swap.

    Another order of summation may choose the other of two tokens whose logits are nearly equal, and
    goes on with another text. ``logits`` gives those after every token of (1, seqlen) ids.
    """
    assert list(map(len, actual)) == list(map(len, expected))
    for ours, theirs in zip(actual, expected, strict=True):
        i = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if i is not None:
            assert i > 0, "the first token is given"
            with torch.no_grad():
                after = logits(torch.as_tensor(theirs[:i])[None])[0, -1].double()
            gap = after[ours[i]] - after[theirs[i]]
            assert gap.abs() <= 1e-4 * after.abs().max(), f"token {i} of {ours}, not {theirs}"


def unpadded(text: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Return the rows of `text` without the padding on the left of their prompts."""
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
    """Return outputs of ``function(**inputs)`` and its gradients, by name.

    With ``dtype``, floating-point inputs are converted to it.
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
    """Check that outputs and every gradient are as accurate as plain PyTorch."""
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

    The loss is one number, which plain PyTorch may compute exactly by chance. Its bound is the
    rounding of the logits (times the number of tokens, if ``summed``) and of the loss, in float32
    if those dtypes are shorter. Gradients follow the tolerance rule.
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
    """A kernel as its launch compiled it: the files in Triton's cache, by suffix."""

    name: str
    target: Target
    files: dict[str, Path]

    def assert_healthy(self, edge_spills: int = 0, main_spills: int = 0) -> None:
        """Check for no spill inside a loop, and not the 32 registers that ptxas falls back to.

        Or at most so many: in the main loop, which does most of the matrix products, and in others.
        Shared memory needs no look: Triton itself raises OutOfResources above the limit.
        Tensor memory does: above 512 columns it compiles a kernel that only traps.
        """
        if self.target.backend == "hip":
            spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", self.files["amdgcn"].read_text())
            assert spills, f"{self.name}: {spills} registers spilled"
            assert set(spills) == {"0"}, f"{self.name}: {spills} registers spilled"
            return
        arch = f"sm_{max(80, self.target.arch)}"  # sasscost has no rates for sm_75; none needed
        metadata = json.loads(self.files["json"].read_text())
        assert (metadata.get("tmem_size") or 0) <= 512, f"{self.name}, {arch}: tensor memory"
        for kernel in sasscost.analyse(self.files["cubin"].read_bytes(), arch=arch):
            main = (sasscost.main_loop(kernel) or {}).get("name")
            for loop in kernel["loops"]:
                allowed = main_spills if loop["name"] == main else edge_spills
                assert loop["spills"] <= allowed, f"{self.name}, {arch}: {loop['spills']} spills"
            assert not (kernel["regs"] == 32 and kernel["stack"]), f"{self.name}: unallocated"

    def main_loop(self) -> dict[str, Any]:
        """Return sasscost's figures of the loop with most matrix products."""
        shared = json.loads(self.files["json"].read_text())["shared"]
        arch = f"sm_{self.target.arch}"
        (kernel,) = sasscost.analyse(self.files["cubin"].read_bytes(), arch=arch, smem=shared)
        return sasscost.main_loop(kernel)


class _CompileOnlyDriver:
    """A Triton driver for a GPU that is not here: launches compile for it and do nothing more."""

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
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def on_load(self, module: Any, function: Any, name: str, files: dict[str, str], _: Any) -> None:
        paths = {Path(path).suffix[1:]: Path(path) for path in files.values()}
        self.kernels.append(CompiledKernel(name, self.target, paths))


@contextlib.contextmanager
def compile_only(name: str) -> Iterator[list[CompiledKernel]]:
    """Compile for the named target at Triton launches on CPU tensors; yield the kernels.

    The real launchers run, with the target's properties, so what is compiled is what a user of that
    GPU would launch, launch parameters and alignments included.
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
