"""Which backend serves a tensor, and why; the current device; what the device can do.

``triton`` serves GPU tensors and ``torch`` serves CPU tensors; the environment variable
``MISTRAL_KERNELS_BACKEND=auto|triton|torch`` forces one. Nothing falls back: a backend that cannot
run raises, naming the remedy.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BACKEND_VARIABLE = "MISTRAL_KERNELS_BACKEND"
_NO_GUARD = contextlib.nullcontext()


class Backend(NamedTuple):
    """A choice (``"triton"`` or ``"torch"``) and the reason for it, in words for people."""

    name: str
    reason: str


class DeviceProperties(NamedTuple):
    """What launch parameters depend on. ``arch``: 90 for sm_90, or AMD's name, ``"gfx942"``."""

    platform: str  # "cuda" or "hip"
    arch: int | str
    multiprocessors: int
    shared_memory: int  # bytes that one block may use


def choose_backend(device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``.

    Raises:
        ValueError: ``MISTRAL_KERNELS_BACKEND`` is none of auto, triton, torch.
        RuntimeError: the backend cannot run here; the message names the remedy.
    """
    return _choose(device.type, _setting())


def uses_triton(x: torch.Tensor) -> bool:
    """Return whether the Triton backend serves ``x``."""
    device_type = "cpu" if x.is_cpu else x.device.type  # the first is the quicker to ask for
    return _choose(device_type, _setting()).name == "triton"


def uses_csrc(device_type: str) -> bool:
    """Return whether csrc's kernels, where there are any, serve tensors on this type of device."""
    setting = _setting()
    return setting == "auto" or (setting == "torch" and device_type == "cpu")


def forget_choice() -> None:
    """Read MISTRAL_KERNELS_BACKEND again at the next choice; see `operator.choose_again`."""
    _setting.cache_clear()
    _choose.cache_clear()


@functools.cache
def _setting() -> str:
    return os.environ.get(BACKEND_VARIABLE, "auto")


@functools.cache  # exceptions are not cached: a remedy takes effect at the next call
def _choose(device_type: str, setting: str) -> Backend:
    if setting not in ("auto", "triton", "torch"):
        raise ValueError(f"{BACKEND_VARIABLE} is {setting!r}; expected 'auto', 'triton' or 'torch'")
    if setting == "torch":
        return Backend("torch", f"{BACKEND_VARIABLE}=torch")
    if setting == "auto" and device_type != "cuda":
        ours = "csrc's kernels or " if device_type == "cpu" else ""
        return Backend("torch", f"{device_type} tensors: {ours}PyTorch's own")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"the triton backend was chosen for {device_type} tensors but triton is not installed; "
            f"run `pip install triton`, or set {BACKEND_VARIABLE}=torch"
        )
    if device_type == "cuda":
        forced = f"{BACKEND_VARIABLE}=triton" if setting == "triton" else "GPU tensors"
        return Backend("triton", f"{forced}: Triton kernels")
    return Backend("triton", f"{BACKEND_VARIABLE}=triton: {_what_runs_triton_on(device_type)}")


def _what_runs_triton_on(device_type: str) -> str:
    if _interpreting():
        return "Triton's interpreter (TRITON_INTERPRET=1)"
    from triton.runtime import driver

    try:
        served = driver.active.get_active_torch_device().type
    except RuntimeError:  # Triton found no driver at all
        served = None
    if served == device_type:
        return f"Triton's active driver runs compiled kernels on {device_type} tensors"
    raise RuntimeError(
        f"{BACKEND_VARIABLE}=triton, but nothing here runs Triton kernels on {device_type} "
        "tensors; move them to a GPU, set TRITON_INTERPRET=1 before Python starts, "
        f"or unset {BACKEND_VARIABLE}"
    )


def _interpreting() -> bool:
    import triton  # and its modules by name: `from triton import` takes six times as long

    return bool(triton.knobs.runtime.interpret)


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of ``x`` current, where Triton launches; do nothing for CPU tensors."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NO_GUARD


def device_properties(x: torch.Tensor) -> DeviceProperties:
    """Return the properties of the device that runs Triton kernels on ``x``.

    It is not for code that is being traced.
    """
    if not x.is_cuda and _interpreting():
        # The interpreter has no device. Few multiprocessors make loops take several turns.
        return DeviceProperties("cuda", 80, 4, 163 * 1024)
    import triton

    return _query(triton.runtime.driver.active, x.device.index or 0)


@functools.cache
def _query(driver: Any, index: int) -> DeviceProperties:
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    return DeviceProperties(
        target.backend,
        target.arch,
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
    )


def with_workspace(x: torch.Tensor, launch: Callable[[], None]) -> None:
    """Launch kernels that need memory of their own, as for descriptors made on the device.

    Triton asks an allocator for it, which is set for this launch alone: the caller's stays.
    """
    import triton

    def run() -> None:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device)
        )
        launch()

    contextvars.copy_context().run(run)


def float32_precision(x: torch.Tensor) -> str:
    """How `tl.dot` multiplies float32: "tf32" if the user allows it, exact to float32 otherwise."""
    if x.dtype != torch.float32:
        return "ieee"  # says nothing of other types
    device = device_properties(x)
    if device.platform != "cuda" or int(device.arch) < 80:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy if its last dimension is not contiguous: all other strides kernels take."""
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def width_of(x: torch.Tensor) -> int:
    """Of the last dimension; a single number is a row of one."""
    return x.shape[-1] if x.ndim else 1


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``x`` as rows of its last dimension, and the stride between rows in elements.

    Copies only when the rows are not evenly spaced or their elements not contiguous. Contiguous
    tensors come back in the shape they have: a kernel needs no more than the pointer and stride.
    """
    width = width_of(x)
    if x.is_contiguous():
        return x, width
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
