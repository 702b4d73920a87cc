"""Plots of results: lines over lengths, and labeled bars.

A provider has one color and one marker in every plot, so that lines are distinct without
color. Ours is drawn thickest and last. Every plot names its machine, torch version and date.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.registry import OURS, PROVIDERS
from benchmarks.results import Results, Row

MARKERS = dict(zip(PROVIDERS, "oosvp^<>dDPXhsXDP*o", strict=True))
MIN_POINTS = 4  # lengths per line
MIN_BARS = 3
STYLE = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
}
Groups = list[tuple[Any, list[Row]]]


def draw_all(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Draw the PNG files for which there are rows; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Results], Any]] = {
        "attention": attention_times,
        "attention-tflops": attention_rates,
        "decode": decode_times,
        "decode-position": functools.partial(token_rates, direction="decode"),
        "prompt": functools.partial(token_rates, direction="prefill"),
        "memory": memory,
        "of-peak": shares_of_peak,
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, draw in plots.items():
            figure = draw(results)
            if figure is not None:
                path = folder / f"{prefix}{name}.png"
                figure.savefig(path)
                plt.close(figure)
                drawn.append(path)
    return drawn


def attention_times(results: Results) -> Any:
    """Plot milliseconds against the length, per direction and window."""
    groups = long_enough(
        results.select(op="attention", B=1), lambda row: (row.direction, row.sizes["W"])
    )

    def title(key: Any) -> str:
        direction, window = key
        return f"{direction}, {f'window {window}' if window else 'no window'}"

    return line_figure(
        results, "Attention", groups, title, lambda row: row.seconds * 1e3, "milliseconds"
    )


def attention_rates(results: Results) -> Any:
    """Plot TFLOP/s per shape and direction, of a GPU."""
    rows = results.select(op="attention") if on_gpu(results) else []
    rows.sort(key=lambda row: row.direction, reverse=True)  # forward first
    return bar_figure(
        results,
        "Attention: TFLOP/s of visible pairs (higher is better)",
        group_by(rows, lambda row: (row.direction, row.sizes["B"], row.sizes["S"], row.sizes["W"])),
        lambda key: (
            f"{key[0]}, {key[1]} x {key[2]}\n{f'window {key[3]}' if key[3] else 'no window'}"
        ),
        lambda row: row.rate / 1e12,
        "TFLOP/s",
    )


def decode_times(results: Results) -> Any:
    """Plot milliseconds of a decode step per model and batch."""
    rows = [
        row
        for row in results.select(op="generation", direction="decode")
        if row.sizes["model"] != "10M"
    ]
    return bar_figure(
        results,
        "Decode step: milliseconds (lower is better)",
        group_by(rows, lambda row: (row.sizes["model"], row.sizes["B"], row.sizes["tokens"])),
        lambda key: f"{key[0]} parameters, batch {key[1]}\nafter {key[2]} tokens",
        lambda row: row.seconds * 1e3,
        "milliseconds",
    )


def token_rates(results: Results, direction: str) -> Any:
    """Plot tokens per second of prompts, or of decode steps, against the tokens in the text."""

    def rate(row: Row) -> float:
        tokens = row.sizes["tokens"] if direction == "prefill" else 1
        return float(row.sizes["B"] * tokens / row.seconds)

    return line_figure(
        results,
        "Prompts" if direction == "prefill" else "Decoding",
        long_enough(
            results.select(op="generation", direction=direction),
            lambda row: (row.sizes["model"], row.sizes["B"]),
        ),
        lambda key: f"{key[0]} parameters, batch {key[1]}",
        rate,
        "tokens per second",
        log=False,
    )


def memory(results: Results) -> Any:
    """Plot the peak memory of a training step, and of a prompt, against the length."""
    rows = [row for row in results.rows if row.peak_memory and row.direction in ("step", "prefill")]
    return line_figure(
        results,
        "Peak memory beyond the model",
        long_enough(rows, lambda row: (row.direction, row.sizes["model"])),
        lambda key: f"{'training step' if key[0] == 'step' else 'prompt'}, {key[1]} parameters",
        lambda row: (row.peak_memory or 0) / 1e6,
        "MB",
    )


def shares_of_peak(results: Results) -> Any:
    """Plot the percentage of the machine's speed that an operator reaches."""
    rows = [
        row
        for row in results.rows
        if row.of_peak and row.op not in ("attention", "generation", "training_step")
    ]
    return bar_figure(
        results,
        "Percent of the machine's speed at a copy, a read or a matrix product (higher is better)",
        group_by(rows, lambda row: (row.op, row.direction)),
        lambda key: f"{key[0].replace('_', ' ')}\n{key[1]}",
        lambda row: 100 * (row.of_peak or 0),
        "percent of the peak",
    )


