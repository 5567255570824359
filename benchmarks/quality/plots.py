"""Plots of the quality lab: accuracy against quota, by depth and length, by task, head classes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402

from benchmarks.quality.intervals import wilson  # noqa: E402
from benchmarks.quality.report import (  # noqa: E402
    compressed,
    find,
    full_cache,
    is_complete,
    names_of,
    solved_tasks,
)
from benchmarks.quality.results import load_plan  # noqa: E402
from benchmarks.quality.suite import DEPTHS, TASKS  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.quality.results import RunResult

OURS, INK, FAINT = "#1f6feb", "#3c4149", "#8a8f98"
COLOURS = ("#d1742a", "#2a9d5c", "#8e44ad", "#b8860b", "#c0392b", "#16a0a0", "#7f5539", "#d16ba5")
STYLES = ("-", "--", ":")
LABEL_GAP = 0.034


def draw(folder: Path) -> list[Path]:
    """Write every plot whose plan has its full cache into the folder; returns the files."""
    written = []
    for name, (plan, paint) in PLOTS.items():
        source = folder / f"quality_{plan}.json"
        if source.is_file():
            _, results = load_plan(source)
            if not is_complete(results):
                continue
            file = folder / f"quality_{name}.png"
            paint(results, file)
            written.append(file)
    return written


def quota_plot(results: Sequence[RunResult], file: Path) -> None:
    """Accuracy against quota, one line a policy, named at its end."""
    figure, axes = plt.subplots(figsize=(8.4, 5.6), layout="constrained")
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    shares = sorted({result.quota_share or 0.0 for result in compressed(results)})
    ends = {}
    for index, name in enumerate(n for n in names_of(results) if n != "hybrid"):
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        ends[name] = _line(axes, results, name, shares, COLOURS[index % len(COLOURS)], style)
    if "hybrid" in names_of(results):
        ends["hybrid"] = _line(axes, results, "hybrid", shares, OURS, "-", band=True)
    _quota_axis(axes, shares, full_cache(results, length).pooled(tasks).value)
    axes.set_xlim(right=shares[-1] * 1.65)
    heights = spread([height for height, _ in ends.values()], LABEL_GAP)
    for (name, (end, colour)), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name,
            (shares[-1], end),
            xytext=(shares[-1] * 1.1, height),
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold" if name == "hybrid" else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 3},
        )
    axes.set_title(f"{len(tasks)} tasks at {length:,} tokens", loc="left", fontsize=10, color=INK)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _line(
    axes: Axes,
    results: Sequence[RunResult],
    name: str,
    shares: Sequence[float],
    colour: str,
    style: str,
    *,
    band: bool = False,
) -> tuple[float, str]:
    """Draws one line; returns where it ends and its colour."""
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    found = [(s, r.pooled(tasks)) for s in shares if (r := find(results, name, s, length))]
    x = [share for share, _ in found]
    y = [pooled.value for _, pooled in found]
    width = 2.4 if band else 1.2
    axes.plot(x, y, style, marker="o", ms=5 if band else 3, color=colour, lw=width)
    if band:
        low, high = zip(*(wilson(pooled.right, pooled.count) for _, pooled in found), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    return y[-1], colour


def _quota_axis(axes: Axes, shares: Sequence[float], full: float) -> None:
    axes.hlines(full, min(shares), max(shares), color=FAINT, lw=1, ls=(0, (4, 3)))
    across = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "bottom"}
    axes.text(0.2, full + 0.025, "full cache", color=FAINT, fontsize=9, **across)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set_ylim(0, 1.06)
    axes.set_xlabel("quota, share of the prompt")
    axes.set_ylabel("right answers")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the same order, moved as little as a few passes find."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights, dtype=float)[order]
    for _ in range(200):
        for low, high in pairwise(range(len(placed))):
            missing = gap - (placed[high] - placed[low])
            if missing > 0:
                placed[low] -= missing / 2
                placed[high] += missing / 2
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def budgets_plot(results: Sequence[RunResult], file: Path) -> None:
    """One policy over many quotas with its interval; the tasks as thin lines behind it."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    chosen = compressed(results)
    shares = [result.quota_share or 0.0 for result in chosen]
    for task in tasks:
        axes.plot(shares, [r.share(task).value for r in chosen], color=FAINT, lw=0.7, alpha=0.6)
    name = chosen[0].name
    _line(axes, results, name, shares, OURS, "-", band=True)
    _quota_axis(axes, shares, full_cache(results, length).pooled(tasks).value)
    axes.set_title(
        f"{name} at {length:,} tokens; thin: each of {len(tasks)} tasks",
        loc="left",
        fontsize=10,
        color=INK,
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)


