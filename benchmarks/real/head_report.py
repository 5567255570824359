"""A table of what the heads do: thirds of all heads, ranked by concentration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality.report import grid

if TYPE_CHECKING:
    from typing import Any

THIRDS = ("lowest S", "middle", "highest S")
RANKED_BY = "S of the question"


def table(result: dict[str, Any]) -> str:
    """A row for each figure: means over thirds of the heads and over all, each task alike."""
    figures = {name: mean_over_tasks(by_task) for name, by_task in result["figures"].items()}
    order = figures[RANKED_BY].argsort(kind="stable")
    groups = [*np.array_split(order, len(THIRDS)), order]
    rows = [
        [name, *(f"{values[heads].mean():.2f}" for heads in groups)]
        for name, values in figures.items()
    ]
    about = result["about"]
    note = f"`{about['command']}` at {about['commit']}, {about['machine']}; {about['model']}."
    return "\n".join([*grid(["mean over heads", *THIRDS, "all"], rows), "", note])


def mean_over_tasks(by_task: dict[str, list[list[float]]]) -> np.ndarray:
    """float [L * H]."""
    return np.mean([np.array(values) for values in by_task.values()], axis=0).ravel()
