"""csrc's kernels for the CPU, in each instruction set that this processor supports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.helpers import FLOATS, assert_as_accurate

from mistral_kernels.ops import compiler, extension
from mistral_kernels.ops.cross_entropy import _softmax_torch

CASES = {  # ignore_index, label_smoothing, z_loss, softcap
    "plain": (-100, 0.0, 0.0, 0.0),
    "smoothed": (-100, 0.1, 0.01, 0.0),
    "capped": (-1, 1.0, 0.1, 3.0),
}


def make_rows(rows, vocab, dtype, spread=5.0, ignore_index=-100):
    """Return logits, targets, and the scale of the gradient."""
    targets = torch.randint(vocab, (rows,))
    targets[2::3] = ignore_index
    return (torch.randn(rows, vocab) * spread).to(dtype), targets, torch.tensor(0.7)


def run(operators, logits, targets, scale, options, needs_gradient=True):
    """Return the losses and the gradient, which overwrites the logits."""
    return operators.cross_entropy_(logits, targets, scale, *options, needs_gradient), logits


def run_in_pytorch(logits, targets, scale, options):
    logits = logits.clone()
    return _softmax_torch(logits, targets, scale, *options, True), logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 2), (7, 63), (4, 513), (3, 9001)], ids=str)
def test_softmax(shape, dtype, case, operators):
    options = CASES[case]
    logits, *rest = make_rows(*shape, dtype, ignore_index=options[0])
    exact = run_in_pytorch(logits.double(), rest[0], rest[1].double(), options)
    plain = run_in_pytorch(logits, *rest, options)
    losses, unchanged = run(operators, logits.clone(), *rest, options, needs_gradient=False)
    assert torch.equal(unchanged, logits)
    actual = run(operators, logits, *rest, options)
    assert torch.equal(actual[0], losses)
    for name, *results in zip(("losses", "gradient"), actual, plain, exact, strict=True):
        assert_as_accurate(*results, name)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_half_precision_is_rounded_float32(dtype, operators):
    """Results are rounded to nearest: normal, subnormal and infinite numbers."""
    logits, targets, _ = make_rows(64, 1003, dtype)
    scale = torch.tensor(1e6 if dtype == torch.float16 else 0.7)
    wide = run(operators, logits.float(), targets, scale, CASES["smoothed"])
    narrow = run(operators, logits, targets, scale, CASES["smoothed"])
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1].to(dtype), narrow[1])
    logits, targets, scale = make_rows(64, 1003, dtype)
    wide = run(operators, logits.float(), targets, scale, CASES["plain"])
    narrow = run(operators, logits, targets, scale, CASES["plain"])
    assert torch.equal(wide[1].to(dtype), narrow[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_logits(dtype, operators):
    """Rows are not adjacent and not aligned. The memory between rows does not change."""
    logits, *rest = make_rows(5, 777, dtype)
    expected = run(operators, logits.clone(), *rest, CASES["smoothed"])
    memory = torch.full((5 * 800 + 1,), 9.0, dtype=dtype)
    view = memory[1:].view(5, 800)[:, :777]
    actual = run(operators, view.copy_(logits), *rest, CASES["smoothed"])
    assert all(map(torch.equal, actual, expected))
    view.fill_(9.0)
    assert (memory == 9.0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, operators):
    logits, *rest = make_rows(41, 9001, dtype)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(operators, logits.clone(), *rest, CASES["smoothed"]))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_extreme_logits(operators):
    """Results match PyTorch in float64, including NaN."""
    inf, nan, vocab = float("inf"), float("nan"), 600
    logits = torch.randn(11, vocab)
    logits[0] = -3e38
    logits[1, :513] = -inf
    logits[2] *= 1e4
    logits[3, 5] = 3e38
    logits[4] -= 1e30
    logits[5] = -inf
    logits[6, 300] = inf
    logits[7, 599] = nan
    logits[8, ::2] -= 95  # their exponentials are subnormal
    logits[9, 1] = logits[10, 2] = nan
    targets = torch.full((11,), vocab - 1)
    targets[9:] = -100  # ignored rows, whose NaNs have no effect
    exact = logits.double().requires_grad_()
    exact_losses = F.cross_entropy(exact, targets, reduction="none")
    exact_losses.sum().backward()
    losses, gradient = run(operators, logits, targets, torch.tensor(1.0), CASES["plain"])
    torch.testing.assert_close(losses, exact_losses.float(), equal_nan=True)
    torch.testing.assert_close(gradient[:9], exact.grad[:9].float(), equal_nan=True)
    assert not losses[9:].any()
    assert not gradient[9:].any()


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_accumulate_reads_every_bit_pattern(dtype, operators):
    x = torch.arange(2**16).to(torch.uint16).view(dtype)
    for part in (x, x[:0], x[1:2], x[3:20]):
        total = torch.zeros(len(part))
        operators.accumulate_(total, part)
        torch.testing.assert_close(total, part.float(), rtol=0, atol=0, equal_nan=True)
    for finite in (x[x.isfinite()], torch.randn(40_000)):
        total = torch.randn(len(finite))
        expected = total + finite
        torch.set_num_threads(3)
        operators.accumulate_(total, finite)
        assert torch.equal(total, expected)


def test_each_instruction_set_has_its_own_kernels(operators, request):
    """Vectors of other lengths add in another order, so the results have other bits."""
    arguments = *make_rows(64, 9001, torch.float32), CASES["plain"]
    usual = run(operators, arguments[0].clone(), *arguments[1:])[1]
    widths = {"plain": 4, "neon_bf16": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}
    chosen = request.node.callspec.params["operators"]
    for name in operators.instruction_sets().split():
        operators.use_instruction_set(name)
        gradient = run(operators, arguments[0].clone(), *arguments[1:])[1]
        assert torch.equal(gradient, usual) == (widths[name] == widths[chosen])


@pytest.mark.parametrize("setting", ["", "avx", "AVX2"])
def test_unknown_instruction_set_is_refused(setting, monkeypatch):
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    monkeypatch.setenv(extension.CPU_VARIABLE, setting)
    monkeypatch.setattr(extension, "_libraries", {})
    message = f"MISTRAL_KERNELS_CPU must be 'all' or .*'plain' on this processor, got {setting!r}$"
    with pytest.raises(ValueError, match=message):
        extension.load("cpu")
    assert extension.status("cpu").startswith("not loaded: MISTRAL_KERNELS_CPU must be ")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("name", compiler.INSTRUCTION_SETS)
def test_kernels_share_no_code(name, tmp_path):
    """The linker would merge shared code that is compiled for different processors."""
    units = compiler._units("cpu", list(compiler.INSTRUCTION_SETS))
    options = next(unit.options for unit in units if f"-DINSTRUCTION_SET={name}" in unit.options)
    for source in compiler._sources("cpu/kernels"):
        built = tmp_path / "kernel.o"
        compiling = [*compiler.compiler_command("cpu"), "-c", *options, source, "-o", str(built)]
        subprocess.run(compiling, cwd=compiler.SOURCES, check=True)
        listed = subprocess.check_output(
            ["nm", "-C", "--defined-only", "--extern-only", str(built)], text=True
        )
        symbols = [line.split(maxsplit=2)[1:] for line in listed.splitlines()]
        assert symbols
        for kind, symbol in symbols:
            assert kind == "T", symbol
            assert symbol.startswith(f"kernels::{name}::"), symbol


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads GCC's sanitizer")
def test_with_sanitizers(tmp_path):
    """Run the CPU tests and the tests of the rolling cache with address and UB sanitizers."""
    cxx = os.environ.get("CXX", "c++")
    preloaded = []
    for name in ("libasan.so", "libstdc++.so"):  # libasan intercepts exceptions of libstdc++
        command = [cxx, f"-print-file-name={name}"]
        preloaded.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not Path(preloaded[-1]).is_absolute():
            pytest.skip(f"{cxx} has no {name}")
    script = tmp_path / "c++"  # -O1 comes last: -O3 is slow with sanitizers
    options = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O1"
    script.write_text(f'#!/bin/sh\nexec {cxx} "$@" {options}\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(script),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        compiler.BUILD_VARIABLE: "always",
    }
    here = Path(__file__)
    tests = [*map(str, here.parent.glob("test_cpu_*.py"))]
    tests.append(f"{here.with_name('test_extension.py')}::test_same_bits")
    tests.append(f"{here.with_name('test_fuzz.py')}::test_malformed_calls")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout.splitlines()[-1] or "has no avx" in done.stdout
