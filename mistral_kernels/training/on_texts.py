"""Training and evaluation of a checkpoint on text files, from reading them to the written files."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, resolve
from mistral_kernels.checkpoint.tokenizer_files import find_tokenizer_files
from mistral_kernels.checkpoint.writing import check_target
from mistral_kernels.cli.command import as_started, write_out
from mistral_kernels.distributed.process_group import World, check_same
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.training.corpus import Corpus, read_texts, split_held_out, train_tokenizer
from mistral_kernels.training.evaluation import (
    bits_per_byte,
    perplexity,
    text_loss,
)
from mistral_kernels.training.loop import Run, SingleProcess, train
from mistral_kernels.training.metrics import (
    LogFile,
    MetricsWriter,
    TensorBoard,
    draw_curve,
    summary_writer_class,
)
from mistral_kernels.training.recipe import DTYPES, Recipe
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
SAVE_EVERY = Range(int, 0, COUNT.high)
LOG, CURVE = "log.jsonl", "curve.png"


def train_on_texts(
    texts: Sequence[Path],
    output: Path,
    held_out_chars: int | None,
    recipe: Recipe,
    world: World,
    source: str | None = None,
    save_every: int = 0,
    tensorboard: Path | None = None,
) -> None:
    """Train a tokenizer and a model on `texts`, and write them to `output` when complete.

    The checkpoint has Hugging Face's format and four additional files: the held-out text;
    `training.json` with the recipe, the loss curve and the final held-out loss; `log.jsonl` with
    the measurements of each step; and, if matplotlib is installed, their plot `curve.png`.

    The state of the run is saved at `output` with the suffix `.partial`. A run that finds a state
    there resumes from it. The state is removed at the end. The log has the suffix `.log.jsonl`
    until it is moved into `output`.

    In a process group, all ranks must call this function with the same arguments. Each rank holds a
    share of the model, and the state is a folder from which any number of ranks can resume.

    Args:
        texts: UTF-8 files.
        output: folder to create.
        held_out_chars: maximum number of characters at the end of the text that are kept for
            evaluation; None: 32,000, at most 10 % of the text.
        recipe: settings of the optimization.
        world: this rank; its device is used.
        source: folder or hub id of a checkpoint. Its model is trained further, with its tokenizer;
            None: train a new model.
        save_every: number of steps between two saves of the state; 0: never.
        tensorboard: folder for TensorBoard's event files; None: do not write them.

    Raises:
        ValueError: an argument or a text is invalid, or a loss is not finite.
        CheckpointError: `source` or the saved state is invalid, `output` exists and is not an empty
            folder, or a file cannot be written.
        TokenizerError: the tokenizer of `source` is invalid.
    """
    output = output.expanduser().resolve()
    if output.is_symlink():
        raise ValueError(
            f"output must be a folder, got {output}, a symbolic link that leads back to itself; "
            "remove the link, or name another output"
        )
    check_target(output)
    SAVE_EVERY.check("save_every", save_every)
    if world.size > recipe.batch_size:
        raise ValueError(
            f"batch_size must be at least the number of ranks, {world.size}, "
            f"got {recipe.batch_size}"
        )
    summary_writer = summary_writer_class() if tensorboard and world.is_main else None
    text, paragraphs = read_texts(texts)
    training, held_out = split_held_out(text, held_out_chars)
    partial, log_path = (output.with_name(f"{output.name}.{end}") for end in ("partial", LOG))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = sys.stderr if world.is_main else stack.enter_context(open(os.devnull, "w"))
        folder = scratch if source is None else resolve(source)
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
        resumed = run.restore(saving)
        writers: list[MetricsWriter] = []
        if world.is_main:
            log_file = stack.enter_context(LogFile(log_path, run.step))
            writers.append(log_file)
            if tensorboard:
                board = TensorBoard(summary_writer, tensorboard, run.step)
                writers.append(stack.enter_context(board))
        print(
            paragraphs,
            f"{parameters:,} parameters, {len(corpus.tokens):,} tokens to train on, "
            f"{len(tokens):,} held out",
            f"log of each step: {log_path}, at the end {output / LOG}",
            *([f"resuming from step {run.step}, saved in {saving.path}"] if resumed else []),
            sep="\n",
            file=log,
            flush=True,
        )
        try:
            curve = train(run, corpus, tokens, log, saving, writers)
        except KeyboardInterrupt:
            print(
                f"\nto resume from the state in {partial}, run the same command again"
                if saving.exists()
                else "\nno state was saved from which to resume; use --save-every",
                file=log,
            )
            raise
        loss = run.backend.held_out_loss(corpus, tokens)
        bits = bits_per_byte(loss, tokens, held_out)
        report = {
            "texts": [path.name for path in texts],
            "from": source,
            "recipe": asdict(recipe),
            "parameters": parameters,
            "training_tokens": len(corpus.tokens),
            "held_out_loss": loss,
            "held_out_bits_per_byte": bits,
            "curve": [
                dict(zip(("step", "loss", "held_out_loss"), point, strict=True)) for point in curve
            ],
        }
        files = [scratch / name for name in (HELD_OUT, "training.json")]
        files[0].write_text(held_out, encoding="utf-8")
        files[1].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if world.is_main:
            log_file.copy_to(scratch / LOG)
            files.append(scratch / LOG)
            if missing := draw_curve(scratch / LOG, scratch / CURVE):
                print(missing, file=log)
            else:
                files.append(scratch / CURVE)
        files += {corpus.tokenizer.path, *find_tokenizer_files(folder)}
        run.backend.write(output, files)
        if world.is_main:
            log_file.remove()
        saving.discard()
        print(
            f"wrote {output}: held-out loss {loss:.4f} nats per token, {bits:.4f} bits per byte",
            as_started('next: python -m mistral_kernels.generate "Once upon a time" --model ')
            + shlex.quote(str(output)),
            sep="\n",
            file=log,
        )


def evaluate_on_texts(
    texts: Sequence[Path],
    source: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    seqlen: int | None = None,
) -> None:
    """Print the loss of a checkpoint on `texts`, which are read as in training.

    Args:
        texts: UTF-8 files.
        source: folder or hub id of the checkpoint and its tokenizer.
        device: device of the model.
        dtype: data type of the weights; None: as stored.
        seqlen: largest number of tokens per sequence; None: `MistralConfig.default_length`.

    Raises:
        ValueError: a text is invalid, or the loss is not finite.
        CheckpointError: `source` is invalid.
        TokenizerError: the tokenizer of `source` is invalid.
    """
    text, paragraphs = read_texts(texts)
    folder = resolve(source)
    config = open_checkpoint(folder).config
    corpus = Corpus(text, folder)
    _check_vocabulary(config, corpus)
    model = MistralForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
    seqlen = seqlen or config.default_length
    print(paragraphs, f"sequences of at most {seqlen:,} tokens", sep="\n", file=sys.stderr)
    loss = text_loss(model, corpus, seqlen)
    if not math.isfinite(loss):
        raise ValueError(f"the loss of the text must be finite, got {loss} from {source}")
    write_out(
        f"loss        {loss:.4f} nats per token\n"
        f"perplexity  {perplexity(loss):,.2f}\n"
        f"bits        {bits_per_byte(loss, corpus.tokens, text):.4f} per byte\n"
        f"tokens      {len(corpus.tokens):,} of {len(text.encode()):,} bytes\n"
    )


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


def _check_vocabulary(config: MistralConfig, corpus: Corpus, *others: Tensor) -> None:
    tokens = (corpus.tokens, *others)
    if not all(map(len, tokens)):
        raise ValueError(f"the text must have tokens, got none with {corpus.tokenizer.path}")
    largest = max(int(each.max()) for each in tokens)
    if largest >= config.vocab_size:
        raise ValueError(
            f"tokens must be less than the model's vocab_size, {config.vocab_size}, got {largest} "
            f"from {corpus.tokenizer.path}; use the tokenizer of the model"
        )
