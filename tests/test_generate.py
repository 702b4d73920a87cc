"""Generation: all entry points give the same text, and each setting has its effect."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.graph_stand_in import GraphStandIn
from support.helpers import assert_same_text
from support.small_checkpoints import SMALL, varied_model

from mistral_kernels import GenerationConfig, MistralForCausalLM, MistralTokenizer, Sampler
from mistral_kernels.generate import Completion, generate, stream_generate
from mistral_kernels.text.streaming import _StopText

W = 7
EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> MistralTokenizer:
    return MistralTokenizer.from_pretrained("tiny")


@pytest.fixture
def model() -> MistralForCausalLM:
    return varied_model(dataclasses.replace(SMALL, vocab_size=2048))


class ScriptedModel:
    """Stand-in for a model that "generates" given token ids."""

    def __init__(self, *texts: list[int]) -> None:
        self.texts, self.config = texts, SMALL

    def stream(self, prompts: Any, max_new_tokens: int, **_: Any) -> Iterator[list[int | None]]:
        for i in range(min(max_new_tokens, max(map(len, self.texts)))):
            yield [text[i] if i < len(text) else None for text in self.texts]


def as_bytes(text: str) -> list[int]:
    """Return the byte tokens of a text: sentencepiece's byte fallback, after <unk>, <s>, </s>."""
    return [3 + byte for byte in text.encode()]


def random_ids(n: int) -> list[int]:
    return torch.randint(3, 2048, (n,)).tolist()


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random_ids(n) for n in lengths]


# All entry points


def test_all_entry_points_agree(model: MistralForCausalLM, tokenizer: MistralTokenizer) -> None:
    prompts, new = prompts_of(3, 19, 1), 40
    whole = model.generate(prompts, max_new_tokens=new, eos_token_id=None)
    ids = [row[len(prompt) :] for row, prompt in zip(whole, prompts, strict=True)]
    assert all(len(set(row)) > 5 for row in ids), "the text must be varied"
    steps = list(model.stream(prompts, max_new_tokens=new))
    assert [list(row) for row in zip(*steps, strict=True)] == ids
    options: dict[str, Any] = {"max_tokens": new, "ignore_eos": True}
    completions = generate(model, tokenizer, prompts, **options)
    assert [c.token_ids for c in completions] == ids
    streamed = [Completion() for _ in prompts]
    for delta in stream_generate(model, tokenizer, prompts, **options):
        streamed[delta.index].add(delta)
    assert streamed == completions
    for completion, prompt in zip(completions, prompts, strict=True):
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        after = tokenizer.decode(prompt + completion.token_ids, skip_special_tokens=True)
        # If a character begins in the prompt, the whole text is not the concatenation of its parts.
        if not before.endswith("\ufffd"):
            assert before + completion.text == after
        assert completion.finish_reason == "length"


