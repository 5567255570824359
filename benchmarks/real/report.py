"""Tables of the pretrained model in `docs/experiments.md`, made from the results of its plans."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import bench_table, stored
from benchmarks.quality.intervals import mcnemar
from benchmarks.quality.report import INCOMPLETE, SOLVED, grid, percent
from benchmarks.real import head_report
from benchmarks.real.frames import FRAME_TASKS
from benchmarks.real.peers import report as peers
from benchmarks.real.plan import CONTINUATION
from benchmarks.real.results import load_plan
from benchmarks.real.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from benchmarks.real.results import RunResult

TITLES = {name: task.title for name, task in (TASKS | FRAME_TASKS).items()}


def full_caches(results: Sequence[RunResult]) -> list[RunResult]:
    """Results of the full cache, by length."""
    found = [result for result in results if result.quota_share is None]
    return sorted(found, key=lambda result: result.length_tokens)


def solved_tasks(full: RunResult) -> list[str]:
    """Tasks that the full cache answers; the others say nothing about a policy."""
    return [task for task in full.right if full.share(task).value >= SOLVED]


def compressed(results: Sequence[RunResult]) -> list[RunResult]:
    return [result for result in results if result.quota_share is not None]


def cell(result: RunResult, tasks: Sequence[str]) -> str:
    """Right answers and mean log-probability of a token of the right answer."""
    return f"{percent(result.pooled(tasks))}; {result.logprob(tasks):.2f}"


def marks(result: RunResult, tasks: Sequence[str]) -> list[bool]:
    return [mark == "1" for task in tasks for mark in result.right[task]]


def quota_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Policy by quota over the tasks that the full cache solves."""
    full, tasks = full_caches(results)[0], solved_tasks(full_caches(results)[0])
    shares = sorted({result.quota_share or 0.0 for result in compressed(results)})
    rows = [["full cache", *[cell(full, tasks)] * len(shares)]]
    for name in dict.fromkeys(result.name for result in compressed(results)):
        found = {r.quota_share: r for r in compressed(results) if r.name == name}
        rows.append([name, *(cell(found[s], tasks) if s in found else "" for s in shares)])
    heads = ["policy", *(f"{100 * share:g} %" for share in shares)]
    return "\n".join([*grid(heads, rows), "", left_out(full), "", source(about, results)])


def task_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Policy by task at each quota, per cent right."""
    full, tasks = full_caches(results)[0], solved_tasks(full_caches(results)[0])
    rows = []
    for result in [full, *compressed(results)]:
        share = "" if result.quota_share is None else f"{100 * result.quota_share:g} %"
        row = [result.name, share, *(f"{100 * result.share(t).value:.0f}" for t in tasks)]
        rows.append(row)
    heads = ["policy", "quota", *(TITLES[task] for task in tasks)]
    return "\n".join([*grid(heads, rows), "", source(about, results)])


def tasks_of_all(results: Sequence[RunResult]) -> list[str]:
    """Tasks that all were asked."""
    full = full_caches(results)[0]
    return [task for task in full.right if all(task in result.right for result in results)]


def every_task_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Policy by task at each quota, right and log-probability, whether or not the full cache solves
    it: the tasks that all were asked."""
    full, tasks = full_caches(results)[0], tasks_of_all(results)
    rows = []
    for result in [full, *compressed(results)]:
        share = "" if result.quota_share is None else f"{100 * result.quota_share:g} %"
        cells = [f"{100 * result.share(t).value:.0f}; {result.logprob([t]):.2f}" for t in tasks]
        rows.append([result.name, share, *cells, f"{result.logprob(tasks):.2f}"])
    heads = ["policy", "quota", *(TITLES[task] for task in tasks), "mean log-probability"]
    return "\n".join([*grid(heads, rows), "", source(about, results)])


def full_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """What the full cache answers, task by length; below `SOLVED` a task is left out."""
    fulls = full_caches(results)
    rows = [
        [TITLES[task], *(f"{percent(f.share(task))}; {f.logprob([task]):.2f}" for f in fulls)]
        for task in fulls[0].right
    ]
    heads = ["task", *(f"{full.length_tokens:,} tokens" for full in fulls)]
    return "\n".join([*grid(heads, rows), "", source(about, results)])


