"""`MistralConfig`: architecture of a dense Mistral, in both configuration file formats."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any

from mistral_kernels.model.config_formats import (
    RAW_NAMES,
    ConfigError,
    parse_hf,
    parse_raw,
    with_raw_names,
)

__all__ = ["ConfigError", "MistralConfig"]

# Limits far above the sizes of any model. A larger value is an error in a file; it must not cause a
# long loop or a large allocation. Positions are held in 32 bits.
_MAX_POSITION = (1 << 31) - 1
_MAX_SIZES = {
    **{name: 1 << 24 for name in RAW_NAMES if name != "rms_norm_eps"},
    "num_hidden_layers": 1 << 12,
    "max_position_embeddings": _MAX_POSITION,
}

# Fields that change neither the shape nor the meaning of any weight.
_REPLACEABLE = (
    "sliding_window",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)
# Assignments in code for transformers that change nothing here: the forward pass has no cache.
_WITHOUT_EFFECT = {"use_cache": (True, False), "pretraining_tp": (1,)}


@dataclass(frozen=True)
class MistralConfig:
    """Sizes and constants of a dense Mistral decoder; the defaults are those of Mistral 7B v0.1.

    The fields have the names of Hugging Face's `config.json`. They cannot be set: give them to
    `from_pretrained`, or use `dataclasses.replace`. `config.use_cache = False` has no effect.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: size of the hidden states.
        intermediate_size: size of the MLP's activations.
        num_hidden_layers: number of layers.
        num_attention_heads: number of query heads, a multiple of `num_key_value_heads`.
        num_key_value_heads: number of key and value heads.
        head_dim: size of a head, an even number.
        rms_norm_eps: constant that RMSNorm adds to the mean square.
        rope_theta: base of the rotary embedding's frequencies.
        sliding_window: number of visible keys, including the query's own. An int or None (no
            window) applies to all layers; a tuple is a pattern that is repeated over the layers, as
            in Ministral.
        max_position_embeddings: largest number of tokens that the model was trained for.
        tie_word_embeddings: whether the head uses the weight of the embedding.
        bos_token_id: token that begins a text, or None.
        eos_token_id: token or tokens that end a text, or None.
        notes: one sentence per value that the checkpoint's files lack, or that is not used as
            written in the files, with the reason. Not compared by `==`.

    Raises:
        ConfigError: a field has a wrong type or is out of range, or two fields contradict each
            other.

    Example:
        >>> from mistral_kernels import MistralConfig
        >>> config = MistralConfig(num_hidden_layers=4, sliding_window=(None, 4096))
        >>> config.layer_windows
        (None, 4096, None, 4096)
        >>> params = config.to_raw()  # the contents of params.json
        >>> params["n_layers"], params["dim"], params["sliding_window"]
        (4, 4096, [None, 4096])
        >>> MistralConfig.from_raw(params) == config
        True
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
    sliding_window: int | tuple[int | None, ...] | None = 4096
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, limit in _MAX_SIZES.items():
            _check_integer(name, getattr(self, name), 1, limit)
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # Models have an eps of 1e-6 to 1e-5. With a very large eps, every norm returns zeros.
            high, bound = (1, " of at most 1") if name == "rms_norm_eps" else (math.inf, "")
            if not (number and 0 < value <= high and value < math.inf):
                got = reprlib.repr(value)
                raise ConfigError(f"{name} must be a positive number{bound}, got {got}")
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
            if window is not None:
                _check_integer("sliding_window", window, 1, _MAX_POSITION, " or None")
        if type(self.tie_word_embeddings) is not bool:
            got = reprlib.repr(self.tie_word_embeddings)
            raise ConfigError(f"tie_word_embeddings must be True or False, got {got}")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.bos_token_id is not None:
            _check_integer("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1, " or None")
        for token in self.eos_token_ids:
            _check_integer("eos_token_id", token, 0, self.vocab_size - 1, " or None")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, in tokens; None for a layer without a window."""
        windows = self.sliding_window
        if not isinstance(windows, tuple):
            windows = (windows,)
        return tuple(windows[i % len(windows)] for i in range(self.num_hidden_layers))

    @property
    def default_length(self) -> int:
        """Default maximum length of a sequence: `max_position_embeddings`, at most 32,768 tokens.

        The cache of a layer without a window is allocated for the whole length at once.
        """
        return min(self.max_position_embeddings, 32768)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def with_replaced(self, **changes: Any) -> MistralConfig:
        """Return a copy in which some fields are replaced.

        Only fields that do not change the weights can be replaced, such as `sliding_window`. Other
        fields are accepted only with their present value.

        Raises:
            TypeError: a name is not a field.
            ConfigError: a field that the weights determine has another value.
        """
        allowed = f"fields that can be replaced: {', '.join(_REPLACEABLE)}"
        check_fields(changes)
        for name, value in changes.items():
            if name not in _REPLACEABLE and (own := getattr(self, name)) != value:
                raise ConfigError(
                    f"{name} must be {own}, which the checkpoint's weights determine, "
                    f"got {reprlib.repr(value)}; {allowed}"
                )
        return replace(self, **changes)

    @classmethod
    def from_raw(cls, params: dict[str, Any]) -> MistralConfig:
        """Parse the contents of a raw checkpoint's `params.json`.

        Raises:
            ConfigError: a field is missing or malformed, or the model is not supported: MoE,
                vision, quantized and YaRN models.
        """
        try:
            return cls(**parse_raw(params))
        except ConfigError as error:
            raise ConfigError(with_raw_names(str(error))) from None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MistralConfig:
        """Parse the contents of a Hugging Face `config.json`, written by transformers 4 or 5.

        Raises:
            ConfigError: see `from_raw`; also if `model_type` is neither "mistral" nor "ministral".
        """
        return cls(**parse_hf(config))

    def to_raw(self) -> dict[str, Any]:
        """Return the contents of `params.json`.

        `rope_theta` is always written, since loaders have different defaults.
        """
        params: dict[str, Any] = {raw: getattr(self, ours) for ours, raw in RAW_NAMES.items()}
        params["rope_theta"] = self.rope_theta
        params["max_position_embeddings"] = self.max_position_embeddings
        if self.sliding_window is not None:
            params["sliding_window"] = _as_json(self.sliding_window)
        if self.tie_word_embeddings:
            params["tied_embeddings"] = True
        return params

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """Return the contents of a `config.json` for transformers 4 and 5.

        Args:
            dtype: name of the weights' data type, such as "bfloat16".

        Raises:
            ConfigError: the layers have windows of more than one size.
        """
        windows = self.layer_windows
        mixed = len(set(windows)) > 1
        config = {
            "architectures": ["MistralForCausalLM"],
            "model_type": "ministral" if mixed else "mistral",
            "hidden_act": "silu",
            **{name: getattr(self, name) for name in RAW_NAMES},
            "sliding_window": windows[0],
            "max_position_embeddings": self.max_position_embeddings,
            # transformers 4 reads rope_theta, transformers 5 reads rope_parameters.
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
                    "sliding_window must have one size in all layers that have a window, as "
                    f"config.json requires, got {sorted(sizes)}"
                )
            config["architectures"] = ["MinistralForCausalLM"]
            config["sliding_window"] = sizes.pop()
            config["layer_types"] = [
                "full_attention" if window is None else "sliding_attention" for window in windows
            ]
        return config


def _set_attribute(config: MistralConfig, name: str, value: Any) -> None:
    """Accept assignments without effect; raise a FrozenInstanceError for others."""
    if isinstance(value, int) and value in _WITHOUT_EFFECT.get(name, ()):
        return
    remedy = f"set model.generation_config.{name}, if it is a setting of generate"
    if name in MistralConfig.__annotations__ and not name.endswith("_token_id"):
        replaceable = name in _REPLACEABLE
        remedy = "give it to from_pretrained" if replaceable else "make another configuration"
    raise FrozenInstanceError(f"config.{name} cannot be set, got {reprlib.repr(value)}; {remedy}")


MistralConfig.__setattr__ = _set_attribute  # type: ignore[assignment,method-assign]


def check_fields(changes: Iterable[str], options: str = "") -> None:
    """Raise a TypeError if a name is not a field. The message lists the replaceable fields.

    `options`: the other keywords of the caller, for the message.
    """
    names = {field.name for field in fields(MistralConfig)} - {"notes"}
    for name in changes:
        if name not in names:
            also = f"options are {options}, and the fields" if options else "fields are"
            raise TypeError(f"unexpected keyword {name!r}; {also} {', '.join(_REPLACEABLE)}")


def _check_integer(name: str, value: Any, low: int, high: int, alternative: str = "") -> None:
    if type(value) is not int or not low <= value <= high:
        expected = f"an integer from {low} to {high}{alternative}"
        raise ConfigError(f"{name} must be {expected}, got {reprlib.repr(value)}")


def _shortest_pattern(
    windows: tuple[int | None, ...], num_layers: int
) -> int | tuple[int | None, ...] | None:
    """Return the shortest pattern that gives the same windows.

    Configurations of equal models then compare equal.
    """
    if not windows:
        raise ConfigError("sliding_window must not be an empty list")
    layers = [windows[i % len(windows)] for i in range(num_layers)]
    length = next(n for n in range(1, num_layers + 1) if layers[n:] == layers[:-n])
    return layers[0] if length == 1 else tuple(layers[:length])


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