def on_gpu(results: Results) -> bool:
    return results.environment.get("device") == "cuda"


def group_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> Groups:
    """Group rows by `key`, in the order in which the keys appear."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def long_enough(rows: Iterable[Row], key: Callable[[Row], Any]) -> Groups:
    """Return the groups that have enough lengths for lines."""
    groups = group_by(rows, key)
    return [(k, own) for k, own in groups if len({row.length for row in own}) >= MIN_POINTS]


def by_provider(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by provider, in the registry's order with ours last, drawn on top."""
    found = dict(group_by(rows, lambda row: row.provider))
    order = [name for name in PROVIDERS if name != OURS.name] + [OURS.name]
    return {name: found[name] for name in order if name in found}


def line_figure(
    results: Results,
    title: str,
    groups: Groups,
    panel_title: Callable[[Any], str],
    y: Callable[[Row], float],
    y_label: str,
    log: bool = True,
) -> Any:
    """Draw one panel of lines per group; None without groups."""
    if not groups:
        return None
    figure, grid = figure_of(len(groups))
    for axes, (key, group) in zip(grid, groups, strict=True):
        lines(axes, group, y, log)
        axes.set_title(panel_title(key))
        axes.set_ylabel(f"{y_label} (logarithmic)" if log else y_label)
    return finish(figure, grid, f"{title}, {described(groups)}", results)


def lines(axes: Axes, rows: Iterable[Row], y: Callable[[Row], float], log: bool = True) -> None:
    """Draw the y of each provider over the number of tokens."""
    rows = list(rows)
    for name, own in by_provider(rows).items():
        axes.plot(
            *zip(*sorted((row.length, y(row)) for row in own), strict=True),
            color=PROVIDERS[name].color,
            marker=MARKERS[name],
            linewidth=2.4 if name == OURS.name else 1.2,
            markersize=6 if name == OURS.name else 4.5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens (logarithmic)")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({row.length for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def bar_figure(
    results: Results,
    title: str,
    groups: Groups,
    label: Callable[[Any], str],
    y: Callable[[Row], float],
    x_label: str,
) -> Any:
    """Draw horizontal bars, one block per group, each with its number; None for fewer than 3."""
    counts = [len(by_provider(group)) for _, group in groups]
    if sum(counts) < MIN_BARS:
        return None
    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.24 * sum(counts) + 0.14 * len(groups)))
    centers, position = [], 0.0
    for count, (_, group) in zip(counts, groups, strict=True):
        centers.append(position + (count - 1) / 2)
        for name, own in reversed(by_provider(group).items()):
            value = statistics.median(map(y, own))
            axes.barh(position, value, 0.85, color=PROVIDERS[name].color, label=name)
            axes.text(value, position, f" {value:.3g}", va="center", fontsize=7.5)
            position += 1
        position += 0.7
    axes.set_yticks(centers, [label(key) for key, _ in groups])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(x_label)
    return finish(figure, [axes], f"{title}\n{described(groups)}", results)


def described(groups: Groups) -> str:
    """Return the dtypes, and the heads where all rows have the same."""
    rows = [row for _, group in groups for row in group]
    parts = ["/".join(sorted({row.dtype for row in rows}))]
    heads = {row.sizes.get("H") for row in rows}
    if len(heads) == 1 and (count := heads.pop()):
        parts.append(f"{count}/{count // 4} heads of 128")
    return ", ".join(parts)


def figure_of(count: int) -> tuple[Any, list[Axes]]:
    columns = min(count, 2)
    height = -(-count // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(max(6.4, 4.4 * columns), 3.2 * height + 0.8), squeeze=False
    )
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def finish(figure: Any, grid: Sequence[Axes], title: str, results: Results) -> Any:
    """Add the title, one legend for all panels, and the machine, versions and date."""
    found: dict[str, Any] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    order = [name for name in PROVIDERS if name in found]
    figure.legend(
        [found[name] for name in order], order, loc="outside lower center", ncols=3, fontsize=8
    )
    machine = f"{results.machine}; torch {results.environment.get('torch', 'unknown')}"
    source = f"transcribed, measured before {results.date}" if results.transcribed else results.date
    figure.suptitle(f"{title}\n{machine}; {source}", fontsize=9.5)
    return figure
