"""Fixtures shared by all tests: seeds, poisoned memory, devices, backends."""

from __future__ import annotations

import os
import random
import re
import signal
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import ClassVar

import ptxrun
import pytest
import torch
from hypothesis import settings
from support.backends import SetBackend, use_backend, without_csrc

from mistral_kernels.model import transformer

# The tensors of tests are small: threads would only wait for one another.
torch.set_num_threads(1)

# How long a machine takes over an example is not tested.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="repeat the random inputs of an earlier run")
    parser.addoption(
        "--capability",
        type=int,
        default=80,
        help="compute capability for which kernels are compiled where ptxrun executes them",
    )
    parser.addoption(
        "--share",
        metavar="I/N",
        help="run the I-th of N shares of the selected tests, the same tests every time",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    # A shell starts what runs in the background deaf to Ctrl-C, and so would be all it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed={config.option.seed}"


@pytest.hookimpl(tryfirst=True)  # before the selection by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (INTERPRETING or torch.cuda.is_available() or config.option.capability == 90):
        for item in items:
            backend = getattr(item, "callspec", _NONE).params.get("backend", "triton")
            if item.get_closest_marker("long") and backend == "triton":
                item.add_marker("slow")
    # The longest first, so that workers end together.
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
        # Triton's interpreter truncates to bf16 and multiplies bf16 bit patterns: no judge of it.
        unfit = [
            item
            for item in items
            if any(x is torch.bfloat16 for x in getattr(item, "callspec", _NONE).params.values())
        ]
    elif torch.cuda.is_available():
        return
    else:
        unfit = [item for item in items if item.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=unfit)
    items[:] = [item for item in items if item not in unfit]


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


class _NONE:
    params: ClassVar[dict[str, object]] = {}


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    value = request.config.option.seed
    random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"--seed={value}")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (integers: the largest value), so that what is never written shows."""

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
        (transformer, "zeros"),  # of weights, which are all written
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    """Return the GPU if there is one, except under the interpreter, which is for CPU tensors."""
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
    """Run the test as on a machine where csrc has no library."""
    with without_csrc():
        yield


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the torch backend and on Triton kernels, whatever executes these here."""
    if request.param == "triton":
        request.getfixturevalue("triton_runs")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def torch_backend() -> Iterator[None]:
    """Select the torch backend, for what it alone has, float64 above all."""
    with use_backend("torch"):
        yield


@pytest.fixture
def triton_backend(triton_runs: None) -> Iterator[None]:
    """Select Triton. Mark such tests ``kernels`` for the interpreter."""
    with use_backend("triton"):
        yield
