"""Tables of the quality lab in `docs/experiments.md`, made from the results of its plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import bench_table, stored
from benchmarks.quality.intervals import mcnemar, wilson
from benchmarks.quality.results import load_plan
from benchmarks.quality.suite import DEPTHS, TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from benchmarks.quality.results import RunResult, Share

SOLVED = 0.9
INCOMPLETE = "The full cache failed, so nothing can be said about a policy."


def solved_tasks(results: Sequence[RunResult], length_tokens: int) -> list[str]:
    """Tasks that the full cache answers at a length; the others say nothing about a policy."""
    full = full_cache(results, length_tokens)
    return [task for task in full.answers if full.share(task).value >= SOLVED]


def full_cache(results: Sequence[RunResult], length_tokens: int) -> RunResult:
    """Raises `ValueError` where the plan's full cache failed: nothing can be said without it."""
    for result in results:
        if result.quota_share is None and result.length_tokens == length_tokens:
            return result
    raise ValueError(f"no result of the full cache at {length_tokens:,} tokens")


def is_complete(results: Sequence[RunResult]) -> bool:
    """Whether there is a full cache for every length."""
    full = {result.length_tokens for result in results if result.quota_share is None}
    return bool(results) and full == {result.length_tokens for result in results}


def compressed(results: Sequence[RunResult]) -> list[RunResult]:
    return [result for result in results if result.quota_share is not None]


def names_of(results: Sequence[RunResult]) -> list[str]:
    """Names of the lines, in order of the plan."""
    return list(dict.fromkeys(result.name for result in compressed(results)))


def find(results: Sequence[RunResult], name: str, share: float, length: int) -> RunResult | None:
    """The result of a name at a quota and a length; None where the run failed."""
    wanted = (name, share, length)
    found = (r for r in results if (r.name, r.quota_share, r.length_tokens) == wanted)
    return next(found, None)


def percent(share: Share) -> str:
    """Share with its 95 % interval: `87 (82-91)`."""
    if not share.count:
        return ""
    low, high = wilson(share.right, share.count)
    return f"{100 * share.value:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def marks(result: RunResult, tasks: Sequence[str]) -> list[bool]:
    return [mark == "1" for task in tasks for mark in result.answers[task]]


def quota_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Policy by quota: average over the tasks that the full cache solves."""
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    shares = sorted({result.quota_share or 0.0 for result in compressed(results)})
    heads = [f"{100 * share:g} %" for share in shares]
    best = full_cache(results, length).pooled(tasks)
    rows = [["full cache", *[percent(best)] * len(shares)]]
    for name in names_of(results):
        found = [find(results, name, share, length) for share in shares]
        rows.append([name, *("failed" if r is None else percent(r.pooled(tasks)) for r in found)])
    return "\n".join(
        [*grid(["policy", *heads], rows), "", left_out(results, length), "", source(about, results)]
    )


def task_table(results: Sequence[RunResult], about: dict[str, Any], share: float = 0.1) -> str:
    """Task by policy at one quota, per cent right; and whether a policy differs from `hybrid`."""
    length = results[0].length_tokens
    full, tasks = full_cache(results, length), solved_tasks(results, length)
    chosen = [r for n in names_of(results) if (r := find(results, n, share, length))]
    ours = find(results, "hybrid", share, length)
    rows = []
    for result in [full, *chosen]:
        row = [result.name, *(f"{100 * result.share(task).value:.0f}" for task in tasks)]
        row.append(percent(result.pooled(tasks)))
        differs = result is not ours and ours is not None
        row.append(f"{mcnemar(marks(ours, tasks), marks(result, tasks)):.2g}" if differs else "")
        rows.append(row)
    heads = ["policy", *(TASKS[task].title for task in tasks), "average", "p against hybrid"]
    note = (
        f"Quota {100 * share:g} % of {length:,} tokens, {len(next(iter(full.answers.values())))} "
        "examples a task, the same for all. p: McNemar's exact test."
    )
    return "\n".join([*grid(heads, rows), "", note, "", source(about, results)])


def full_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """What the full cache scores, task by length; below `SOLVED` a task is left out."""
    lengths = sorted({result.length_tokens for result in results})
    fulls = [full_cache(results, length) for length in lengths]
    tasks = [task for task in TASKS if any(task in full.answers for full in fulls)]
    rows = []
    for task in tasks:
        shares = [full.share(task) if task in full.answers else None for full in fulls]
        row = [TASKS[task].title, TASKS[task].what]
        row += ["" if share is None else percent(share) for share in shares]
        rows.append(row)
    heads = ["task", "asks", *(f"{length:,} tokens" for length in lengths)]
    return "\n".join([*grid(heads, rows), "", source(about, results)])


def depth_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Depth of the evidence by length, for every policy of the plan."""
    rows = []
    lengths = sorted({result.length_tokens for result in results})
    for result in sorted(results, key=lambda r: (results_order(results, r), r.length_tokens)):
        tasks = solved_tasks(results, result.length_tokens)
        shares = result.shares_by_depth(tasks)
        row = [result.name, f"{result.length_tokens:,}", *(percent(shares[d]) for d in DEPTHS)]
        rows.append([*row, percent(result.pooled(tasks))])
    heads = ["policy", "tokens", *(f"depth {depth:g}" for depth in DEPTHS), "all"]
    notes = " ".join(f"{n:,} tokens: {left_out(results, n)}" for n in lengths)
    return "\n".join([*grid(heads, rows), "", notes, "", source(about, results)])


