"""The command `python -m mistral_kernels.generate`: output, errors, signals and streams."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.backends import SetBackend
from support.small_checkpoints import SMALL, random_state

from mistral_kernels import MistralForCausalLM, MistralTokenizer, generate
from mistral_kernels.checkpoint import resolve, save_hf
from mistral_kernels.generate import main
from mistral_kernels.model import generation
from mistral_kernels.ops import dispatch, extension
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE

# The expected texts are from the CPU: in bfloat16, a GPU may choose another of two close tokens.
ON_THE_CPU = ("--device", "cpu") if torch.cuda.is_available() else ()
GREEDY = ("--temperature", "0", "-m", "12", *ON_THE_CPU)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_environment(set_backend: SetBackend) -> None:
    """Undo --backend, which sets an environment variable of this process."""
    set_backend("auto")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: str | Path, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code: Any = main([str(argument) for argument in arguments])
        except SystemExit as end:  # raised by the parser
            code = end.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def expected() -> Callable[..., str]:
    """Return a function that generates greedily with the bundled model."""
    model = MistralForCausalLM.from_pretrained("tiny")
    tokenizer = MistralTokenizer.from_pretrained("tiny")

    def expected(prompt: str, max_tokens: int = 12, **options: Any) -> str:
        return generate.generate(model, tokenizer, [prompt], max_tokens=max_tokens, **options)[
            0
        ].text

    return expected


# Sources of the prompt


def test_only_the_text_goes_to_stdout(run: Command, expected: Callable[..., str]) -> None:
    text = expected("She was") + "\n"
    result = run("She was", *GREEDY, "--seed", "5")
    assert (result.code, result.out) == (0, text)
    for pattern in (
        r"^She was\n",
        r"^load +[\d.]+ s, 5\.5 MB of bfloat16$",
        r"^prompt +\d+ tokens, [\d,.]+ tokens/s, first token after [\d.]+ s$",
        r"^generate +12 tokens, [\d,.]+ tokens/s, weights read at [\d.]+ GB/s$",
        r"^memory +[\d,]+ MB at the peak, cache [\d,.]+ MB$",
        r"^backend +torch on cpu \(.+\)$",
        r"^seed +5$",
    ):
        assert re.search(pattern, result.err, re.MULTILINE), pattern
    quiet = run("She was", *GREEDY, "--quiet")
    assert quiet == (0, text, "")


def test_all_sources_of_a_prompt_are_equal(
    run: Command, expected: Callable[..., str], tmp_path: Path
) -> None:
    out = expected("She was") + "\n"
    file = tmp_path / "prompts"
    file.write_text("She was\n")
    for result in (
        run("--prompt", "She was", *GREEDY, "--quiet"),
        run("-p", "She was", *GREEDY, "--quiet"),
        run("-", *GREEDY, "--quiet", stdin="She was"),
        run("-p", "-", *GREEDY, "--quiet", stdin="She was\n"),
        run(*GREEDY, "--quiet", stdin="She was\n"),
        run("--prompt-file", file, *GREEDY, "--quiet"),
    ):
        assert result == (0, out, "")
    # Only one newline at the end is removed, which `echo` adds.
    record = run("-", *GREEDY, "--json", stdin="She was\n\n").out
    assert json.loads(record)["prompt"] == "She was\n"


def test_a_prompt_file_is_a_batch_of_unequal_prompts(
    run: Command, expected: Callable[..., str], tmp_path: Path
) -> None:
    # Only newlines separate prompts, unlike in str.splitlines.
    prompts = ["She was", "It is a truth universally\u2028acknowledged", "\u00e9"]
    file = tmp_path / "prompts"
    file.write_text("\n".join([prompts[0], "", *prompts[1:], "  "]) + "\n", encoding="utf-8")
    result = run("--prompt-file", file, *GREEDY)
    assert result.code == 0
    assert result.out == "".join(expected(prompt) + "\n" for prompt in prompts)
    for number, prompt in enumerate(prompts, start=1):
        assert f"[{number}/3] {prompt}\n" in result.err
    records = run("--prompt-file", file, *GREEDY, "--json", "--quiet").out.split("\n")[:-1]
    assert [json.loads(line)["text"] for line in records] == [expected(p) for p in prompts]


@pytest.mark.parametrize("head", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_are_normalized(
    run: Command, tmp_path: Path, head: str, end: str
) -> None:
    prompts, file = ["She was", "It is"], tmp_path / "prompts"
    text = head + "".join(prompt + end for prompt in [prompts[0], "", prompts[1]])
    file.write_bytes(text.encode())
    options = (*GREEDY, "--json", "--quiet")
    records = map(json.loads, run("--prompt-file", file, *options).out.splitlines())
    assert [record["prompt"] for record in records] == prompts
    record = json.loads(run("-", *options, stdin=f"{head}She{end}was{end}").out)
    assert record["prompt"] == "She\nwas"


def test_a_prompt_file_may_be_a_pipe(run: Command, tmp_path: Path) -> None:
    """A shell's `<(...)` is a pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    sender = threading.Thread(target=pipe.write_text, args=("She was\n",))
    sender.start()
    assert json.loads(run("--prompt-file", pipe, *GREEDY, "--json").out)["prompt"] == "She was"
    sender.join()


