"""Conversations: the cache is kept between messages and does not change the answers."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_checkpoints import SMALL, varied_model

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.generate import generate, main
from mistral_kernels.text.chat import Conversation

mistral_common = pytest.importorskip("mistral_common", reason="extra `chat` is not installed")

DATA = Path(mistral_common.__file__).parent / "data"
VOCABULARY = "mistral_instruct_tokenizer_240323.model.v3"
CONTROL_TOKENS = 771  # number of control and byte tokens, the first tokens of that vocabulary
MESSAGES = ["Hello there!", "More details, please.", "Why?", "And then? " * 20]


@pytest.fixture(scope="module")
def tokenizer() -> MistralTokenizer:
    return MistralTokenizer.from_pretrained(DATA / VOCABULARY)


def make_model(window: int | None) -> MistralForCausalLM:
    """Return a float64 model that never generates EOS or another control token."""
    model = varied_model(dataclasses.replace(SMALL, vocab_size=32768, sliding_window=window))
    with torch.no_grad():
        model.lm_head.weight[:CONTROL_TOKENS] = 0.0
    return model.double()


def send(conversation: Conversation, message: str, **options: Any) -> tuple[str, int]:
    """Return the answer, and the number of prompt tokens that were computed for it."""
    prompt = conversation.prompt_for(message)
    return "".join(delta.text for delta in conversation.reply(prompt, **options)), len(prompt)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("window", [None, 512, 40, 7])
def test_answers_equal_those_without_a_cache(
    tokenizer: MistralTokenizer, window: int | None, system: str | None
) -> None:
    model = make_model(window)
    conversation = Conversation(model, tokenizer, system)
    history = [{"role": "system", "content": system}] if system else []
    for message in MESSAGES:
        history.append({"role": "user", "content": message})
        whole = tokenizer.apply_chat_template(history, return_dict=False)
        (expected,) = generate(model, tokenizer, [whole], max_tokens=15, standalone=True)
        answer, computed = send(conversation, message, max_tokens=15)
        assert answer == expected.text
        assert answer
        history.append({"role": "assistant", "content": answer})
        assert conversation.messages == history
        assert computed <= len(whole)


def test_tokens_in_the_cache_are_not_computed_again(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(None), tokenizer)
    _, first = send(conversation, MESSAGES[0], max_tokens=1)
    prompt = conversation.prompt_for(MESSAGES[1])
    whole = tokenizer.apply_chat_template(conversation.messages, return_dict=False)
    assert prompt == whole[first:], "all tokens of the first message and answer are kept"


def test_answers_are_tokenized_as_they_were_generated(tokenizer: MistralTokenizer) -> None:
    """Thus answers stay in the cache: no space is added to their first word."""
    conversation = Conversation(make_model(None), tokenizer)
    prompt = conversation.prompt_for("Hello")
    answer = tokenizer.encode("I am fine, and you?", bos=False)
    deltas = iter([*answer, 2])
    conversation.model.stream = lambda *a, **k: ([token] for token in deltas)  # type: ignore
    assert "".join(d.text for d in conversation.reply(prompt)) == "I am fine, and you?"
    again = conversation.tokenizer.apply_chat_template(
        [*conversation.messages, {"role": "user", "content": "Well"}], return_dict=False
    )
    assert again[: len(prompt) + len(answer) + 1] == [*prompt, *answer, 2]


def test_cache_memory_is_constant_with_a_window(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(16), tokenizer)
    size = conversation._cache.nbytes
    for message in MESSAGES:
        send(conversation, message, max_tokens=20)
        assert conversation._cache.nbytes == size == 2 * 3 * 16 * 2 * 16 * 8


def test_without_a_window_max_length_bounds_the_conversation(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(None), tokenizer, max_length=30)
    send(conversation, "Hi", max_tokens=5)
    with pytest.raises(
        ValueError, match=r"must have at most 30 tokens \(--context, max_length\), got"
    ):
        send(conversation, "word " * 40, max_tokens=5)


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("context", [20, 21, 47])
def test_an_answer_ends_when_the_context_is_full(
    tokenizer: MistralTokenizer, context: int, window: int | None
) -> None:
    """Every slot of the cache is used. The last token of the answer needs no slot."""
    model = make_model(window)
    conversation = Conversation(model, tokenizer, max_length=context)
    prompt = conversation.prompt_for("Hello there!")
    assert not conversation.full
    deltas = list(conversation.reply(prompt, max_tokens=200))
    assert len(deltas) == context - len(prompt) + 1
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    (expected,) = generate(model, tokenizer, [prompt], max_tokens=len(deltas), standalone=True)
    assert "".join(delta.text for delta in deltas) == expected.text
    assert conversation.full
    assert conversation._cache.host_lengths == [context]
    assert conversation.messages[-1] == {"role": "assistant", "content": expected.text}
    before = list(conversation.messages)
    message = rf"must have at most {context} tokens .+, got \d+; increase it"
    with pytest.raises(ValueError, match=message):
        conversation.prompt_for("And then?")
    assert conversation.messages == before


def test_an_answer_that_fits_is_complete(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(None), tokenizer, max_length=60)
    prompt = conversation.prompt_for("Hello there!")
    assert len(list(conversation.reply(prompt, max_tokens=60 - len(prompt)))) == 60 - len(prompt)
    assert not conversation.full


def test_an_incomplete_answer_is_kept(tokenizer: MistralTokenizer) -> None:
    model = make_model(40)
    conversation = Conversation(model, tokenizer)
    reply = conversation.reply(conversation.prompt_for("Hello"), max_tokens=20)
    text = "".join(next(reply).text for _ in range(8))
    reply.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    whole = tokenizer.apply_chat_template(
        [*conversation.messages, {"role": "user", "content": "More"}], return_dict=False
    )
    (expected,) = generate(model, tokenizer, [whole], max_tokens=10, standalone=True)
    assert send(conversation, "More", max_tokens=10)[0] == expected.text


def test_an_empty_answer_and_its_message_are_removed(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(40), tokenizer)
    assert send(conversation, "Hello", max_tokens=0)[0] == ""
    answer, _ = send(conversation, "More", max_tokens=6)
    assert conversation.messages == [
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": answer},
    ]


def test_a_prompt_that_is_in_the_cache_computes_one_token(tokenizer: MistralTokenizer) -> None:
    """The same message follows an empty answer. Only its last token is computed again."""
    model = make_model(512)
    first, _ = send(Conversation(model, tokenizer), "Hello", max_tokens=8)
    conversation = Conversation(model, tokenizer)
    assert send(conversation, "Hello", max_tokens=8, stop=[first[:1]])[0] == ""
    assert send(conversation, "Hello", max_tokens=8) == (first, 1)


def test_an_empty_message_is_rejected(tokenizer: MistralTokenizer) -> None:
    with pytest.raises(ValueError, match="message must not be empty"):
        Conversation(make_model(7), tokenizer).prompt_for("  ")


def test_a_template_that_renders_no_tokens_raises_an_error(
    tokenizer: MistralTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the template, and the message is not kept."""
    conversation = Conversation(make_model(7), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(MistralTokenizer, "apply_chat_template", lambda *_, **__: [])
        with pytest.raises(ValueError, match=f"the chat template in {DATA} must render a prompt"):
            conversation.prompt_for("Hello")
    assert conversation.messages == []
    assert conversation.prompt_for("Hello")


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(40).float().save_pretrained(tmp_path / "model")
    shutil.copy(DATA / VOCABULARY, tmp_path / "model" / "tokenizer.model.v3")
    return tmp_path / "model"


def test_chat_command_prints_the_answers(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        options = ("--chat", "--temp", "0", "-m", "9", "--device", "cpu")
        code = main(["--model", str(folder), *options, *arguments])
        return code, *capsys.readouterr()

    conversation = Conversation(
        MistralForCausalLM.from_pretrained(folder),
        MistralTokenizer.from_pretrained(folder),
        "Be brief.",
    )
    answers = [send(conversation, message, max_tokens=9)[0] for message in MESSAGES[:3]]
    lines = "\n".join([MESSAGES[1], "   ", MESSAGES[2]]) + "\n"
    system = ("--system", "Be brief.")
    code, out, err = run(MESSAGES[0], *system, stdin=lines)
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers))
    assert err.startswith("> ")
    assert "generate  27 tokens" in err
    code, out, err = run(*system, "--quiet", "--json", stdin=MESSAGES[0] + "\n" + lines)
    records = [json.loads(line) for line in out.split("\n")[:-1]]
    assert (code, err) == (0, "")
    assert [record["text"] for record in records] == answers
    assert [record["prompt"] for record in records] == [m.strip() for m in MESSAGES[:3]]
    assert run("--quiet") == (0, "", "")


def test_a_full_context_prints_a_note(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer ends with a note that names the remedy, and the next message is an error."""
    options = ["--model", str(folder), "--chat", "--window", "none", "--context", "25"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("And then?\n"))
    assert main(["Hello there!", *options, "--json", "--quiet", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    (record,) = map(json.loads, out.splitlines())
    assert record["finish_reason"] == "length"
    assert record["text"]
    note, error = err.splitlines()
    assert note == (
        "note: the conversation fills its context of 25 tokens; restart with a larger --context"
    )
    assert error.startswith("error: the conversation with this message must have at most 25 ")
    assert "--context" in error


def test_a_note_recommends_chat_for_an_instruct_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hello", "--model", str(folder), "-m", "2"]) == 0
    assert (
        "note: this is an instruct model; --chat applies its chat template\n"
        in capsys.readouterr().err
    )


def test_chat_with_a_base_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--chat", "hello"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert (
        "--chat requires a chat template, which model 'tiny' does not have; leave out --chat" in err
    )
