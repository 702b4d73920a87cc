"""Text from prompts: `generate()`, `stream_generate()` and `python -m mistral_kernels.generate`.

The command writes generated text, and nothing else, to standard output; the prompt, notes and a
closing block of figures go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mistral_kernels.chat import Conversation
from mistral_kernels.checkpoint import resolve
from mistral_kernels.command import DTYPES, Parser, device_of, run
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE, choose_backend
from mistral_kernels.streaming import Completion, TextDelta, generate, stream_generate
from mistral_kernels.tokenizer import MistralTokenizer

__all__ = ["Completion", "TextDelta", "generate", "main", "stream_generate"]


@dataclass
class _Stats:
    """Figures of one command, printed at its end."""

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    first_tokens: int = 0
    later_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    cache_bytes: int = 0

    def time(self, deltas: Iterator[TextDelta], prompt_tokens: int) -> Iterator[TextDelta]:
        """Pass `deltas` on, telling the first tokens, which wait for the prompts, from the rest."""
        self.prompt_tokens += prompt_tokens
        seen: dict[int, int] = {}
        steps = 0
        started = time.perf_counter()
        for delta in deltas:  # counted one by one, so that an interrupt loses nothing
            now = time.perf_counter()
            if seen:
                self.decode_seconds += now - started
            else:
                self.prefill_seconds += now - started
            started = now
            count = seen[delta.index] = seen.get(delta.index, 0) + 1
            if count == 1:
                self.first_tokens += 1
            else:
                self.later_tokens += 1
            if count > max(steps, 1):
                self.decode_steps += 1
            steps = max(steps, count)
            yield delta

    def lines(self, model: MistralForCausalLM) -> Iterator[str]:
        weights = sum(p.nbytes for p in model.parameters())
        dtype = str(model.dtype).removeprefix("torch.")
        yield f"load      {self.load_seconds:.2f} s, {weights / 1e6:,.1f} MB of {dtype}"
        if self.prefill_seconds:
            yield (
                f"prompt    {self.prompt_tokens} tokens, "
                f"{self.prompt_tokens / self.prefill_seconds:,.1f} tokens/s, "
                f"first token after {self.prefill_seconds:.3f} s"
            )
        if self.decode_steps:
            yield (
                f"generate  {self.first_tokens + self.later_tokens} tokens, "
                f"{self.later_tokens / self.decode_seconds:,.1f} tokens/s, weights read at "
                f"{self.decode_steps * weights / self.decode_seconds / 1e9:,.1f} GB/s"
            )
        peak = _peak_memory(model.device)
        yield f"memory    {peak / 1e6:,.0f} MB at the peak, cache {self.cache_bytes / 1e6:,.1f} MB"
        backend = choose_backend(model.device)
        yield f"backend   {backend.name} on {model.device} ({backend.reason})"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels.generate",
        description="Continue a text, or chat. The text goes to stdout, all else to stderr.",
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; '-' reads stdin")
    parser.add_argument("-p", "--prompt", dest="prompt_option", metavar="TEXT", help="the same")
    parser.add_argument("--prompt-file", type=Path, metavar="PATH", help="a batch: a prompt a line")
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
        type=int,
        metavar="N",
        help="tokens to make room for in a model without a window; default: up to 32768",
    )
    length = parser.add_argument_group("length")
    length.add_argument(
        "-m", "--max-tokens", "--max_tokens", type=int, default=256, help="default 256"
    )
    length.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    length.add_argument("--ignore-eos", action="store_true", help="go on after end-of-text")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", "--temp", type=float, default=0.7, help="default 0.7; 0: the likeliest"
    )
    sampling.add_argument("--top-k", type=int, default=0, help="default 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, help="default 1: all")
    sampling.add_argument("--min-p", type=float, default=0.0, help="default 0: all")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="default 1: none")
    sampling.add_argument("--seed", type=int, help="default: random, and printed")
    sampling.add_argument("--num-samples", type=int, default=1, help="texts for each prompt")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    machine.add_argument("--backend", choices=["auto", "triton", "torch"])
    machine.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens in one pass")
    machine.add_argument("--window", metavar="N|none", help="replace the model's sliding window")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="a JSON object a text, one a line")
    output.add_argument("--quiet", action="store_true", help="no prompt and figures on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    return run(_run, _parser().parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    if args.backend:
        os.environ[BACKEND_VARIABLE] = args.backend
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"--seed must be in [0, 2**64), got {seed}")
    device = device_of(args.device)
    try:
        choose_backend(device)
    except RuntimeError as error:  # it cannot run here
        raise ValueError(str(error)) from None
    sampler = Sampler(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
        torch.Generator(device).manual_seed(seed),
    )
    for option in ("--max-tokens", "--num-samples", "--prefill-chunk"):
        count = getattr(args, option[2:].replace("-", "_"))
        if count is not None and count < 1:
            raise ValueError(f"{option} must be positive, got {count}")
    if not all(args.stop):
        raise ValueError("--stop must not be empty")
    if args.chat and args.num_samples > 1:
        raise ValueError("--num-samples is for texts; --chat holds one conversation")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    if args.context is not None and not (args.chat and args.context > 0):
        raise ValueError("--context needs --chat and a positive number of tokens")
    prompts = _prompts(args)
    stats = _Stats()
    started = time.perf_counter()
    path = resolve(args.model)
    overrides = {} if args.window is None else {"sliding_window": _window(args.window)}
    tokenizer = MistralTokenizer.from_pretrained(path)
    if args.chat and tokenizer.chat_version is None:
        raise ValueError(f"--chat: {tokenizer.path} has no chat template; continue a text instead")
    model = MistralForCausalLM.from_pretrained(
        path, dtype=DTYPES.get(args.dtype), device=device, **overrides
    )
    stats.load_seconds = time.perf_counter() - started
    options = {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
        "prefill_chunk": args.prefill_chunk,
    }
    figures = not args.quiet
    try:
        if args.chat:
            _chat(args, model, tokenizer, prompts, options, stats)
        else:
            if tokenizer.has_chat_template and not args.quiet:
                print("note: an instruct model; --chat applies its template", file=sys.stderr)
            _complete(args, model, tokenizer, prompts, options, stats)
    except Exception:  # after an interrupt, too, there are figures to tell
        figures = False
        raise
    finally:
        if figures:
            print("", *stats.lines(model), f"seed      {seed}", sep="\n", file=sys.stderr)


def _window(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal():
        raise ValueError(f"--window must be a number of tokens or 'none', got {text!r}")
    return int(text)


def _prompts(args: argparse.Namespace) -> list[str]:
    given = [x for x in (args.prompt, args.prompt_option, args.prompt_file) if x is not None]
    if len(given) > 1:
        raise ValueError("give one of a prompt, --prompt and --prompt-file")
    if args.prompt_file is not None:
        try:
            lines = args.prompt_file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} is not UTF-8: {error}") from None
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompt_file} has no prompt in it")
        if args.chat:
            raise ValueError("--prompt-file is a batch of texts; --chat holds one conversation")
        return prompts
    if not given:
        if args.chat:
            return []
        if sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, or '-' to read it from stdin")
    prompt = given[0] if given else "-"
    try:  # what `echo` puts at the end is not part of the prompt
        prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt]
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None
    if not prompts[0].strip():
        raise ValueError("the prompt is empty")
    return prompts


def _complete(
    args: argparse.Namespace,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    prompts: list[str],
    options: dict[str, Any],
    stats: _Stats,
) -> None:
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    completions = [Completion() for _ in prompts]
    live = len(prompts) == 1 and not args.json

    def finish() -> None:
        if live:
            print(flush=True)
        for number, (prompt, completion) in enumerate(zip(prompts, completions), start=1):
            if args.json:
                record = {"prompt": prompt, **asdict(completion)}
                print(json.dumps(record, ensure_ascii=False), flush=True)
            elif not live:
                if not args.quiet:
                    print(f"[{number}/{len(prompts)}] {prompt}", file=sys.stderr, flush=True)
                print(completion.text, flush=True)

    cache = model.new_cache(len(ids), max(map(len, ids)) + args.max_tokens)
    stats.cache_bytes = cache.nbytes
    deltas = stream_generate(model, tokenizer, ids, cache=cache, **options)
    try:
        for delta in stats.time(deltas, sum(map(len, ids))):
            if live and not args.quiet and not completions[0].token_ids:
                print(prompts[0], end="", file=sys.stderr, flush=True)
            completions[delta.index].add(delta)
            if live:
                print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        finish()  # what there is
        raise
    finish()


def _chat(
    args: argparse.Namespace,
    model: MistralForCausalLM,
    tokenizer: MistralTokenizer,
    messages: list[str],
    options: dict[str, Any],
    stats: _Stats,
) -> None:
    conversation = Conversation(model, tokenizer, args.system, args.context)
    stats.cache_bytes = conversation.cache_bytes
    while True:
        if not messages:
            if not args.quiet:
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
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
                    print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise  # at a terminal it ends this answer; at the prompt, the conversation
        record = {"prompt": message, **asdict(completion)}
        print(json.dumps(record, ensure_ascii=False) if args.json else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
