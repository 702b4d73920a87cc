"""MistralConfig: both file formats, their variants, and configurations that are rejected."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_kernels.model.config import ConfigError, MistralConfig
from mistral_kernels.utils.unsupported import TRANSFORMERS

# The published params.json of 7B v0.1 and of Nemo. In Nemo, head_dim * n_heads != dim.
RAW_7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
RAW_NEMO = RAW_7B | {
    "dim": 5120,
    "n_layers": 40,
    "vocab_size": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "max_seq_len": 128000,
}
HF_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def without(contents: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in contents.items() if key not in names}


def test_defaults_are_those_of_7b_in_both_formats() -> None:
    assert MistralConfig.from_raw(RAW_7B) == MistralConfig.from_hf(HF_7B) == MistralConfig()


def test_nemo_params_json() -> None:
    config = MistralConfig.from_raw(RAW_NEMO)
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (5120, 128, 32)
    assert config.layer_windows == (None,) * 40
    assert config.max_position_embeddings == 128000
    assert config.notes == ()


@pytest.mark.parametrize(
    ("written", "windows"),
    [
        (4096, (4096, 4096, 4096, 4096)),
        (4096.0, (4096, 4096, 4096, 4096)),
        ("4096", (4096, 4096, 4096, 4096)),
        (None, (None, None, None, None)),
        ("null", (None, None, None, None)),
        (" None ", (None, None, None, None)),
        ("", (None, None, None, None)),
        ([7], (7, 7, 7, 7)),
        ([None, 8], (None, 8, None, 8)),
        (["null", "8", 9], (None, 8, 9, None)),
        ([1, 2, 3, 4, 5], (1, 2, 3, 4)),
    ],
)
@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_forms_of_sliding_window_in_raw_files(
    key: str, written: Any, windows: tuple[int | None, ...]
) -> None:
    params = without(RAW_7B, "sliding_window") | {"n_layers": 4, key: written}
    assert MistralConfig.from_raw(params).layer_windows == windows


def test_raw_file_without_sliding_window_has_no_window() -> None:
    params = without(RAW_7B, "sliding_window")
    assert MistralConfig.from_raw(params).sliding_window is None


def test_hf_file_without_sliding_window_has_transformers_default() -> None:
    assert MistralConfig.from_hf(without(HF_7B, "sliding_window")).sliding_window == 4096
    assert MistralConfig.from_hf(HF_7B | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    "written", ["wide", {}, [[7]], [], 4.5, True, float("inf"), "4096.5", 0, -1, [7, 0]]
)
def test_malformed_windows_are_rejected(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"sliding_window(\[0\])? must"):
        MistralConfig.from_raw(RAW_7B | {"sliding_window": written})
    with pytest.raises(ConfigError, match=r"sliding_window(\[0\])? must"):
        MistralConfig.from_hf(HF_7B | {"sliding_window": written})


@pytest.mark.parametrize(("window", "theta"), [(4096, 1e4), (None, 1e6), ([None, 8], 1e4)])
def test_absent_rope_theta_depends_on_the_window(window: Any, theta: float) -> None:
    config = MistralConfig.from_raw(RAW_7B | {"sliding_window": window})
    assert config.rope_theta == theta
    note = next(note for note in config.notes if note.startswith("rope_theta"))
    assert str(theta) in note
    assert "not in params.json" in note


@pytest.mark.parametrize("window", [4096, None])
def test_given_rope_theta_is_kept(window: int | None) -> None:
    params = RAW_7B | {"sliding_window": window, "rope_theta": 12345}
    config = MistralConfig.from_raw(params)
    assert config.rope_theta == 12345.0
    assert not any(note.startswith("rope_theta") for note in config.notes)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},  # transformers 4
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},  # transformers 5
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    ],
)
def test_rope_theta_in_hf_files(rope: dict[str, Any]) -> None:
    config = MistralConfig.from_hf(without(HF_7B, "rope_theta") | rope)
    assert config.rope_theta == 5e5


@pytest.mark.parametrize(
    ("rope_theta", "expected"),
    [
        *((value, "a number or null") for value in ("many", [1e4], True, math.nan, math.inf)),
        *((value, "a positive number") for value in (0, -1.0)),
    ],
)
def test_malformed_rope_theta_is_rejected(rope_theta: Any, expected: str) -> None:
    message = re.escape(f"rope_theta must be {expected}, got {rope_theta!r}")
    for parse, contents in ((MistralConfig.from_raw, RAW_7B), (MistralConfig.from_hf, HF_7B)):
        with pytest.raises(ConfigError, match=message):
            parse(contents | {"rope_theta": rope_theta})
    with pytest.raises(ConfigError, match="rope_theta must be a positive number, got"):
        MistralConfig(rope_theta=rope_theta)


def test_every_inferred_value_has_a_note() -> None:
    bare = without(RAW_7B, "head_dim", "n_kv_heads", "norm_eps")
    config = MistralConfig.from_raw(bare)
    inferred = {note.split(" = ")[0] for note in config.notes}
    assert inferred == {
        "n_kv_heads",
        "head_dim",
        "norm_eps",
        "rope_theta",
        "max_position_embeddings",
    }
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (32, 128, 1e-5)


def test_absent_keys_have_transformers_defaults() -> None:
    transformers = pytest.importorskip("transformers")
    names = ("rms_norm_eps", "num_key_value_heads", "eos_token_id", "bos_token_id", "head_dim")
    short = without(HF_7B, *names)
    ours, theirs = MistralConfig.from_hf(short), transformers.MistralConfig(**short)
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    null = short | {"num_key_value_heads": None, "head_dim": None}
    assert MistralConfig.from_hf(null).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("section", "contents", "feature"),
    [
        ("moe", {"num_experts": 8}, "a mixture of experts"),
        ("vision_encoder", {"hidden_size": 1024}, "a vision encoder"),
        ("quantization", {"qformat_weight": "fp8_e4m3"}, "quantized weights"),
        ("yarn", {"factor": 16}, "YaRN-scaled rotary embeddings"),
        ("lora", {"rank": 64}, "LoRA adapters"),
    ],
)
def test_unsupported_raw_sections_are_rejected(
    section: str, contents: dict[str, Any], feature: str
) -> None:
    assert MistralConfig.from_raw(RAW_7B | {section: None}) == MistralConfig()
    with pytest.raises(ConfigError, match=rf"has {feature} \(section '{section}'\)"):
        MistralConfig.from_raw(RAW_7B | {section: contents})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"vision_config": {"depth": 2}}, "a vision encoder"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ({"model_type": "llama"}, "model_type must be 'mistral' or 'ministral', got 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_type must be 'default', got 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            re.escape(f"rope_type must be 'default', got 'yarn'; {TRANSFORMERS}"),
        ),
        (
            {"layer_types": ["full_attention"]},
            "layer_types must have one entry per layer, 32, got 1",
        ),
        ({"layer_types": ["chunked_attention"] * 32}, r"got \['chunked_attention'\]"),
    ],
)
def test_unsupported_hf_configurations_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MistralConfig.from_hf(HF_7B | change)


SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}


@pytest.mark.parametrize(("raw_name", "hf_name"), SIZES.items())
@pytest.mark.parametrize("value", [0, -1, "4096", 2.5, True, [], {}, 2**62, 2**64])
def test_malformed_sizes_are_rejected(raw_name: str, hf_name: str, value: Any) -> None:
    """The message contains the key of the file's own format."""
    fits = type(value) is int and value < 2**63
    expected = "an integer from 1 to [0-9]+" if fits else "an integer or null"
    raw, hf = without(RAW_7B, "head_dim", "n_kv_heads"), without(HF_7B, "num_key_value_heads")
    for name, parse, contents in (
        (raw_name, MistralConfig.from_raw, raw),
        (hf_name, MistralConfig.from_hf, hf),
    ):
        message = f"^{name} must be {expected}, got {re.escape(repr(value))}$"
        with pytest.raises(ConfigError, match=message):
            parse(contents | {name: value})
        with pytest.raises(ConfigError, match=f"(params|config).json has no '{name}'"):
            parse(without(contents, name))
    with pytest.raises(ConfigError, match=f"{hf_name} must be an integer from 1 to [0-9]+, got"):
        MistralConfig(**{hf_name: value})


