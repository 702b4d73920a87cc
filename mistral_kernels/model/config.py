"""The architecture of a dense Mistral, read from and written to both configuration formats."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

# (our name, the same in a raw params.json). Hugging Face's config.json uses our names.
_RAW_NAMES = {
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

# Sections of either format that describe something which is not a dense Mistral decoder.
_UNSUPPORTED = {
    "moe": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "vision_encoder": "a vision encoder",
    "vision_config": "a vision encoder",
    "quantization": "quantised weights",
    "quantization_config": "quantised weights",
    "yarn": "YaRN-scaled rotary embeddings",
    "lora": "LoRA adapters",
}


class ConfigError(ValueError):
    """A configuration is malformed, or describes a model that this package does not run."""


@dataclass(frozen=True)
class MistralConfig:
    """Sizes and constants of a Mistral decoder, under Hugging Face's names.

    `sliding_window` is a count of visible keys, the query's own included: one `int` or `None` (no
    window) for all layers, or a tuple that is repeated over the layers as a pattern (Ministral).
    `notes` holds, in words, each value that a file left out and the rule that supplied it.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int | None | tuple[int | None, ...] = 4096
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in (*_RAW_NAMES, "max_position_embeddings"):
            _check_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if isinstance(self.sliding_window, (list, tuple)):
            windows = _shortest_pattern(tuple(self.sliding_window), self.num_hidden_layers)
            object.__setattr__(self, "sliding_window", windows)
        for window in self.layer_windows:
            if window is not None and (type(window) is not int or window <= 0):
                raise ConfigError(f"sliding_window must be positive or None, got {window!r}")
        if not (isinstance(self.rope_theta, (int, float)) and 0 < self.rope_theta < math.inf):
            raise ConfigError(f"rope_theta must be a positive number, got {self.rope_theta!r}")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer."""
        windows = self.sliding_window
        if not isinstance(windows, tuple):
            windows = (windows,)
        return tuple(windows[i % len(windows)] for i in range(self.num_hidden_layers))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_raw(cls, params: dict[str, Any]) -> MistralConfig:
        """From the contents of a raw checkpoint's `params.json`.

        Raises `ConfigError` for a missing or malformed field, and for MoE, vision, quantised and
        YaRN models, by name.
        """
        params = dict(params.get("text_config") or params)
        _refuse_unsupported(params)
        values = {ours: params.get(raw) for ours, raw in _RAW_NAMES.items()}
        window = _parse_window(params.get("sliding_window", params.get("_sliding_window")))
        # The rule of the reference code of December 2023. Later loaders default to one rope_theta
        # for all, which is wrong for v0.1 (1e6) or for v0.2 (1e4), and say nothing.
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
            "max_position_embeddings": params.get(
                "max_position_embeddings", params.get("max_seq_len")
            ),
            "tie_word_embeddings": bool(params.get("tied_embeddings")),
        }
        return cls._complete(values, defaults, "params.json")

    def to_raw(self) -> dict[str, Any]:
        """The contents of `params.json`. `rope_theta` is always written: see `from_raw`'s rule."""
        params: dict[str, Any] = {raw: getattr(self, ours) for ours, raw in _RAW_NAMES.items()}
        params["rope_theta"] = self.rope_theta
        params["max_position_embeddings"] = self.max_position_embeddings
        if self.sliding_window is not None:
            params["sliding_window"] = _as_json(self.sliding_window)
        if self.tie_word_embeddings:
            params["tied_embeddings"] = True
        return params

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MistralConfig:
        """From the contents of a Hugging Face `config.json`, of transformers 4 or 5.

        Raises `ConfigError` as `from_raw` does, and for another `model_type` than Mistral's.
        """
        _refuse_unsupported(config)
        model_type = config.get("model_type", "mistral")
        if model_type not in ("mistral", "ministral"):
            raise ConfigError(
                f"config.json describes model_type {model_type!r}; only dense Mistral models "
                "(model_type 'mistral' or 'ministral') are supported"
            )
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(f"hidden_act {activation!r} is not supported, only 'silu' is")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(f"rope_type {rope_type!r} is not supported, only 'default' is")
        values = {name: config.get(name) for name in _RAW_NAMES}
        eos = config.get("eos_token_id", 2)
        values |= {
            "sliding_window": _hf_window(config),
            "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
            "max_position_embeddings": config.get("max_position_embeddings"),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
            "bos_token_id": config.get("bos_token_id", 1),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        }
        # What transformers takes where a key is absent; for the kv heads, null is not absent.
        defaults: dict[str, tuple[Any, str]] = {
            name: (value, "transformers' default") for name, value in _HF_DEFAULTS.items()
        }
        if "num_key_value_heads" in config:
            heads = values["num_attention_heads"]
            defaults["num_key_value_heads"] = (heads, "each query head has its own")
        return cls._complete(values, defaults, "config.json")

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The contents of a `config.json` for transformers 4 and 5. `dtype`: "bfloat16", ..."""
        windows = self.layer_windows
        mixed = len(set(windows)) > 1
        config = {
            "architectures": ["MistralForCausalLM"],
            "model_type": "ministral" if mixed else "mistral",
            "hidden_act": "silu",
            **{name: getattr(self, name) for name in _RAW_NAMES},
            "sliding_window": windows[0],
            "max_position_embeddings": self.max_position_embeddings,
            # The first is read by transformers 4, the second by transformers 5.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _as_json(self.eos_token_id),
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "use_cache": True,
            "torch_dtype": dtype,
            "dtype": dtype,
        }
        if mixed:
            sizes = {window for window in windows if window is not None}
            if len(sizes) > 1:
                raise ConfigError(
                    f"config.json has room for one window size, this model has {sorted(sizes)}"
                )
            config["architectures"] = ["MinistralForCausalLM"]
            config["sliding_window"] = sizes.pop()
            config["layer_types"] = [
                "full_attention" if window is None else "sliding_attention" for window in windows
            ]
        return config

    @classmethod
    def _complete(
        cls, values: dict[str, Any], defaults: dict[str, tuple[Any, str]], source: str
    ) -> MistralConfig:
        """Fill in what `source` left out, noting each inferred value and its reason."""
        for name in _REQUIRED:
            if values[name] is None:
                shown = name if source == "config.json" else _RAW_NAMES[name]
                raise ConfigError(f"{source} has no {shown!r}")
            _check_positive(name, values[name])
        if values["head_dim"] is None:
            size, heads = values["hidden_size"], values["num_attention_heads"]
            if size % heads:
                raise ConfigError(f"{source} has no head_dim, and heads do not divide hidden_size")
            defaults["head_dim"] = (size // heads, "hidden_size / num_attention_heads")
        notes = []
        for name, (value, reason) in defaults.items():
            if values[name] is None:
                values[name] = value
                notes.append(f"{name} = {value}: not in {source}; {reason}")
        try:
            values["rope_theta"] = float(values["rope_theta"])
        except (TypeError, ValueError):
            pass  # the check of the fields names it
        return cls(**values, notes=tuple(notes))


def _check_positive(name: str, value: Any) -> None:
    kinds = (int, float) if name == "rms_norm_eps" else (int,)
    if type(value) not in kinds or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    for section, what in _UNSUPPORTED.items():
        if config.get(section):
            raise ConfigError(
                f"the checkpoint has {what} (section {section!r}); "
                "only dense, unquantised Mistral decoders are supported"
            )


def _parse_window(value: Any) -> int | None | tuple[int | None, ...]:
    """`sliding_window` as files in the wild write it: a number, a string, null or a list."""
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
        raise ConfigError(f"sliding_window must be a number, null or a list, got {value!r}")
    return window


def _hf_window(config: dict[str, Any]) -> int | None | tuple[int | None, ...]:
    if config.get("use_sliding_window") is False:
        return None
    # transformers' default where the key is absent; an explicit null means no window.
    window = _parse_window(config.get("sliding_window", 4096))
    types = config.get("layer_types")
    if not types or isinstance(window, tuple):
        return window
    num_layers = config.get("num_hidden_layers")
    if len(types) != num_layers:
        raise ConfigError(f"layer_types has {len(types)} entries for {num_layers} layers")
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer_types {sorted(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _shortest_pattern(
    windows: tuple[int | None, ...], num_layers: int
) -> int | None | tuple[int | None, ...]:
    """The shortest pattern that repeats to the same windows, so that equal models compare equal."""
    if not windows:
        raise ConfigError("sliding_window must not be an empty list")
    layers = [windows[i % len(windows)] for i in range(num_layers)]
    length = next(n for n in range(1, num_layers + 1) if layers[n:] == layers[:-n])
    return layers[0] if length == 1 else tuple(layers[:length])


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