def depth_plot(results: Sequence[RunResult], file: Path) -> None:
    """Depth by length, a map for each policy."""
    names = list(dict.fromkeys(result.name for result in results))
    lengths = sorted({result.length_tokens for result in results})
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(2.1 * len(names) + 1.0, 3.1),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, name in zip(panels[0], names, strict=True):
        values = np.full((len(DEPTHS), len(lengths)), np.nan)
        for result in (r for r in results if r.name == name):
            shares = result.shares_by_depth(solved_tasks(results, result.length_tokens))
            column = lengths.index(result.length_tokens)
            values[:, column] = [s.value if s.count else np.nan for s in shares.values()]
        _heat(axes, values, name)
        axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths])
        axes.set_yticks(range(len(DEPTHS)), [f"{depth:g}" for depth in DEPTHS])
    panels[0][0].set_ylabel("depth of the evidence")
    figure.supxlabel("prompt tokens", fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def task_plot(results: Sequence[RunResult], file: Path, share: float = 0.1) -> None:
    """Policy by task at one quota, best policy on top."""
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    chosen = [r for n in names_of(results) if (r := find(results, n, share, length))]
    chosen.sort(key=lambda result: -result.pooled(tasks).value)
    chosen.insert(0, full_cache(results, length))
    values = np.array([[result.share(task).value for task in tasks] for result in chosen])
    size = (0.62 * len(tasks) + 2.2, 0.34 * len(chosen) + 1.7)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    title = f"quota {100 * share:g} % of {length:,} tokens; per cent right"
    _heat(axes, values, title)
    axes.set_yticks(range(len(chosen)), [result.name for result in chosen])
    names = [TASKS[task].title for task in tasks]
    axes.set_xticks(range(len(tasks)), names, rotation=40, ha="right", rotation_mode="anchor")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def heads_plot(results: Sequence[RunResult], file: Path) -> None:
    """How often each head is static, by quota."""
    chosen = [result for result in compressed(results) if result.static_share]
    num_layers, num_heads = np.array(chosen[0].static_share).shape
    values = np.array([np.ravel(result.static_share) for result in chosen])
    size = (0.55 * values.shape[1] + 1.8, 0.34 * len(chosen) + 1.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    _heat(axes, values, f"{chosen[0].name}: requests in which a head is static, per cent")
    axes.set_yticks(range(len(chosen)), [f"{100 * (r.quota_share or 0):g} %" for r in chosen])
    axes.set_ylabel("quota")
    labels = [f"{layer}.{head}" for layer in range(num_layers) for head in range(num_heads)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("layer.head")
    for layer in range(1, num_layers):
        axes.axvline(layer * num_heads - 0.5, color="white", lw=2.5)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _heat(axes: Axes, values: np.ndarray, title: str) -> None:
    """A map of shares with their per cents written in; empty where there is none."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > 0.5 else INK
            text = f"{100 * value:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


PLOTS: dict[str, tuple[str, Callable[[Sequence[RunResult], Path], None]]] = {
    "quota": ("main", quota_plot),
    "tasks": ("main", task_plot),
    "depth": ("lengths", depth_plot),
    "budgets": ("budgets", budgets_plot),
    "classes": ("budgets", heads_plot),
}
