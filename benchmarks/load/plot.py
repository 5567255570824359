"""One plot of `benchmarks.bench_load`: throughput, and requests that run at once, by case."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

from benchmarks.bench_plots import COLOURS  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

NAME = "bench_load.png"
NAMES = {"stock": "stock vLLM", "ours": "hybrid, a quota for each request"}
BAR_HEIGHT = 0.38


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write `NAME` into `folder`."""
    height = 1.2 + 0.5 * len(result["cases"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.0, height), sharey=True, layout="constrained"
    )
    _bars(left, result, "output_tokens_per_s", ".1f")
    _bars(right, result, "running_mean", ".1f")
    left.set_title("Output tokens a second")
    right.set_title("Requests that run at once, mean")
    left.set_yticks(range(len(result["cases"])), [c["about"] for c in result["cases"].values()])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    figure.savefig(folder / NAME, dpi=150)
    plt.close(figure)


def _bars(axes: Axes, result: dict[str, Any], figure: str, form: str) -> None:
    for side, shift in (("stock", -BAR_HEIGHT / 2), ("ours", BAR_HEIGHT / 2)):
        places, values = [], []
        for place, name in enumerate(result["cases"]):
            runs = result["runs"][name].get(side)
            if runs:
                places.append(place + shift)
                values.append(statistics.median(run[figure] for run in runs))
        found = axes.barh(places, values, BAR_HEIGHT, color=COLOURS[side], label=NAMES[side])
        axes.bar_label(found, fmt=f"{{:{form}}}", padding=2, fontsize=8)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