# Output


def test_json_prints_one_record_per_text(run: Command, expected: Callable[..., str]) -> None:
    result = run("She was", *GREEDY, "--json", "--quiet")
    record = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert result.err == ""
    assert record.keys() == {"prompt", "text", "token_ids", "finish_reason"}
    assert (record["prompt"], record["text"]) == ("She was", expected("She was"))
    assert len(record["token_ids"]) == 12
    assert record["finish_reason"] == "length"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp037", "utf-16"])
def test_encodings_of_stdout_other_than_utf8(
    encoding: str, run: Command, expected: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON records are ASCII, and characters that the encoding lacks are escaped."""
    for options in (("--json",), ()):
        sink = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding))
            assert run("caf\u00e9 \u6f22", *GREEDY, *options).code == 0
            out = sink.getvalue().decode(encoding)
        if options:
            record = json.loads(out)
            assert out.isascii()
            assert record["prompt"] == "caf\u00e9 \u6f22"
            assert record["text"] == expected("caf\u00e9 \u6f22")
        else:
            lacking = expected("caf\u00e9 \u6f22").encode(encoding, "backslashreplace")
            assert out == lacking.decode(encoding) + "\n"


def test_json_is_not_escaped_if_stdout_is_utf8(run: Command) -> None:
    assert '"prompt": "caf\u00e9 \u6f22"' in run("caf\u00e9 \u6f22", *GREEDY, "--json").out


def test_a_seed_determines_the_samples(run: Command) -> None:
    def sample(*arguments: str) -> list[str]:
        result = run("She was", "-m", "20", "--json", *arguments)
        assert result.code == 0
        return [json.loads(line)["text"] for line in result.out.split("\n")[:-1]]

    assert sample("--seed", "3") == sample("--seed", "3") != sample("--seed", "4")
    several = sample("--seed", "3", "--num-samples", "3")
    assert len(several) == len(set(several)) == 3
    drawn = run("She was", "-m", "20", "--json")
    seed = re.search(r"^seed +(\d+)$", drawn.err, re.MULTILINE)
    assert seed
    assert json.loads(drawn.out)["text"] == sample("--seed", seed[1])[0]


def test_a_stop_string_ends_the_text(run: Command, expected: Callable[..., str]) -> None:
    text = expected("She was", 40)
    stop = text[len(text) // 2 :][:4]
    options = ("--temp", "0", "--max_tokens", "40", "--stop", stop, *ON_THE_CPU)
    result = run("She was", *options, "--json")
    record = json.loads(result.out)
    assert (record["text"], record["finish_reason"]) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize(
    "arguments", [("--window", "3"), ("--window", "none"), ("--dtype", "fp32")]
)
def test_window_and_dtype_change_the_model(run: Command, arguments: tuple[str, str]) -> None:
    options: dict[str, Any] = {
        "3": {"sliding_window": 3},
        "none": {"sliding_window": None},
        "fp32": {"dtype": torch.float32},
    }[arguments[1]]
    model = MistralForCausalLM.from_pretrained("tiny", **options)
    tokenizer = MistralTokenizer.from_pretrained("tiny")
    prompt = "the " * 150
    (completion,) = generate.generate(model, tokenizer, [prompt], max_tokens=12)
    result = run(prompt, *GREEDY, *arguments)
    assert result.out == completion.text + "\n"
    assert ("float32" if arguments[1] == "fp32" else "bfloat16") in result.err


def test_chunks_backend_and_device_do_not_change_the_text(
    run: Command, expected: Callable[..., str]
) -> None:
    prompt = "of the " * 100
    for arguments in (("--prefill-chunk", "50"), ("--backend", "torch"), ("--device", "cpu")):
        assert run(prompt, *GREEDY, "--quiet", *arguments) == (0, expected(prompt) + "\n", "")


# Bad input: exit code 2, one line, nothing on stdout


def bad_checkpoint(tmp_path: Path, *, lose: str = "", change: dict[str, Any] | None = None) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in resolve("tiny").iterdir():
        if file.name != lose:
            shutil.copy(file, folder)
    if change is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


def check_error(result: Result, *parts: str) -> None:
    assert result.code == 2, result
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert result.out == ""
    for part in parts:
        assert part in result.err, result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt must not be empty"),
        (["  \n\t"], "prompt must not be empty"),
        (["-"], "prompt must not be empty"),
        ([], "prompt must not be empty"),
        (["x", "-p", "y"], "only one of prompt, --prompt and --prompt-file must be given, got 2"),
        (
            ["x", "--temperature", "-1"],
            "error: --temperature must be >= 0, got -1.0; see python -m",
        ),
        (["x", "--temperature", "nan"], "temperature must be >= 0, got nan"),
        (["x", "--top-p", "0"], "--top-p must be in (0, 1], got 0.0"),
        (["x", "--top-p", "1.5"], "--top-p must be in (0, 1], got 1.5"),
        (["x", "--top-k", "-2"], "--top-k must be >= 0, got -2"),
        (["x", "--min-p", "2"], "--min-p must be in [0, 1], got 2.0"),
        (
            ["x", "--repetition-penalty", "0"],
            "--repetition-penalty must be in [1e-06, 1000000], got 0.0",
        ),
        (["x", "-m", "-1"], "error: --max-tokens must be in [1, 1000000000], got -1; see "),
        (["x", "--max-tokens", "0"], "--max-tokens must be in [1, 1000000000], got 0"),
        (["x", "--num-samples", "0"], "--num-samples must be in [1, 1000000000], got 0"),
        (["x", "--prefill-chunk", "0"], "--prefill-chunk must be in [1, 1000000000], got 0"),
        (["x", "--stop", ""], "--stop must not be empty"),
        (["x", "--seed", "-1"], "--seed must be in [0, 18446744073709551615], got -1"),
        (["x", "--seed", str(1 << 64)], "--seed must be in [0, 18446744073709551615], got 1"),
        (["x", "--window", "0"], "--window must be in [1, 1000000000], got 0"),
        (
            ["x", "--window", "few"],
            "must be an integer in [1, 1000000000], got 'few'; 'none' removes the window",
        ),
        (["x", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["x", "--device", "meta"], "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        (["x", "--device", "cuda:99"], "GPUs that PyTorch finds, got 'cuda:99'; use"),
        (["x", "--system", "be brief"], "--system requires --chat"),
        (["x", "--chat", "--num-samples", "2"], "--num-samples must be 1 with --chat, got 2"),
        (["x", "--chat"], "--chat requires an instruct model, and the bundled model is a base"),
        (["x", "--model", "/no/such/folder"], "no such folder: '/no/such/folder'"),
        (["x", "--model", "tine"], "no such folder: 'tine'"),
        (["x", "--model", __file__], "is a file; give the folder that holds the checkpoint"),
        (["--prompt-file", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        (["--prompt-file", "/"], "Is a directory: '/'"),
        (["lone \ud800 surrogate"], "text has a lone surrogate"),
        (["x", "--stop", "a", "--stop", "y\udcff"], "--stop has a lone surrogate, '\\udcff', at"),
        (["x", "--device", "cuda:9999999999999"], "--device must be auto, cpu, cuda or cuda:N"),
        (["x", "--device", "cuda:\u0663"], "--device must be auto, cpu, cuda or cuda:N"),
        (["x", "--window", "9" * 30], "--window must be in [1, 1000000000], got 99999999999"),
        (["x", "--max-tokens", "9" * 5000], "--max-tokens must be an integer in [1, 1000000000]"),
        (["x", "-m", "1e3"], "--max-tokens must be an integer in [1, 1000000000], got '1e3'"),
        (["x", "--temp", "warm"], "--temperature must be a number >= 0, got 'warm'"),
        (["x", "--seed", "1.5"], "--seed must be an integer in [0, 18446744073709551615]"),
        (["x", "--num-samples", "1000000000"], "GB of this machine, got 196,608.0 GB; gen"),
        (
            ["x", "--window", "none", "-m", "400000000"],
            "of this machine, got 614.4 GB; generate fewer tokens or texts, or set a sliding",
        ),
        (["--prompt-file", "~no-such-user/x"], "--prompt-file must be a path, got '~no-such-user"),
        (["--prompt-file", ""], "--prompt-file must be a path, got ''"),
        (["--prompt-file", "/dev/zero"], "/dev/zero must have at most 67108864 bytes, got more"),
        (["--prompt-file", "/dev/null"], "/dev/null must contain a prompt, got only empty"),
        (["--model", "~no-such-user/x", "x"], ""),  # the message depends on the library
        (["x", "--model", ""], "no such folder: ''"),
        (["x", "--context", "5"], "--context requires --chat"),
    ],
)
def test_bad_arguments_are_one_line(run: Command, arguments: list[str], message: str) -> None:
    check_error(run(*arguments), message)


def test_bad_prompt_files_print_one_line(run: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(b"good\nbad \xff\n")
    check_error(run("--prompt-file", file), f"{file} must be UTF-8", "0xff in position 9")
    file.write_text("\n  \n")
    check_error(run("--prompt-file", file), f"{file} must contain a prompt")
    file.write_text("hello\n")
    check_error(run("--prompt-file", file, "--chat"), "--prompt-file must not be given with --chat")


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ({"lose": "model.safetensors"}, ["model", "safetensors"]),
        ({"lose": "config.json"}, ["config.json"]),
        ({"lose": "tokenizer.model"}, ["no tokenizer found; looked for tekken.json"]),
        ({"change": {"num_local_experts": 8}}, ["a mixture of experts", "config.json"]),
        ({"change": {"vision_config": {"a": 1}}}, ["a vision encoder"]),
        ({"change": {"quantization_config": {"bits": 4}}}, ["quantized weights"]),
        ({"change": {"hidden_size": 200}}, ["model.safetensors", "must have shape"]),
        ({"change": {"num_attention_heads": 0}}, ["num_attention_heads must be an integer from 1"]),
    ],
    ids=str,
)
def test_bad_checkpoints_are_one_line(
    run: Command, tmp_path: Path, fault: dict[str, Any], parts: list[str]
) -> None:
    check_error(run("x", "--model", bad_checkpoint(tmp_path, **fault)), *parts)


def test_damaged_files_are_one_line(run: Command, tmp_path: Path) -> None:
    folder = bad_checkpoint(tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        check_error(run("x", "--model", folder), f"{weights} is not a valid safetensors file")
    weights.write_bytes(whole)
    config.write_text("{")
    check_error(run("x", "--model", folder), f"{config} must be JSON")
    (folder / "tokenizer.model").write_bytes(random.randbytes(500))
    check_error(run("x", "--model", folder), "tokenizer.model: not a sentencepiece model")
    shutil.rmtree(folder)
    folder.mkdir()
    check_error(run("x", "--model", folder), f"{folder} is empty: a checkpoint has config.json")
    (folder / "x.gguf").write_bytes(b"GGUF")
    check_error(
        run("x", "--model", folder / "x.gguf"), "holds GGUF weights, which are not supported"
    )


def test_bad_stdin_is_one_line(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check_error(run("-", stdin="caf\udce9"), "standard input must be UTF-8", "position 3")
    monkeypatch.setattr(generate, "_PROMPT_LIMIT", 10)
    check_error(run("-", stdin="x" * 11), "standard input must have at most 10 characters")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs Triton's kernels")
def test_a_backend_that_cannot_run_is_one_line(
    run: Command, monkeypatch: pytest.MonkeyPatch, set_backend: SetBackend
) -> None:
    """The message names the option or the variable that chose the backend."""
    dispatch._choose.cache_clear()
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", None)  # other tests may set a driver for the CPU
    reason = "nothing here runs Triton kernels on cpu tensors; move them to a GPU, set "
    remedy = "TRITON_INTERPRET=1 before Python starts, or "
    if os.environ.get("TRITON_INTERPRET") != "1":
        option = run("x", "--backend", "triton")
        check_error(option, f"error: --backend triton, but {reason}{remedy}leave out --backend\n")
        set_backend("triton")
        variable = f"error: {BACKEND_VARIABLE}=triton, but {reason}{remedy}unset {BACKEND_VARIABLE}"
        check_error(run("x"), f"{variable}\n")


def test_logits_that_are_not_finite_are_one_line(run: Command, tmp_path: Path) -> None:
    state = random_state(dataclasses.replace(SMALL, vocab_size=2048))
    config = dataclasses.replace(SMALL, vocab_size=2048, sliding_window=3)
    state["model.norm.weight"].fill_(torch.nan)
    save_hf(state.items(), config, tmp_path / "m", dtype=torch.float32)
    shutil.copy(resolve("tiny") / "tokenizer.model", tmp_path / "m")
    for options in (("--temperature", "0"), (), ("--json",)):
        result = run("hello", "--model", tmp_path / "m", "--quiet", *options)
        check_error(result, "the logits of text 0 are not finite after 0 new tokens")


@pytest.mark.parametrize("error", [ValueError("in the middle"), KeyboardInterrupt()])
def test_incomplete_texts_are_printed(
    error: BaseException, run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is printed at its end, or when an error or an interrupt stops it."""
    real, texts = generate.stream_generate, ["She was", "It is"]

    def stream(*args: Any, **options: Any) -> Any:
        yield from itertools.islice(real(*args, **options), 7)
        raise error

    (tmp_path / "prompts").write_text("\n".join(texts))
    monkeypatch.setattr(generate, "stream_generate", stream)
    result = run("--prompt-file", tmp_path / "prompts", *GREEDY, "--json", "--quiet")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["prompt"] for record in records] == texts
    assert [len(record["token_ids"]) for record in records] == [4, 3]
    line = "error: in the middle\n" if isinstance(error, ValueError) else "\ninterrupted\n"
    assert (result.code, result.err) == (2 if "error" in line else 130, line)


