"""Text from prompts: `generate()`, `stream_generate()` and `python -m mistral_kernels.generate`.

The command writes generated text, and nothing else, to standard output; the prompt, notes and a
closing block of figures go to standard error. Started by torchrun, all ranks share the model's work
(see `mistral_kernels.distributed.tensor_parallel`), and the first speaks for them.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from typing import Any

import torch

from mistral_kernels.checkpoint import check_folder, resolve
from mistral_kernels.checkpoint.tokenizer_files import find_tokenizer_files
from mistral_kernels.cli.command import (
    DTYPES,
    Parser,
    check_backend,
    device_of,
    enter,
    read_input,
    read_stdin,
    run,
    user_path,
    write_out,
)
from mistral_kernels.distributed.process_group import World, check_same, joined, launched
from mistral_kernels.distributed.tensor_parallel import ParallelMistralForCausalLM
from mistral_kernels.model.sampling import RANGES, Sampler
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops import extension
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE
from mistral_kernels.ops.operator import choose_again
from mistral_kernels.text.chat import Conversation
from mistral_kernels.text.stats import Figures
from mistral_kernels.text.streaming import Completion, TextDelta, generate, stream_generate
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.tokenizer.base import check_text
from mistral_kernels.utils.files import digest
from mistral_kernels.utils.ranges import COUNT, SEED

__all__ = ["Completion", "TextDelta", "generate", "main", "stream_generate"]

# What is read of prompts at most: bytes of a pipe, characters of stdin, and of a line of a chat.
_PROMPT_LIMIT, _MESSAGE_LIMIT = 1 << 26, 1 << 20


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels.generate",
        description="Continue a text, or chat. The text goes to stdout, all else to stderr. "
        "Started by torchrun, the ranks share the model.",
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; '-' reads stdin")
    parser.add_argument("-p", "--prompt", dest="prompt_option", metavar="TEXT", help="the same")
    parser.add_argument(
        "--prompt-file", type=user_path, metavar="PATH", help="a batch: a prompt a line"
    )
    parser.add_argument(
        "--model", default="tiny", help="folder (raw or Hugging Face) or hub id; default: bundled"
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        "--instruct",
        action="store_true",
        help="converse, in the vendor's template; messages come from the prompt, then stdin",
    )
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument(
        "--context",
        type=COUNT,
        metavar="N",
        help="tokens to make room for in a model without a window; default: up to 32768",
    )
    length = parser.add_argument_group("length")
    length.add_argument(
        "-m", "--max-tokens", "--max_tokens", type=COUNT, default=256, help="default 256"
    )
    length.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    length.add_argument("--ignore-eos", action="store_true", help="go on after end-of-text")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        "--temp",
        type=RANGES["temperature"],
        default=0.7,
        help="default 0.7; 0: the likeliest",
    )
    sampling.add_argument("--top-k", type=RANGES["top_k"], default=0, help="default 0: all")
    sampling.add_argument("--top-p", type=RANGES["top_p"], default=1.0, help="default 1: all")
    sampling.add_argument("--min-p", type=RANGES["min_p"], default=0.0, help="default 0: all")
    sampling.add_argument(
        "--repetition-penalty",
        type=RANGES["repetition_penalty"],
        default=1.0,
        help="default 1: none",
    )
    sampling.add_argument("--seed", type=SEED, help="default: random, and printed")
    sampling.add_argument("--num-samples", type=COUNT, default=1, help="texts for each prompt")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    machine.add_argument(
        "--quantize", choices=["int8"], help="weights of 8 bits, to generate faster on the CPU"
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    machine.add_argument("--backend", choices=["auto", "triton", "torch"])
    machine.add_argument(
        "--prefill-chunk", type=COUNT, metavar="N", help="prompt tokens in one pass"
    )
    machine.add_argument(
        "--window", type=_window, metavar="N|none", help="replace the model's sliding window"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="a JSON object a text, one a line")
    output.add_argument("--quiet", action="store_true", help="no prompt and figures on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    if args.backend:
        os.environ[BACKEND_VARIABLE] = args.backend
        choose_again()
    if not launched():
        return _generate(args, World(0, 1, device_of(args.device)))
    with joined(args.device) as world, _silent(not world.is_main):
        for name, value in vars(args).items():
            if name not in _OF_ONE_RANK:
                check_same(f"--{name.replace('_', '-')}", value)
        return _generate(args, world)


# Options that only the main rank reads, or that each may have in its own way.
_OF_ONE_RANK = {"prompt", "prompt_option", "prompt_file", "model", "device"}


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Discard what the block prints. Exceptions pass."""
    with ExitStack() as stack:
        if silent:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def _generate(args: argparse.Namespace, world: World) -> None:
    """Run the command on each rank of `world`.

    All ranks generate the same text, from the main rank's prompts.
    """
    device = world.device
    check_backend(device, args.backend)
    seed = args.seed
    if seed is None:
        seed = world.from_main(lambda: secrets.randbelow(1 << 31))
    sampler = Sampler(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
        torch.Generator(device).manual_seed(seed),
    )
    if not all(args.stop):
        raise ValueError("--stop must not be empty")
    for text in args.stop:
        check_text("--stop", text)
    if args.chat and args.num_samples > 1:
        raise ValueError("--num-samples is for texts; --chat holds one conversation")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    if args.context is not None and not args.chat:
        raise ValueError("--context needs --chat")
    prompts = world.from_main(lambda: _prompts(args))
    stats = Figures(world.size)
    started = time.perf_counter()
    if world.size > 1:  # one downloads, the others find what it has
        world.from_main(lambda: str(resolve(args.model)))
    path = resolve(args.model)
    check_folder(path)  # before the tokenizer, which a folder without a checkpoint lacks, too
    overrides: dict[str, Any] = {}
    if args.window is not None:
        overrides["sliding_window"] = None if args.window == "none" else args.window
    tokenizer = MistralTokenizer.from_pretrained(path)
    if args.chat and tokenizer.chat_version is None:
        raise ValueError(
            f"--chat: model {args.model!r} has no chat template; leave out --chat to continue a "
            "text, or name an instruct model with --model"
        )
    if world.size > 1:
        files = sorted({tokenizer.path, *find_tokenizer_files(path)})
        contents = (part for file in files for part in (file.name.encode(), file.read_bytes()))
        check_same("the tokenizer", digest(*contents))
    family = MistralForCausalLM if world.size == 1 else ParallelMistralForCausalLM
    model = family.from_pretrained(
        path,
        dtype=DTYPES.get(args.dtype),
        device=device,
        quantize=args.quantize,
        **overrides,
    )
    extension.load(device.type)  # which may compile: no part of the prompt's time
    stats.load_seconds = time.perf_counter() - started
    options = {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
        "prefill_chunk": args.prefill_chunk,
    }
    reports = not args.quiet
    try:
        if args.chat:
            _chat(args, world, model, tokenizer, prompts, options, stats)
        else:
            if tokenizer.has_chat_template and not args.quiet:
                print("note: an instruct model; --chat applies its template", file=sys.stderr)
            _complete(args, model, tokenizer, prompts, options, stats)
    except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
        reports = reports and stats.first_tokens > 0
        raise
    except Exception:
        reports = False
        raise
    finally:
        if reports:
            print("", *stats.lines(model), f"seed      {seed}", sep="\n", file=sys.stderr)


