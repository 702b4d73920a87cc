"""Plots of `benchmarks.report`: lines over lengths, and bars of shares of the machine's peak.

A provider has one colour and one marker everywhere (the registry's), ours is drawn thickest and
last. Nothing hangs on the colour alone: lines are told apart by their markers too.
"""

from __future__ import annotations

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
from benchmarks.report import Row

MARKERS = dict(zip(PROVIDERS, "oosvp^<>dDPXhsXDP*o", strict=True))
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the PNG files for which there are rows."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[], Any]] = {
        "attention_over_eager": lambda: speedups(rows, "eager"),
        "attention_over_flash_attn": lambda: speedups(rows, "flash-attn 2"),
        "decode": lambda: decoding(rows),
        "memory": lambda: memory(rows),
        "of_peak": lambda: fractions(rows),
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, draw in plots.items():
            figure = draw()
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path)
                plt.close(figure)
                drawn.append(path)
    return drawn


def by_provider(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by provider, in the registry's order, ours last, to be drawn on top."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.provider, []).append(row)
    order = [name for name in PROVIDERS if name != OURS.name] + [OURS.name]
    return {name: found[name] for name in order if name in found}


def lines(
    axes: Axes, rows: Iterable[Row], x: str, y: Callable[[Row], float | None], log: bool = True
) -> None:
    """Draw each provider's y, logarithmic or from 0, over the logarithm of the size named x."""
    for name, own in by_provider(rows).items():
        points = sorted((row.sizes[x], y(row)) for row in own if y(row) is not None)
        if len(points) < 2:
            continue
        axes.plot(
            *zip(*points, strict=True),
            color=PROVIDERS[name].colour,
            marker=MARKERS[name],
            linewidth=2.4 if name == OURS.name else 1.2,
            markersize=6 if name == OURS.name else 4.5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({row.sizes[x] for row in rows})
    axes.set_xticks(ticks, [length(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def panels(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Group rows by `key`, in the order in which the keys appear."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def figure_of(count: int) -> tuple[Any, list[Axes]]:
    figure, grid = plt.subplots(1, count, figsize=(max(5.6, 4.6 * count), 3.6), squeeze=False)
    return figure, list(grid[0])


def legend(figure: Any, grid: list[Axes]) -> None:
    """Draw one legend for all panels, below them."""
    found = {}
    for axes in grid:
        found.update(
            {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        )
    columns = 4 if figure.get_figwidth() > 6 else 2
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def speedups(rows: Sequence[Row], base: str) -> Any:
    """Plot attention's speed over that of `base` against the length, forward and backward."""
    own = [row for row in rows if row.op == "attention" and row.sizes["B"] == 1]
    times = {(row.key[:-1], row.provider): row.median for row in own}

    def speedup(row: Row) -> float | None:
        theirs = times.get((row.key[:-1], base))
        return None if theirs is None else theirs / row.median

    groups = []
    for (direction, window, dtype), group in panels(
        [row for row in own if speedup(row) is not None],
        lambda row: (row.direction, row.sizes["W"], row.dtype),
    ):
        if len({row.sizes["S"] for row in group}) > 1:
            groups.append(((direction, window, dtype), group))
    if not groups:
        return None
    figure, grid = figure_of(len(groups))
    for axes, ((direction, window, dtype), group) in zip(grid, groups, strict=True):
        lines(axes, group, "S", speedup)
        seen = f"window {length(window)}" if window else "no window"
        axes.set_title(f"{direction}, {seen}, {dtype}")
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"speed over {base}")
    legend(figure, grid)
    return figure


def decoding(rows: Sequence[Row]) -> Any:
    """Plot tokens per second against the position in the text."""
    own = [row for row in rows if row.op == "generation" and row.direction == "decode"]
    groups = [
        (key, group)
        for key, group in panels(own, lambda row: (row.sizes["model"], row.sizes["B"], row.dtype))
        if len({row.sizes["tokens"] for row in group}) > 1
    ]
    if not groups:
        return None
    figure, grid = figure_of(len(groups))
    for axes, ((model, batch, dtype), group) in zip(grid, groups, strict=True):
        lines(axes, group, "tokens", lambda row: row.sizes["B"] / row.median, log=False)
        axes.set_title(f"decoding, {model} parameters, batch {batch}, {dtype}")
        axes.set_xlabel("tokens before")
        axes.set_ylabel("tokens a second")
    legend(figure, grid)
    return figure


def memory(rows: Sequence[Row]) -> Any:
    """Plot the peak memory of a training step, and of a prompt, against the length."""
    own = [row for row in rows if row.peak_memory and row.direction in ("step", "prefill")]
    groups = []
    for (op, model, dtype), group in panels(
        own, lambda row: (row.op, row.sizes["model"], row.dtype)
    ):
        x = "S" if op == "training_step" else "tokens"
        if len({row.sizes[x] for row in group}) > 1:
            groups.append((op, model, dtype, x, group))
    if not groups:
        return None
    figure, grid = figure_of(len(groups))
    for axes, (op, model, dtype, x, group) in zip(grid, groups, strict=True):
        lines(axes, group, x, lambda row: (row.peak_memory or 0) / 1e6)
        what = "training step" if op == "training_step" else "prompt"
        axes.set_title(f"{what}, {model} parameters, {dtype}")
        axes.set_xlabel("tokens")
        axes.set_ylabel("peak memory, MB")
    legend(figure, grid)
    return figure


def fractions(rows: Sequence[Row]) -> Any:
    """Plot shares of the measured peak: each provider's median over an operator's cases."""
    own = [row for row in rows if row.of_peak and row.op not in ("generation", "training_step")]
    if not own:
        return None
    groups = panels(own, lambda row: (row.op, row.direction, row.bound))
    names = list(by_provider(own))
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.13 * len(names) * len(groups)))
    height = 0.8 / len(names)
    for i, (_, group) in enumerate(groups):
        for j, (name, found) in enumerate(by_provider(group).items()):
            axes.barh(
                i + (j - len(names) / 2) * height,
                100 * statistics.median(row.of_peak or 0 for row in found),
                height,
                color=PROVIDERS[name].colour,
                label=name,
            )
    labels = [f"{op}, {direction}\n(of {bound}s)" for (op, direction, bound), _ in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("percent of the machine's measured peak")
    legend(figure, [axes])
    return figure