def test_an_interrupt_before_the_first_token_prints_no_text(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are not printed either."""

    def prefill(*_: Any) -> Any:
        raise KeyboardInterrupt

    (tmp_path / "prompts").write_text("She was\nIt is")
    monkeypatch.setattr(generation, "prefill", prefill)
    for given in (["She was"], ["She was", "--json"], ["--prompt-file", tmp_path / "prompts"]):
        assert run(*given, *GREEDY) == (130, "", "\ninterrupted\n")


def test_compilation_counts_as_load_time(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the first token excludes it. An interrupt during compilation prints one word."""

    def compiling(device_type: str) -> None:
        patch.setattr(extension, "load", lambda device_type: None)
        time.sleep(0.5)

    with monkeypatch.context() as patch:
        patch.setattr(extension, "load", compiling)
        result = run("She was", *GREEDY)
    seconds = dict(re.findall(r"(load|first token after) +([0-9.]+) s", result.err))
    assert result.code == 0
    assert float(seconds["load"]) >= 0.5

    def interrupted(device_type: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extension, "load", interrupted)
    assert run("She was", *GREEDY) == (130, "", "\ninterrupted\n")


def test_a_tokenizer_of_another_model_is_one_line(run: Command, tmp_path: Path) -> None:
    """Its vocabulary is larger than the model's, so some ids have no embedding."""
    save_hf(random_state(SMALL).items(), SMALL, tmp_path / "m", dtype=torch.float32)
    shutil.copy(resolve("tiny") / "tokenizer.model", tmp_path / "m")
    check_error(run("hello there", "--model", tmp_path / "m"), "vocabulary")


def test_long_texts_take_constant_memory(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def new_cache(self: MistralForCausalLM, *arguments: Any) -> Any:
        caches.append(original(self, *arguments))
        sizes.append(caches[-1].nbytes)
        return caches[-1]

    caches: list[Any] = []
    original = MistralForCausalLM.new_cache
    monkeypatch.setattr(MistralForCausalLM, "new_cache", new_cache)
    for words in (200, 2000):
        result = run("the old man and " * words, "--quiet", "-m", "3")
        assert result.code == 0
    assert caches[1].host_lengths[0] > 8000 - 2000
    # 6 layers of keys and values for 128 positions of 2 heads of 32 numbers in bfloat16.
    assert sizes == [cache.nbytes for cache in caches] == [6 * 2 * 128 * 2 * 32 * 2] * 2


# Signals and streams of a process


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "mistral_kernels.generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **{"stdin": subprocess.DEVNULL, **options},
    )


def test_ctrl_c_keeps_the_text_and_prints_statistics() -> None:
    process = start("She was", "-m", "1000000", "--ignore-eos")
    assert process.stdout is not None
    head = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(head) == 40
    assert (head + out).endswith("\n")
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted")
    assert re.search(r"^generate +\d+ tokens", err, re.MULTILINE)


def test_a_closed_pipe_ends_the_command_with_141() -> None:
    process = start("She was", "-m", "1000000", "--ignore-eos", "--quiet")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == ""


@pytest.mark.parametrize("module", ["cli.startup", "text.chat"])
def test_ctrl_c_during_imports_prints_one_word(module: str) -> None:
    """No traceback is printed, from the import of the first module on."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "TRITON_INTERPRET": "0"}
    process = start("-", env=environment, stdin=subprocess.PIPE)  # never written to
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith(f" mistral_kernels.{module}\n"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    times, _, rest = err.rpartition("\ninterrupted\n")  # the last line may be incomplete
    assert (process.returncode, out, rest) == (130, "", "")
    assert all(line.startswith("import time: ") for line in times.splitlines()), times


def test_lines_of_a_closed_stderr_do_not_go_to_stdout(expected: Callable[..., str]) -> None:
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "mistral_kernels.generate"]
    for prompt, code, text in (("She was", 0, expected("She was") + "\n"), ("", 2, "")):
        done = subprocess.run([*shell, prompt, *GREEDY], stdout=subprocess.PIPE, text=True)
        assert (done.returncode, done.stdout) == (code, text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs Triton's kernels")
def test_triton_without_a_gpu_is_one_line() -> None:
    process = start("x", "--backend", "triton")
    out, err = process.communicate(timeout=60)
    result = Result(process.returncode, out, err)
    check_error(
        result,
        "--backend triton, but nothing here runs Triton kernels on cpu",
        "or leave out --backend",
    )