def _window(text: str) -> int | str:
    if text.lower() == "none":
        return "none"
    try:
        count: int = COUNT(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; 'none' removes the window") from None
    return count


def _prompts(args: argparse.Namespace) -> list[str]:
    given = [x for x in (args.prompt, args.prompt_option, args.prompt_file) if x is not None]
    if len(given) > 1:
        raise ValueError("give one of a prompt, --prompt and --prompt-file")
    if args.prompt_file is not None:
        if args.chat:
            raise ValueError("--prompt-file is a batch of texts; --chat holds one conversation")
        lines = read_input(args.prompt_file, _PROMPT_LIMIT).split("\n")
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompt_file} has no prompt in it")
        return prompts
    if not given:
        if args.chat:
            return []
        if sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, or '-' to read it from stdin")
    prompt = given[0] if given else "-"
    if prompt == "-":  # what `echo` puts at the end is not part of the prompt
        prompt = read_stdin(sys.stdin.read, _PROMPT_LIMIT).removesuffix("\n")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return [prompt]


def _write_record(prompt: str, completion: Completion) -> None:
    """Write a line of JSON, in ASCII where stdout is not UTF-8."""
    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    record = {"prompt": prompt, **asdict(completion)}
    write_out(json.dumps(record, ensure_ascii=not utf8) + "\n")