def results_order(results: Sequence[RunResult], result: RunResult) -> int:
    return list(dict.fromkeys(r.name for r in results)).index(result.name)


def variation_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """Variations of one policy at one quota, each against the first."""
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    base = compressed(results)[0]
    rows = [["full cache", "", percent(full_cache(results, length).pooled(tasks)), ""]]
    for result in compressed(results):
        options = ", ".join(f"{key} {value}" for key, value in result.options.items())
        p = "" if result is base else f"{mcnemar(marks(base, tasks), marks(result, tasks)):.2g}"
        rows.append([result.name, options, percent(result.pooled(tasks)), p])
    heads = ["variation", "options", "accuracy", f"p against {base.name}"]
    return "\n".join(
        [*grid(heads, rows), "", left_out(results, length), "", source(about, results)]
    )


def stored_table(results: Sequence[RunResult], about: dict[str, Any]) -> str:
    """What is stored in 8 bits beside the same in 16, over the tasks that the full cache solves."""
    length = results[0].length_tokens
    tasks = solved_tasks(results, length)
    rows = []
    for result in results:
        row = [result.name, *stored.settings(result, about["page_tokens"])]
        row.append(percent(result.pooled(tasks)))
        base = stored.base_of(result, results)
        if base is None:
            row += ["", ""]
        else:
            before, after = marks(base, tasks), marks(result, tasks)
            row += [stored.lost_and_gained(before, after), f"{mcnemar(before, after):.2g}"]
        rows.append(row)
    heads = ["policy", "quota", "keys and values", "held at most", "accuracy"]
    heads += ["answers lost, gained", "p"]
    return "\n".join(
        [*grid(heads, rows), "", left_out(results, length), "", source(about, results)]
    )


def left_out(results: Sequence[RunResult], length_tokens: int) -> str:
    """One sentence on the tasks that the average leaves out."""
    full, solved = full_cache(results, length_tokens), solved_tasks(results, length_tokens)
    missing = [
        f"{TASKS[task].title} ({100 * full.share(task).value:.0f})"
        for task in full.answers
        if task not in solved
    ]
    if not missing:
        return f"All {len(solved)} tasks are solved by the full cache."
    return f"Left out, because the full cache is below {100 * SOLVED:g}: {', '.join(missing)}."


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def source(about: dict[str, Any], results: Sequence[RunResult]) -> str:
    commits = ", ".join(sorted({result.commit for result in results}))
    return (
        f"`{about['command']}` at {commits}, {about['machine']}; model {about['model']} "
        f"({about['fingerprint']}), suite seed {about['suite_seed']}, pages of "
        f"{about['page_tokens']} tokens; per cent right with 95 % intervals."
    )


TABLES: dict[str, tuple[str, Callable[[Sequence[RunResult], dict[str, Any]], str]]] = {
    "quality_quota": ("main", quota_table),
    "quality_tasks": ("main", task_table),
    "quality_full": ("lengths", full_table),
    "quality_full_all": ("main", full_table),
    "quality_depth": ("lengths", depth_table),
    "quality_budgets": ("budgets", quota_table),
    "quality_ablations": ("ablations", variation_table),
    "quality_probe": ("probe", quota_table),
    "quality_engine": ("engine", variation_table),
    "quality_recall": ("recall", quota_table),
    "quality_stored": ("stored", stored_table),
    "quality_quick": ("quick", quota_table),
}


def tables(folder: Path) -> dict[str, str]:
    """Markdown of every table whose plan has been run, by its marker."""
    found = {}
    for mark, (plan, table) in TABLES.items():
        file = folder / f"quality_{plan}.json"
        if file.is_file():
            about, results = load_plan(file)
            found[mark] = table(results, about) if is_complete(results) else INCOMPLETE
    return found


def write(folder: Path, document: Path, marks: Sequence[str] = tuple(TABLES)) -> None:
    """Replace the tables between the markers of a document. Mutates the file."""
    for mark, block in tables(folder).items():
        if mark in marks:
            bench_table.replace(document, mark, block)


def summary(folder: Path) -> str:
    """All tables, for the terminal."""
    return "\n\n".join(f"{mark}\n\n{block}" for mark, block in tables(folder).items())
