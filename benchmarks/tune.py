"""Search for the fastest tile of an attention kernel on the GPU at hand; print its table entry.

    python -m benchmarks.tune --kernel attention_forward --head-dim 128 --shapes 4x4096,1x16384
    python -m benchmarks.tune --kernel attention_decode --head-dim 64 --shapes 64x4096

A shape is batch x sequence length; for attention_decode and attention_chunk, batch x number of
tokens in the cache. The search begins at the tile of `ops/attention/tiles.py`. It moves to the
fastest tile that differs in one parameter, until none is faster by 1 %. Tiles that exceed the GPU's
resources count as infinitely slow.
The printed line belongs in `EXCEPTIONS` of that module.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mistral_kernels.ops.attention import tiles
from mistral_kernels.ops.attention.kernels.backward import attention_backward
from mistral_kernels.ops.attention.kernels.decode import attention_decode
from mistral_kernels.ops.attention.kernels.forward import attention_forward
from mistral_kernels.ops.attention.spec import AttentionSpec, CacheView, Sequences
from mistral_kernels.ops.attention.tiles import Tile
from mistral_kernels.ops.attention.window import resolve_window
from mistral_kernels.ops.dispatch import DeviceProperties, device_properties, uses_triton
from mistral_kernels.ops.launch_configs import next_power_of_2

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
CHUNK = 512  # new tokens per sequence of attention_chunk
FASTER = 0.99


def neighbors(kernel: str, tile: Tile, device: DeviceProperties) -> Iterator[Tile]:
    """Yield the tiles that differ in one parameter and that the kernel can run with."""
    sizes = (16, 32, 64, 128, 256)
    for name, values in (
        ("m", (16,) if kernel == "attention_decode" else sizes),
        ("n", sizes),
        ("warps", (2, 4, 8)),
        ("stages", (1, 2, 3, 4)),
    ):
        i = values.index(getattr(tile, name))
        for j in (i - 1, i + 1):
            if 0 <= j < len(values):
                yield Tile(**{**tile._asdict(), name: values[j]})
    if tiles.has_descriptors(device) and kernel not in ("attention_decode", "attention_chunk"):
        yield tile._replace(descriptors=not tile.descriptors)


def search(
    start: Tile, neighbors: Callable[[Tile], Iterator[Tile]], seconds: Callable[[Tile], float]
) -> dict[Tile, float]:
    """Return the time of every tile tried. The search ends when no neighbor is 1 % faster."""
    times = {start: seconds(start)}
    best = start
    while True:
        for tile in neighbors(best):
            if tile not in times:
                times[tile] = seconds(tile)
        fastest = min(times, key=lambda tile: times[tile])
        if times[fastest] > FASTER * times[best]:
            return times
        best = fastest


def entry(device: DeviceProperties, element_bytes: int, head_dim: int, tile: Tile) -> str:
    """Return the line of `tiles.EXCEPTIONS[kernel]` that chooses the tile."""
    numbers = ", ".join(map(str, tile if tile.descriptors else tile[:4]))
    key = element_bytes, max(64, next_power_of_2(head_dim))
    return f'"{tiles.architecture(device)}": {{{key}: Tile({numbers})}},  # measured'


def make_call(
    kernel: str, batch: int, seqlen: int, args: argparse.Namespace, device: torch.device
) -> Callable[[], object]:
    """Return the call to time, with the heads of the arguments (default: Mistral's)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[args.dtype])

    kv_shape = batch, seqlen, args.kv_heads, args.head_dim
    k, v = normal(*kv_shape), normal(*kv_shape)
    window = resolve_window(True, None, args.sliding_window)
    if kernel in ("attention_decode", "attention_chunk"):
        new = 1 if kernel == "attention_decode" else CHUNK
        q = normal(batch, new, args.heads, args.head_dim)
        lengths = torch.full((batch,), seqlen - new, dtype=torch.int32, device=device)
        sequences = Sequences(None, None, new, new)
        spec = AttentionSpec(sequences, window, cache=CacheView(k, v, lengths, new))
        return lambda: attention_decode(q, None, None, spec, 0, None)
    q = normal(batch, seqlen, args.heads, args.head_dim)
    spec = AttentionSpec(Sequences(None, None, seqlen, seqlen), window)
    if kernel == "attention_forward":
        return lambda: attention_forward(q, k, v, spec)
    out, lse = attention_forward(q, k, v, spec)
    mask = [True, False, False] if kernel == "attention_dq" else [False, True, True]
    return lambda: attention_backward(out, q, k, v, out, lse, spec, mask)


def seconds_with(kernel: str, tile: Tile, call: Callable[[], object]) -> float:
    """Return the median time of a call that runs `kernel` with a tile; infinite if it cannot."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    chosen = tiles.configs

    def forced(name: str, block_d: int, *rest: Any) -> Any:
        if name == kernel:
            return (tiles.tile_config(tile, block_d),)
        return chosen(name, block_d, *rest)

    with mock.patch.object(tiles, "configs", forced), mock.patch.object(tiles, "_misfits", {}):
        try:
            return float(do_bench(call, warmup=25, rep=100, return_mode="median")) / 1e3
        except OutOfResources:
            return math.inf


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Find the fastest tile of a kernel."
    )
    parser.add_argument("--kernel", required=True, choices=tiles.KERNELS)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--sliding-window", type=int)
    parser.add_argument(
        "--shapes", default="4x4096", help="batch x length, separated by commas (default: 4x4096)"
    )
    args = parser.parse_args(argv)
    try:
        pairs = [map(int, shape.split("x")) for shape in args.shapes.split(",")]
        shapes = [(batch, length) for batch, length in pairs]
        if min(map(min, shapes)) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--shapes must be like 4x4096,1x16384, got {args.shapes}")
    if args.kernel == "attention_chunk" and min(length for _, length in shapes) < CHUNK:
        parser.error(f"--shapes of attention_chunk must have at least {CHUNK} tokens")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    like = torch.empty(0, dtype=DTYPES[args.dtype], device=device)
    if not uses_triton(like):
        parser.error("tiles can be timed only on a GPU that runs Triton kernels; none was found")

    properties = device_properties(like)
    block_d = max(16, next_power_of_2(args.head_dim))
    calls = [make_call(args.kernel, *shape, args, device) for shape in shapes]
    arguments = args.kernel, block_d, like.element_size(), properties, True
    start = tiles.choose_tile(*arguments)

    def seconds(tile: Tile) -> float:
        """Return the geometric mean of the times of all shapes."""
        times = [seconds_with(args.kernel, tile, call) for call in calls]
        mean = math.exp(sum(map(math.log, times)) / len(times))
        print(f"{tile}: {mean * 1e6:.1f} us", flush=True)
        return mean

    times = search(start, lambda tile: neighbors(args.kernel, tile, properties), seconds)
    best = min(times, key=lambda tile: times[tile])
    print(f"{args.kernel}: {times[best] / times[start]:.3f} of the time of {start}")
    print(entry(properties, like.element_size(), args.head_dim, best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
