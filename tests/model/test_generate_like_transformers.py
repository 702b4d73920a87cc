"""`generate` with transformers' arguments: the same tokens, scores and calls as transformers."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.generating import (
    CONFIG,
    DETAILS,
    NEW,
    PAD,
    VOCAB,
    WIDTH,
    assert_same_output,
    batch,
    penalize_last,
    theirs_generate,
    transformers_model,
)
from support.graph_stand_in import GraphStandIn
from support.small_checkpoints import varied_model
from support.tokenizer_cases import train_json
from torch import Tensor

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.model.generate import GenerateOutput


@pytest.fixture
def model() -> MistralForCausalLM:
    return varied_model(CONFIG)


@pytest.fixture
def theirs(model: MistralForCausalLM) -> Any:
    return transformers_model(model)


def change_in_place(ids: Tensor, scores: Tensor) -> Tensor:
    scores[:, ids.shape[1] % 7 :: 7] = -torch.inf
    return scores


# `with_eos` replaces EOS by two tokens, each from the middle of one of the texts.
EOS: Any = object()
BASE = {"max_new_tokens": NEW, "eos_token_id": EOS}


def at_multiples_of_six(ids: Tensor, scores: Any) -> Tensor:
    return ids[:, -1] % 6 == 0


def after_three_scores(ids: Tensor, scores: tuple[Tensor, ...]) -> bool:
    return len(scores) >= 3 and bool((scores[-1].amax(-1) > 0).all())


CASES: dict[str, dict[str, Any]] = {
    "no EOS tokens": {"eos_token_id": None},
    "two EOS tokens": {},
    "padding": {"pad_token_id": PAD},
    "the default length": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": WIDTH + 6},
    "max_new_tokens and max_length": {"max_length": WIDTH + 6},
    "min_new_tokens": {"min_new_tokens": 9},
    "min_length": {"min_length": WIDTH + 9},
    "both minima": {"min_new_tokens": 2, "min_length": 99},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "a processor": {"logits_processor": [penalize_last]},
    "two processors and a penalty": {
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
        "logits_processor": [change_in_place, penalize_last],
    },
    "a criterion for each text": {"stopping_criteria": [at_multiples_of_six]},
    "a criterion without EOS tokens": {
        "eos_token_id": None,
        "stopping_criteria": [at_multiples_of_six],
    },
    "a criterion for all texts": {
        "stopping_criteria": [lambda ids, scores: ids.shape[1] >= WIDTH + 4]
    },
    "a criterion on scores": {"stopping_criteria": [after_three_scores]},
    "settings of sampling": {
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": 0.3,
        "min_p": 0.1,
    },
    "settings of beams": {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    "use_cache": {"use_cache": True},
}


def with_eos(model: MistralForCausalLM, options: dict[str, Any], prompts: Any) -> dict[str, Any]:
    if options["eos_token_id"] is not EOS:
        return options
    free = {k: v for k, v in options.items() if not k.startswith(("max_", "min_l", "stopping"))}
    new: Any = model.generate(**prompts, **{**free, "eos_token_id": None, "max_new_tokens": NEW})
    return {**options, "eos_token_id": [int(new[0, WIDTH + 3]), int(new[-1, WIDTH + 8])]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
def test_greedy_output_equals_transformers(
    case: str, model: MistralForCausalLM, theirs: Any
) -> None:
    """The prompts are padded on the left. The plain call returns the same tokens."""
    prompts = batch()
    options = with_eos(model, {**BASE, **CASES[case]}, prompts)
    ours: Any = model.generate(**prompts, **options, **DETAILS)
    assert_same_output(ours, theirs_generate(theirs, **prompts, **options, **DETAILS))
    if case != "a criterion on scores":  # without `output_scores`, it gets None
        assert torch.equal(model.generate(**prompts, **options), ours.sequences)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 0, "min_p": 0.02},
        {"top_k": None, "top_p": None, "temperature": None},
        {
            "temperature": 2.0,
            "top_k": 40,
            "top_p": 0.8,
            "min_p": 0.01,
            "repetition_penalty": 1.4,
            "min_new_tokens": 1,
            "eos_token_id": [5, 6],
            "logits_processor": [penalize_last],
        },
    ],
    ids=lambda options: " ".join(options) or "the 50 most likely tokens",
)
def test_scores_of_sampled_tokens_equal_transformers(
    options: dict[str, Any], model: MistralForCausalLM, theirs: Any
) -> None:
    """Compare one step: the second depends on the draw."""
    options = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": PAD, **DETAILS, **options}
    prompts = batch()
    ours: Any = model.generate(**prompts, **options)
    expected = theirs_generate(theirs, **prompts, **options).scores[0]
    (actual,) = ours.scores
    # Rounding may move one token across the bound of top_p or min_p.
    both = actual.isfinite() & expected.isfinite()
    torch.testing.assert_close(actual[both], expected[both], atol=2e-3, rtol=2e-3)
    assert ((actual.isfinite() != expected.isfinite()).sum(dim=1) <= 1).all()
    assert actual.isfinite().gather(1, ours.sequences[:, -1:]).all()
    if options.get("top_k", 50) == 50 and len(options) == 6:
        assert actual.isfinite().sum(dim=1).tolist() == [50, 50, 50]


def test_lists_are_processed_as_if_padded_on_the_left(model: MistralForCausalLM) -> None:
    padded = batch()
    prompts = [
        row[keep.bool()].tolist()
        for row, keep in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    seen: list[Tensor] = []
    options: dict[str, Any] = {
        "max_length": WIDTH + 5,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "logits_processor": [lambda ids, scores: seen.append(ids) or penalize_last(ids, scores)],
    }
    tensor: Any = model.generate(**padded, **options)
    from_tensor, seen[:] = list(seen), []
    listed = model.generate(prompts, **options)
    assert listed == [
        prompt + row for prompt, row in zip(prompts, tensor[:, WIDTH:].tolist(), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(seen, from_tensor, strict=True))
    assert [ids.shape for ids in seen] == [(3, WIDTH + i) for i in range(5)]


def test_padding_is_recognized_by_its_token(model: MistralForCausalLM, theirs: Any) -> None:
    """A pad token that is also an EOS token is not recognized, as in transformers."""
    prompts = batch()
    ids, options = prompts["input_ids"], {"max_new_tokens": 6, **DETAILS}
    for pad, eos in ((PAD, 2), (PAD, PAD), (None, PAD)):
        tokens = {"pad_token_id": pad, "eos_token_id": eos}
        assert_same_output(
            model.generate(ids, **tokens, **options), theirs.generate(ids, **tokens, **options)
        )
    free: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    masked: Any = model.generate(**prompts, **free)
    assert torch.equal(model.generate(ids, **free, pad_token_id=PAD), masked)


def test_a_call_without_prompt_begins_with_bos(model: MistralForCausalLM) -> None:
    expected = model.generate(torch.tensor([[1]]), max_new_tokens=5)
    assert torch.equal(model.generate(max_new_tokens=5), expected)
    assert torch.equal(model.generate(inputs=torch.tensor([[1]]), max_new_tokens=5), expected)
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="input_ids must be given for a model without a BOS token"):
        model.generate(max_new_tokens=5)


# Processors, criteria and kept scores


def test_steps_of_a_cuda_graph_are_processed_outside_it(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that contained a processor would replay its first result."""
    prompts = batch()
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "eos_token_id": VOCAB,
        "pad_token_id": PAD,
        "repetition_penalty": 1.2,
        "logits_processor": [penalize_last],
        "stopping_criteria": [lambda ids, scores: torch.tensor([4, 7, 9]) + WIDTH <= ids.shape[1]],
    }
    expected: Any = model.generate(**prompts, **options, **DETAILS)
    del options["logits_processor"]
    unprocessed = model.generate(**prompts, **options)
    stand_in = GraphStandIn(monkeypatch)
    assert torch.equal(model.generate(**prompts, **options), unprocessed)
    assert stand_in.captures == 1
    actual: Any = model.generate(**prompts, **options, logits_processor=[penalize_last], **DETAILS)
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.scores + actual.logits, expected.scores + expected.logits, strict=True):
        assert torch.equal(a, b)
    assert (stand_in.captures, actual.sequences.shape[1]) == (2, WIDTH + 9)
    assert (actual.sequences[0, WIDTH + 4 :] == PAD).all()


