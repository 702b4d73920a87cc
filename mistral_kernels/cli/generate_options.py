"""Options of `python -m mistral_kernels.generate`."""

from __future__ import annotations

import argparse

from mistral_kernels.cli.command import DTYPES, Parser, user_path
from mistral_kernels.model.sampling import RANGES
from mistral_kernels.ops.dispatch import BACKEND_VARIABLE
from mistral_kernels.utils.ranges import COUNT, SEED

COMMAND = "python -m mistral_kernels.generate"
INSTRUCT_EXAMPLE = "mistralai/Mistral-7B-Instruct-v0.3"
# Default of --max-tokens: without and with --chat.
TEXT_TOKENS, CHAT_TOKENS = 256, 1024

_DESCRIPTION = """\
Continue a text, or chat with an instruct model. The generated text goes to
stdout, everything else to stderr. Under torchrun, the ranks share the model's
work.
"""
_EXAMPLES = f"""\
examples:
  {COMMAND} "It is a truth"
      continue a text with the bundled model
  {COMMAND} --chat --model {INSTRUCT_EXAMPLE}
      chat; a hub id requires: pip install "mistral_kernels[hf]"
  cat long.txt | {COMMAND} - --model FOLDER --temperature 0
      continue a text from stdin, with the most likely tokens
  {COMMAND} --prompt-file prompts.txt --json > texts.jsonl
      a batch: one prompt per line, one JSON object per text
"""


def generate_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog=COMMAND,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        metavar="FOLDER|ID",
        help="folder of a raw or Hugging Face checkpoint, or a Hugging Face hub id; "
        "default: tiny, the bundled model",
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        "--instruct",
        action="store_true",
        help="chat, with the chat template of the model; the prompt is the first message. At a "
        "terminal, /help lists the commands. From a pipe, each line is a message",
    )
    chat.add_argument("--system", metavar="TEXT", help="system message; default: none")
    chat.add_argument(
        "--context",
        type=COUNT,
        metavar="N",
        help="maximum number of tokens of the conversation, for a model without a sliding window; "
        "the oldest messages of a longer conversation are dropped; default: the model's own "
        "maximum, at most 32768",
    )
    length = parser.add_argument_group("length")
    length.add_argument(
        "-m",
        "--max-tokens",
        "--max_tokens",
        type=COUNT,
        metavar="N",
        help=f"maximum number of new tokens per text; default: {TEXT_TOKENS}, with --chat "
        f"{CHAT_TOKENS} per answer",
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
        metavar="X",
        help="divisor of the logits, >= 0; 0: choose the most likely token; default: 0.7",
    )
    sampling.add_argument(
        "--top-k",
        type=RANGES["top_k"],
        default=0,
        metavar="N",
        help="number of most likely tokens to sample from; default: 0, all tokens",
    )
    sampling.add_argument(
        "--top-p",
        type=RANGES["top_p"],
        default=1.0,
        metavar="X",
        help="sample from the smallest set of most likely tokens with at least this total "
        "probability, in (0, 1]; default: 1, all tokens",
    )
    sampling.add_argument(
        "--min-p",
        type=RANGES["min_p"],
        default=0.0,
        metavar="X",
        help="sample from the tokens with at least this fraction of the largest probability, in "
        "[0, 1]; default: 0, all tokens",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=RANGES["repetition_penalty"],
        default=1.0,
        metavar="X",
        help="divide positive logits of tokens already in the text by this factor, and multiply "
        "negative ones; default: 1, no penalty",
    )
    sampling.add_argument(
        "--seed",
        type=SEED,
        metavar="N",
        help="seed of the random numbers; default: random, printed with the statistics",
    )
    sampling.add_argument(
        "--num-samples",
        type=COUNT,
        default=1,
        metavar="N",
        help="number of texts per prompt; default: 1",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        metavar="DTYPE",
        help=f"data type of the weights: {', '.join(DTYPES)}; default: auto, as stored",
    )
    machine.add_argument(
        "--quantize",
        choices=["int8"],
        help="quantize the weights to 8 bits, for faster decoding on the CPU; default: no",
    )
    machine.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
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
        "--quiet",
        action="store_true",
        help="print no banner, prompt, notes or statistics on stderr",
    )
    return parser


def _window(text: str) -> int | str:
    if text.lower() == "none":
        return "none"
    try:
        count: int = COUNT(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; 'none' removes the window") from None
    return count
