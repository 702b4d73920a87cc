"""Text generation: `generate()`, `stream_generate()` and `python -m mistral_kernels.generate`.

The command writes only generated text to standard output. The prompt, notes and the closing
statistics go to standard error. Under torchrun, the ranks share the model's work (see
`mistral_kernels.distributed.tensor_parallel`), and only rank 0 prints.
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
from mistral_kernels.ops.operator import reload_backend_setting
from mistral_kernels.text.chat import Conversation
from mistral_kernels.text.stats import GenerationStats
from mistral_kernels.text.streaming import Completion, TextDelta, generate, stream_generate
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.tokenizer.arguments import check_text
from mistral_kernels.utils.files import digest
from mistral_kernels.utils.ranges import COUNT, SEED

__all__ = ["Completion", "TextDelta", "generate", "main", "stream_generate"]

# Limits of prompts: bytes of a pipe or characters of stdin, and characters of a line of a chat.
_PROMPT_LIMIT, _MESSAGE_LIMIT = 1 << 26, 1 << 20


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels.generate",
        description="Continue a text, or chat with an instruct model. The generated text goes to "
        "stdout, everything else to stderr. Under torchrun, the ranks share the model's work.",
    )
    parser.add_argument("prompt", nargs="?", help="text to continue; '-' or none: read stdin")
    parser.add_argument(
        "-p", "--prompt", dest="prompt_option", metavar="TEXT", help="same as the argument prompt"
    )
    parser.add_argument(
        "--prompt-file",
        type=user_path,
        metavar="PATH",
        help="file with one prompt per line; the prompts are generated as one batch",
    )
    parser.add_argument(
        "--model",
        default="tiny",
        help="folder of a raw or Hugging Face checkpoint, or a Hugging Face hub id; "
        "default: tiny, the bundled model",
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        "--instruct",
        action="store_true",
        help="chat, with the chat template of the model; the prompt is the first message, and each "
        "line of stdin is another",
    )
    chat.add_argument("--system", metavar="TEXT", help="system prompt; default: none")
    chat.add_argument(
        "--context",
        type=COUNT,
        metavar="N",
        help="maximum number of tokens of the conversation, for a model without a sliding window; "
        "default: the model's own maximum, at most 32768",
    )
    length = parser.add_argument_group("length")
    length.add_argument(
        "-m",
        "--max-tokens",
        "--max_tokens",
        type=COUNT,
        default=256,
        help="largest number of new tokens per text; default: 256",
    )
    length.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this string; may be repeated; default: none",
    )
    length.add_argument(
        "--ignore-eos", action="store_true", help="continue after an end-of-text token"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        "--temp",
        type=RANGES["temperature"],
        default=0.7,
        help="divisor of the logits; 0: choose the most likely token; default: 0.7",
    )
    sampling.add_argument(
        "--top-k",
        type=RANGES["top_k"],
        default=0,
        help="number of most likely tokens to sample from; default: 0, all tokens",
    )
    sampling.add_argument(
        "--top-p",
        type=RANGES["top_p"],
        default=1.0,
        help="sample from the smallest set of most likely tokens with at least this total "
        "probability; default: 1, all tokens",
    )
    sampling.add_argument(
        "--min-p",
        type=RANGES["min_p"],
        default=0.0,
        help="sample from the tokens with at least this fraction of the largest probability; "
        "default: 0, all tokens",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=RANGES["repetition_penalty"],
        default=1.0,
        help="divide positive logits of tokens already in the text by this factor, and multiply "
        "negative ones; default: 1, no penalty",
    )
    sampling.add_argument(
        "--seed",
        type=SEED,
        help="seed of the random numbers; default: random, printed with the statistics",
    )
    sampling.add_argument(
        "--num-samples", type=COUNT, default=1, help="number of texts per prompt; default: 1"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="data type of the weights; default: auto, as stored",
    )
    machine.add_argument(
        "--quantize",
        choices=["int8"],
        help="quantize the weights to 8 bits, for faster decoding on the CPU; default: no",
    )
    machine.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; default: auto, a GPU if there is one",
    )
    machine.add_argument(
        "--backend",
        choices=["auto", "triton", "torch"],
        help=f"backend of the operators; default: {BACKEND_VARIABLE}, or else auto",
    )
    machine.add_argument(
        "--prefill-chunk",
        type=COUNT,
        metavar="N",
        help="prompt tokens per pass; changes memory, not the text; default: the largest sliding "
        "window, between 512 and 4096",
    )
    machine.add_argument(
        "--window",
        type=_window,
        metavar="N|none",
        help="sliding window in tokens; 'none' removes the window; default: the model's",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per text, on one line"
    )
    output.add_argument(
        "--quiet", action="store_true", help="print no prompt, notes or statistics on stderr"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    if args.backend:
        os.environ[BACKEND_VARIABLE] = args.backend
        reload_backend_setting()
    if not launched():
        return _generate(args, World(0, 1, device_of(args.device)))
    with joined(args.device) as world, _silent(not world.is_main):
        for name, value in vars(args).items():
            if name not in _RANK_LOCAL_OPTIONS:
                check_same(f"--{name.replace('_', '-')}", value)
        return _generate(args, world)


# Options that only the main rank reads, or that may differ between ranks.
_RANK_LOCAL_OPTIONS = {"prompt", "prompt_option", "prompt_file", "model", "device"}


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Discard what the block prints, if `silent`. Exceptions pass through."""
    with ExitStack() as stack:
        if silent:
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(sink))
            stack.enter_context(redirect_stderr(sink))
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
        raise ValueError(
            f"--num-samples must be 1 with --chat, got {args.num_samples}; leave out --num-samples "
            "or --chat"
        )
    if args.system is not None and not args.chat:
        raise ValueError("--system requires --chat")
    if args.context is not None and not args.chat:
        raise ValueError("--context requires --chat")
    prompts = world.from_main(lambda: _prompts(args))
    stats = GenerationStats(world.size)
    started = time.perf_counter()
    if world.size > 1:  # the main rank downloads first
        world.from_main(lambda: str(resolve(args.model)))
    path = resolve(args.model)
    check_folder(path)  # before the tokenizer: its error is clearer if the folder has no checkpoint
    overrides: dict[str, Any] = {}
    if args.window is not None:
        overrides["sliding_window"] = None if args.window == "none" else args.window
    tokenizer = MistralTokenizer.from_pretrained(path)
    if args.chat and tokenizer.chat_version is None:
        raise ValueError(
            f"--chat requires a chat template, which model {args.model!r} does not have; leave out "
            "--chat to continue a text, or give an instruct model with --model"
        )
    if world.size > 1:
        files = sorted({tokenizer.path, *find_tokenizer_files(path)})
        contents = (part for file in files for part in (file.name.encode(), file.read_bytes()))
        check_same("the tokenizer", digest(*contents))
    model_class = MistralForCausalLM if world.size == 1 else ParallelMistralForCausalLM
    model = model_class.from_pretrained(
        path,
        dtype=DTYPES.get(args.dtype),
        device=device,
        quantize=args.quantize,
        **overrides,
    )
    extension.load(device.type)  # here, so that compilation does not count as prompt time
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
                print(
                    "note: this is an instruct model; --chat applies its chat template",
                    file=sys.stderr,
                )
            _complete(args, model, tokenizer, prompts, options, stats)
    except (KeyboardInterrupt, SystemExit):  # SIGTERM raises SystemExit
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
        raise ValueError(
            f"only one of prompt, --prompt and --prompt-file must be given, got {len(given)}"
        )
    if args.prompt_file is not None:
        if args.chat:
            raise ValueError(
                "--prompt-file must not be given with --chat; leave out --prompt-file or --chat"
            )
        lines = read_input(args.prompt_file, _PROMPT_LIMIT).split("\n")
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompt_file} must contain a prompt, got only empty lines")
        return prompts
    if not given:
        if args.chat:
            return []
        if sys.stdin.isatty():
            raise ValueError("no prompt; give one as an argument, or '-' to read it from stdin")
    prompt = given[0] if given else "-"
    if prompt == "-":  # `echo` adds one newline, which is not part of the prompt
        prompt = read_stdin(sys.stdin.read, _PROMPT_LIMIT).removesuffix("\n")
    if not prompt.strip():
        raise ValueError("prompt must not be empty")
    return [prompt]


