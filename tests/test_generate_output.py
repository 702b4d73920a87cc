"""Notes and progress of `python -m mistral_kernels.generate`, and its help."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import tqdm.std
from support.small_checkpoints import SMALL, varied_model

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.cli.generate_options import generate_parser
from mistral_kernels.cli.output import with_progress
from mistral_kernels.generate import generate, main

GREEDY = ("--temp", "0", "--device", "cpu")


def test_a_note_names_the_limit_that_ended_a_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An end-of-text token or a stop string needs no note."""
    assert main(["She was", *GREEDY, "-m", "5"]) == 0
    assert capsys.readouterr().err.startswith("She was\nnote: stopped at --max-tokens 5\nload ")
    assert main(["She was", *GREEDY, "-m", "5", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    model = MistralForCausalLM.from_pretrained("tiny")
    tokenizer = MistralTokenizer.from_pretrained("tiny")
    texts = [x.text for x in generate(model, tokenizer, ["She was", "It is"], max_tokens=30)]
    stop = next(texts[0][i : i + 4] for i in range(9) if texts[0][i : i + 4] not in texts[1])
    assert main(["She was", *GREEDY, "-m", "30", "--stop", stop]) == 0
    assert "note: " not in capsys.readouterr().err
    (tmp_path / "prompts").write_text("She was\nIt is\nIt is\n")
    prompts = ("--prompt-file", str(tmp_path / "prompts"))
    assert main([*prompts, *GREEDY, "-m", "30", "--stop", stop]) == 0
    assert "\nnote: 2 of 3 texts stopped at --max-tokens 30\n" in capsys.readouterr().err


def test_the_statistics_name_the_reason_if_csrc_is_not_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = random.choice(["loaded from x.so", "not loaded: no compiler: c++ is not on PATH"])
    monkeypatch.setattr("mistral_kernels.ops.extension.status", lambda device_type: status)
    assert main(["She was", *GREEDY, "-m", "2"]) == 0
    line = f"\ncsrc      {status}\n"
    assert (line in capsys.readouterr().err) == status.startswith("not loaded")


def test_help_has_examples_and_every_default() -> None:
    parser = generate_parser()
    text = parser.format_help()
    assert "examples:\n  python -m mistral_kernels.generate" in text
    for action in parser._actions:
        if (
            action.option_strings
            and action.nargs != 0
            and action.dest not in ("prompt_option", "prompt_file")
        ):
            assert "default: " in (action.help or ""), action.dest
    assert parser.parse_args([]).max_tokens is None


def test_progress_counts_the_tokens_of_each_pass() -> None:
    model = varied_model(SMALL)
    lengths = [random.randint(1, 30) for _ in range(random.randint(1, 3))]
    prompts = [torch.randint(3, 61, (n,)).tolist() for n in lengths]
    chunk, passes = random.randint(1, 12), []
    steps = model.stream(prompts, max_new_tokens=2, chunk_size=chunk, progress=passes.append)
    next(steps)
    ends = range(0, max(lengths), chunk)
    assert passes == [sum(min(max(n - i, 0), chunk) for n in lengths) for i in ends]
    list(steps)
    assert sum(passes) == sum(lengths)


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.1, 3.0])
@pytest.mark.parametrize("stream", [FakeTerminal, io.StringIO])
def test_a_bar_shows_a_prefill_of_over_two_seconds(
    stream: type[io.StringIO], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar is on a terminal only, and it is removed before the first item."""
    now, err = 0.0, stream()
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    monkeypatch.setattr(sys, "stderr", err)

    def items(progress: Callable[[int], object]) -> Iterator[str]:
        nonlocal now
        for _ in range(4):
            now += seconds
            progress(10)
        yield from "ab"

    received = with_progress(items, 40)
    assert next(received) == "a"
    shown = err.getvalue()
    if stream is FakeTerminal and seconds > 2:
        assert "prompt:  25%" in shown
        assert "10/40" in shown
        *_, line, end = shown.split("\r")
        assert (line.strip(" \x1b[K"), end) == ("", "")
    else:
        assert shown == ""
    assert list(received) == ["b"]
    assert err.getvalue() == shown
