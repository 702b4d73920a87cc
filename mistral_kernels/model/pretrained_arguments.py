"""Arguments of transformers' `from_pretrained` and `save_pretrained`: accepted values, parsers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from mistral_kernels.utils.unsupported import ANY_FLAG, OPENING, TRANSFORMERS, Unsupported

# Names of the arguments of `from_pretrained` that concern the download.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
}
_QUANTIZED = f'pass quantize="int8" for int8 weights on the CPU, or {TRANSFORMERS}'
_SEVERAL = (
    "to divide a model among devices, run torchrun -m mistral_kernels.generate, which uses tensor "
    "parallelism"
)
_OFFLOADED = "leave it out: the whole model is on one device"

# Arguments of `from_pretrained` that are accepted only at values without effect.
LOADING = {
    **OPENING,
    "attn_implementation": Unsupported(
        (
            None,
            "mistral_kernels",
            "eager",
            "sdpa",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
            "flex_attention",
        ),
        "leave it out: the kernels of mistral_kernels are always used",
    ),
    # Arguments whose values select nothing here: weights are always loaded one tensor at a time,
    # and the forward pass has no cache.
    "low_cpu_mem_usage": ANY_FLAG,
    "use_safetensors": ANY_FLAG,
    "use_cache": ANY_FLAG,
    "use_flash_attention_2": ANY_FLAG,
    "offload_state_dict": ANY_FLAG,
    "offload_buffers": ANY_FLAG,
    "weights_only": Unsupported((None, True), "leave it out: pickles are read as plain tensors"),
    "load_in_4bit": Unsupported((None, False), _QUANTIZED),
    "load_in_8bit": Unsupported((None, False), _QUANTIZED),
    "quantization_config": Unsupported(remedy=_QUANTIZED),
    "tp_plan": Unsupported(remedy=_SEVERAL),
    "tp_size": Unsupported(remedy=_SEVERAL),
    "device_mesh": Unsupported(remedy=_SEVERAL),
    "max_memory": Unsupported(remedy=f"{_OFFLOADED}; {_SEVERAL}"),
    "offload_folder": Unsupported(remedy=_OFFLOADED),
    "variant": Unsupported(remedy="leave it out, and give the folder that holds the files"),
    "gguf_file": Unsupported(remedy="give a folder with safetensors files"),
    "config": Unsupported(
        remedy="give the fields to replace as keywords, such as sliding_window=1024"
    ),
    "pad_token_id": Unsupported(remedy="pass it to generate"),
    "state_dict": Unsupported(remedy="call load_state_dict of the loaded model"),
    "ignore_mismatched_sizes": Unsupported((None, False)),
    "output_loading_info": Unsupported((None, False)),
    "adapter_kwargs": Unsupported(),
    "key_mapping": Unsupported(),
    "use_kernels": Unsupported((None, False), "leave it out: the kernels are always used"),
    "from_tf": Unsupported((None, False)),
    "from_flax": Unsupported((None, False)),
}

_UPLOAD = "upload the folder with huggingface_hub.upload_folder"
# The same for `save_pretrained` and, in CHECKPOINTING, for `gradient_checkpointing_enable`.
SAVING = {
    "safe_serialization": Unsupported(
        (None, True), "leave it out, or write model.state_dict() with torch.save"
    ),
    "state_dict": Unsupported(remedy="call load_state_dict first"),
    "variant": Unsupported(),
    "push_to_hub": Unsupported((None, False), _UPLOAD),
    "token": Unsupported(remedy=_UPLOAD),
    "save_peft_format": ANY_FLAG,
}
CHECKPOINTING = {
    "use_reentrant": ANY_FLAG,
    "every_n_layers": Unsupported((None, 1), "leave it out: the input of every layer is saved"),
    "offload": Unsupported((None, False), "leave it out: the inputs stay on the device"),
}


def parse_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | None:
    """Return the dtype that one of two arguments of the same meaning names.

    Args:
        dtype: a torch.dtype, its name or "auto"; None: not given.
        torch_dtype: the earlier name of `dtype`.

    Returns:
        The dtype; None: that of the checkpoint.

    Raises:
        TypeError: an argument is neither a dtype nor a string nor None.
        ValueError: an argument is another dtype or string, or the arguments differ.
    """
    return _agreed(_parse_dtype, dtype=dtype, torch_dtype=torch_dtype)  # type: ignore[no-any-return]


def _parse_dtype(name: str, value: Any) -> torch.dtype | None:
    if value == "auto":
        return None
    found = _DTYPES.get(value) if isinstance(value, str) else value
    if found not in _DTYPES.values():
        kind = ValueError if isinstance(value, (str, torch.dtype)) else TypeError
        raise kind(
            f"{name} must be 'auto', None, or bfloat16, float16, float32 or float64 as a "
            f"torch.dtype or a name, got {value!r}"
        )
    return found


def parse_device(device: Any, device_map: Any) -> torch.device:
    """Return the device that one of two arguments of the same meaning names; by default the CPU.

    Args:
        device: a torch.device, a string or the index of a GPU; None: not given.
        device_map: the same, {"": device} or "auto"; None: not given.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: there is no such device, or the arguments differ.
        NotImplementedError: `device_map` divides the model among several devices.
    """
    return _agreed(_parse_device, device=device, device_map=device_map) or torch.device("cpu")


def _parse_device(name: str, value: Any) -> torch.device:
    if name == "device_map":
        if isinstance(value, dict) and list(value) == [""]:
            value = value[""]
        if isinstance(value, dict) or value in ("balanced", "balanced_low_0", "sequential"):
            raise NotImplementedError(
                f"device_map must be 'auto', one device or {{'': device}}, got {value!r}; "
                f"{_SEVERAL}"
            )
        if value == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(
            f"{name} must be a torch.device, a string or an integer, got {type(value).__name__}"
        )
    index = value if isinstance(value, int) else None
    try:
        found = torch.device(value) if index is None else torch.device("cuda", index)
    except (RuntimeError, OverflowError):
        expected = "'auto', 'cpu', 'cuda'" if name == "device_map" else "'cpu', 'cuda'"
        raise ValueError(f"{name} must be {expected} or 'cuda:N', got {value!r}") from None
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(
            f"{name} must be the CPU or one of the {count} GPUs that PyTorch finds, got {value!r}; "
            "use 'cpu', or install a PyTorch built for your GPU"
        )
    return found


def _agreed(parse: Callable[[str, Any], Any], **arguments: Any) -> Any:
    """Return the parsed value of two arguments of the same meaning; None if both are None."""
    parsed = {name: parse(name, value) for name, value in arguments.items() if value is not None}
    if len(set(parsed.values())) > 1:
        first, second = parsed
        raise ValueError(
            f"{second} must equal {first}, {arguments[first]!r}, got {arguments[second]!r}; give "
            "one of them"
        )
    return next(iter(parsed.values()), None)


def parse_shard_size(size: int | str) -> int:
    """Return a number of bytes.

    Args:
        size: the number, or a string such as "5GB" (5 * 10^9 bytes) or "5GiB" (5 * 2^30 bytes).

    Raises:
        ValueError: `size` is neither a positive integer nor such a string.
    """
    match = re.fullmatch(r"(\d+) *([KMGT])(i?)B", str(size), re.IGNORECASE)
    if match:
        base = 1024 if match[3] else 1000
        number = int(match[1]) * int(base ** ("KMGT".index(match[2].upper()) + 1))
    else:
        number = size if type(size) is int else 0
    if number <= 0:
        raise ValueError(
            f"max_shard_size must be a number of bytes or a string such as '5GB', got {size!r}"
        )
    return number
