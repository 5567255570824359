"""Tables of what the heads do, and of what rules would answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality.report import grid
from benchmarks.real.tasks import TASKS

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

THIRDS = ("lowest S", "middle", "highest S")
RANKED_BY = "S of the question"


def tables(folder: Path) -> dict[str, str]:
    """Markdown of what has been measured, by its marker."""
    files = {"real_heads": table, "real_simulation": rule_table}
    return {
        name: make(json.loads(file.read_text(encoding="utf-8")))
        for name, make in files.items()
        if (file := folder / f"{name}.json").is_file()
    }


def table(result: dict[str, Any]) -> str:
    """A row for each figure: means over thirds of the heads and over all, each task alike."""
    figures = {name: mean_over_tasks(by_task) for name, by_task in result["figures"].items()}
    order = figures[RANKED_BY].argsort(kind="stable")
    groups = [*np.array_split(order, len(THIRDS)), order]
    rows = [
        [name, *(f"{values[heads].mean():.2f}" for heads in groups)]
        for name, values in figures.items()
    ]
    return "\n".join([*grid(["mean over heads", *THIRDS, "all"], rows), "", source(result)])


def rule_table(result: dict[str, Any]) -> str:
    """Right answers and log-probability of every rule, by task."""
    outcomes = result["outcomes"]
    tasks = list(outcomes["full cache"])
    rows = []
    for title, found in outcomes.items():
        cells = []
        for task in tasks:
            right, logprobs = zip(*found[task], strict=True)
            cells.append(f"{sum(right)} of {len(right)}; {np.mean(logprobs):.2f}")
        rows.append([title, *cells])
    heads = ["rule", *(TASKS[task].title for task in tasks)]
    return "\n".join([*grid(heads, rows), "", source(result)])


def source(result: dict[str, Any]) -> str:
    about = result["about"]
    return f"`{about['command']}` at {about['commit']}, {about['machine']}; {about['model']}."


def mean_over_tasks(by_task: dict[str, list[list[float]]]) -> np.ndarray:
    """float [L * H]."""
    return np.mean([np.array(values) for values in by_task.values()], axis=0).ravel()
