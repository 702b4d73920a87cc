"""Fixtures of all tests: seeds, poisoned memory, devices and backends."""

from __future__ import annotations

import os
import random
import re
import signal
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import ClassVar

# Before the package reads it: some tests need the kernels for each instruction set.
os.environ.setdefault("MISTRAL_KERNELS_CPU", "all")

import ptxrun
import pytest
import torch
from hypothesis import settings
from support.backends import SetBackend, use_backend, without_csrc

from mistral_kernels.model import transformer

# Tensors in tests are small: more threads would only add synchronization.
torch.set_num_threads(1)

# The tests check no times, so Hypothesis must not fail slow examples.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the random inputs (default: a new one)")
    parser.addoption(
        "--capability",
        type=int,
        default=80,
        help="compute capability of kernels that ptxrun executes: 80 (default) or 90",
    )
    parser.addoption(
        "--share",
        metavar="I/N",
        help="run share I of N of the selected tests; a test is always in the same share",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    # A shell makes background processes ignore Ctrl-C, and child processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed={config.option.seed}"


@pytest.hookimpl(tryfirst=True)  # run before pytest selects tests by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (INTERPRETING or torch.cuda.is_available() or config.option.capability == 90):
        for item in items:
            backend = getattr(item, "callspec", _NoSpec).params.get("backend", "triton")
            if item.get_closest_marker("long") and backend == "triton":
                item.add_marker("slow")
    # Run the longest tests first, so that all workers finish at about the same time.
    longest = (
        "test_with_sanitizers",
        "test_kernels_in_the_interpreter",
        "test_capability_90",
        "test_gluon_attention",
        "test_a_text_of_50_000_tokens",
    )
    items.sort(key=lambda item: not any(name in item.nodeid for name in longest))
    if config.option.share:
        _keep_share(config, items)
    if INTERPRETING:
        # Triton's interpreter gives wrong results in bf16: it truncates instead of rounding, and
        # multiplies bit patterns.
        deselected = [
            item
            for item in items
            if any(x is torch.bfloat16 for x in getattr(item, "callspec", _NoSpec).params.values())
        ]
    elif torch.cuda.is_available():
        return
    else:
        deselected = [item for item in items if item.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def _keep_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = re.fullmatch(r"(\d+)/(\d+)", config.option.share)
    if not share or not 1 <= int(share[1]) <= int(share[2]):
        raise pytest.UsageError(f"--share must be I/N with 1 <= I <= N, got {config.option.share}")
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        is_ours = zlib.crc32(item.nodeid.encode()) % int(share[2]) == int(share[1]) - 1
        (kept if is_ours else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


class _NoSpec:
    params: ClassVar[dict[str, object]] = {}


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    value = request.config.option.seed
    random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"--seed={value}")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN (integers: the largest value), to reveal unwritten elements."""

    def poison(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.is_floating_point() or x.is_complex():
                poisoned = x.detach().fill_(float("nan"))
                return poisoned.requires_grad_() if x.requires_grad else poisoned
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (transformer, "zeros"),  # allocates weights, which loading overwrites
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    """Return the GPU if there is one, else the CPU. The interpreter uses CPU tensors."""
    on_gpu = torch.cuda.is_available() and not INTERPRETING
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@pytest.fixture(scope="session")
def triton_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run Triton kernels on a GPU, in the interpreter, or as compiled PTX on the CPU."""
    if torch.cuda.is_available() or INTERPRETING:
        yield
        return
    if reason := ptxrun.missing():
        pytest.skip(f"no GPU, and ptxrun cannot execute PTX: {reason}")
    with ptxrun.running(request.config.option.capability):
        yield


@pytest.fixture
def set_backend() -> Iterator[SetBackend]:
    """Return a function that sets MISTRAL_KERNELS_BACKEND until the test ends."""
    with ExitStack() as stack:
        yield lambda setting: stack.enter_context(use_backend(setting))


@pytest.fixture
def no_csrc() -> Iterator[None]:
    """Run the test as if the library of csrc were absent."""
    with without_csrc():
        yield


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the torch backend, and with Triton kernels as `triton_runs` runs them."""
    if request.param == "triton":
        request.getfixturevalue("triton_runs")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def torch_backend() -> Iterator[None]:
    """Select the torch backend, for features that only it has, such as float64."""
    with use_backend("torch"):
        yield


@pytest.fixture
def triton_backend(triton_runs: None) -> Iterator[None]:
    """Select the Triton backend. The interpreter runs only tests with the marker `kernels`."""
    with use_backend("triton"):
        yield
