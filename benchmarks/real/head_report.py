"""A table of what the heads do: thirds of all heads, ranked by concentration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality.report import grid

if TYPE_CHECKING:
    from typing import Any

THIRDS = ("lowest S", "middle", "highest S")


def table(result: dict[str, Any]) -> str:
    """Means over thirds of the heads, each task alike; `missing` per policy and quota."""
    concentration = mean_over_tasks(result["concentration"])
    order = concentration.argsort(kind="stable")
    thirds = np.array_split(order, len(THIRDS))
    columns = {
        "S of the question": concentration,
        "S of the answer": mean_over_tasks(result["answer_concentration"]),
        "overlap of steps": mean_over_tasks(result["overlap"]),
        "attention afar": mean_over_tasks(result["far"]),
    }
    for name, by_task in result["missing"].items():
        columns[f"missing: {name}"] = mean_over_tasks(by_task)
    rows = [
        [name, *(f"{values[heads].mean():.2f}" for values in columns.values())]
        for name, heads in zip([*THIRDS, "all"], [*thirds, order], strict=True)
    ]
    about = result["about"]
    note = f"`{about['command']}` at {about['commit']}, {about['machine']}; {about['model']}."
    return "\n".join([*grid(["heads", *columns], rows), "", note])


def mean_over_tasks(by_task: dict[str, list[list[float]]]) -> np.ndarray:
    """float [L * H]."""
    return np.mean([np.array(values) for values in by_task.values()], axis=0).ravel()
