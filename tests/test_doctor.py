"""`python -m mistral_kernels report`: the report of packages, devices and backends."""

from __future__ import annotations

import re

import pytest
import torch
from support.backends import SetBackend

import mistral_kernels
from mistral_kernels.cli import build
from mistral_kernels.cli import report as doctor
from mistral_kernels.ops import extension, reference
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE


def test_report_names_versions_devices_and_backends(
    capsys: pytest.CaptureFixture[str], set_backend: SetBackend
) -> None:
    set_backend(None)
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"mistral_kernels {mistral_kernels.__version__}\n")
    assert f"torch           {torch.__version__}, CUDA " in out
    backend = r"cpu: torch \(cpu tensors: csrc's kernels or PyTorch's own\)"
    assert re.search(f"^backend +{backend}$", out, re.M)
    gpu = r"^cuda:0 +.+, compute capability \d+\.\d+" if torch.cuda.is_available() else "^gpu +none"
    assert re.search(gpu, out, re.M)
    assert re.search(r"^csrc +cpu: (loaded from .+, kernels for \w+|not loaded: .+)$", out, re.M)
    assert re.search(r"^products +cpu, many rows: .* by (csrc|PyTorch)", out, re.M)


def test_report_names_a_forced_backend(
    capsys: pytest.CaptureFixture[str], set_backend: SetBackend
) -> None:
    set_backend("torch")
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"cpu: torch ({BACKEND_VARIABLE}=torch)" in out
    assert f"environment     {BACKEND_VARIABLE}=torch\n" in out
    set_backend("fast")
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"cpu: none, {BACKEND_VARIABLE} must be 'auto', 'triton' or 'torch', got 'fast'" in out


def test_report_names_a_forced_instruction_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = torch.ops.mistral_kernels
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    best = operators.instruction_sets().split()[0]
    try:
        for setting, words in (("all", f"kernels for {best}"), ("fast", "processor, got 'fast'")):
            monkeypatch.setattr(extension, "_libraries", {})
            monkeypatch.setenv(extension.CPU_VARIABLE, setting)
            assert doctor.main([]) == 0
            assert words in capsys.readouterr().out
    finally:
        operators.use_instruction_set(best)


def test_missing_packages_are_reported_with_a_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda package: None)
    doctor.main([])
    out = capsys.readouterr().out
    assert 'missing mistral_common: pip install "mistral_kernels[chat]"' in out
    assert "triton          not installed: pip install triton" in out


def test_check_prints_errors_of_all_operators(
    capsys: pytest.CaptureFixture[str], set_backend: SetBackend
) -> None:
    if not torch.cuda.is_available():
        set_backend("torch")
    assert doctor.main(["--check"]) == 0
    out = capsys.readouterr().out
    names = ("rms_norm", "rms_norm + residual", "apply_rotary", "swiglu", "attention, window 100")
    for name in (*names, "linear_cross_entropy"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert re.search(rf"^{re.escape(name)} +{dtype}( +\d\.\d\de-\d\d){{4}}$", out, re.M)
    assert out.endswith("\npassed: every error is at most twice eager's plus one rounding\n")


def test_check_finds_a_wrong_operator(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    set_backend: SetBackend,
) -> None:
    def wrong(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return reference.swiglu(gate, up) * 1.01

    set_backend("auto" if torch.cuda.is_available() else "torch")
    monkeypatch.setattr(mistral_kernels, "swiglu", wrong)
    assert doctor.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("\nfailed: the marked errors are too large; please report this output\n")
    flagged = [line for line in out.splitlines() if "more than twice" in line]
    assert len(flagged) >= 1
    assert all(line.startswith("swiglu ") for line in flagged)


@pytest.mark.parametrize(
    ("loaded", "code", "error"),
    [
        (("cpu", "cuda"), 0, ""),
        (("cpu",), 0, ""),
        (("cuda",), 2, "error: the library for cpu cannot be built: no compiler\n"),
    ],
)
def test_build_prints_the_state_of_each_library(
    loaded: tuple[str, ...],
    code: int,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only a missing library of the CPU is an error."""
    calls = []

    def status(device: str) -> str:
        assert device in calls, "`load` compiles"
        return f"loaded from {device}.so" if device in loaded else "not loaded: no compiler"

    monkeypatch.setattr(extension, "load", lambda device: calls.append(device) or device in loaded)
    monkeypatch.setattr(extension, "status", status)
    assert build.main([]) == code
    lines = "".join(f"csrc {device}: {status(device)}\n" for device in ("cpu", "cuda"))
    assert capsys.readouterr() == (lines, error)


def test_help_describes_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "Print what is installed, which backend runs, and why." in capsys.readouterr().out
