"""Parsers of both configuration formats: raw (`params.json`) and Hugging Face (`config.json`)."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from mistral_kernels.utils.schema import OneLineError, find_mismatch
from mistral_kernels.utils.unsupported import TRANSFORMERS

# Keys: names in `MistralConfig` and config.json. Values: names in params.json.
RAW_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

_HF_DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 131072,
}

# The types of the keys that are read from each file.
_WINDOW = (float, str, None)
_COMMON_SCHEMA = {
    "sliding_window": (*_WINDOW, [_WINDOW]),
    "rope_theta": (float, None),
    "max_position_embeddings": (int, None),
}
_RAW_SCHEMA = _COMMON_SCHEMA | {
    **dict.fromkeys(RAW_NAMES.values(), (int, None)),
    "norm_eps": (float, None),
    "_sliding_window": _COMMON_SCHEMA["sliding_window"],
    "max_seq_len": (int, None),
    "tied_embeddings": (bool, None),
}
_ROPE = ({"rope_type": str, "type": str, "rope_theta": float}, None)
_HF_SCHEMA = _COMMON_SCHEMA | {
    **dict.fromkeys(RAW_NAMES, (int, None)),
    "rms_norm_eps": (float, None),
    "rope_parameters": _ROPE,
    "rope_scaling": _ROPE,
    "use_sliding_window": (bool, None),
    "layer_types": ([str], None),
    "tie_word_embeddings": (bool, None),
    "bos_token_id": (int, None),
    "eos_token_id": (int, None, [int]),
}

# Sections of both formats that describe a model other than a dense Mistral decoder.
_UNSUPPORTED = {
    "moe": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "vision_encoder": "a vision encoder",
    "vision_config": "a vision encoder",
    "quantization": "quantized weights",
    "quantization_config": "quantized weights",
    "yarn": "YaRN-scaled rotary embeddings",
    "llama_4_scaling": "position-dependent scaling of queries",
    "lora": "LoRA adapters",
}
# rope_scaling is defined only for config.json.
_UNSUPPORTED_RAW = _UNSUPPORTED | {"rope_scaling": "scaled rotary embeddings"}


class ConfigError(OneLineError):
    """Error in a configuration, or a configuration of a model that is not supported."""


def parse_raw(params: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `MistralConfig` from the contents of `params.json`.

    Raises:
        ConfigError: a field is missing or has a wrong type, or a section is not supported.
    """
    _check_schema(params, {"text_config": ({}, None)})
    params = params.get("text_config") or params
    _refuse_unsupported(params, _UNSUPPORTED_RAW)
    _check_schema(params, _RAW_SCHEMA)
    values = {ours: params.get(raw) for ours, raw in RAW_NAMES.items()}
    window = _parse_window(params.get("sliding_window", params.get("_sliding_window")))
    # As in Mistral's first reference code, the default of rope_theta depends on the window. Later
    # loaders have one default for all models, which is silently wrong for some: 1e6 for v0.1, and
    # 1e4 for v0.2.
    with_or_without = "without" if window is None else "with"
    defaults: dict[str, tuple[Any, str]] = {
        "num_key_value_heads": (values["num_attention_heads"], "each query head has its own"),
        "rms_norm_eps": (1e-5, "all released Mistral models use it"),
        "rope_theta": (
            1e6 if window is None else 1e4,
            f"models {with_or_without} a sliding window were trained with it",
        ),
        "max_position_embeddings": (32768, "Mistral's default"),
    }
    values |= {
        "sliding_window": window,
        "rope_theta": params.get("rope_theta"),
        "max_position_embeddings": params.get("max_position_embeddings", params.get("max_seq_len")),
        "tie_word_embeddings": bool(params.get("tied_embeddings")),
    }
    fields = _complete(values, defaults, "params.json")
    return fields | {"notes": tuple(map(with_raw_names, fields["notes"]))}


