"""The map of head classes: one panel per task, layers by heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402

from vllm_budgetkv.policy import PolicyOptions  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = 3
NUMBERED_HEADS = 64


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the map at the default threshold.

    Args:
        report: of `heads.summarise`.
        path: of the PNG.
    """
    threshold = PolicyOptions.static_threshold
    index = list(report["thresholds"]).index(threshold)
    tasks = report["tasks"]
    num_rows = -(-len(tasks) // COLUMNS)
    shape = np.array(next(iter(tasks.values()))["dynamic_share"]).shape
    height = max(1.6, min(4.0, 0.4 * shape[1] + 0.7))
    figure, grid = plt.subplots(
        num_rows,
        COLUMNS,
        figsize=(8.0, height * num_rows + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat[len(tasks) :]:
        axes.axis("off")
    for axes, (task, found) in zip(grid.flat, tasks.items(), strict=False):
        share = np.array(found["dynamic_share"])[index]
        image = axes.imshow(share, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        axes.set_title(task, fontsize=10)
        axes.set_xticks(range(share.shape[1]))
        axes.set_yticks(range(share.shape[0]))
        axes.spines[:].set_visible(False)
        if share.size <= NUMBERED_HEADS:
            for layer, head in np.ndindex(share.shape):
                colour = "white" if share[layer, head] > 0.6 else "black"
                text = f"{share[layer, head]:.0%}"
                axes.text(head, layer, text, ha="center", va="center", color=colour, fontsize=8)
    figure.supxlabel("KV head")
    figure.supylabel("layer")
    figure.suptitle(f"Share of prompts on which a head is dynamic (threshold {threshold})")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.colorbar(image, ax=grid, shrink=0.6, label="share of prompts")
    figure.savefig(path, dpi=150)
    plt.close(figure)
