"""Memory traffic of the memory-bound operators relative to its minimum, at Mistral-7B's sizes.

    python -m benchmarks.traffic

Prints a Markdown table. Our kernels and Liger-Kernel's are compiled for sm_80 and executed on the
CPU by ptxrun, which counts the bytes that they read and write; no time is measured. The minimum is
each input and each output of the operator once. "DRAM" is the number of distinct bytes that each
launch touches, and "sectors" the number of bytes in all 32-byte sectors that its accesses request,
both divided by the minimum. "bytes per lane" is the average size of an access to global memory; 16
is the maximum. Liger-Kernel's rotary is below 1, because its tables are bfloat16 and ours float32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ptxrun
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mistral_kernels.ops import reference
from mistral_kernels.ops.rms_norm import rms_norm
from mistral_kernels.ops.rotary import apply_rotary, rotary_tables
from mistral_kernels.ops.swiglu import swiglu

TOKENS, HIDDEN, INTERMEDIATE = 2048, 4096, 14336
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
EPS = 1e-5
MULTIPROCESSORS = 108  # A100, which ptxrun simulates; ptxrun reports one to Liger


class Traffic(NamedTuple):
    dram: int
    sectors: int = 0
    lane: float = 0.0  # bytes of an average access


def executed(run: Callable[[], object]) -> Traffic:
    """Count the traffic of the kernels that a call launches."""
    with ptxrun.options(profile=True):
        ptxrun.reset_profile()
        run()
        profiles = list(ptxrun.profiles())
    useful = sum(p.global_read_bytes + p.global_write_bytes for p in profiles)
    sectors = sum(p.global_read_sectors + p.global_write_sectors for p in profiles)
    requests = sum(p.global_requests for p in profiles)
    dram = sum(p.dram_bytes for p in profiles)
    return Traffic(dram, 32 * sectors, useful / requests / 32)


class Eager(TorchDispatchMode):
    """Traffic of plain PyTorch: each operator except views is one pass over its tensors.

    A pass reads each input once and writes each output once. The forward pass of RMSNorm moves 36
    bytes per element: to float32 (2 + 4), square (4 + 4), mean (4), times 1 / rms (4 + 4), to
    bfloat16 (4 + 2), times weight (2 + 2). Its backward pass moves 92.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dram = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = tree_leaves((args, kwargs, result))
            self.dram += sum(size(x) for x in tensors if isinstance(x, Tensor))
        return result


def size(*tensors: Tensor) -> int:
    """Return the bytes of tensors in memory; expanded dimensions count once."""
    total = 0
    for x in tensors:
        stored = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
        total += torch.Size(stored).numel() * x.element_size()
    return total


def counted(run: Callable[[], object]) -> Traffic:
    with Eager() as traffic, reference.eager_arithmetic():
        run()
    return Traffic(traffic.dram)