def test_inconsistent_heads_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"\(32\) must be a multiple of .* \(5\)"):
        MistralConfig(num_key_value_heads=5)
    with pytest.raises(ConfigError, match="head_dim must be even"):
        MistralConfig(head_dim=127)
    with pytest.raises(ConfigError, match="must have a head_dim unless dim is a multiple of"):
        MistralConfig.from_raw(without(RAW_7B, "head_dim") | {"dim": 4100})


def test_eos_token_id_may_be_a_number_a_list_or_null() -> None:
    for given_id, ids in [(2, (2,)), ([2, 28], (2, 28)), (None, ())]:
        config = MistralConfig.from_hf(HF_7B | {"eos_token_id": given_id})
        assert config.eos_token_ids == ids
        assert config.to_hf("float32")["eos_token_id"] == given_id


def test_equal_windows_compare_equal() -> None:
    plain = MistralConfig(sliding_window=8)
    assert MistralConfig(sliding_window=(8,)) == plain
    assert MistralConfig(sliding_window=(8, 8, 8)) == plain
    pattern = MistralConfig(sliding_window=(None, 8))
    assert pattern == MistralConfig(sliding_window=[None, 8])  # type: ignore[arg-type]
    assert pattern == MistralConfig(sliding_window=(None, 8) * 16)
    assert hash(pattern) == hash(MistralConfig(sliding_window=(None, 8) * 16))
    assert pattern != plain


