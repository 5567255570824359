"""Tables of the peers in `docs/experiments.md`, beside our own results of the plan `main`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.report import SOLVED, grid, percent
from benchmarks.quality.results import Share
from benchmarks.real.results import load_plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from benchmarks.real.results import RunResult

    Row = dict[str, Any]

FILE = "real_peers.json"
OURS = "real_main.json"
TITLES = {
    "transformers": "transformers, full cache",
    "snapkv": "kvpress SnapKV",
    "keydiff": "kvpress KeyDiff",
    "expected": "kvpress Expected Attention",
    "adakv-expected": "kvpress Expected Attention, AdaKV",
    "kvzip": "kvpress KVzip",
    "openvino": "OpenVINO, full cache",
    "openvino eviction": "OpenVINO, eviction",
    "openvino kvcrush": "OpenVINO, eviction and KVCrush",
}
WHERE = {
    "in": "compressed with the text",
    "after": "after the compressed text",
    "ours": "run ahead",
}
MIB = 2**20
BASE = "hybrid"


def tables(folder: Path) -> dict[str, str]:
    """Markdown of what has been measured, by its marker."""
    file = folder / FILE
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    found = {}
    if "accuracy" in content:
        part = content["accuracy"]
        ours = load_plan(folder / OURS) if (folder / OURS).is_file() else ({}, [])
        rows = part["rows"] + [row_of(run, ours[0]["page_tokens"]) for run in ours[1]]
        found["real_peers"] = accuracy_table(rows, part["about"])
    if "speed" in content:
        found["real_peers_speed"] = speed_table(content["speed"]["rows"], content["speed"]["about"])
    return found


def row_of(run: RunResult, page_tokens: int) -> Row:
    """A result of our engine as a row of the peers."""
    held = run.peak_blocks * page_tokens
    return {
        "name": "vLLM, full cache" if run.quota_share is None else f"ours, {run.name}",
        "share": 1.0 if run.quota_share is None else run.quota_share,
        "mode": "ours",
        "peak_tokens": held,
        "kept_tokens": held,
        "exact": run.exact,
        "logprobs": run.logprobs,
        "commit": run.commit,
    }


def solved_tasks(rows: Sequence[Row]) -> list[str]:
    """Tasks that transformers answers with the full cache.

    Raises:
        ValueError: there is no such row.
    """
    for row in rows:
        if row["name"] == "transformers":
            return [t for t, marks in row["exact"].items() if share_of([marks]).value >= SOLVED]
    raise ValueError("the peers' results have no full cache of transformers")


def share_of(marks: Iterable[str]) -> Share:
    joined = "".join(marks)
    return Share(joined.count("1"), len(joined))


def cell(row: Row, tasks: Sequence[str]) -> str:
    """Right answers and mean log-probability of a token of the right answer."""
    logprob = np.mean([np.mean(row["logprobs"][task]) for task in tasks])
    return f"{percent(share_of(row['exact'][task] for task in tasks))}; {logprob:.2f}"


def accuracy_table(rows: Sequence[Row], about: Row) -> str:
    """System by share; full caches, whose share is all, first."""
    tasks = solved_tasks(rows)
    shares = sorted({row["share"] for row in rows if row["share"] < 1})
    lines = []
    for row in rows:
        if row["share"] == 1 and row["mode"] != "after":
            title = TITLES.get(row["name"], row["name"])
            lines.append([title, "", *[cell(row, tasks)] * len(shares), *held([row])])
    names = dict.fromkeys((row["name"], row["mode"]) for row in rows if row["share"] < 1)
    for name, mode in names:
        found = {r["share"]: r for r in rows if (r["name"], r["mode"]) == (name, mode)}
        cells = [cell(found[share], tasks) if share in found else "" for share in shares]
        chosen = [found[share] for share in shares if share in found]
        where = WHERE[mode] if mode != "ours" or name == f"ours, {BASE}" else WHERE["in"]
        lines.append([TITLES.get(name, name), where, *cells, *held(chosen)])
    heads = ["system", "the question is", *(f"{100 * share:g} %" for share in shares)]
    table = grid([*heads, "peak tokens", "kept tokens"], lines)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    note = f"`{about['command']}` at {commits}, {about['machine']}; {about['model']} "
    note += f"({about['fingerprint']}), suite seed {about['suite_seed']}; "
    note += f"{versions(about)}; float32, 2,048 tokens, tasks {', '.join(tasks)}; per cent "
    note += "written exactly, with 95 % intervals; mean natural log-probability of a token of the "
    note += "right answer; tokens of the cache, mean over layers (and heads, where kept)."
    return "\n".join([*table, "", note])


def held(rows: Sequence[Row]) -> list[str]:
    """Peak and kept tokens, share by share."""
    return [
        " / ".join(f"{row[key]:,.0f}" for row in rows) for key in ("peak_tokens", "kept_tokens")
    ]


def speed_table(rows: Sequence[Row], about: Row) -> str:
    """System by length; in brackets the ratio to `hybrid` at the same length."""
    lines = []
    for row in rows:
        (base,) = [
            r for r in rows if (r["name"], r["length_tokens"]) == (BASE, row["length_tokens"])
        ]
        lines.append([row["name"], f"{row['prompt_tokens']:,.0f}", *cells_of(row, base)])
    heads = ["system", "prompt tokens", "first token", "further token", "KV, most"]
    heads += ["KV in decode", "process", "over idle"]
    note = f"`{about['command']}` at {about['commit']}, {about['machine']}; {about['model']}; "
    note += f"{versions(about)}; float32, all cores, a process each, medians of "
    note += f"{rows[0]['repeats']}; a tenth is kept; in brackets: times that of {BASE}."
    return "\n".join([*grid(heads, lines), "", note])


def cells_of(row: Row, base: Row) -> list[str]:
    """Each figure with its ratio to that of `base`; less may come on top of idle than is seen."""
    figures = [
        ("first_token_seconds", 1, ".2f", "s"),
        ("decode_ms", 1, ".1f", "ms"),
        ("kv_peak_bytes", MIB, ".1f", "MiB"),
        ("kv_decode_bytes", MIB, ".1f", "MiB"),
        ("peak_bytes", MIB, ".0f", "MiB"),
    ]
    cells = [
        f"{row[name] / scale:{form}} {unit} ({row[name] / base[name]:.1f}x)"
        for name, scale, form, unit in figures
    ]
    over_idle = (row["peak_bytes"] - row["idle_bytes"]) / MIB
    return [*cells, f"{over_idle:.0f} MiB"]


def versions(about: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())
