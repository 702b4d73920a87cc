"""Select the backend for a tensor; query and set the device that Triton kernels run on.

``triton`` is the backend for GPU tensors, ``torch`` is the backend for all other tensors. The
environment variable ``MISTRAL_KERNELS_BACKEND=auto|triton|torch`` overrides the selection. The
other backend is never used silently: if the selected backend cannot run, an error names the remedy.
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
    """A backend, ``"triton"`` or ``"torch"``, and the reason why it was selected, as text."""

    name: str
    reason: str


class DeviceProperties(NamedTuple):
    """Properties of a device that the launch parameters depend on."""

    platform: str  # "cuda" or "hip"
    arch: int | str  # 90 for sm_90; for AMD a name, "gfx942"
    multiprocessors: int
    shared_memory: int  # bytes available to one block


def choose_backend(device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``.

    Raises:
        ValueError: ``MISTRAL_KERNELS_BACKEND`` is not auto, triton or torch.
        RuntimeError: the backend cannot run on this machine; the message names the remedy.
    """
    return _choose(device.type, _setting())


def uses_triton(x: torch.Tensor) -> bool:
    """Return whether ``triton`` is the backend for ``x``."""
    device_type = "cpu" if x.is_cpu else x.device.type  # is_cpu is faster than device.type
    return _choose(device_type, _setting()).name == "triton"


def uses_csrc(device_type: str) -> bool:
    """Return whether MISTRAL_KERNELS_BACKEND allows csrc's kernels for this device type."""
    setting = _setting()
    return setting == "auto" or (setting == "torch" and device_type == "cpu")


def clear_backend_cache() -> None:
    """Make the next selection read MISTRAL_KERNELS_BACKEND again.

    Call `operator.reload_backend_setting` instead, which also updates csrc's libraries.
    """
    _setting.cache_clear()
    _choose.cache_clear()


@functools.cache
def _setting() -> str:
    return os.environ.get(BACKEND_VARIABLE, "auto")


@functools.cache  # exceptions are not cached, so that a remedy takes effect at the next call
def _choose(device_type: str, setting: str) -> Backend:
    if setting not in ("auto", "triton", "torch"):
        raise ValueError(f"{BACKEND_VARIABLE} must be 'auto', 'triton' or 'torch', got {setting!r}")
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
    return Backend("triton", f"{BACKEND_VARIABLE}=triton: {_describe_triton_runner(device_type)}")


def _describe_triton_runner(device_type: str) -> str:
    if _interpreting():
        return "Triton's interpreter (TRITON_INTERPRET=1)"
    from triton.runtime import driver

    try:
        runs_on = driver.active.get_active_torch_device().type
    except RuntimeError:  # Triton found no driver
        runs_on = None
    if runs_on == device_type:
        return f"Triton's active driver runs compiled kernels on {device_type} tensors"
    raise RuntimeError(
        f"{BACKEND_VARIABLE}=triton, but nothing here runs Triton kernels on {device_type} "
        "tensors; move them to a GPU, set TRITON_INTERPRET=1 before Python starts, "
        f"or unset {BACKEND_VARIABLE}"
    )


def _interpreting() -> bool:
    import triton  # `from triton import knobs` would take six times as long per call

    return bool(triton.knobs.runtime.interpret)


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that makes the device of ``x`` current, as Triton launches require.

    The context manager does nothing for CPU tensors, and if the device is current already.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NO_GUARD


def device_properties(x: torch.Tensor) -> DeviceProperties:
    """Return the properties of the device that runs Triton kernels on ``x``.

    Do not call this function in code that `torch.compile` traces.
    """
    if not x.is_cuda and _interpreting():
        # The interpreter has no device. With few multiprocessors, tests cover loops of several
        # iterations.
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
    """Run ``launch``, which launches kernels that need workspace, on the device of ``x``.

    Tensor descriptors that a kernel creates need workspace, for example. Triton requests the
    workspace from an allocator. The allocator set here is used for this launch only; the caller's
    allocator is kept.
    """
    import triton

    def run() -> None:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device)
        )
        launch()

    contextvars.copy_context().run(run)


def float32_precision(x: torch.Tensor) -> str:
    """Return `input_precision` of `tl.dot`.

    For float32 it is "tf32" if `torch.backends.cuda.matmul.fp32_precision` is "tf32", and otherwise
    a precision that is as accurate as float32: "tf32x3", or "ieee" on devices without tf32.
    """
    if x.dtype != torch.float32:
        return "ieee"  # has no effect on other dtypes
    device = device_properties(x)
    if device.platform != "cuda" or int(device.arch) < 80:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or a copy if its last dimension is not contiguous.

    The kernels require a contiguous last dimension and support any other strides.
    """
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def width_of(x: torch.Tensor) -> int:
    """Return the size of the last dimension; 1 for a 0-d tensor."""
    return x.shape[-1] if x.ndim else 1


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return ``x`` as rows of its last dimension, and the stride between rows in elements.

    ``x`` is copied only if its rows are not evenly spaced or their elements are not contiguous. A
    contiguous ``x`` is returned unchanged in shape, because a kernel uses only the data pointer and
    the stride.
    """
    width = width_of(x)
    if x.is_contiguous():
        return x, width
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