def test_text_prompts_begin_with_bos(
    model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    texts = ["It is a truth", "x"]
    ids = [tokenizer.encode(text) for text in texts]
    assert all(row[0] == tokenizer.bos_token_id for row in ids)
    options = {"max_tokens": 9}
    by_text = generate(model, tokenizer, texts, **options)
    assert by_text == generate(model, tokenizer, ids, **options)


def test_other_prompts_of_a_batch_do_not_change_a_text(model: MistralForCausalLM) -> None:
    prompts, new = prompts_of(1, 33, W, W + 1, 2), 4 * W
    together = model.generate(prompts, max_new_tokens=new, eos_token_id=None)
    for prompt, row in zip(prompts, together, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(row) == len(prompt) + new
        alone = model.generate([prompt], max_new_tokens=new, eos_token_id=None)
        assert_same_text(alone, [row], model)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_ignored(model: MistralForCausalLM, side: str) -> None:
    prompts, new = prompts_of(4, 21, 11), 2 * W
    expected = model.generate(prompts, max_new_tokens=new, eos_token_id=None)
    ids, mask = torch.full((3, 25), 77), torch.zeros(3, 25, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        gap = 25 - len(prompt)
        start = {"left": gap, "right": 0, "both": gap // 2}[side]
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    out = model.generate(ids, mask, max_new_tokens=new, eos_token_id=None)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == ids.dtype
    assert torch.equal(out[:, :25], ids)
    actual = [prompt + row for prompt, row in zip(prompts, out[:, 25:].tolist(), strict=True)]
    assert_same_text(actual, expected, model)


def test_prefill_chunks_do_not_change_the_text(model: MistralForCausalLM) -> None:
    prompts = prompts_of(31, 2)
    options: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None}
    expected = model.generate(prompts, **options)
    for size in (1, W - 1, W, 2 * W + 3, 100):
        actual = model.generate(prompts, **options, prefill_chunk_size=size)
        assert_same_text(actual, expected, model)
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        model.generate(prompts, prefill_chunk_size=0)


@torch.inference_mode()
def test_a_cache_continues_its_text(model: MistralForCausalLM, tokenizer: MistralTokenizer) -> None:
    first, second = prompts_of(12, 9)
    cache = model.new_cache(1, W)
    model.prefill([first], cache)
    expected = generate(model, tokenizer, [first + second], max_tokens=20, ignore_eos=True)
    actual = generate(model, tokenizer, [second], max_tokens=20, ignore_eos=True, cache=cache)
    whole = [[*first, *second, *text[0].token_ids] for text in (actual, expected)]
    assert_same_text(whole[:1], whole[1:], model)
    assert cache.host_lengths == [12 + 9 + 19], "all tokens except the last one"


# The end of a text


def test_eos_token_id_ends_a_text(model: MistralForCausalLM) -> None:
    prompt = random_ids(5)
    free = model.generate([prompt], max_new_tokens=30, eos_token_id=None)[0][5:]
    ends = [free[3], free[11]]
    first = min(free.index(end) for end in ends)
    for eos, length in (
        (ends[0], free.index(ends[0]) + 1),
        (ends, first + 1),
        ([], 30),
        (None, 30),
    ):
        row = model.generate([prompt], max_new_tokens=30, eos_token_id=eos)[0]
        assert row == prompt + free[:length]
    model.generation_config.eos_token_id = ends
    assert model.generate([prompt], max_new_tokens=30)[0] == prompt + free[: first + 1]
    with pytest.raises(ValueError, match="eos_token_id must be 'config', ids or None, got 'none'"):
        model.generate([prompt], eos_token_id="none")


def test_rows_that_end_early_are_padded(model: MistralForCausalLM) -> None:
    prompts = torch.tensor(prompts_of(6, 6))
    free = model.generate(prompts, max_new_tokens=20, eos_token_id=None)[:, 6:].tolist()
    eos = next(token for token in free[0] if token not in free[1])
    length = free[0].index(eos) + 1
    for pad, fill in ((None, eos), (0, 0), (1, 1)):
        out = model.generate(prompts, max_new_tokens=20, eos_token_id=eos, pad_token_id=pad)
        assert out[0, 6:].tolist() == free[0][:length] + [fill] * (20 - length)
        assert out[1, 6:].tolist() == free[1]
    listed = model.generate(prompts.tolist(), max_new_tokens=20, eos_token_id=eos)
    assert [len(row) for row in listed] == [6 + length, 26]


def test_zero_new_tokens_return_the_prompts(
    model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    prompts = torch.tensor(prompts_of(6, 6))
    assert torch.equal(model.generate(prompts, max_new_tokens=0), prompts)
    (completion,) = generate(model, tokenizer, ["x"], max_tokens=0)
    assert (completion.text, completion.token_ids) == ("", [])


def test_eos_ends_a_text_and_is_not_part_of_it(tokenizer: MistralTokenizer) -> None:
    text = tokenizer.encode(" the end", bos=False)
    script: Any = ScriptedModel([*text, EOS], as_bytes("and so it was"))
    ended, cut = generate(script, tokenizer, ["a", "b"], max_tokens=len(text) + 1)
    assert (ended.text.strip(), ended.finish_reason) == ("the end", "eos")
    assert ended.token_ids == [*text, EOS]
    assert cut.text == "and so it was"[: len(text) + 1]
    assert cut.finish_reason == "length"
    # An end-of-text token that is an ordinary piece of text is not part of the text either.
    script = ScriptedModel(as_bytes("a.b"))
    script.config = dataclasses.replace(SMALL, eos_token_id=(EOS, *as_bytes(".")))
    (dot,) = generate(script, tokenizer, ["a"], max_tokens=2)
    assert (dot.text, dot.finish_reason) == ("a", "eos")
    script = ScriptedModel([*text, EOS, *as_bytes("!")])
    (longer,) = generate(script, tokenizer, ["a"], max_tokens=len(text) + 2, ignore_eos=True)
    assert longer.text.strip() == "the end!"
    assert longer.finish_reason == "length"


def test_characters_are_not_split(tokenizer: MistralTokenizer) -> None:
    text = "né 漢字 👩‍👧 end"
    ids = as_bytes(text)
    deltas = list(
        stream_generate(ScriptedModel(ids), tokenizer, ["x"], max_tokens=len(ids))  # type: ignore
    )
    assert [delta.token_id for delta in deltas] == ids
    assert "".join(delta.text for delta in deltas) == text
    assert max(len(delta.text) for delta in deltas) == 1
    # A text that ends inside a character, by length or by EOS, ends with a replacement character.
    for cut, tail in ((len("né 漢".encode()) - 1, []), (len("né 漢".encode()) - 2, [EOS])):
        script: Any = ScriptedModel([*ids[:cut], *tail])
        (completion,) = generate(script, tokenizer, ["x"], max_tokens=cut + len(tail))
        assert completion.text.rstrip("\ufffd") == "né "
        assert completion.text.endswith("\ufffd")


# Stop strings


def naive_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    found = [text.find(each) for each in stop if each in text]
    return text[: min(found)] if found else text


def test_stop_strings_may_span_tokens(tokenizer: MistralTokenizer) -> None:
    """Random texts over a small alphabet, one byte per token, with overlapping stop strings."""
    found = 0
    for _ in range(300):
        text = "".join(random.choices("abé", k=random.randint(1, 24)))
        stop = ["".join(random.choices("abé", k=random.randint(1, 5))) for _ in range(2)]
        expected, ids = naive_stop(text, stop), as_bytes(text)
        shown = ""
        deltas = list(
            stream_generate(ScriptedModel(ids), tokenizer, ["x"], max_tokens=len(ids), stop=stop)
        )  # type: ignore
        for delta in deltas:
            shown += delta.text
            assert expected.startswith(shown), (text, stop)
        assert shown == expected, (text, stop)
        stopped = any(s in text for s in stop)
        found += stopped
        assert deltas[-1].finish_reason == ("stop" if stopped else "length")
        assert all(delta.finish_reason is None for delta in deltas[:-1])
    assert 30 < found < 300


def test_stop_strings_do_not_depend_on_how_a_text_is_cut() -> None:
    """A text that is cut into any pieces ends at the same character, and all before it is shown."""
    cut_inside = 0
    for _ in range(2000):
        text = "".join(random.choices("ab", k=random.randint(0, 16)))
        stop = ["".join(random.choices("ab", k=random.randint(1, 6))) for _ in range(3)]
        expected = naive_stop(text, stop)
        cuts = sorted(random.choices(range(len(text) + 1), k=random.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        texts, shown, pushed = _StopText(stop), "", ""
        for i, piece in enumerate(pieces):
            shown, pushed = shown + texts.push(piece, i == len(pieces) - 1), pushed + piece
            if texts.found:
                break
            held = pushed[len(shown) :]
            cut_inside += bool(held)
            assert not held or any(each.startswith(held) and each != held for each in stop)
        assert shown == expected, (pieces, stop)
        assert texts.found == any(each in text for each in stop), (pieces, stop)
    assert cut_inside > 100


def test_only_a_possible_stop_string_is_held_back(tokenizer: MistralTokenizer) -> None:
    ids = as_bytes("one.\n\ntwo.\nthree")
    options: dict[str, Any] = {"max_tokens": len(ids), "stop": ["\n\nthree"]}
    deltas = stream_generate(ScriptedModel(ids), tokenizer, ["x"], **options)  # type: ignore
    texts = [delta.text for delta in deltas]
    assert texts[:4] == ["o", "n", "e", "."]
    assert texts[4:8] == ["", "", "", "\n\ntw"]
    assert "".join(texts) == "one.\n\ntwo.\nthree"


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (["her", "herself"], ["for herself", " alone"], "for "),
        (["lf", "herself"], ["for hers", "e", "lf", " alone"], "for "),
        (["lf", "herselves"], ["for hers", "e", "lf", " alone"], "for herse"),
        (["b", "abc"], ["a", "b", "x"], "a"),
        (["b", "abc"], ["ab", "c"], ""),
        (["b", "abc"], ["ab"], "a"),
    ],
)
def test_the_stop_string_that_begins_first_ends_the_text(
    stop: list[str], pieces: list[str], expected: str
) -> None:
    texts = _StopText(stop)
    shown = ""
    for i, piece in enumerate(pieces):
        if not texts.found:
            shown += texts.push(piece, i == len(pieces) - 1)
    assert shown == expected
    assert texts.found


def test_a_single_string_is_one_prompt_or_one_stop_string(
    model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    alone = generate(model, tokenizer, "It is", **options)
    assert alone == generate(model, tokenizer, ["It is"], **options)
    assert len(alone) == 1
    deltas = list(stream_generate(model, tokenizer, "It is", **options))
    assert [delta.token_id for delta in deltas] == alone[0].token_ids
    ids: Any = ScriptedModel(as_bytes("for herself"))
    (cut,) = generate(ids, tokenizer, "x", max_tokens=11, stop="her")
    assert (cut.text, cut.finish_reason) == ("for ", "stop")
    (whole,) = generate(ids, tokenizer, "x", max_tokens=11, stop="reh")
    assert (whole.text, whole.finish_reason) == ("for herself", "length")


def test_a_stop_string_does_not_end_other_texts(
    model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    prompts = prompts_of(5, 8)
    options: dict[str, Any] = {"max_tokens": 25, "ignore_eos": True}
    free = generate(model, tokenizer, prompts, **options)
    middle = len(free[0].text) // 2
    stop = next(
        free[0].text[i : i + 3]
        for i in range(middle, len(free[0].text))
        if free[0].text[i : i + 3] not in free[1].text and "\ufffd" not in free[0].text[i : i + 3]
    )
    stopped, other = generate(model, tokenizer, prompts, stop=[stop], **options)
    assert stopped.text == free[0].text[: free[0].text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 25
    assert other == free[1]


# Sampling


@pytest.mark.parametrize("penalty", [1.8, 0.2])
def test_repetition_penalty_equals_its_formula(model: MistralForCausalLM, penalty: float) -> None:
    model = model.double()
    prompt = random_ids(6)
    text = list(prompt)
    for _ in range(25):
        logits = model(torch.tensor([text])).logits[0, -1].detach().double()
        for token in set(text):
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        text.append(int(logits.argmax()))
    options: dict[str, Any] = {"max_new_tokens": 25, "eos_token_id": None}
    both = model.generate([random_ids(9), prompt], repetition_penalty=penalty, **options)
    assert both[1] == text
    if penalty < 1:  # with a penalty above 1, a text without repetitions may be unchanged
        assert both[1] != model.generate([prompt], **options)[0]


def test_a_seed_determines_the_text(model: MistralForCausalLM) -> None:
    prompts = prompts_of(3, 5)

    def sample(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            prompts, max_new_tokens=20, do_sample=True, eos_token_id=None, generator=generator
        )

    assert sample(1) == sample(1) != sample(2)
    greedy = model.generate(prompts, max_new_tokens=20, eos_token_id=None)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None}
    assert model.generate(prompts, top_k=1, temperature=3.0, **settings) == greedy
    assert model.generate(prompts, top_p=1e-9, **settings) == greedy
    assert model.generate(prompts, min_p=1.0, **settings) == greedy
    assert model.generate(prompts, temperature=1e-9, **settings) == greedy


# Logits that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampler", [Sampler(0), Sampler(0.7), Sampler(1.0, 9, 0.9, 0.1, 1.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_not_finite_raise_an_error(
    value: float, sampler: Sampler, dtype: torch.dtype, model: MistralForCausalLM
) -> None:
    """The head overflows from the first token on. For -inf, all logits of a row must be -inf."""
    model = model.to(dtype)
    with torch.no_grad():
        model.lm_head.weight[slice(None) if value == -math.inf else slice(7, 9)] = value
    if value == -math.inf:  # the product's sign depends on the hidden state
        model.lm_head.register_forward_hook(lambda *_: torch.full((2, 2048), value, dtype=dtype))
    elif value == math.inf:
        model.lm_head.register_forward_hook(lambda module, given, out: out.abs())
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="the logits of text 0 are not finite after 0 new tokens; load the model in "
            "another dtype, or check its weights",
        ):
            list(model.stream(prompts_of(4, 9), max_new_tokens=5, sampler=sampler))


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_logits_that_become_nan_within_a_text_raise_an_error(
    captures: bool, hooked: bool, model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use csrc or the modules, with and without a queued step.

    The tokens before the error are yielded, and the cache remains usable.
    """
    if captures:
        GraphStandIn(monkeypatch)
    if hooked:
        model.model.norm.register_forward_hook(lambda *_: None)
    prompts, bad = prompts_of(4, 9), []
    free = list(zip(*model.stream(prompts, max_new_tokens=12), strict=True))
    # The embedding of this token is NaN. It occurs first in the second text, at the index `at`.
    at = next(i for i in range(3, 11) if free[1][i] not in (*free[1][:i], *free[0], *prompts[1]))
    with torch.no_grad():
        model.model.embed_tokens.weight[free[1][at]] = math.nan
    assert not any(free[1][at] in prompt for prompt in prompts)
    cache = model.new_cache(2, 100)
    with pytest.raises(ValueError, match=f"logits of text 1 are not finite after {at + 1} new"):
        bad.extend(model.stream(prompts, max_new_tokens=12, cache=cache))
    assert bad == [list(tokens) for tokens in zip(*free, strict=True)][: at + 1]
    assert not cache.interrupted
    # NaN logits of a text that has ended are ignored.
    ended = model.stream(prompts, max_new_tokens=12, eos_token_ids=(free[1][at],))
    assert [tokens[0] for tokens in ended] == list(free[0])


# Bad input


def test_values_out_of_range_raise_value_error(
    model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    ids = torch.tensor([random_ids(4)])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        (
            {"do_sample": True, "temperature": 0.0},
            "temperature must be > 0 with do_sample=True, got 0",
        ),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must be \(1, 4\) like input_ids"),
        (
            {"attention_mask": torch.zeros(1, 4)},
            "attention_mask must be 1 for at least one token, got only zeros",
        ),
        (
            {"attention_mask": torch.tensor([[0.0, 0.0, -1e9, -1e9]])},
            "attention_mask must be 0 for padding and 1 for tokens, got -1000000000.0",
        ),
        (
            {"attention_mask": torch.full((1, 4), torch.nan)},
            "attention_mask must be 0 for padding and 1 for tokens, got nan",
        ),
        (
            {"attention_mask": torch.ones(1, 4, device="meta")},
            "attention_mask must have values, got a tensor on meta",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **options)
    for bad in ([], [[]], [[4], []]):
        with pytest.raises(ValueError, match="every prompt must have at least one token"):
            model.generate(bad)
    for tensor in (ids[0], ids[:, :0]):
        shape = re.escape(str(tuple(tensor.shape)))
        message = rf"input_ids must be \(batch, seqlen\) and not empty, got {shape}"
        with pytest.raises(ValueError, match=message):
            model.generate(tensor)
    with pytest.raises(ValueError, match="every prompt must have at least one token"):
        model.generate(ids.repeat(2, 1), torch.tensor([[1] * 4, [0] * 4]))
    with pytest.raises(ValueError, match="input_ids must have values, got a tensor on meta"):
        model.generate(ids.to("meta"))
    with pytest.raises(ValueError, match="attention_mask must be None if input_ids is a list"):
        model.generate(ids.tolist(), torch.ones(1, 4))
    for prompts in ([""], [[]], ["a", ""]):
        with pytest.raises(ValueError, match=r"prompts\[[01]\] must not be empty"):
            generate(model, tokenizer, prompts)
    with pytest.raises(ValueError, match="stop must not contain an empty string"):
        generate(model, tokenizer, ["a"], stop=["x", ""])
    with pytest.raises(ValueError, match=r"stop has a lone surrogate, '.udcff'"):
        generate(model, tokenizer, ["a"], stop=["x", "y\udcff"])
    with pytest.raises(ValueError, match="max_tokens must be >= 0, got -3"):
        generate(model, tokenizer, ["a"], max_tokens=-3, sampler=Sampler())


IDS = [5, 9, 2000]


@pytest.mark.parametrize(
    "ids",
    [
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        [np.int64(id) for id in IDS],
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        list(torch.tensor(IDS)),
        tuple(IDS),
        range(5, 8),
    ],
    ids=lambda ids: f"{type(ids).__name__} {getattr(ids, 'dtype', '')}",
)
def test_token_ids_may_be_integers_of_any_type(
    ids: Any, model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    plain = [int(id) for id in ids]
    expected = model.generate([plain], max_new_tokens=6, eos_token_id=None)
    given = model.generate([ids], max_new_tokens=np.int64(6), eos_token_id=None)
    assert given == expected
    assert all(type(id) is int for id in given[0])
    (completion,) = generate(model, tokenizer, [ids], max_tokens=6, ignore_eos=True)
    assert completion.token_ids == expected[0][len(plain) :]
    eos = expected[0][len(plain) + 2]
    short = model.generate([ids], max_new_tokens=6, eos_token_id=eos)
    for same in (np.int32(eos), [np.int64(eos)], np.array([eos, 1]), torch.tensor([eos, 1]), {eos}):
        assert model.generate([ids], max_new_tokens=6, eos_token_id=same) == short


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_keep_their_dtype(dtype: torch.dtype, model: MistralForCausalLM) -> None:
    """The padding and the new tokens may be larger than any id of the prompt."""
    ids = torch.tensor([[3, 4], [5, 6]], dtype=dtype)
    out = model.generate(ids, max_new_tokens=5, eos_token_id=None)
    assert out.dtype == dtype
    assert out.max() > 127
    eos = int(out[0, 3])
    padded = model.generate(ids, max_new_tokens=5, eos_token_id=eos, pad_token_id=2**31 - 1)
    assert padded.dtype == dtype
    assert padded.shape[1] <= 7


TYPES: list[tuple[Any, dict[str, Any], str]] = [
    ("It is", {}, "input_ids must be token ids, got str; encode it with the tokenizer"),
    (["It is"], {}, r"input_ids\[0\] must be a list of token ids, got str; encode it with the to"),
    ([b"It"], {}, r"input_ids\[0\] must be a list of token ids, got bytes; encode it"),
    (5, {}, "input_ids must be token ids, got int; encode it with the tokenizer"),
    ([5, 6], {}, r"input_ids\[0\] must be a list of token ids, got int"),
    ([[5, 6.0]], {}, r"input_ids\[0\]\[1\] must be a token id, an int, got float"),
    ([[5, True]], {}, r"input_ids\[0\]\[1\] must be a token id, an int, got bool"),
    ([[5], ["a"]], {}, r"input_ids\[1\]\[0\] must be a token id, an int, got str"),
    ([np.array([1.0])], {}, r"input_ids\[0\]\[0\] must be a token id, an int, got float"),
    ([np.array([True])], {}, r"input_ids\[0\]\[0\] must be a token id, an int, got bool"),
    ([torch.tensor([True])], {}, r"input_ids\[0\]\[0\] must be a token id, an int, got bool"),
    ([[None]], {}, r"input_ids\[0\]\[0\] must be a token id, an int, got NoneType"),
    (
        torch.tensor([[5]], dtype=torch.uint8),
        {},
        "input_ids must be int64 or int32, got torch.uint8",
    ),
    (torch.tensor([[5]], dtype=torch.int16), {}, "input_ids must be int64 or int32, got torch.int"),
    (torch.tensor([[5.0]]), {}, "input_ids must be int64 or int32, got torch.float32"),
    (torch.tensor([[True]]), {}, "input_ids must be int64 or int32, got torch.bool"),
    ([[5]], {"max_new_tokens": 1.5}, "max_new_tokens must be an integer >= 0, got float"),
    ([[5]], {"max_new_tokens": True}, "max_new_tokens must be an integer >= 0, got bool"),
    ([[5]], {"top_k": 1.5}, "top_k must be an integer >= 0, got float"),
    ([[5]], {"top_k": True}, "top_k must be an integer >= 0, got bool"),
    ([[5]], {"temperature": "1", "do_sample": True}, "temperature must be a number >= 0, got str"),
    ([[5]], {"top_p": "1"}, r"top_p must be a number in \(0, 1\], got str"),
    ([[5]], {"min_p": [0]}, r"min_p must be a number in \[0, 1\], got list"),
    ([[5]], {"repetition_penalty": "1"}, "repetition_penalty must be a number in .*, got str"),
    ([[5]], {"prefill_chunk_size": 2.0}, "chunk_size must be an integer >= 1, got float"),
    ([[5]], {"eos_token_id": 1.5}, r"eos_token_id\[0\] must be a token id, an int, got float"),
    ([[5]], {"eos_token_id": [2, "x"]}, r"eos_token_id\[1\] must be a token id, an int, got str"),
    ([[5]], {"eos_token_id": True}, r"eos_token_id\[0\] must be a token id, an int, got bool"),
    ([[5]], {"pad_token_id": 0.0}, "pad_token_id must be an integer in .*, got float"),
    (torch.tensor([[5]]), {"attention_mask": [[1]]}, "attention_mask must be a tensor, got list$"),
    (
        torch.tensor([[5]]),
        {"attention_mask": GenerationConfig()},
        "attention_mask must be a tensor, got GenerationConfig; give generation_config by its name",
    ),
    ([[5]], {"streamer": print}, "streamer must be an object with put and end, got builtin_fun"),
    ([[5]], {"generator": 7}, "generator must be a torch.Generator, got int"),
    (
        [[5]],
        {"stop_strings": "x", "tokenizer": "tiny"},
        "tokenizer must be an object with decode, got str",
    ),
]


@pytest.mark.parametrize(("ids", "options", "message"), TYPES)
def test_wrong_types_raise_type_error(
    ids: Any, options: dict[str, Any], message: str, model: MistralForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The error is raised before the model runs."""
    if "prefill_chunk_size" not in options:
        monkeypatch.setattr(MistralForCausalLM, "prefill", None)
    with pytest.raises(TypeError, match=f"^{message}"):
        model.generate(ids, **options)


def test_wrong_types_of_prompts_and_options_raise_type_error(
    model: MistralForCausalLM, tokenizer: MistralTokenizer
) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (b"It", {}, "prompts must be strings or lists of token ids, got bytes"),
        (5, {}, "prompts must be strings or lists of token ids, got int"),
        ([5, 6], {}, r"prompts\[0\] must be a list of token ids, got int"),
        ([b"It"], {}, r"prompts\[0\] must be a list of token ids, got bytes; encode it"),
        (["a", [1.0]], {}, r"prompts\[1\]\[0\] must be a token id, an int, got float"),
        (torch.tensor([5, 6]), {}, r"prompts\[0\] must be a list of token ids, got int"),
        ("a", {"stop": [b"x"]}, "stop must be a string or list of strings, got bytes"),
        ("a", {"stop": ["x", 5]}, "stop must be a string or list of strings, got int"),
        ("a", {"max_tokens": 1.5}, "max_tokens must be an integer >= 0, got float"),
        ("a", {"prefill_chunk": "x"}, "chunk_size must be an integer >= 1, got str"),
    ]
    for prompts, options, message in cases:
        with pytest.raises(TypeError, match=f"^{message}"):
            generate(model, tokenizer, prompts, **options)
    with pytest.raises(ValueError, match=r"pad_token_id must be in \[-2147483648, 2147483647\]"):
        model.generate([[5]], pad_token_id=2**31)
