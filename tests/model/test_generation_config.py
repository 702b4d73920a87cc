"""The settings of `generate`: where they come from, which are refused, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.generating import CONFIG, DETAILS, NEW, VOCAB, WIDTH, batch, penalize_last
from support.small_checkpoints import varied_model

from mistral_kernels import MistralForCausalLM
from mistral_kernels.checkpoint import CheckpointError
from mistral_kernels.model.generation_config import IGNORED, UNSUPPORTED, GenerationConfig
from mistral_kernels.tokenizer import TokenizerOutput
from mistral_kernels.utils.unsupported import TRANSFORMERS


@pytest.fixture
def model() -> MistralForCausalLM:
    return varied_model(CONFIG)


# Settings of the model, of the call and of the arguments


def test_settings_of_the_folder_are_the_defaults(tmp_path: Path) -> None:
    model = varied_model(CONFIG)
    model.save_pretrained(tmp_path / "model")
    written = tmp_path / "model" / "generation_config.json"
    written.write_text(
        '{"do_sample": true, "temperature": 0.3, "top_k": 7, "eos_token_id": [2, 9], "max_length": '
        '30, "transformers_version": "5.0", "_from_model_config": true, "own": 1, "top_p": null}'
    )
    model = MistralForCausalLM.from_pretrained(tmp_path / "model")
    settings = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 7,
        "eos_token_id": [2, 9],
        "max_length": 30,
        "bos_token_id": 1,
    }
    assert model.generation_config.to_dict() == settings
    assert model.generation_config.pad_token_id is None
    out: Any = model.generate([[5]], min_new_tokens=29, **DETAILS)
    assert len(out.sequences[0]) == 30
    assert {int(x.isfinite().sum()) for x in out.scores} == {7}
    top = out.logits[0][0].index_fill(0, torch.tensor([2, 9]), -torch.inf).topk(7)
    torch.testing.assert_close(out.scores[0][0, top.indices], top.values / 0.3)
    # Arguments replace the settings, also by None. A saved model keeps the settings.
    out = model.generate([[5]], max_new_tokens=3, top_k=None, eos_token_id=None, **DETAILS)
    assert {int(x.isfinite().sum()) for x in out.scores} == {VOCAB}
    model.generation_config.pad_token_id = 4
    model.save_pretrained(tmp_path / "again")
    again = MistralForCausalLM.from_pretrained(tmp_path / "again").generation_config
    assert again.to_dict() == {**settings, "pad_token_id": 4}


def test_a_saved_model_keeps_the_settings_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = varied_model(CONFIG)
    settings = {"do_sample": True, "top_p": 0.8, "eos_token_id": [4, 5], "num_beams": 3}
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(tmp_path / "model")
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "model").to_diff_dict()
    assert {name: read[name] for name in settings} == settings


def test_generation_config_may_be_ours_or_theirs_or_a_dict(model: MistralForCausalLM) -> None:
    transformers = pytest.importorskip("transformers")
    free = model.generate([[5, 6]], max_new_tokens=NEW, eos_token_id=None)[0]
    settings: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "top_k": 3}
    for config in (
        settings,
        GenerationConfig(**settings),
        transformers.GenerationConfig(**settings),
    ):
        model.generation_config.eos_token_id = VOCAB - 1
        for call in ({}, {"eos_token_id": None}, {"max_new_tokens": 4, "eos_token_id": free[3]}):
            expected = model.generate([[5, 6]], **{"max_new_tokens": 7, **call})
            assert model.generate([[5, 6]], generation_config=config, **call) == expected
        model.generation_config = config
        assert model.generate([[5, 6]], eos_token_id=None) == [free[:9]]
        out: Any = model.generate([[5, 6]], do_sample=True, eos_token_id=None, **DETAILS)
        assert {int(x.isfinite().sum()) for x in out.scores} == {3}
        model.generation_config = GenerationConfig(eos_token_id=2)


def test_a_model_takes_its_tokens_from_its_configuration(model: MistralForCausalLM) -> None:
    assert repr(model.generation_config) == "GenerationConfig(bos_token_id=1, eos_token_id=2)"
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    prompts = batch()
    free: Any = model.generate(**prompts, max_new_tokens=NEW, eos_token_id=None)
    model.generation_config.eos_token_id = int(free[0, WIDTH])
    out: Any = model.generate(**prompts, max_new_tokens=NEW)
    assert (out[0, WIDTH + 1 :] == 2).all()
    assert torch.equal(
        model.generate(**prompts, max_new_tokens=NEW, eos_token_id="config"),
        model.generate(**prompts, max_new_tokens=NEW, eos_token_id=2),
    )


# Arguments that are not offered, and bad input

REFUSED: list[tuple[str, Any, str]] = [
    ("num_beams", 4, f"num_beams must be None or 1, got 4; {TRANSFORMERS}"),
    ("penalty_alpha", 0.6, f"penalty_alpha must be None or 0.0 or 0, got 0.6; {TRANSFORMERS}"),
    (
        "prompt_lookup_num_tokens",
        3,
        f"prompt_lookup_num_tokens must be None, got 3; {TRANSFORMERS}",
    ),
    ("constraints", [1], f"constraints must be None, got [1]; {TRANSFORMERS}"),
    (
        "assistant_model",
        torch.nn.Linear(2, 2).requires_grad_(False),
        f"assistant_model must be None, got Linear(in_features=2, out_features=2, bias=True); {TRANSFORMERS}",  # noqa: E501
    ),
    (
        "assistant_model",
        torch.nn.Sequential(torch.nn.Identity()),
        f"assistant_model must be None, got Sequential; {TRANSFORMERS}",
    ),
    (
        "no_repeat_ngram_size",
        2,
        "no_repeat_ngram_size must be None or 0, got 2; "
        "pass logits_processor=[transformers.NoRepeatNGramLogitsProcessor(...)]",
    ),
    (
        "bad_words_ids",
        [[5]],
        "bad_words_ids must be None, got [[5]]; "
        "pass logits_processor=[transformers.NoBadWordsLogitsProcessor(...)]",
    ),
    (
        "encoder_repetition_penalty",
        1.5,
        "encoder_repetition_penalty must be None or 1.0 or 1, got 1.5; "
        "pass logits_processor=[transformers.EncoderRepetitionPenaltyLogitsProcessor(...)]",
    ),
    (
        "output_attentions",
        True,
        f"output_attentions must be None or False, got True; {TRANSFORMERS}",
    ),
    (
        "past_key_values",
        (),
        "past_key_values must be None, got (); call stream with cache=model.new_cache(...)",
    ),
    (
        "inputs_embeds",
        torch.zeros(1, 4, 8),
        f"inputs_embeds must be None, got Tensor; give input_ids, or {TRANSFORMERS}",
    ),
    (
        "token_type_ids",
        [[0]],
        "token_type_ids must be None, got [[0]]; leave it out: Mistral has no token types",
    ),
    (
        "cache_implementation",
        "quantized",
        "cache_implementation must be None or 'dynamic' or 'static' or 'offloaded' or "
        f"'offloaded_static' or 'hybrid' or 'sliding_window', got 'quantized'; {TRANSFORMERS}",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_arguments_that_are_not_offered_are_refused_by_name(
    name: str, value: Any, message: str, model: MistralForCausalLM
) -> None:
    """They are refused as arguments, in a configuration, and in the model's configuration."""
    with pytest.raises(NotImplementedError) as error:
        model.generate([[5]], **{name: value})
    assert str(error.value) == message
    with pytest.raises(NotImplementedError) as error:
        model.generate([[5]], generation_config={name: value})
    assert str(error.value) == message
    setattr(model.generation_config, name, value)
    with pytest.raises(NotImplementedError) as error:
        model.generate([[5]])
    assert str(error.value) == message
    assert model.generate([[5]], **{name: None})


