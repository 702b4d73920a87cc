"""Check arguments of operators. Messages read `<name> must be <expectation>, got <value>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FEW = 64  # for fewer values, `tolist` is faster than `aminmax`
INT32_MAX = torch.iinfo(torch.int32).max
FLOAT32 = torch.finfo(torch.float32)  # limits of the kernels' scalar arguments
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: Any) -> None:
    """Raise TypeError unless every named argument is a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_optional_tensors(**tensors: Any) -> None:
    """Raise TypeError unless every named argument is a tensor or None."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_float(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` has a floating-point dtype that some backend supports."""
    if x.dtype not in _ALL_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_triton_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError if `x` is float64, which the Triton kernels do not support."""
    if x.dtype == torch.float64:
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32 on the triton backend, got "
            "torch.float64; set MISTRAL_KERNELS_BACKEND=torch for float64"
        )


def check_writable(name: str, x: Tensor) -> None:
    """Raise ValueError if `x`, which is written in place, is an expanded tensor."""
    if 0 in x.stride() and any(
        s == 0 and size > 1 for s, size in zip(x.stride(), x.shape, strict=True)
    ):
        raise ValueError(
            f"{name} must not be an expanded tensor, since it is written in place, got strides "
            f"{x.stride()} for shape {tuple(x.shape)}"
        )


def check_unit_stride(name: str, x: Tensor) -> None:
    """Raise ValueError unless the last dimension of `x` is contiguous."""
    if x.ndim and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}'s last dimension must be contiguous, got strides {x.stride()}")


def check_same_dtype(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise TypeError unless `x` has the dtype of `like`."""
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must have {like_name}'s dtype {like.dtype}, got {x.dtype}")


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `x` has this shape."""
    if x.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number and not a bool.

    Numbers of Python and NumPy, 0-d tensors, and symbolic numbers of `torch.compile` are accepted.
    """
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool
    return hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0 and not is_flag(value)


def is_flag(value: Any) -> bool:
    """Return whether `value` is a Python, NumPy or symbolic bool, or the integer 0 or 1."""
    if value is True or value is False:
        return True
    if type(value) is int:
        return value in (0, 1)
    return type(value).__name__ in ("bool", "bool_", "SymBool")  # NumPy 1: bool_; NumPy 2: bool


def check_softcap(softcap: float) -> None:
    """Raise ValueError unless `softcap` is 0 or a positive normal float32."""
    if softcap != 0 and not FLOAT32.tiny <= softcap <= FLOAT32.max:
        raise ValueError(
            f"softcap must be 0, or in [{FLOAT32.tiny:.2g}, {FLOAT32.max:.2g}], got {softcap}"
        )


def check_device(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless the `others` are on the device of `like`.

    Call this function before calling several operators: each operator checks only its own tensors.
    """
    for name, x in others.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like {like_name}, got {x.device}")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless `x` has this dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")


def check_int32(name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless `x` is None, or has this shape and dtype int32."""
    if x is None:
        return
    check_shape(name, x, shape)
    check_dtype(name, x, torch.int32)


def check_range(name: str, x: Tensor | None, highest: int) -> None:
    """Raise ValueError unless all values of `x` are in [0, highest].

    Nothing is checked if `can_read(x)` is False.
    """
    if x is None or not x.numel() or not can_read(x):
        return
    values = x.tolist() if x.numel() < _FEW and x.ndim == 1 else [int(y) for y in x.aminmax()]
    low, high = min(values), max(values)
    if low < 0 or high > highest:
        raise ValueError(f"{name} must be in [0, {highest}], got {low} to {high}")


def can_read(x: Tensor) -> bool:
    """Return whether the values of `x` can be read without synchronizing with a device.

    The result is False on a GPU, where reading waits for the device.
    """
    return x.is_cpu and has_memory(x)


def is_plain(x: Tensor) -> bool:
    """Return whether `x` is a `torch.Tensor` or `nn.Parameter`, not another subclass."""
    return type(x) in _PLAIN


def has_memory(x: Tensor) -> bool:
    """Return whether `x` has a data pointer.

    The result is False while a function is compiled or exported, and for tensor subclasses (such as
    fake tensors), meta tensors and the tensors that a `torch.func` transform wraps.
    """
    if torch.compiler.is_compiling() or not is_plain(x) or x.is_meta:
        return False
    if torch._C._are_functorch_transforms_active():
        return not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return True