def test_kept_scores_are_ordinary_tensors(model: MistralForCausalLM) -> None:
    out: Any = model.generate([[5, 6]], max_new_tokens=3, eos_token_id=None, **DETAILS)
    assert isinstance(out, GenerateOutput)
    assert out[0] is out["sequences"] is out.sequences
    assert out[1] is out.scores
    assert out[1:] == (out.scores, out.logits)
    assert len(out.sequences[0]) == 5
    for kept in (*out.scores, *out.logits):
        assert (kept.shape, kept.dtype) == ((1, VOCAB), torch.float32)
        kept.mul_(torch.ones(1, requires_grad=True).detach())  # an inference tensor would raise
    plain: Any = model.generate([[5, 6]], max_new_tokens=3, return_dict_in_generate=True)
    assert (plain.scores, plain.logits, plain.to_tuple()) == (None, None, (plain.sequences,))
    ignored = model.generate([[5, 6]], max_new_tokens=3, eos_token_id=None, output_scores=True)
    assert ignored == out.sequences


def test_a_processor_may_force_a_token(model: MistralForCausalLM) -> None:
    def force(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 9] = torch.inf
        return scores

    for options in ({}, {"do_sample": True}):
        out = model.generate([[5, 6]], max_new_tokens=3, logits_processor=[force], **options)
        assert out == [[5, 6, 9, 9, 9]]


