"""`python -m mistral_kernels.train`: pretrain a small Mistral on plain text, or continue training.

The defaults are the recipe of the bundled model: a 2.75 M-parameter decoder with grouped-query
attention, a sliding window of 128 tokens, and a byte-fallback BPE vocabulary of 2048 pieces trained
on the same text.

Under torchrun, the ranks divide the model, the optimizer state and every batch among them. With
`--evaluate`, the command prints the loss of a checkpoint on a text instead.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mistral_kernels.cli.command import Parser, check_backend, device_of, enter, run, user_path
from mistral_kernels.distributed.process_group import World, joined, launched
from mistral_kernels.training.on_texts import SAVE_EVERY, evaluate_on_texts, train_on_texts
from mistral_kernels.training.recipe import DTYPES, Recipe
from mistral_kernels.utils.ranges import COUNT

_SCHEDULE = """\
AdamW with betas 0.9 and 0.95. The learning rate rises linearly to
--learning-rate in the first --warmup-steps steps, then falls along half a
cosine to 10 % of it at the last step. The written weights are those of the
evaluation with the lowest held-out loss."""

_EPILOG = """\
The text: blank lines separate paragraphs. In a file without blank lines, every
line is a paragraph; in a file of a single line, every sentence. A training
sequence begins with BOS and a paragraph.

The run: OUTPUT.log.jsonl gets one JSON object per step and is moved to
OUTPUT/log.jsonl at the end. OUTPUT appears only when it is complete.

With --evaluate, the text is cut into sequences of --seqlen tokens, each after
BOS. A token sees the tokens before it in its sequence, as far as the model's
sliding window reaches. --from, --seqlen, --dtype and --device are the only
options that may be given with it.

examples:
  python -m mistral_kernels.train book.txt --output model --save-every 50
  python -m mistral_kernels.train notes.txt --from tiny --output tuned \\
      --learning-rate 1e-4 --steps 200
  python -m mistral_kernels.train notes.txt --from tuned --evaluate
  torchrun --nproc-per-node 8 -m mistral_kernels.train notes.txt \\
      --from FOLDER --output tuned"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


# Parts of the help: the defaults of these options with --evaluate.
_WITH_EVALUATE = {
    "seqlen": "; with --evaluate: the model's maximum, at most 32768",
    "dtype": "; with --evaluate: as stored",
}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels.train",
        description="Pretrain a small Mistral on plain text, train a checkpoint further, or "
        "evaluate one.\nThe defaults are the recipe of the bundled model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only given options are in the result
    )
    parser.add_argument("text", nargs="+", type=user_path, help="UTF-8 file")
    parser.add_argument("--output", type=user_path, help="folder to create")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="CHECKPOINT",
        help="folder or hub id of a checkpoint to train further or evaluate, with its own "
        "tokenizer; default: train a new model and tokenizer",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="print the loss of --from on the text to stdout: nats per token, perplexity, bits per "
        "byte; nothing is trained or written",
    )
    groups = {
        "optimization": parser.add_argument_group("optimization", _SCHEDULE),
        "batches": parser.add_argument_group("batches"),
        "evaluation and saving": parser.add_argument_group("evaluation and saving"),
        "machine": parser.add_argument_group("machine"),
    }
    for option in fields(Recipe):
        group = groups[option.metadata["group"]]
        name, described = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        if isinstance(option.default, bool):
            group.add_argument(name, action="store_true", help=f"{described}; default: no")
            continue
        described += f"; default: {option.default}{_WITH_EVALUATE.get(option.name, '')}"
        kind: dict[str, Any] = {"type": option.metadata["range"], "metavar": "N"}
        if option.name == "dtype":
            kind = {"choices": DTYPES}
        elif option.metadata["range"].kind is float:
            kind["metavar"] = "X"
        group.add_argument(name, help=described, **kind)
    saving = groups["evaluation and saving"]
    saving.add_argument(
        "--held-out-chars",
        type=COUNT,
        metavar="N",
        help="maximum number of characters at the end of the text that are kept for evaluation; "
        "default: 32000, at most 10 %% of the text",
    )
    saving.add_argument(
        "--save-every",
        type=SAVE_EVERY,
        metavar="N",
        help="steps between two saves of the run's state in OUTPUT.partial, from which the same "
        "command resumes; default: 0, never",
    )
    saving.add_argument(
        "--tensorboard",
        type=user_path,
        metavar="DIR",
        help="folder for TensorBoard's event files; requires the package tensorboard; default: "
        "none",
    )
    groups["machine"].add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; default: auto, a GPU if there is one"
    )
    return parser


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    given = vars(parser.parse_args(argv))
    texts, device = given.pop("text"), given.pop("device", "auto")
    if given.pop("evaluate", False):
        return _evaluate(parser, texts, device, given)
    if "output" not in given:
        parser.error("--output must be given, to train a model; or use --from with --evaluate")
    options = {
        "output": given.pop("output"),
        "held_out_chars": given.pop("held_out_chars", None),
        "source": given.pop("source", None),
        "save_every": given.pop("save_every", 0),
        "tensorboard": given.pop("tensorboard", None),
    }

    def train_in(world: World) -> None:
        check_backend(world.device)
        train_on_texts(texts, recipe=Recipe(**given), world=world, **options)

    if launched():
        with joined(device) as world:
            train_in(world)
    else:
        train_in(World(0, 1, device_of(device)))
    return None


def _evaluate(
    parser: Parser, texts: Sequence[Path], device_name: str, given: dict[str, Any]
) -> None:
    """Run the command with `--evaluate`; `given` holds its other options."""
    source, dtype, seqlen = (given.pop(name, None) for name in ("source", "dtype", "seqlen"))
    if given:
        name = f"--{next(iter(given)).replace('_', '-')}"
        parser.error(f"{name} must not be given with --evaluate; leave out one of the two")
    if source is None:
        parser.error("--from must be given with --evaluate; name the checkpoint to evaluate")
    if launched():
        raise ValueError(
            f"the number of ranks must be 1 with --evaluate, got {os.environ['WORLD_SIZE']}; start "
            "the command without torchrun"
        )
    device = device_of(device_name)
    check_backend(device)
    evaluate_on_texts(texts, source, device, DTYPES.get(dtype), seqlen)


if __name__ == "__main__":
    enter(main)
