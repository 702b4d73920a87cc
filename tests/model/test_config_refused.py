"""Configurations that are rejected with the key in the message, and contradicting values."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_config import HF_7B, RAW_7B, SIZES, without

from mistral_kernels import MistralForCausalLM
from mistral_kernels.model.config import ConfigError, MistralConfig

# JSON values of every type.
VALUES: list[Any] = [None, True, 0, -1, 7, 1.5, 2**64, "2", "x", [], [1], ["x"], [[]], {}, {"a": 1}]


def is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def is_number(value: Any) -> bool:
    return is_integer(value) or type(value) is float


def is_window(value: Any) -> bool:
    items = value if type(value) is list else [value]
    return all(item is None or is_number(item) or type(item) is str for item in items)


def is_list_of(kind: type) -> Any:
    return lambda value: type(value) is list and all(type(item) is kind for item in value)


def is_rope(value: Any) -> bool:
    return type(value) is dict


# For each key, a function that returns whether a value has an allowed type.
ADMITTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(SIZES.values(), is_integer),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings"), is_integer),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), is_number),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), lambda x: type(x) is bool),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), is_rope),
    "sliding_window": is_window,
    "layer_types": is_list_of(str),
    "bos_token_id": is_integer,
    "eos_token_id": lambda x: is_integer(x) or is_list_of(int)(x),
}


@pytest.mark.parametrize("key", ADMITTED)
def test_types_in_config_json_are_checked(key: str) -> None:
    """A value of a wrong type is rejected. One of a correct type is accepted or out of range."""
    for value in VALUES:
        check_value(
            MistralConfig.from_hf, HF_7B | {"head_dim": 128, key: value}, key, ADMITTED[key]
        )


def check_value(
    parse: Callable[[dict[str, Any]], MistralConfig],
    contents: dict[str, Any],
    key: str,
    admits: Callable[[Any], bool],
) -> None:
    value = contents[key]
    try:
        parse(contents)
    except ConfigError as error:
        message = str(error)
        if value is None:
            assert message in (f"config.json has no {key!r}", f"params.json has no {key!r}")
        elif admits(value):
            # The value is out of range. Two raw keys have another name than their field.
            name = {"max_seq_len": "max_position_embeddings"}.get(key, key.lstrip("_"))
            assert re.search(rf"\b{name}\b", message), (value, message)
            assert "or null" not in message, (value, message)
        else:
            part = reprlib.repr(value[0]) if type(value) is list and value else reprlib.repr(value)
            got = "|".join(map(re.escape, (reprlib.repr(value), part)))
            assert re.fullmatch(rf"{key}(\[0\])? must be .*, got ({got})", message), message
    else:
        assert value is None or admits(value), value


RAW_KEYS = {
    **{raw: ADMITTED[hf] for raw, hf in SIZES.items()},
    **dict.fromkeys(("n_kv_heads", "head_dim", "max_seq_len"), is_integer),
    **dict.fromkeys(("norm_eps", "rope_theta"), is_number),
    **dict.fromkeys(("sliding_window", "_sliding_window"), is_window),
    "tied_embeddings": lambda x: type(x) is bool,
}


@pytest.mark.parametrize("key", RAW_KEYS)
def test_types_in_params_json_are_checked(key: str) -> None:
    contents = without(RAW_7B, "sliding_window") if key == "_sliding_window" else RAW_7B
    for value in VALUES:
        check_value(MistralConfig.from_raw, contents | {key: value}, key, RAW_KEYS[key])


def test_text_config_must_be_an_object_or_null() -> None:
    """An object that is not empty replaces the whole of `params.json`."""
    assert MistralConfig.from_raw({"text_config": RAW_7B}) == MistralConfig()
    assert MistralConfig.from_raw(RAW_7B | {"text_config": {}}) == MistralConfig()
    for value in (True, 7, 1.5, "x", [], [1], [[]]):
        message = f"text_config must be an object or null, got {value!r}"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            MistralConfig.from_raw(RAW_7B | {"text_config": value})


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 32000, 2**62, 2**64, "x", "2", {}, 1.5, True, [[1]], [-1]])
def test_tokens_outside_the_vocabulary_are_rejected(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}(\[0\])? must be "):
        MistralConfig.from_hf(HF_7B | {key: value})
    with pytest.raises(ConfigError, match=rf"^{key} must be an integer from 0 to 31999 or None, "):
        MistralConfig(**{key: value})


def test_eos_token_id_may_be_a_list() -> None:
    config = MistralConfig(eos_token_id=[2, 31999])  # type: ignore[arg-type]
    assert config.eos_token_ids == (2, 31999)
    assert config == MistralConfig(eos_token_id=(2, 31999))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2**62}, "num_hidden_layers must be an integer from 1 to 4096, got"),
        (
            {"sliding_window": 2**62},
            "sliding_window must be an integer from 1 to 2147483647",
        ),
        (
            {"sliding_window": True},
            "sliding_window must be an integer from 1 to 2147483647 or None",
        ),
        ({"sliding_window": (None, "7")}, "sliding_window must be an integer from 1 to 2147483647"),
        (
            {"max_position_embeddings": 2**31},
            "max_position_embeddings must be an integer from 1",
        ),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1 to 16777216, got 0"),
        ({"head_dim": 0}, "head_dim must be an integer from 1 to 16777216, got 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a positive number of at most 1, got True"),
        ({"rms_norm_eps": 1e308}, "rms_norm_eps must be a positive number of at most 1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number of at most 1"),
        ({"rope_theta": math.inf}, "rope_theta must be a positive number, got inf"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings must be True or False, got",
        ),
    ],
)
def test_fields_are_checked_in_python(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        MistralConfig(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"rope_theta": 7.0}},
            "rope_parameters and rope_scaling must be equal",
        ),
        (
            {"rope_parameters": {"full_attention": {}}},
            "rope_parameters must be the same for all layer types",
        ),
        (
            {"rope_scaling": {"sliding_attention": {}}},
            "rope_scaling must be the same for all layer types",
        ),
        (
            {"rope_parameters": {"llama_4_scaling_beta": 0.1}},
            "rope_parameters must not have 'llama_4_s",
        ),
        ({"llama_4_scaling": {"beta": 0.1}}, "position-dependent scaling of queries"),
        (
            {"rope_parameters": {"rope_type": 3}},
            "rope_parameters.rope_type must be a string",
        ),
        ({"rope_parameters": {"rope_theta": True}}, "rope_parameters.rope_theta must be a number"),
        (
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 32},
            "sliding_window must",
        ),
    ],
)
def test_contradictions_in_config_json_are_rejected(change: dict[str, Any], message: str) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    MistralConfig.from_hf(HF_7B | rope)
    with pytest.raises(ConfigError, match=message):
        MistralConfig.from_hf(HF_7B | rope | change)


def test_scaled_rope_in_params_json_is_rejected() -> None:
    for section in ({"rope_scaling": {"factor": 2.0}}, {"llama_4_scaling": {"beta": 0.1}}):
        with pytest.raises(ConfigError, match=rf"\(section '{next(iter(section))}'\)"):
            MistralConfig.from_raw(RAW_7B | section)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 2e5},
        {"rope_parameters": {}, "rope_theta": 2e5},
    ],
)
def test_rope_theta_equals_that_of_transformers(rope: dict[str, Any]) -> None:
    """Contradicting values give the value of transformers 5 and a note, or an error."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is absent")
    contents = without(HF_7B, "rope_theta", "model_type", "architectures") | rope
    theirs = transformers.MistralConfig(**copy.deepcopy(contents)).rope_parameters["rope_theta"]
    try:
        ours = MistralConfig.from_hf(contents)
    except ConfigError as error:
        assert "must be equal" in str(error)
    else:
        assert ours.rope_theta == theirs
        both = rope.get("rope_theta", theirs) != theirs
        assert any(note.startswith("rope_theta = 500000.0: from") for note in ours.notes) == both


