"""Generated parts of README.md and benchmarks/README.md: `python -m benchmarks.pages`.

Writes the tables and plots of `benchmarks/results/*.json` between `<!-- results: NAME -->` and
`<!-- end -->` in both pages. With --check it changes nothing, and exits with 1 if a page differs
from its results.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.plots import by_provider, group_by
from benchmarks.registry import OURS, PROVIDERS
from benchmarks.results import FOLDER, PACKAGES, Results, Row

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
PLOTS = Path(__file__).parent / "plots"
MACHINES = "epyc-zen2", "epyc-zen4", "h200"
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(machine: str) -> Results:
    """Return the rows of all files of a machine: MACHINE.json and MACHINE-*.json."""
    paths = [FOLDER / f"{machine}.json", *sorted(FOLDER.glob(f"{machine}-*.json"))]
    files = [Results.load(path) for path in paths]
    return replace(
        files[0],
        command="; ".join(file.command for file in files),
        rows=[row for file in files for row in file.rows],
        notes=[note for file in files for note in file.notes],
    )


def milliseconds(row: Row) -> str:
    """Return the time with three digits, and its ratio to our time in a small font."""
    time = f"{row.seconds * 1e3:.3g}" if row.seconds < 1 else f"{row.seconds * 1e3:.0f}"
    if row.provider == OURS.name or row.over_ours is None:
        return time
    return f"{time} {ratio(row)}"


def teraflops(row: Row) -> str:
    rate = f"{row.rate / 1e12:.0f}"
    return rate if row.provider == OURS.name else f"{rate} {ratio(row)}"


def ratio(row: Row) -> str:
    """Return the time divided by ours, in a small font; `~` marks a difference within the noise."""
    value = row.over_ours or 0.0
    return f"<sub>{'~' if row.is_tie else ''}{value:.{0 if value >= 10 else 2}f}x</sub>"


def describe(row: Row) -> str:
    """Return a case in words."""
    sizes = row.sizes
    tokens = row.length
    window = f"window {sizes['W']}" if sizes.get("W") else "no window"
    batch = f", batch {sizes['B']}" if sizes.get("B", 1) > 1 else ""
    text = {
        "attention": f"attention, {tokens} tokens, {window}{batch}",
        "cached_attention": f"one token after {sizes.get('position')}, {window}{batch}",
        "cache_update": f"cache update, {sizes.get('new')} new per sequence{batch}",
        "rms_norm": f"RMSNorm{' with residual' if sizes.get('residual') else ''}, {tokens} tokens",
        "rotary": f"rotary, {tokens} tokens",
        "swiglu": f"SwiGLU, {tokens} tokens",
        "linear_cross_entropy": f"linear cross entropy, {tokens} tokens",
        "training_step": f"training step of {sizes.get('model')}, {tokens} tokens",
        "generation": f"{sizes.get('model')}, prompt of {tokens} tokens{batch}",
    }[row.op]
    if row.direction == "decode":
        return f"{sizes['model']}, decode step after {tokens} tokens, batch {sizes['B']}"
    return f"{text}, {row.direction}" if row.direction in ("forward", "backward") else text


def table(
    rows: Iterable[Row],
    head: str,
    cell: Callable[[Row], str] = milliseconds,
    providers: Sequence[str] = tuple(PROVIDERS),
) -> str:
    """Return a Markdown table with a row per case and a column per provider."""
    rows = [row for row in rows if row.provider in providers]
    found = by_provider(rows)
    columns = [OURS.name, *(name for name in providers if name in found and name != OURS.name)]
    lines = [f"| {head} | dtype | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for _, group in group_by(rows, lambda row: row.key[:-1]):
        cells = {row.provider: cell(row) for row in group}
        dtype = group[0].dtype.replace("bfloat", "bf").replace("float", "fp")
        lines.append(
            f"| {describe(group[0])} | {dtype} | "
            + " | ".join(cells.get(name, "") for name in columns)
            + " |"
        )
    return "\n".join(lines)


def machine_page(name: str) -> str:
    """Return the tables, notes and plots of one machine's results."""
    results = load(name)
    versions = ", ".join(
        f"{package} {version}"
        for package, version in results.environment.items()
        if package in PACKAGES
    )
    source = f"{results.machine}; {versions}; {results.date}; `{results.command}`."
    if results.transcribed:
        source += f" Transcribed from {results.transcribed}."
    models = [row for row in results.rows if row.op in ("generation", "training_step")]
    others = [row for row in results.rows if row.op not in ("generation", "training_step")]
    parts = [source]
    if results.environment.get("device") == "cuda":
        attention = [row for row in others if row.op == "attention"]
        others = [row for row in others if row.op != "attention"]
        parts.append(table(attention, "TFLOP/s of visible pairs", teraflops))
    parts += [table(own, "milliseconds") for own in (models, others) if own]
    parts += results.notes
    parts += [
        f"![{path.stem.removeprefix(f'{name}-')} on {results.machine}](plots/{path.name})"
        for path in sorted(PLOTS.glob(f"{name}-*.png"))
    ]
    return "\n\n".join(parts)