def normal(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_()


class Operator:
    """Forward and backward of one operator: ours, PyTorch's and Liger-Kernel's."""

    def __init__(self, function: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.function, self.plain = function, plain

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def liger(self, backward: bool) -> Traffic:
        raise NotImplementedError

    def measure(self, backward: bool, measured: Callable[..., Traffic], device: str) -> Traffic:
        """Measure by `executed` on the CPU or `counted` on the meta device."""
        inputs = self.inputs(device)
        function = self.function if measured is executed else self.plain
        if not backward:
            return measured(lambda: function(*inputs))
        with reference.eager_arithmetic():
            outputs = tree_leaves(function(*inputs))
        wanted = [x for x in inputs if x.requires_grad]
        cotangents = [torch.ones_like(y) for y in outputs]
        return measured(lambda: torch.autograd.grad(outputs, wanted, cotangents))

    def least(self, backward: bool) -> int:
        """Return the minimal traffic: each input and output once.

        In the backward pass the inputs include the cotangents, and the outputs are the gradients.
        """
        inputs = self.inputs("meta")
        if not backward:
            return size(*inputs, *tree_leaves(self.plain(*inputs)))
        return size(*self.saved(inputs), *tree_leaves(self.plain(*inputs))) + size(
            *self.gradients(inputs)
        )

    def saved(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the tensors that the backward pass reads in addition to the cotangents."""
        return list(inputs)

    def gradients(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [x for x in inputs if x.requires_grad]


class Norm(Operator):
    def __init__(self, residual: bool) -> None:
        def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
            return reference.rms_norm(x, weight, EPS, residual)

        def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
            return rms_norm(x, weight, EPS, residual)

        super().__init__(ours, plain)
        self.residual = residual

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        x, weight = normal(TOKENS, HIDDEN, device=device), normal(HIDDEN, device=device)
        return (x, weight, normal(TOKENS, HIDDEN, device=device)) if self.residual else (x, weight)

    # The backward pass reads only the sum x + residual, whose gradient is that of both.
    def saved(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(inputs[:2])

    def gradients(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(inputs[:2])

    def liger(self, backward: bool) -> Traffic:
        from liger_kernel.ops import fused_add_rms_norm as fused
        from liger_kernel.ops import rms_norm as alone

        inputs = [x.detach() for x in self.inputs("cpu")]
        weight = inputs.pop(1)
        results: list[Any] = []

        def forward() -> None:
            call = fused.fused_add_rms_norm_forward if self.residual else alone.rms_norm_forward
            row_mode = () if self.residual else (None,)
            results.extend(call(*inputs, weight, EPS, 0.0, "llama", *row_mode))

        if not backward:
            return executed(forward)
        forward()
        y, h, rstd, block, *launch, mode = results
        dy = torch.ones_like(y)

        def run() -> None:
            if self.residual:
                fused.fused_add_rms_norm_backward(
                    dy, torch.ones_like(h), h, weight, rstd, 0.0, mode, block, *launch, True
                )
            else:
                alone.rms_norm_backward(dy, h, weight, rstd, 0.0, mode, block, *launch, True, None)

        traffic = executed(run)
        # One program ran here and wrote one row of partial sums. On a GPU each multiprocessor
        # writes one, and PyTorch adds them.
        partial_sums = (2 * MULTIPROCESSORS - 1) * HIDDEN * 4 + 2 * HIDDEN
        return traffic._replace(
            dram=traffic.dram + partial_sums, sectors=traffic.sectors + partial_sums
        )


class Rotary(Operator):
    def __init__(self) -> None:
        super().__init__(apply_rotary, reference.apply_rotary)

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        q, k = (normal(TOKENS, n, HEAD_DIM, device=device) for n in (HEADS, KV_HEADS))
        return (
            q,
            k,
            *rotary_tables(TOKENS, HEAD_DIM, 1e4, device),
            torch.arange(TOKENS, device=device),
        )

    def saved(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(inputs[2:])

    def liger(self, backward: bool) -> Traffic:
        from liger_kernel.ops.rope import rope_backward, rope_forward

        q, k, cos, sin, _ = (x.detach()[None] for x in self.inputs("cpu"))
        # The layout of transformers: heads first, tables twice as wide and in bfloat16.
        tables = [torch.cat((x, x), -1).bfloat16() for x in (cos, sin)]
        call = rope_backward if backward else rope_forward
        return executed(lambda: call(q.transpose(1, 2), k.transpose(1, 2), *tables))


class Gate(Operator):
    def __init__(self) -> None:
        super().__init__(swiglu, reference.swiglu)

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        gate, up = (normal(TOKENS, INTERMEDIATE, device=device) for _ in range(2))
        return gate, up

    def liger(self, backward: bool) -> Traffic:
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        gate, up = (x.detach() for x in self.inputs("cpu"))
        if backward:
            return executed(lambda: swiglu_backward(gate, up, torch.ones_like(gate)))
        return executed(lambda: swiglu_forward(gate, up))


class FusedGate(Gate):
    """SwiGLU of gate and up in one tensor, the output of a fused projection."""

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        return (normal(TOKENS, 2 * INTERMEDIATE, device=device),)

    def liger(self, backward: bool) -> Traffic:
        separate = Gate().liger(backward)
        if not backward:
            return separate
        # PyTorch reads the gradients of the two views and writes them as one tensor.
        together = 2 * size(*self.inputs("meta"))
        return separate._replace(dram=separate.dram + together, sectors=separate.sectors + together)


ROWS = {
    "RMSNorm": (Norm(False), False),
    "RMSNorm, backward": (Norm(False), True),
    "RMSNorm with residual": (Norm(True), False),
    "RMSNorm with residual, backward": (Norm(True), True),
    "rotary": (Rotary(), False),
    "rotary, backward": (Rotary(), True),
    "SwiGLU": (Gate(), False),
    "SwiGLU, backward": (Gate(), True),
    "SwiGLU, fused projection, backward": (FusedGate(), True),
}


def cells(traffic: Traffic, least: int) -> str:
    return f"{traffic.dram / least:.3f} | {traffic.sectors / least:.3f} | {traffic.lane:.1f}"


def main() -> int:
    if reason := ptxrun.missing():
        print(f"traffic.py cannot execute PTX: {reason}")
        return 1
    ptxrun.install()
    os.environ["MISTRAL_KERNELS_BACKEND"] = "triton"
    columns = ("DRAM", "sectors", "bytes per lane")
    names = [f"{name}: {column}" for name in ("ours", "Liger-Kernel") for column in columns]
    print(f"| bfloat16, {TOKENS} tokens | minimum, MB | {' | '.join(names)} | PyTorch: DRAM |")
    print("|---|" + "---:|" * (len(names) + 2))
    for name, (operator, backward) in ROWS.items():
        least = operator.least(backward)
        ours = operator.measure(backward, executed, "cpu")
        eager = operator.measure(backward, counted, "meta")
        try:
            theirs = cells(operator.liger(backward), least)
        except Exception as error:  # any error: Liger is optional and not written for CPU tensors
            theirs = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} | - | -"
        print(
            f"| {name} | {least / 1e6:.1f} | {cells(ours, least)} | {theirs} "
            f"| {eager.dram / least:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