def _complete(
    args: argparse.Namespace,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: list[str],
    options: dict[str, Any],
    stats: Figures,
) -> None:
    encoded = [tokenizer.encode(prompt, eos=False) for prompt in prompts]
    batch = len(prompts) * args.num_samples
    # First, since it raises where memory does not suffice for so many texts.
    cache = model.new_cache(batch, max(map(len, encoded)) + args.max_tokens)
    stats.cache_bytes = cache.nbytes
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    ids = [tokens for tokens in encoded for _ in range(args.num_samples)]
    completions = [Completion() for _ in prompts]
    live = batch == 1 and not args.json

    def finish() -> None:
        if live:
            write_out("\n")
        for number, (prompt, completion) in enumerate(
            zip(prompts, completions, strict=True), start=1
        ):
            if args.json:
                _write_record(prompt, completion)
            elif not live:
                if not args.quiet:
                    print(f"[{number}/{batch}] {prompt}", file=sys.stderr, flush=True)
                write_out(completion.text + "\n")

    deltas = stream_generate(model, tokenizer, ids, cache=cache, **options)
    try:
        for delta in stats.time(deltas, sum(map(len, ids))):
            if live and not args.quiet and not completions[0].token_ids:
                print(prompts[0], end="", file=sys.stderr, flush=True)
            completions[delta.index].add(delta)
            if live:
                write_out(delta.text)
    except (KeyboardInterrupt, Exception) as error:
        if stats.first_tokens and not isinstance(error, OSError):  # which stdout raises
            finish()  # what there is
        if stats.first_tokens and live and not args.quiet:
            print(file=sys.stderr)  # behind the prompt
        raise
    finish()


def _chat(
    args: argparse.Namespace,
    world: World,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    messages: list[str],
    options: dict[str, Any],
    stats: Figures,
) -> None:
    conversation = Conversation(model, tokenizer, args.system, args.context)
    stats.cache_bytes = conversation.cache_bytes
    while True:
        if not messages:
            if not args.quiet:
                print("> ", end="", file=sys.stderr, flush=True)
            try:
                line = world.from_main(lambda: read_stdin(sys.stdin.readline, _MESSAGE_LIMIT))
            finally:
                if not (args.quiet or sys.stdin.isatty()):
                    print(file=sys.stderr)  # a terminal shows the line end that is typed
            if not line:
                return
            if not line.strip():
                continue
            messages.append(line)
        message = messages.pop(0).strip()
        prompt = conversation.prompt_for(message)
        completion = Completion()
        try:
            for delta in stats.time(conversation.reply(prompt, **options), len(prompt)):
                completion.add(delta)
                if not args.json:
                    write_out(delta.text)
        except KeyboardInterrupt:
            if world.size > 1 or not sys.stdin.isatty():
                raise  # at a terminal it ends this answer; at the prompt, the conversation
        if args.json:
            _write_record(message, completion)
        else:
            write_out("\n")
        if conversation.full:
            print(
                f"note: the conversation fills its context of {conversation.max_length} tokens; "
                "--context makes room for more",
                file=sys.stderr,
            )


if __name__ == "__main__":
    enter(main)