def test_num_return_sequences_samples_several_texts_per_prompt(model: MistralForCausalLM) -> None:
    prompts = batch()
    options: dict[str, Any] = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 9}
    options["temperature"] = 9.0  # no two texts are equal
    out: Any = model.generate(**prompts, **options, num_return_sequences=4)
    assert torch.equal(out[:, :WIDTH], prompts["input_ids"].repeat_interleave(4, 0))
    assert len({tuple(row) for row in out.tolist()}) == 12
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    repeated = {name: x.repeat_interleave(4, 0) for name, x in prompts.items()}
    assert torch.equal(
        model.generate(**prompts, **options, num_return_sequences=4, generator=generators[0]),
        model.generate(**repeated, **options, generator=generators[1]),
    )
    listed = model.generate([[5], [6, 7]], num_return_sequences=2, **options)
    assert [row[: 1 if i < 2 else 2] for i, row in enumerate(listed)] == [[5], [5], [6, 7], [6, 7]]


def test_max_time_ends_all_texts(model: MistralForCausalLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None}
    assert [len(row) for row in model.generate([[5], [6]], max_time=0, **options)] == [2, 2]
    assert [len(row) for row in model.generate([[5], [6]], max_time=3600, **options)] == [10, 10]


# Stop strings and streamers


@pytest.mark.parametrize("byte_level", [False, True])
def test_stop_strings_equal_transformers(byte_level: bool, tmp_path: Path) -> None:
    """The token that completes a stop string is the last one, with either tokenizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    train_json(tmp_path / "tokenizer.json", byte_level)
    tokenizer = MistralTokenizer.from_pretrained(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    model = varied_model(replace(CONFIG, vocab_size=len(fast)))
    theirs = transformers_model(model)
    # transformers matches incomplete characters and added tokens in another way.
    added = set(fast.get_added_vocab().values())
    whole = [
        i
        for token, i in fast.get_vocab().items()
        if i not in added and not token.startswith("<0x") and "\ufffd" not in fast.decode([i])
    ]
    others = sorted(set(range(len(fast))) - set(whole))

    def only_whole(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor(others), -torch.inf)

    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "logits_processor": [only_whole],
    }
    stopped = 0
    for _ in range(6):
        ids = torch.tensor(whole)[torch.randint(len(whole), (2, 5))]
        free: Any = model.generate(ids, **options)
        texts = [tokenizer.decode(row) for row in free[:, 5:]]
        options["stop_strings"] = [text[len(text) // 2 :][:3] for text in texts]
        options |= {"attention_mask": torch.ones_like(ids), **DETAILS}
        expected = theirs_generate(theirs, inputs=ids, tokenizer=fast, **options)
        for each in (tokenizer, fast):
            ours: Any = model.generate(ids, tokenizer=each, **options)
            assert_same_output(ours, expected)
        stopped += ours.sequences.shape[1] < 5 + NEW
        options = {name: options[name] for name in options if name not in DETAILS}
        del options["stop_strings"], options["attention_mask"]
    assert stopped


def test_a_text_ends_with_the_token_that_completes_a_stop_string() -> None:
    model, tokenizer = (
        kind.from_pretrained("tiny") for kind in (MistralForCausalLM, MistralTokenizer)
    )
    prompt = tokenizer.encode("He was not at all")
    free = model.generate([prompt], max_new_tokens=NEW)[0]
    for stop in ("way", " way", "e wa", ["xyz", "to", "way to"]):
        (row,) = model.generate(
            [prompt], max_new_tokens=NEW, stop_strings=stop, tokenizer=tokenizer
        )
        strings = [stop] if isinstance(stop, str) else stop
        assert free[: len(row)] == row
        assert len(row) < len(free)
        shown, before = (tokenizer.decode(free[len(prompt) : n]) for n in (len(row), len(row) - 1))
        assert any(each in shown for each in strings)
        assert not any(each in before for each in strings)
    # The prompt alone does not end a text; a string that begins in it does.
    (row,) = model.generate([prompt], max_new_tokens=NEW, stop_strings="not", tokenizer=tokenizer)
    assert row == free
    (row,) = model.generate([prompt], max_new_tokens=9, stop_strings="all in", tokenizer=tokenizer)
    assert tokenizer.decode(row) == "<s>He was not at all in"


class Recorder:
    """Streamer that records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        assert value.dtype == torch.int64
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


