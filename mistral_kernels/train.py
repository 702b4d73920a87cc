"""`python -m mistral_kernels.train`: pretrain a small Mistral on plain text, or continue training.

The defaults are the recipe of the bundled model: a 2.75 M-parameter decoder with grouped-query
attention, a sliding window of 128 tokens, and a byte-fallback BPE vocabulary of 2048 pieces trained
on the same text.

Under torchrun, the ranks divide the model, the optimizer state and every batch among them.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, resolve
from mistral_kernels.checkpoint.tokenizer_files import find_tokenizer_files
from mistral_kernels.checkpoint.writing import check_target
from mistral_kernels.cli.command import (
    Parser,
    check_backend,
    device_of,
    enter,
    read_input,
    run,
    user_path,
)
from mistral_kernels.distributed.process_group import World, check_same, joined, launched
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.training.loop import DTYPES, Corpus, Recipe, Run, SingleProcess, train
from mistral_kernels.training.state import FileSaving, Saving
from mistral_kernels.utils.files import digest
from mistral_kernels.utils.ranges import COUNT, Range

TINY = MistralConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=128,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
HELD_OUT = "held_out.txt"
_SAVE_EVERY = Range(int, 0, COUNT.high)
_PIPE_LIMIT = 1 << 29  # maximum bytes of a text that is not a regular file


def read_text(paths: Sequence[Path]) -> str:
    """Return the text of the files, one line per paragraph. A blank line ends a paragraph."""
    text = "\n\n".join(read_input(path, _PIPE_LIMIT) for path in paths)
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def split_held_out(text: str, size: int) -> tuple[str, str]:
    """Split a text into training text and held-out text.

    The held-out text consists of whole paragraphs and has at most the last `size` characters.
    """
    if not 0 < size < len(text) // 2:
        raise ValueError(
            f"--held-out-chars must be at least 1 and less than half of the text's {len(text)} "
            f"characters, got {size}; hold out less, or give more text"
        )
    cut = text.index("\n", len(text) - size) + 1
    if cut == len(text):
        raise ValueError(
            f"the last {size} characters of the text are all in one paragraph; hold out more "
            "(--held-out-chars), or separate the paragraphs by blank lines"
        )
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int, path: Path) -> None:
    """Train a byte-fallback BPE model with Mistral's special tokens and write it to `path`."""
    import sentencepiece

    model = io.BytesIO()  # with a path instead, sentencepiece would record the path in the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the text is too short to train a vocabulary of {vocab_size} tokens: {error}"
        ) from None
    path.write_bytes(model.getvalue())


def train_on_texts(
    texts: Sequence[Path],
    output: Path,
    held_out_chars: int,
    recipe: Recipe,
    world: World,
    source: str | None = None,
    save_every: int = 0,
) -> None:
    """Train a tokenizer and a model on `texts`, and write them to `output` when complete.

    The checkpoint has Hugging Face's format and two additional files: the held-out text, and
    `training.json` with the recipe, the loss curve and the final held-out loss.

    The state of the run is saved at `output` with the suffix `.partial`. A run that finds a state
    there resumes from it. The state is removed at the end.

    In a process group, all ranks must call this function with the same arguments. Each rank holds a
    share of the model, and the state is a folder from which any number of ranks can resume.

    Args:
        texts: UTF-8 files.
        output: folder to create.
        held_out_chars: maximum number of characters at the end of the text that are kept for
            evaluation.
        recipe: settings of the optimization.
        world: this rank; its device is used.
        source: folder or hub id of a checkpoint. Its model is trained further, with its tokenizer;
            None: train a new model.
        save_every: number of steps between two saves of the state; 0: never.
    """
    output = output.expanduser().resolve()
    if output.is_symlink():
        raise ValueError(
            f"output must be a folder, got {output}, a symbolic link that leads back to itself; "
            "remove the link, or name another output"
        )
    check_target(output)
    _SAVE_EVERY.check("save_every", save_every)
    if world.size > recipe.batch_size:
        raise ValueError(
            f"batch_size must be at least the number of ranks, {world.size}, "
            f"got {recipe.batch_size}"
        )
    training, held_out = split_held_out(read_text(texts), held_out_chars)
    partial = output.with_name(f"{output.name}.partial")
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere:
        log = sys.stderr if world.is_main else nowhere
        folder = Path(scratch) if source is None else resolve(source)
        if source is None:
            train_tokenizer(training, TINY.vocab_size, folder / "tokenizer.model")
        corpus = Corpus(training, folder)
        tokens = corpus.encode(held_out)
        config = TINY if source is None else open_checkpoint(folder).config
        _check_vocabulary(config, corpus, tokens)
        identity = {
            **asdict(recipe),
            "from": source,
            "texts": digest(training.encode(), held_out.encode()),
            "tokenizer": digest(*(x.numpy().tobytes() for x in (corpus.tokens, tokens))),
            "model": digest(repr(config).encode()),
        }
        saving = _saving(partial, save_every, identity, world)
        world.from_main(lambda: _check_writable(output.parent))
        run = _start(None if source is None else folder, recipe, world)
        parameters = sum(p.numel() for p in run.backend.model.parameters())
        print(
            f"{parameters:,} parameters, {len(corpus.tokens):,} tokens to train on, "
            f"{len(tokens):,} held out",
            file=log,
        )
        try:
            curve = train(run, corpus, tokens, log, saving)
        except KeyboardInterrupt:
            print(
                f"\nto resume from the state in {partial}, run the same command again"
                if saving.exists()
                else "\nno state was saved from which to resume; use --save-every",
                file=log,
            )
            raise
        loss = run.backend.held_out_loss(corpus, tokens)
        report = {
            "texts": [path.name for path in texts],
            "from": source,
            "recipe": asdict(recipe),
            "parameters": parameters,
            "training_tokens": len(corpus.tokens),
            "held_out_loss": loss,
            "held_out_bits_per_byte": loss * len(tokens) / len(held_out.encode()) / math.log(2),
            "curve": [
                dict(zip(("step", "loss", "held_out_loss"), point, strict=True)) for point in curve
            ],
        }
        files = [Path(scratch, name) for name in (HELD_OUT, "training.json")]
        files[0].write_text(held_out, encoding="utf-8")
        files[1].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        files += {corpus.tokenizer.path, *find_tokenizer_files(folder)}
        run.backend.write(output, files)
    saving.discard()