def test_values_without_effect_pass(model: MistralForCausalLM) -> None:
    expected = model.generate([[5]], max_new_tokens=2)
    for name, known in UNSUPPORTED.items():
        for value in known.without_effect:
            assert model.generate([[5]], max_new_tokens=2, **{name: value}) == expected
            GenerationConfig(**{name: value})
    unused: dict[str, Any] = dict.fromkeys(IGNORED, 1) | {"typical_p": 0.5, "top_h": 0.5}
    assert model.generate([[5]], max_new_tokens=2, **unused) == expected
    with pytest.raises(NotImplementedError, match=r"^typical_p must be None or 1.0 or 1, got 0.5"):
        model.generate([[5]], do_sample=True, typical_p=0.5)
    assert model.generate([[5]], max_new_tokens=2, do_sample=True, penalty_alpha=0.6)


def test_every_argument_of_transformers_is_known() -> None:
    """The processors that messages name exist in transformers."""
    transformers = pytest.importorskip("transformers")
    known = set(GenerationConfig.__annotations__) | UNSUPPORTED.keys() | IGNORED
    assert not set(vars(transformers.GenerationConfig())) - known
    for name, refused in UNSUPPORTED.items():
        if "logits_processor=[" in refused.remedy:
            found = refused.remedy.removeprefix("pass logits_processor=[transformers.")
            assert hasattr(transformers, found.removesuffix("(...)]")), name