def _write_record(prompt: str, completion: Completion) -> None:
    """Write a line of JSON to stdout, in ASCII unless stdout is UTF-8."""
    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    record = {"prompt": prompt, **asdict(completion)}
    write_out(json.dumps(record, ensure_ascii=not utf8) + "\n")


def _complete(
    args: argparse.Namespace,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: list[str],
    options: dict[str, Any],
    stats: GenerationStats,
) -> None:
    encoded = [tokenizer.encode(prompt, eos=False) for prompt in prompts]
    batch = len(prompts) * args.num_samples
    # Allocate the cache first: it raises an error if memory does not suffice for the batch.
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
        if stats.first_tokens and not isinstance(
            error, OSError
        ):  # OSError: stdout cannot be written
            finish()  # print the incomplete texts
        if stats.first_tokens and live and not args.quiet:
            print(file=sys.stderr)  # end the line of the prompt
        raise
    finish()


def _chat(
    args: argparse.Namespace,
    world: World,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    messages: list[str],
    options: dict[str, Any],
    stats: GenerationStats,
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
                    print(file=sys.stderr)  # end the line of "> "; a terminal echoes the newline
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
                raise  # at a terminal, Ctrl-C during an answer ends only the answer
        if args.json:
            _write_record(message, completion)
        else:
            write_out("\n")
        if conversation.full:
            print(
                f"note: the conversation fills its context of {conversation.max_length} tokens; "
                "restart with a larger --context",
                file=sys.stderr,
            )


if __name__ == "__main__":
    enter(main)
