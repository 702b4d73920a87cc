"""Convert a checkpoint between Mistral's own format and Hugging Face's, either way.

    python -m mistral_kernels.convert SOURCE TARGET

Everything but the result goes to stderr. Exit codes: see `command.run`. An incomplete result is
removed; after SIGKILL, by the next conversion into the same parent folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from mistral_kernels.checkpoint import Checkpoint, open_checkpoint, resolve, save_hf, save_raw
from mistral_kernels.checkpoint.tokenizer_files import find_tokenizer_files
from mistral_kernels.cli.command import DTYPES, Parser, enter, run
from mistral_kernels.utils.ranges import COUNT

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.source and args.input_dir) or (args.target and args.output_dir):
        parser.error("name SOURCE and TARGET once, by position or by flag")
    args.source, args.target = args.source or args.input_dir, args.target or args.output_dir
    if args.source is None or args.target is None:
        parser.error("name the checkpoint to read and the folder to write")
    _convert(args)


def _convert(args: argparse.Namespace) -> None:
    checkpoint, target = open_checkpoint(resolve(args.source)), Path(args.target)
    config = checkpoint.config
    for note in config.notes:
        _say(note)
    if args.model_size is not None:
        _say(f"--model_size {args.model_size} ignored: the sizes come from the configuration")
    if args.max_position_embeddings is not None:
        config = replace(config, max_position_embeddings=args.max_position_embeddings)
    tokenizer_files = find_tokenizer_files(checkpoint.path)
    if not tokenizer_files:
        _say(f"no tokenizer in {checkpoint.path}: the result can be loaded, but not talked to")
    to = args.to or ("raw" if checkpoint.format == "hf" else "hf")
    if to == "raw" and config.eos_token_ids != (2,):
        _say(f"eos_token_id = {config.eos_token_id} is left to the tokenizer: params.json has none")
    # Without --dtype every tensor keeps its own, so that nothing is lost.
    dtype = DTYPES[args.dtype] if args.dtype else checkpoint.dtypes
    tensors = _with_progress(checkpoint)
    if to == "raw":
        save_raw(tensors, config, target, dtype=dtype, extra_files=tokenizer_files)
    else:
        save_hf(
            tensors,
            config,
            target,
            dtype=dtype,
            extra_files=tokenizer_files,
            max_shard_bytes=args.max_shard_size,
        )
    name = args.dtype or str(checkpoint.dtype).removeprefix("torch.")
    _say(f"{checkpoint.format} -> {to}: {checkpoint.num_parameters:,} parameters, {name}: {target}")


def _with_progress(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors, with a bar on stderr if that is a terminal."""
    with tqdm(total=checkpoint.num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for name, tensor in checkpoint.tensors():
            yield name, tensor
            del tensor  # a mapped one keeps its pages until it is dropped
            bar.update(checkpoint.stored[name].num_bytes)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _size(text: str) -> int:
    """Return the number of bytes in '5GB', '500MB' or a plain number."""
    number, factor = text.strip().upper(), 1
    for unit, value in _UNITS.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), value
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if not 0 < size < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 500MB, got {text!r}")
    return size


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mistral_kernels.convert",
        description="Convert a checkpoint from Mistral's own format (params.json, consolidated.*) "
        "to Hugging Face's (config.json, model.safetensors), or back. The weights are streamed: "
        "memory for a few tensors is enough. The target appears only when it is whole.",
        epilog="example: python -m mistral_kernels.convert mistral-7B-v0.3 mistral-7B-v0.3-hf",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="folder or hub id of the checkpoint to read")
    add("target", nargs="?", metavar="TARGET", help="folder to write: a new or an empty one")
    add("--input_dir", "--input-dir", metavar="SOURCE", help="the same as the first argument")
    add("--output_dir", "--output-dir", metavar="TARGET", help="the same as the second argument")
    add("--to", choices=("hf", "raw"), help="format to write (default: the other one)")
    add("--dtype", choices=tuple(DTYPES), help="type to store (default: as each tensor is)")
    add(
        "--max-shard-size",
        type=_size,
        default=_UNITS["GB"] * 5,
        metavar="SIZE",
        help="split hf weights into files of at most this size (default: 5GB)",
    )
    add(
        "--max_position_embeddings",
        "--max-position-embeddings",
        type=COUNT,
        metavar="N",
        help="write this value (raw checkpoints seldom give it; default: 32768)",
    )
    add("--model_size", "--model-size", metavar="7B", help="accepted for compatibility, not used")
    return parser


if __name__ == "__main__":
    enter(main)