def parse_hf(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `MistralConfig` from the contents of transformers' `config.json`.

    Raises:
        ConfigError: see `parse_raw`; also if `model_type` is neither "mistral" nor "ministral".
    """
    _refuse_unsupported(config, _UNSUPPORTED)
    model_type = config.get("model_type", "mistral")
    if model_type not in ("mistral", "ministral"):
        raise ConfigError(
            f"model_type must be 'mistral' or 'ministral', got {reprlib.repr(model_type)}; only "
            "dense Mistral models are supported"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act must be 'silu', got {reprlib.repr(activation)}")
    _check_schema(config, _HF_SCHEMA)
    rope, outer_theta = _parse_rope(config), config.get("rope_theta")
    values = {name: config.get(name) for name in RAW_NAMES}
    values |= {
        "sliding_window": _hf_window(config),
        "rope_theta": rope.get("rope_theta", outer_theta),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "bos_token_id": config.get("bos_token_id", 1),
        "eos_token_id": config.get("eos_token_id", 2),
    }
    notes = []
    if outer_theta not in (None, values["rope_theta"]):
        notes.append(
            f"rope_theta = {values['rope_theta']}: from rope_parameters, as in transformers 5; the "
            f"top-level rope_theta of {outer_theta} is ignored"
        )
    if config.get("use_sliding_window") is False and values["sliding_window"] is not None:
        notes.append(
            f"sliding_window = {values['sliding_window']}: transformers ignores "
            f"use_sliding_window = false for model_type {model_type!r}"
        )
    # The defaults of transformers. num_key_value_heads has two defaults: 8 if the key is absent,
    # and num_attention_heads if the value is null.
    defaults: dict[str, tuple[Any, str]] = {
        name: (value, "transformers' default") for name, value in _HF_DEFAULTS.items()
    }
    if "num_key_value_heads" in config:
        heads = values["num_attention_heads"]
        defaults["num_key_value_heads"] = (heads, "each query head has its own")
    return _complete(values, defaults, "config.json", notes)


def with_raw_names(text: str) -> str:
    """Replace the field names of `MistralConfig` in a text by the names in `params.json`."""
    return re.sub(rf"\b({'|'.join(RAW_NAMES)})\b", lambda found: RAW_NAMES[found[0]], text)


def _complete(
    values: dict[str, Any],
    defaults: dict[str, tuple[Any, str]],
    source: str,
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """Fill missing fields of `values` with `defaults`. The field "notes" explains each default."""
    for name in _REQUIRED:
        if values[name] is None:
            shown = with_raw_names(name) if source == "params.json" else name
            raise ConfigError(f"{source} has no {shown!r}")
    if values["head_dim"] is None:
        size, heads = values["hidden_size"], values["num_attention_heads"]
        if 0 < heads <= size and size % heads:
            raise ConfigError(
                f"{source} must have a head_dim unless hidden_size is a multiple of the number of "
                f"heads, {heads}, got hidden_size {size} and no head_dim"
            )
        defaults["head_dim"] = (size // max(heads, 1), "hidden_size / num_attention_heads")
    notes = notes or []
    for name, (value, reason) in defaults.items():
        if values[name] is None:
            values[name] = value
            notes.append(f"{name} = {value}: not in {source}; {reason}")
    values["rope_theta"] = float(values["rope_theta"])
    return values | {"notes": tuple(notes)}


def _check_schema(contents: dict[str, Any], schema: dict[str, Any]) -> None:
    if problem := find_mismatch(contents, schema):
        raise ConfigError(problem)


def _refuse_unsupported(config: dict[str, Any], unsupported: dict[str, str]) -> None:
    for section, feature in unsupported.items():
        if config.get(section):
            raise ConfigError(
                f"the checkpoint has {feature} (section {section!r}); "
                "only dense, unquantized Mistral decoders are supported"
            )


def _parse_window(value: Any) -> int | tuple[int | None, ...] | None:
    """Parse the `sliding_window` of a file: an integer, a string, null, or a list of these."""
    if isinstance(value, (list, tuple)):
        return tuple(_parse_one_window(item) for item in value)
    return _parse_one_window(value)


def _parse_one_window(value: Any) -> int | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none", "")):
        return None
    try:
        window = int(value)
        whole = isinstance(value, str) or (window == value and not isinstance(value, bool))
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ConfigError(
            f"sliding_window must be an integer, null or a list, got {reprlib.repr(value)}"
        )
    return window


def _parse_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Parse `rope_parameters` (transformers 5), or `rope_scaling`, its name in transformers 4."""
    sections = []
    for name in ("rope_parameters", "rope_scaling"):
        if not (rope := config.get(name)):
            continue
        for key, value in rope.items():
            if isinstance(value, dict):
                raise ConfigError(f"{name} must be the same for all layer types, got {key!r}")
            if "llama_4" in key:
                raise ConfigError(f"{name} must not have {key!r}, which is not supported")
        rope = {"rope_type": rope.get("type", "default")} | rope
        if rope["rope_type"] != "default":
            shown = reprlib.repr(rope["rope_type"])
            raise ConfigError(f"rope_type must be 'default', got {shown}; {TRANSFORMERS}")
        sections.append(rope)
    if sections[1:] and sections[0] != sections[1]:
        # transformers 4 reads only rope_scaling; transformers 5 does so too if a file has both.
        shown = " and ".join(map(reprlib.repr, sections))
        raise ConfigError(f"rope_parameters and rope_scaling must be equal, got {shown}")
    return sections[0] if sections else {}


def _hf_window(config: dict[str, Any]) -> int | tuple[int | None, ...] | None:
    # 4096 is the default of transformers for an absent key. An explicit null means no window.
    window = _parse_window(config.get("sliding_window", 4096))
    types = config.get("layer_types")
    if not types or isinstance(window, tuple):
        return window
    num_layers = config.get("num_hidden_layers")
    if len(types) != num_layers:
        raise ConfigError(
            f"layer_types must have one entry per layer, {num_layers}, got {len(types)}"
        )
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        got = reprlib.repr(sorted(unknown))
        raise ConfigError(f"layer_types must be full_attention or sliding_attention, got {got}")
    if window is None and "sliding_attention" in types:
        raise ConfigError("sliding_window must be a number, since layer_types has sliding layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