def test_streamers_get_the_prompts_and_each_step(model: MistralForCausalLM, theirs: Any) -> None:
    prompts = batch()
    free: Any = model.generate(**prompts, max_new_tokens=NEW, eos_token_id=None)
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "eos_token_id": int(free[0, WIDTH + 4]),
        "pad_token_id": PAD,
    }
    recorder = Recorder()
    out: Any = model.generate(**prompts, **options, streamer=recorder)
    columns = out[:, WIDTH:].T.tolist()
    assert recorder.calls == [prompts["input_ids"].tolist(), *columns, "end"]
    expected = Recorder()
    details: Any = theirs.generate(**prompts, **options, streamer=expected, **DETAILS)
    assert_same_output(model.generate(**prompts, **options, **DETAILS), details)
    if torch.equal(details.sequences, out):
        assert recorder.calls == expected.calls
    recorder = Recorder()
    row = model.generate([[5, 6]], max_new_tokens=2, eos_token_id=None, streamer=recorder)[0]
    assert recorder.calls == [[[5, 6]], [row[2]], [row[3]], "end"]


def test_streamers_are_not_ended_by_an_error(model: MistralForCausalLM) -> None:
    class Failing(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.calls) == 3:
                raise OSError("closed")

    recorder = Failing()
    with pytest.raises(OSError, match="closed"):
        model.generate([[5, 6]], max_new_tokens=5, eos_token_id=None, streamer=recorder)
    assert len(recorder.calls) == 3
    assert "end" not in recorder.calls


def test_text_streamers_of_transformers_get_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = (
        kind.from_pretrained("tiny") for kind in (MistralForCausalLM, MistralTokenizer)
    )
    inputs = tokenizer(["He was not at all"], return_tensors="pt")
    out: Any = model.generate(**inputs, max_new_tokens=9)
    text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, max_new_tokens=9, streamer=streamer)
    assert capsys.readouterr().out.strip() == text.strip()
    pieces = transformers.TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "max_new_tokens": 9, "streamer": pieces}
    )
    thread.start()
    assert "".join(pieces) == tokenizer.decode(out[0], skip_special_tokens=True)
    thread.join()
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        model.generate([[5], [6]], streamer=transformers.TextStreamer(tokenizer))