def perplexity_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Perplexity of what follows a prompt, policy by quota."""
    full = full_caches(results)[0]
    (task,) = full.right
    shares = sorted({result.quota_share or 0.0 for result in compressed(results)})
    rows = [["full cache", *[perplexity(full, task)] * len(shares)]]
    for name in dict.fromkeys(result.name for result in compressed(results)):
        found = {r.quota_share: r for r in compressed(results) if r.name == name}
        rows.append([name, *(perplexity(found[s], task) if s in found else "" for s in shares)])
    heads = ["policy", *(f"{100 * share:g} %" for share in shares)]
    return "\n".join([*grid(heads, rows), "", source(about, results)])


def perplexity(result: RunResult, task: str) -> str:
    return f"{math.exp(-result.logprob([task])):.2f}"


def stored_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """What is stored in 8 bits beside the same in 16, and how far each example moved."""
    tasks = tasks_of_all(results)
    rows = []
    for result in results:
        row = [result.name, *stored.settings(result, about["page_tokens"])]
        row += [stored_cell(result, task) for task in tasks]
        row.append(f"{result.logprob(tasks):.3f}")
        base = stored.base_of(result, results)
        rows.append(row + (["", ""] if base is None else changes(base, result, tasks)))
    heads = ["policy", "quota", "keys and values", "held at most", *(TITLES[t] for t in tasks)]
    heads += ["mean log-probability", "answers lost, gained", "log-probability moved"]
    return "\n".join([*grid(heads, rows), "", source(about, results)])


def stored_cell(result: RunResult, task: str) -> str:
    """Right answers and log-probability; perplexity of what has no answer."""
    if task == CONTINUATION:
        return f"perplexity {perplexity(result, task)}"
    return f"{100 * result.share(task).value:.0f}; {result.logprob([task]):.3f}"


def changes(base: RunResult, result: RunResult, tasks: Sequence[str]) -> list[str]:
    """Answers that only one of two has; mean change of an example's log-probability, mean size of
    it, and the largest."""
    answered = [task for task in tasks if task != CONTINUATION]
    before, after = (np.concatenate([r.logprobs[t] for t in tasks]) for r in (base, result))
    moved = after - before
    size = np.abs(moved)
    return [
        stored.lost_and_gained(marks(base, answered), marks(result, answered)) if answered else "",
        f"{moved.mean():+.3f} (size {size.mean():.3f}, largest {size.max():.2f})",
    ]


def variation_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Variations of one policy at one quota, each against the first."""
    full, tasks = full_caches(results)[0], solved_tasks(full_caches(results)[0])
    base = compressed(results)[0]
    rows = [["full cache", "", cell(full, tasks), ""]]
    for result in compressed(results):
        options = ", ".join(f"{key} {value}" for key, value in result.options.items())
        p = "" if result is base else f"{mcnemar(marks(base, tasks), marks(result, tasks)):.2g}"
        rows.append([result.name, options, cell(result, tasks), p])
    heads = ["variation", "options", "right; log-probability", f"p against {base.name}"]
    return "\n".join([*grid(heads, rows), "", left_out(full), "", source(about, results)])


def left_out(full: RunResult) -> str:
    """One sentence on the tasks that the average leaves out."""
    solved = solved_tasks(full)
    missing = [
        f"{TITLES[task]} ({100 * full.share(task).value:.0f})"
        for task in full.right
        if task not in solved
    ]
    if not missing:
        return f"All {len(solved)} tasks are solved by the full cache."
    return f"Left out, because the full cache is below {100 * SOLVED:g}: {', '.join(missing)}."


def source(about: dict[str, Any], results: Sequence[RunResult]) -> str:
    commits = ", ".join(sorted({result.commit for result in results}))
    return (
        f"`{about['command']}` at {commits}, {about['machine']}; {about['model']} "
        f"({about['fingerprint']}), suite seed {about['suite_seed']}, pages of "
        f"{about['page_tokens']} tokens; per cent right with 95 % intervals; mean natural "
        "log-probability of a token of the right answer."
    )


TABLES: dict[str, tuple[str, Callable[[Sequence[RunResult], dict[str, Any]], str]]] = {
    "real_full": ("full", full_table),
    "real_quota": ("main", quota_table),
    "real_tasks": ("main", task_table),
    "real_baselines": ("baselines", quota_table),
    "real_long": ("long", every_task_table),
    "real_longest": ("longest", every_task_table),
    "real_perplexity": ("perplexity", perplexity_table),
    "real_ablations": ("ablations", variation_table),
    "real_frames_full": ("frames-full", full_table),
    "real_frames": ("frames", every_task_table),
    "real_recall": ("recall", quota_table),
    "real_recall_prefill": ("recall-prefill", quota_table),
    "real_recall_variations": ("recall-variations", variation_table),
    "real_recall_long": ("recall-long", every_task_table),
    "real_recall_frames": ("recall-frames", every_task_table),
    "real_recall_needles": ("recall-needles", every_task_table),
    "real_recall_needles_long": ("recall-needles-long", every_task_table),
    "real_stored": ("stored", stored_table),
    "real_stored_text": ("stored-text", stored_table),
    "real_stored_frames": ("stored-frames", stored_table),
    "real_reuse": ("reuse", quota_table),
    "real_reuse_frames": ("reuse-frames", every_task_table),
}


def tables(folder: Path) -> dict[str, str]:
    """Markdown of every table whose plan has been run, by its marker."""
    found = {}
    for mark, (plan, table) in TABLES.items():
        file = folder / f"real_{plan}.json"
        if file.is_file():
            about, results = load_plan(file)
            found[mark] = table(results, about) if full_caches(results) else INCOMPLETE
    return found | head_report.tables(folder) | peers.tables(folder)


def write(folder: Path, document: Path) -> None:
    """Replace the tables between the markers of a document. Mutates the file."""
    for mark, block in tables(folder).items():
        bench_table.replace(document, mark, block)


def summary(folder: Path) -> str:
    """All tables, for the terminal."""
    return "\n\n".join(f"{mark}\n\n{block}" for mark, block in tables(folder).items())
