"""Conversations: the cache is kept between messages and does not change the answers."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_checkpoints import SMALL, varied_model

from mistral_kernels import MistralForCausalLM, MistralTokenizer, RollingCache
from mistral_kernels.checkpoint import resolve
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
    """No space is added to the first word of an answer, so its tokens stay in the cache."""
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
    """A message that is longer alone is an error, and the conversation is unchanged."""
    conversation = Conversation(make_model(None), tokenizer, max_length=30)
    answer, _ = send(conversation, "Hi", max_tokens=5)
    before = list(conversation.messages)
    message = (
        r"^the message with the chat template must have at most 30 tokens "
        r"\(--context, max_length\), got \d+; shorten it, or increase the context$"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            conversation.prompt_for("word " * 40)
        assert conversation.messages == before
    assert "".join(d.text for d in conversation.reply(conversation.regenerate(), max_tokens=5)) == (
        answer
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_oldest_turns_are_dropped(tokenizer: MistralTokenizer, system: str | None) -> None:
    """The newest messages and the system message stay, and answers equal those without a cache."""
    model, context, room = make_model(None), random.randint(30, 50), random.randint(1, 15)
    conversation = Conversation(model, tokenizer, system, context)
    history = [{"role": "system", "content": system}] if system else []
    first, dropped, transcript = len(history), 0, list(history)
    for number in range(8):
        message = " ".join(random.choices(["word", "and", "or"], k=random.randint(1, 8)))
        history.append({"role": "user", "content": message})
        whole = tokenizer.apply_chat_template(history, return_dict=False)
        expected_dropped = 0
        while len(whole) + room - 1 > context and len(history) > first + 1:
            del history[first : first + 2]
            expected_dropped += 1
            whole = tokenizer.apply_chat_template(history, return_dict=False)
        prompt = conversation.prompt_for(message, room)
        assert conversation.dropped == expected_dropped
        assert conversation.messages == history
        tokens = min(number + 1, context - len(whole) + 1)
        (expected,) = generate(model, tokenizer, [whole], max_tokens=tokens, standalone=True)
        answer = "".join(d.text for d in conversation.reply(prompt, max_tokens=number + 1))
        assert answer == expected.text
        history.append({"role": "assistant", "content": answer})
        dropped += expected_dropped
        transcript += history[-2:]
        assert conversation.transcript == transcript
    assert dropped > 0


@pytest.mark.parametrize("window", [None, 9, 512])
def test_the_last_answer_is_generated_again(
    tokenizer: MistralTokenizer, window: int | None
) -> None:
    """An empty or interrupted second answer leaves the first one."""
    conversation = Conversation(make_model(window), tokenizer)
    send(conversation, MESSAGES[0], max_tokens=6)
    answer, _ = send(conversation, MESSAGES[1], max_tokens=8)
    before = list(conversation.messages)
    again = "".join(d.text for d in conversation.reply(conversation.regenerate(), max_tokens=8))
    assert (again, conversation.messages) == (answer, before)
    shorter = "".join(d.text for d in conversation.reply(conversation.regenerate(), max_tokens=3))
    assert answer.startswith(shorter)
    assert conversation.messages == [*before[:-1], {"role": "assistant", "content": shorter}]
    kept = list(conversation.messages)
    assert list(conversation.reply(conversation.regenerate(), max_tokens=0)) == []
    assert conversation.messages == kept
    conversation.regenerate()  # and no reply, as after an interrupt
    answer, _ = send(conversation, MESSAGES[2], max_tokens=4)
    assert conversation.messages[:-2] == kept
    whole = tokenizer.apply_chat_template(conversation.messages[:-1], return_dict=False)
    (expected,) = generate(conversation.model, tokenizer, [whole], max_tokens=4, standalone=True)
    assert answer == expected.text


def test_there_must_be_an_answer_to_generate_again(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(7), tokenizer, "Be brief.")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^the conversation has no answer to generate again;"):
            conversation.regenerate()
        conversation.prompt_for("Hello")  # without an answer
    assert conversation.messages[1:] == [{"role": "user", "content": "Hello"}]


def test_the_system_message_can_be_replaced(tokenizer: MistralTokenizer) -> None:
    model = make_model(None)
    conversation = Conversation(model, tokenizer)
    assert conversation.system is None
    send(conversation, MESSAGES[0], max_tokens=4)
    for system in ("Be brief.", "Be verbose.", None, ""):
        turns = [m for m in conversation.messages if m["role"] != "system"]
        conversation.system = system
        assert conversation.system == (system or None)
        assert [m for m in conversation.messages if m["role"] != "system"] == turns
        history = [{"role": "system", "content": system}] if system else []
        whole = tokenizer.apply_chat_template(
            [*history, *turns, {"role": "user", "content": "More"}], return_dict=False
        )
        (expected,) = generate(model, tokenizer, [whole], max_tokens=5, standalone=True)
        assert send(conversation, "More", max_tokens=5)[0] == expected.text


def test_messages_can_be_cleared_and_dropped(tokenizer: MistralTokenizer) -> None:
    conversation = Conversation(make_model(7), tokenizer, "Be brief.")
    assert (conversation.clear(), conversation.drop()) == (0, 0)
    for message in MESSAGES[:3]:
        send(conversation, message, max_tokens=2)
    turns = conversation.messages[1:]
    assert conversation.drop(0) == conversation.drop(-1) == 0
    assert conversation.drop() == 1
    assert conversation.messages[1:] == turns[2:]
    assert conversation.drop(5) == 2
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    send(conversation, MESSAGES[0], max_tokens=2)
    assert conversation.clear() == 2
    assert send(conversation, "Hello", max_tokens=4) == send(
        Conversation(conversation.model, tokenizer, "Be brief."), "Hello", max_tokens=4
    )


@pytest.mark.parametrize("window", [None, 9])
def test_an_interrupt_leaves_a_consistent_conversation(
    tokenizer: MistralTokenizer, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes from any of the methods that a message calls."""
    model = make_model(window)
    conversation = Conversation(model, tokenizer)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    interrupted = set()
    for owner, name in (
        (MistralTokenizer, "apply_chat_template"),
        (RollingCache, "reset"),
        (RollingCache, "drop"),
        (RollingCache, "packing"),
        (RollingCache, "advance"),
        (type(model.model.layers[1]), "forward"),
        (Conversation, "_settle"),
    ):
        send(conversation, "Hello", max_tokens=2)
        conversation.drop()  # the cache has tokens that are not in the conversation any more
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            try:
                send(conversation, "And then?", max_tokens=3)
            except KeyboardInterrupt:
                interrupted.add(name)
        history = list(conversation.messages)
        if history and history[-1]["role"] == "user":
            history.pop()
        history.append({"role": "user", "content": "Why?"})
        whole = tokenizer.apply_chat_template(history, return_dict=False)
        (expected,) = generate(model, tokenizer, [whole], max_tokens=5, standalone=True)
        assert send(conversation, "Why?", max_tokens=5)[0] == expected.text, name
    assert interrupted >= {"apply_chat_template", "drop", "packing", "forward", "_settle"}


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
    conversation.prompt_for("And then?")
    assert conversation.dropped == 1
    assert conversation.messages == [{"role": "user", "content": "And then?"}]


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
    for message in MESSAGES[:3]:
        line = rf"^> {re.escape(message)}\n9 tokens, [\d,.]+ tokens/s; stopped at --max-tokens 9$"
        assert re.search(line, err, re.MULTILINE), err
    assert "\x1b" not in err
    assert "generate  27 tokens" in err
    code, out, err = run(*system, "--quiet", "--json", stdin=MESSAGES[0] + "\n" + lines)
    records = [json.loads(line) for line in out.split("\n")[:-1]]
    assert (code, err) == (0, "")
    assert [record["text"] for record in records] == answers
    assert [record["prompt"] for record in records] == [m.strip() for m in MESSAGES[:3]]
    assert run("--quiet") == (0, "", "")