def _check_writable(folder: Path) -> None:
    """Create `folder`. Raise CheckpointError, before hours of training, if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}; name another output") from None


def _start(folder: Path | None, recipe: Recipe, world: World) -> Run:
    """Create a run of the model in `folder`, or of a new model if None."""
    dtype = DTYPES[recipe.dtype]
    if folder is None:
        torch.manual_seed(recipe.seed)
        model = MistralForCausalLM(TINY).to(dtype)
    elif not dist.is_initialized():
        model = MistralForCausalLM.from_pretrained(folder, dtype=dtype)
    if not dist.is_initialized():
        return Run(SingleProcess(model.to(world.device)), recipe)
    # Imported here, since only runs under torchrun need FSDP and its import is slow.
    from mistral_kernels.training.fsdp import PartOf, Sharded, sharded_model

    def new_weights(part_of: PartOf) -> Iterable[tuple[str, Tensor]]:
        for name, weight in model.state_dict().items():
            yield name, weight[part_of(name, tuple(weight.shape))]

    if folder is None:
        config, tensors = TINY, new_weights
    else:
        stored = open_checkpoint(folder)
        config, tensors = stored.config, stored.tensors
    return Run(Sharded(sharded_model(config, tensors, dtype, world), dtype, world), recipe)


def _saving(path: Path, every: int, identity: dict[str, Any], world: World) -> Saving:
    if not dist.is_initialized():
        return FileSaving(path, every, identity)
    from mistral_kernels.training.fsdp_state import FolderSaving

    for name, value in {**identity, "output": path, "save_every": every}.items():
        check_same(name, value)
    return FolderSaving(path, every, identity, world)


def _check_vocabulary(config: MistralConfig, corpus: Corpus, held_out: Tensor) -> None:
    if not (len(corpus.tokens) and len(held_out)):
        raise ValueError(f"the text must have tokens, got none with {corpus.tokenizer.path}")
    largest = int(torch.cat((corpus.tokens, held_out)).max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"tokens must be less than the model's vocab_size, {config.vocab_size}, got {largest} "
            f"from {corpus.tokenizer.path}: use the tokenizer of the model"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels.train",
        description="Pretrain a small Mistral on plain text. The defaults are the recipe of the "
        "bundled model.",
    )
    parser.add_argument(
        "text", nargs="+", type=user_path, help="UTF-8 file with blank lines between paragraphs"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder to create")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="folder or hub id of a checkpoint to train further, with its own tokenizer",
    )
    parser.add_argument(
        "--held-out-chars",
        type=COUNT,
        default=32_000,
        help="characters at the end of the text that are kept for evaluation",
    )
    parser.add_argument(
        "--save-every",
        type=_SAVE_EVERY,
        default=0,
        metavar="STEPS",
        help="save the state of the run in OUTPUT.partial every STEPS steps; the same command "
        "resumes from it (default 0: never)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    for option in fields(Recipe):
        name, default = f"--{option.name.replace('_', '-')}", option.default
        described = option.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(name, action="store_true", help=described)
        else:
            text = f"{described} (default {default})" if described else f"default {default}"
            kind = option.metadata["range"] or str
            parser.add_argument(name, type=kind, default=default, help=text)
    return parser


def _run(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)

    def train_in(world: World) -> None:
        check_backend(world.device)
        recipe = Recipe(**{option.name: getattr(args, option.name) for option in fields(Recipe)})
        options = (args.held_out_chars, recipe, world, args.source, args.save_every)
        train_on_texts(args.text, args.output, *options)

    if launched():
        with joined(args.device) as world:
            train_in(world)
    else:
        train_in(World(0, 1, device_of(args.device)))


if __name__ == "__main__":
    enter(main)
