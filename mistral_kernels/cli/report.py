"""The command `python -m mistral_kernels report`: a report of the installation.

The report lists the installed packages, the devices, and the backend that each device uses with the
reason. With `--check`, the command also runs every operator on random inputs and prints its error
against float64, next to the error of plain PyTorch in the same dtype.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import mistral_kernels as mk
from mistral_kernels.cli.command import Parser, run, write_out
from mistral_kernels.ops import extension, reference
from mistral_kernels.ops.compiler import DEVICE_TYPES
from mistral_kernels.ops.dispatch import choose_backend, uses_csrc
from mistral_kernels.ops.matmul import multiplied_by_torch

_EXTRAS = {"chat": ("mistral_common",), "hf": ("huggingface_hub", "tokenizers", "transformers")}


def report() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"mistral_kernels {mk.__version__}"
    yield f"python          {platform.python_version()} on {platform.platform()}"
    yield f"torch           {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
    yield f"triton          {_installed('triton') or 'not installed: pip install triton'}"
    for extra, packages in _EXTRAS.items():
        found = {name: _installed(name) for name in packages}
        missing = [name for name, installed in found.items() if installed is None]
        remedy = f'; missing {", ".join(missing)}: pip install "mistral_kernels[{extra}]"'
        have = ", ".join(f"{name} {installed}" for name, installed in found.items() if installed)
        yield f"extra {extra + ':':9} {have or 'nothing'}{remedy if missing else ''}"
    yield (
        f"cpu             {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}          {properties.name}, compute capability "
            f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
        )
    if not torch.cuda.is_available():
        yield f"gpu             none: {_why_no_gpu()}"
    for name, value in sorted(os.environ.items()):
        if name.startswith(("MISTRAL_KERNELS_", "TRITON_")):
            yield f"environment     {name}={value}"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            backend = choose_backend(torch.device(device))
        except (RuntimeError, ValueError) as error:
            yield f"backend         {device}: none, {error}"
            continue
        yield f"backend         {device}: {backend.name} ({backend.reason})"
    for device in DEVICE_TYPES:
        yield f"csrc            {device}: {extension.status(device)}"
    yield f"products        cpu, many rows: {_products()}"


def _products() -> str:
    """Describe which implementation multiplies matrices of which dtype on the CPU."""
    instruction_set = extension.instruction_set()
    if not instruction_set or not uses_csrc("cpu"):
        return "all by PyTorch, since no kernels of csrc are loaded"
    fast = multiplied_by_torch(instruction_set)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    names = {
        by: ", ".join(str(x).removeprefix("torch.") for x in dtypes if (x in fast) == is_fast)
        for by, is_fast in (("csrc", False), ("PyTorch", True))
    }
    return "; ".join(f"{text} by {by}" for by, text in names.items() if text)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is a CPU build"
    return "PyTorch is built for GPUs but finds no device or driver"


# (name, the operator of this package, its definition in plain PyTorch, shapes of random inputs)
OperatorCase = tuple[str, Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]


def _operator_cases(device: str) -> list[OperatorCase]:
    positions = torch.tensor([0, 1, 4095, 32767, 131071], device=device)
    tables = mk.rotary_tables(131072, 64, 10_000.0, device)
    targets = torch.randint(1000, (61,), device=device)
    window: dict[str, Any] = {"causal": True, "window_size": (99, 0)}
    return [
        ("rms_norm", mk.rms_norm, reference.rms_norm, ((61, 4096), (4096,))),
        (
            "rms_norm + residual",
            lambda x, w, r: mk.rms_norm(x, w, residual=r),
            lambda x, w, r: reference.rms_norm(x, w, residual=r),
            ((61, 4096), (4096,), (61, 4096)),
        ),
        (
            "apply_rotary",
            lambda q, k: mk.apply_rotary(q, k, *tables, positions),
            lambda q, k: reference.apply_rotary(q, k, *tables, positions),
            ((5, 8, 64), (5, 2, 64)),
        ),
        ("swiglu", mk.swiglu, reference.swiglu, ((61, 1000), (61, 1000))),
        (
            "attention, window 100",
            lambda q, k, v: mk.attention(q, k, v, sliding_window=100),
            lambda q, k, v: reference.attention(q, k, v, **window)[0],
            ((2, 333, 8, 64), (2, 333, 2, 64), (2, 333, 2, 64)),
        ),
        (
            "linear_cross_entropy",
            lambda h, w: mk.linear_cross_entropy(h, w, targets),
            lambda h, w: reference.linear_cross_entropy(h, w, targets),
            ((61, 128), (1000, 128)),
        ),
    ]


def measure_errors(device: str) -> Iterator[str]:
    """Yield one line per operator and dtype: the largest errors of its outputs and its gradients.

    Errors are measured against float64 and are relative to the largest value. The columns "eager"
    hold the errors of the operator's definition, computed by PyTorch in the same dtype.
    """
    yield f"{'':22} {'dtype':9} {'output: ours':>12} {'eager':>9} {'gradients:':>11} {'eager':>9}"
    for name, ours, definition, shapes in _operator_cases(device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            exact = _run(definition, [x.double() for x in inputs])
            try:
                results = _run(ours, inputs)
            except NotImplementedError as error:
                yield f"{name:22} {error}"
                break
            out, grad = _errors(results, exact)
            with reference.eager_arithmetic():
                eager = _run(definition, inputs)
            eager_out, eager_grad = _errors(eager, exact)
            verdict = ""
            # Eager PyTorch may be exact by chance. Hence always allow one rounding of the result
            # and some rounding of float32 sums.
            rounding = torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps
            if out > 2 * eager_out + rounding or grad > 2 * eager_grad + rounding:
                verdict = "  <- more than twice eager's"
            yield (
                f"{name:22} {str(dtype)[6:]:9} {out:12.2e} {eager_out:9.2e} {grad:11.2e} "
                f"{eager_grad:9.2e}{verdict}"
            )


Results = tuple[list[Tensor], list[Tensor]]


def _errors(results: Results, exact: Results) -> tuple[float, float]:
    outputs, gradients = (
        max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(actual, expected, strict=True)
        )
        for actual, expected in zip(results, exact, strict=True)
    )
    return outputs, gradients


def _run(function: Callable[..., Any], inputs: list[Tensor]) -> Results:
    """Return the outputs of `function`, and the gradients of their sum of squares."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    loss = sum(out.double().square().sum() for out in outputs)
    return [out.detach() for out in outputs], list(torch.autograd.grad(loss, inputs))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`.

    The code is 1 if `--check` finds an error more than twice eager PyTorch's.
    """
    return run(_report, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels report",
        description="Print what is installed, which backend runs, and why.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also run every operator on random inputs and print its error against float64, next "
        "to eager PyTorch's; exit with 1 if an error is more than twice eager's plus one "
        "rounding",
    )
    return parser


def _report(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    for line in report():
        write_out(f"{line}\n")
    if args.check:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_out(f"\nlargest errors against float64, on {device}:\n")
        failed = False
        for line in measure_errors(device):
            write_out(f"{line}\n")
            failed |= line.endswith("eager's")
        write_out(
            "failed: the marked errors are too large; please report this output\n"
            if failed
            else "passed: every error is at most twice eager's plus one rounding\n"
        )
        return int(failed)
    return 0