@pytest.mark.parametrize("model_type", ["mistral", "ministral"])
@pytest.mark.parametrize("off", [True, False, None])
def test_use_sliding_window_is_ignored_as_in_transformers(model_type: str, off: Any) -> None:
    """Compare the logits of a text longer than the window."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is absent")
    contents = HF_7B | {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "model_type": model_type,
        "sliding_window": 5,
        "use_sliding_window": off,
    }
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**copy.deepcopy(contents)), dtype=torch.float32
    ).eval()
    ours = MistralForCausalLM(MistralConfig.from_hf(contents))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(50, (1, 23))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    notes = [note for note in ours.config.notes if note.startswith("sliding_window")]
    rule = "transformers ignores use_sliding_window = false for model_type"
    assert notes == ([f"sliding_window = 5: {rule} '{model_type}'"] if off is False else [])


def test_with_replaced_changes_only_fields_without_weights() -> None:
    config = MistralConfig()
    changed = config.with_replaced(sliding_window=None, rope_theta=1e6, vocab_size=32000)
    assert changed == dataclasses.replace(config, sliding_window=None, rope_theta=1e6)
    with pytest.raises(ConfigError, match=r"^num_hidden_layers must be 32, which the checkpoint"):
        config.with_replaced(num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"^sliding_window must be"):
        config.with_replaced(sliding_window=0)
    for name in ("foo", "notes", "dtype"):
        message = f"^unexpected keyword '{name}'; fields are sliding_window, rope_theta, "
        with pytest.raises(TypeError, match=message):
            config.with_replaced(**{name: ()})