def test_a_full_context_drops_the_oldest_messages(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes have the reasons. A message that is too long alone is an error."""
    options = ["--model", str(folder), "--chat", "--window", "none", "--context", "25"]
    options += ["--json", "--device", "cpu"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("And then?\n" + "word " * 40 + "\nMore\n"))
    assert main(["Hello there!", *options]) == 2
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["Hello there!", "And then?"]
    assert all(record["finish_reason"] == "length" and record["text"] for record in records)
    full = "the context of 25 tokens (--context) is full, the next message drops the oldest ones\n"
    assert err.count(full) == 2
    dropped = "dropped the oldest message and its answer, to fit in the context of 25 tokens\n"
    assert err.count(dropped) == 1
    assert err.splitlines()[-1].startswith(
        "error: the message with the chat template must have at most 25 tokens (--context, max_"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("And then?\n"))
    assert main(["Hello there!", *options, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_note_recommends_chat_for_an_instruct_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hello", "--model", str(folder), "-m", "2"]) == 0
    assert (
        "note: this is an instruct model; --chat applies its chat template: "
        f"python -m mistral_kernels.generate --chat --model {folder}\n" in capsys.readouterr().err
    )


def test_chat_with_a_base_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--chat", "hello"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "--chat requires an instruct model, and the bundled model is a base model" in err
    assert "; use an instruct model, such as --model mistralai/" in err
    assert "site-packages" not in err
    assert str(resolve("tiny")) not in err
