"""Convert a checkpoint between Mistral's own format and Hugging Face's format, in both directions.

    python -m mistral_kernels.convert SOURCE TARGET

All messages go to stderr. Exit codes: see `command.run`. After an error or an interrupt, the
incomplete result is removed. After SIGKILL, it remains until the next conversion into the same
parent folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from mistral_kernels.checkpoint import Checkpoint, open_checkpoint, resolve, save_hf, save_raw
from mistral_kernels.checkpoint.tokenizer_files import find_tokenizer_files
from mistral_kernels.checkpoint.writing import check_target
from mistral_kernels.cli.command import DTYPES, Parser, enter, run
from mistral_kernels.utils.files import expand_user
from mistral_kernels.utils.ranges import COUNT

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `command.run`."""
    return run(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.source and args.input_dir) or (args.target and args.output_dir):
        parser.error("SOURCE and TARGET must be given once, as arguments or by their options")
    args.source, args.target = args.source or args.input_dir, args.target or args.output_dir
    if args.source is None or args.target is None:
        parser.error(
            "SOURCE, the checkpoint to read, and TARGET, the folder to write, are required"
        )
    _convert(args)


def _convert(args: argparse.Namespace) -> None:
    """Convert the checkpoint and print notes to stderr."""
    target = expand_user(args.target)
    check_target(target)  # before a download
    checkpoint = open_checkpoint(resolve(args.source))
    config = checkpoint.config
    for note in config.notes:
        _print_note(note)
    if args.model_size is not None:
        _print_note(
            f"--model_size {args.model_size} ignored: the sizes come from the configuration"
        )
    if args.max_position_embeddings is not None:
        config = replace(config, max_position_embeddings=args.max_position_embeddings)
    tokenizer_files = find_tokenizer_files(checkpoint.path)
    if not tokenizer_files:
        _print_note(f"no tokenizer in {checkpoint.path}: the converted model has no tokenizer")
    to = args.to or ("raw" if checkpoint.format == "hf" else "hf")
    if to == "raw" and config.eos_token_ids != (2,):
        _print_note(
            f"eos_token_id = {config.eos_token_id} is not written: params.json has no such field; "
            "the tokenizer must define it"
        )
    # Without --dtype every tensor keeps its own dtype, so the conversion is exact.
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
            generation=checkpoint.generation,
        )
    name = args.dtype or str(checkpoint.dtype).removeprefix("torch.")
    _print_note(
        f"{checkpoint.format} -> {to}: {checkpoint.num_parameters:,} parameters, {name}: {target}"
    )


def _with_progress(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the checkpoint, with a progress bar if stderr is a terminal."""
    with tqdm(
        desc="convert", total=checkpoint.num_bytes, unit="B", unit_scale=True, disable=None, delay=2
    ) as bar:
        for name, tensor in checkpoint.tensors():
            yield name, tensor
            del tensor  # a mapped tensor keeps its pages in memory until it is released
            bar.update(checkpoint.stored[name].num_bytes)


def _print_note(line: str) -> None:
    print(line, file=sys.stderr)


def _size(text: str) -> int:
    """Return the number of bytes of a size such as '5GB', '500MB' or '5000000'."""
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
        "to Hugging Face's format (config.json, model.safetensors), or back. The weights are "
        "streamed: memory for a few tensors is enough. The target folder appears only when it is "
        "complete.",
        epilog="example: python -m mistral_kernels.convert mistral-7B-v0.3 mistral-7B-v0.3-hf",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="folder or hub id of the checkpoint to read")
    add("target", nargs="?", metavar="TARGET", help="folder to write; must be new or empty")
    add("--input_dir", "--input-dir", metavar="SOURCE", help="the same as the first argument")
    add("--output_dir", "--output-dir", metavar="TARGET", help="the same as the second argument")
    add("--to", choices=("hf", "raw"), help="format to write (default: the other format)")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        metavar="DTYPE",
        help=f"dtype to store: {', '.join(DTYPES)} (default: that of each tensor)",
    )
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
        help="value to write (default: that of the checkpoint, or 32768 if it has none)",
    )
    add("--model_size", "--model-size", metavar="7B", help="accepted for compatibility and ignored")
    return parser


if __name__ == "__main__":
    enter(main)