def one(results: Results, **wanted: object) -> Row:
    (row,) = results.select(**wanted)
    return row


def headline() -> str:
    """Return three numbers for the first screen."""
    gpu, cpu = load("h200"), load("epyc-zen4")
    case = {"op": "attention", "S": 16384, "W": None, "direction": "forward"}
    ours, flash = one(gpu, **case, provider="ours"), one(gpu, **case, provider="SDPA flash")
    step = {"op": "generation", "model": "160M", "B": 1, "direction": "decode"}
    decode, sdpa = one(cpu, **step, provider="ours"), one(cpu, **step, provider="transformers sdpa")
    large = one(gpu, op="generation", model="7B", direction="decode")
    return "\n".join(
        (
            f"- **{ours.rate / 1e12:.0f} TFLOP/s** in attention of {ours.sizes['S']} tokens on an"
            f" H200, {flash.over_ours:.2g} times PyTorch's FlashAttention-2;",
            f"- **{1 / large.seconds:.0f} tokens/s** of Mistral-7B on an H200, batch 1, bf16;",
            f"- **{decode.seconds * 1e3:.2g} ms** per decode step of a 160 M model on two Zen 4"
            f" cores, {sdpa.over_ours:.2g} times faster than transformers.",
        )
    )


def front_cpu() -> str:
    """Return the table of models on CPUs for README.md."""
    providers = ("ours", "transformers sdpa", "llama.cpp")
    lines: list[str] = []
    for name, processor in (("epyc-zen4", "Zen 4"), ("epyc-zen2", "Zen 2")):
        rows = [
            row
            for row in load(name).select(op="generation", model="160M", dtype="bfloat16")
            if row.direction == "decode" or row.sizes["tokens"] == 512
        ]
        head, rule, *body = table(rows, "two cores, milliseconds", providers=providers).split("\n")
        lines = lines or [head, rule]
        lines += [row.replace("| 160M", f"| {processor}, 160M", 1) for row in body]
    return "\n".join(lines)


def front_gpu() -> str:
    """Return the table of attention on GPUs for README.md."""
    rows = [row for row in load("h200").select(op="attention") if row.sizes["S"] == 16384]
    return table(rows, "H200, TFLOP/s", teraflops)


BLOCKS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "front-cpu": front_cpu,
    "front-gpu": front_gpu,
    **{machine: functools.partial(machine_page, machine) for machine in MACHINES},
}


def filled(text: str) -> str:
    """Return a page with its generated blocks up to date."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Update or check both pages; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    parser.add_argument("--plots", action="store_true", help="also draw the plots again")
    args = parser.parse_args(argv)
    if args.plots:
        from benchmarks.plots import draw_all

        for machine in MACHINES:
            draw_all(load(machine), PLOTS, f"{machine}-")
    outdated = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            outdated.append(page)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    for page in outdated:
        print(f"{page.relative_to(ROOT)}: {'outdated' if args.check else 'updated'}")
    return 1 if args.check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
