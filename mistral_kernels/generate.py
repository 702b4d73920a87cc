"""Text generation: `generate()`, `stream_generate()` and `python -m mistral_kernels.generate`.

The command writes only generated text to standard output. The prompt, notes and the closing
statistics go to standard error. Under torchrun, the ranks share the model's work (see
`mistral_kernels.distributed.tensor_parallel`), and only rank 0 prints.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
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
    as_started,
    check_backend,
    device_of,
    enter,
    read_input,
    read_stdin,
    run,
    wrapped,
    write_out,
)
from mistral_kernels.cli.generate_options import (
    CHAT_TOKENS,
    COMMAND,
    INSTRUCT_EXAMPLE,
    TEXT_TOKENS,
)
from mistral_kernels.cli.generate_options import generate_parser as _parser
from mistral_kernels.cli.output import with_progress, write_record
from mistral_kernels.distributed.process_group import World, check_same, joined, launched
from mistral_kernels.distributed.tensor_parallel import ParallelMistralForCausalLM
from mistral_kernels.model.sampling import Sampler
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

__all__ = ["Completion", "TextDelta", "generate", "main", "stream_generate"]

_PROMPT_LIMIT = 1 << 26  # bytes of a pipe or characters of stdin


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    if args.max_tokens is None:
        args.max_tokens = CHAT_TOKENS if args.chat else TEXT_TOKENS
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
        which = "the bundled model is" if args.model == "tiny" else f"{args.model!r} seems to be"
        raise ValueError(
            f"--chat requires an instruct model, and {which} a base model without a chat template; "
            f"use an instruct model, such as --model {INSTRUCT_EXAMPLE}, or leave out --chat to "
            "continue a text"
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
    if args.chat:  # before the first message: this imports the template's library, and may raise
        system = [{"role": "system", "content": args.system}] if args.system else []
        messages = [*system, {"role": "user", "content": "Hello"}]
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    extension.load(device.type)  # here, so that compilation does not count as prompt time
    stats.load_seconds = time.perf_counter() - started
    options = {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
        "prefill_chunk": args.prefill_chunk,
    }
    reports, notes = not args.quiet, list[str]()
    try:
        if args.chat:
            from mistral_kernels.cli.chat import Chat  # needs termios: Unix only

            conversation = Conversation(model, tokenizer, args.system, args.context)
            stats.cache_bytes = conversation.cache_bytes
            Chat(
                conversation,
                world,
                options,
                stats,
                model_name=args.model,
                as_json=args.json,
                quiet=args.quiet,
            ).run(prompts)
        else:
            if tokenizer.has_chat_template and not args.quiet:
                print(
                    "note: this is an instruct model; --chat applies its chat template: "
                    f"{as_started(COMMAND)} --chat --model {shlex.quote(args.model)}",
                    file=sys.stderr,
                )
            notes = _complete(args, model, tokenizer, prompts, options, stats)
    except (KeyboardInterrupt, SystemExit):  # SIGTERM raises SystemExit
        reports = reports and stats.first_tokens > 0
        raise
    except Exception:
        reports = False
        raise
    finally:
        if reports:
            lines = [*notes, *stats.lines(model), f"seed      {seed}"]
            if sys.stderr.isatty():
                lines = [wrapped(line, indent=10) for line in lines]
            print("", *lines, sep="\n", file=sys.stderr)


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


def _complete(
    args: argparse.Namespace,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: list[str],
    options: dict[str, Any],
    stats: GenerationStats,
) -> list[str]:
    """Generate and write one text per prompt and sample; return notes for stderr."""
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
                write_record({"prompt": prompt, **asdict(completion)})
            elif not live:
                if not args.quiet:
                    print(f"[{number}/{batch}] {prompt}", file=sys.stderr, flush=True)
                write_out(completion.text + "\n")

    tokens = sum(map(len, ids))
    deltas = with_progress(
        lambda progress: stream_generate(
            model, tokenizer, ids, cache=cache, progress=progress, **options
        ),
        tokens,
    )
    try:
        for delta in stats.time(deltas, tokens):
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
    stopped = sum(completion.finish_reason == "length" for completion in completions)
    which = f"{stopped} of {batch} texts " if batch > 1 else ""
    return [f"note: {which}stopped at --max-tokens {args.max_tokens}"] if stopped else []


if __name__ == "__main__":
    enter(main)