BAD: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"max_tokens": 5}, "generate() got an unexpected argument 'max_tokens'"),
    (TypeError, {"do_sample": "yes"}, "do_sample must be True or False, got str"),
    (TypeError, {"max_length": 5.0}, "max_length must be an integer >= 0, got float"),
    (
        ValueError,
        {"max_length": 2},
        "max_length must be > 2, the length of the prompt, got 2; set max_new_tokens",
    ),
    (TypeError, {"min_new_tokens": "1"}, "min_new_tokens must be an integer >= 0, got str"),
    (ValueError, {"min_length": -1}, "min_length must be >= 0, got -1"),
    (ValueError, {"max_time": -0.5}, "max_time must be >= 0, got -0.5"),
    (
        ValueError,
        {"num_return_sequences": 2},
        "num_return_sequences must be 1 with do_sample=False, got 2; set do_sample=True",
    ),
    (
        ValueError,
        {"num_return_sequences": 0, "do_sample": True},
        "num_return_sequences must be >= 1, got 0",
    ),
    (
        ValueError,
        {"stop_strings": "x"},
        "tokenizer must be given with stop_strings, got None",
    ),
    (
        ValueError,
        {"stop_strings": ["x", ""], "tokenizer": 1},
        "stop_strings must not contain an empty string",
    ),
    (
        TypeError,
        {"stop_strings": [5], "tokenizer": 1},
        "stop_strings must be a string or a list of strings, got list",
    ),
    (
        TypeError,
        {"logits_processor": penalize_last},
        "logits_processor must be a list of functions, got function",
    ),
    (
        TypeError,
        {"stopping_criteria": [5]},
        "stopping_criteria must be a list of functions, got list",
    ),
    (
        TypeError,
        {"generation_config": "greedy"},
        "generation_config must be a GenerationConfig or a dict, got str",
    ),
    (TypeError, {"pad_token_id": [5]}, "pad_token_id must be an integer in "),
    (ValueError, {"inputs": [[5]]}, "inputs must be None if input_ids is given; give one of them"),
    (
        TypeError,
        {"logits_processor": [lambda ids, scores: None], "min_new_tokens": 2},
        "logits_processor[0] must return a tensor, got NoneType",
    ),
    (
        ValueError,
        {"logits_processor": [lambda ids, scores: scores, lambda ids, scores: scores[0]]},
        f"logits_processor[1] must return scores of shape (1, {VOCAB}), got ({VOCAB},)",
    ),
    (
        ValueError,
        {"logits_processor": [lambda ids, scores: scores - torch.inf]},
        "logits_processor must leave a token with a finite score, got none in text 0 after 0 new "
        "tokens",
    ),
    (
        TypeError,
        {"stopping_criteria": [lambda ids, scores: None]},
        "stopping_criteria[0] must return a bool or a tensor (1,), got NoneType",
    ),
    (
        TypeError,
        {"stopping_criteria": [lambda ids, scores: torch.zeros(2)]},
        "stopping_criteria[0] must return a bool or a tensor (1,), got (2,)",
    ),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_bad_arguments_raise_one_line(
    kind: type[Exception], options: dict[str, Any], message: str, model: MistralForCausalLM
) -> None:
    with pytest.raises(kind) as error:
        model.generate([[5, 6]], **options)
    assert str(error.value).startswith(message)
    assert str(error.value) == message or "pad_token_id" in options
    with pytest.raises(TypeError, match=r"GenerationConfig\(\) got an unexpected argument 'max_t"):
        GenerationConfig(max_tokens=5)


def test_a_prompt_that_fills_the_positions_needs_max_new_tokens(model: MistralForCausalLM) -> None:
    full = CONFIG.max_position_embeddings
    assert len(model.generate([[5] * (full - 3)], eos_token_id=None)[0]) == full
    assert len(model.generate([[5] * full], max_new_tokens=2, eos_token_id=None)[0]) == full + 2
    with pytest.raises(ValueError, match=r"max_new_tokens must be given for a prompt of max_posit"):
        model.generate([[5] * full])


def test_the_output_of_a_tokenizer_is_a_prompt(model: MistralForCausalLM) -> None:
    """The mask is used. Model cards for transformers 4 pass what apply_chat_template returns."""
    ids = torch.tensor([[9, 9, 5], [6, 7, 8]])
    inputs: Any = TokenizerOutput(input_ids=ids, attention_mask=torch.tensor([[0, 0, 1], [1] * 3]))
    expected = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(inputs, max_new_tokens=4), expected)  # type: ignore[arg-type]
    assert torch.equal(model.generate(inputs=inputs, max_new_tokens=4), expected)  # type: ignore
    lists = TokenizerOutput(input_ids=[[5], [6, 7, 8]], attention_mask=[[1], [1, 1, 1]])
    new = [row[-4:] for row in expected.tolist()]  # type: ignore[union-attr]
    assert [row[-4:] for row in model.generate(lists, max_new_tokens=4)] == new
    lists["input_ids"][0], lists["attention_mask"][0] = [9, 9, 5], [0, 0, 1]
    with pytest.raises(ValueError, match=r"^attention_mask must be None if input_ids is a"):
        model.generate(lists)
    with pytest.raises(
        ValueError, match=r"^input_ids must be a key of the given dict, got \['a'\]"
    ):
        model.generate({"a": 1})


def test_from_pretrained_reads_the_file(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text('{"top_k": 7, "eos_token_id": [2, 9], "transformers_version": "5.0", "own": 1}')
    read = GenerationConfig.from_pretrained(tmp_path, top_k=5, local_files_only=True)
    assert read.to_dict() == {"top_k": 5, "eos_token_id": [2, 9]}
    with pytest.raises(TypeError, match=r"got an unexpected argument 'topk'"):
        GenerationConfig.from_pretrained(tmp_path, topk=5)
    file.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"eos_token_id must be an integer or .*, got '</s>'"):
        GenerationConfig.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        GenerationConfig.from_pretrained(tmp_path)
    assert str(caught.value) == f"no such file: {file}; make a GenerationConfig(...) instead"