def test_mixed_windows_are_written_as_ministral() -> None:
    contents = MistralConfig(sliding_window=(None, 8), num_hidden_layers=3).to_hf("float32")
    assert contents["model_type"] == "ministral"
    assert contents["architectures"] == ["MinistralForCausalLM"]
    assert contents["sliding_window"] == 8
    full, sliding = "full_attention", "sliding_attention"
    assert contents["layer_types"] == [full, sliding, full]
    with pytest.raises(ConfigError, match=r"^sliding_window must have one size .*, got \[7, 8\]"):
        MistralConfig(sliding_window=(7, 8)).to_hf("float32")


sizes = st.integers(1, 2**17)
windows = st.none() | sizes


@st.composite
def configs(draw: st.DrawFn) -> MistralConfig:
    """Draw configurations that both formats can write."""
    kv_heads, window = draw(st.integers(1, 16)), draw(sizes)
    pattern = draw(st.lists(st.sampled_from([None, window]), min_size=1, max_size=6))
    return MistralConfig(
        vocab_size=draw(st.integers(3, 2**17)),  # the default eos_token_id is 2
        hidden_size=draw(sizes),
        intermediate_size=draw(sizes),
        num_hidden_layers=draw(st.integers(1, 48)),
        num_attention_heads=kv_heads * draw(st.integers(1, 8)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 256)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-2)),
        rope_theta=draw(st.floats(1.0, 1e9)),
        sliding_window=tuple(pattern),
        max_position_embeddings=draw(sizes),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(configs())
def test_files_restore_the_configuration(config: MistralConfig) -> None:
    """Convert to JSON and back, in both formats: no value is lost, and no value is inferred."""
    for contents, parse in [
        (config.to_raw(), MistralConfig.from_raw),
        (config.to_hf("bfloat16"), MistralConfig.from_hf),
    ]:
        back = parse(json.loads(json.dumps(contents)))
        assert back == config
        assert back.notes == ()


def test_only_assignments_without_effect_are_accepted() -> None:
    config = MistralConfig()
    for name, accepted in (("use_cache", False), ("use_cache", True), ("pretraining_tp", 1)):
        setattr(config, name, accepted)
    assert config == MistralConfig()
    assert config.__dict__ == MistralConfig().__dict__
    generation = "; set model.generation_config.{}, if it is a setting of generate"
    cases: dict[str, tuple[Any, str]] = {
        "use_cache": (2, generation),
        "pad_token_id": (2, generation),
        "eos_token_id": (7, generation),
        "sliding_window": (None, "; give it to from_pretrained"),
        "hidden_size": (8, "; make another configuration"),
    }
    for name, (value, remedy) in cases.items():
        message = f"config.{name} cannot be set, got {value}{remedy.format(name)}"
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"^{re.escape(message)}$"):
            setattr(config, name, value)


def test_notes_are_not_compared() -> None:
    assert dataclasses.replace(MistralConfig(), notes=("x",)) == MistralConfig()


def test_transformers_reads_our_config_json() -> None:
    transformers = pytest.importorskip("transformers")
    ours = MistralConfig(sliding_window=None, rope_theta=1e6, head_dim=64, eos_token_id=(2, 3))
    theirs = transformers.MistralConfig(**ours.to_hf("bfloat16"))
    assert theirs.rope_parameters["rope_theta"] == 1e6
    assert MistralConfig.from_hf(theirs.to_dict()) == ours


@pytest.mark.parametrize("window", [4096, None])
def test_keys_absent_from_config_json_have_transformers_values(window: int | None) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is absent")
    absent = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads")
    given = without(HF_7B, "rope_parameters", *absent) | {"sliding_window": window}
    ours = MistralConfig.from_hf(given)
    theirs = transformers.MistralConfig(**without(given, "model_type", "architectures"))
    for name in absent[1:]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert {note.split()[0] for note in ours.notes} == {"head_dim", *absent}
