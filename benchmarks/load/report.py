"""Tables and the plot of `benchmarks.bench_load`: README, docs/performance.md, and a picture."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import bench_table
from benchmarks.load import plot

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
BURSTS = ("burst-short", "burst-long")
POOL_OF_ALL = ("all-short", "all-long")
LEAST_AT_ONCE = 4.0
LEAST_THROUGHPUT = {"burst-short": 1.5, "burst-long": 4.0}
LEAST_OF_ALL = 0.95
NOT_MEASURED = "not measured"


def medians(result: dict[str, Any], case: str, side: str) -> dict[str, float] | None:
    """Each figure of a case and a side, its median over the rounds; None if it was not run.

    What must not happen in any round, failures and preemptions, is summed.
    """
    runs = result["runs"].get(case, {}).get(side)
    if not runs:
        return None
    found = {
        name: statistics.median(run[name] for run in runs)
        for name, value in runs[0].items()
        if isinstance(value, int | float)
    }
    summed = ("completed", "failed", "preemptions")
    return found | {name: sum(run[name] for run in runs) for name in summed}


def ratio(result: dict[str, Any], case: str, figure: str) -> float | None:
    """Ours over stock; None where a side is missing."""
    stock, ours = medians(result, case, "stock"), medians(result, case, "ours")
    if stock is None or ours is None or not stock[figure]:
        return None
    return ours[figure] / stock[figure]


def ratio_table(result: dict[str, Any]) -> str:
    """Markdown: a row per case, stock and ours beside each other."""
    lines = [
        "| requests | output tokens/s, stock / ours | ours / stock | TTFT median, stock / ours "
        "| TPOT median, stock / ours | at once, stock / ours | preemptions, stock / ours "
        "| failed, stock / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        sides = [medians(result, name, side) for side in ("stock", "ours")]
        throughput = ratio(result, name, "output_tokens_per_s")
        lines.append(
            f"| {case['about']} | {_both(sides, 'output_tokens_per_s', '.1f')} "
            f"| {'-' if throughput is None else f'{throughput:.2f}x'} "
            f"| {_both(sides, 'ttft_median_ms', '.1f', ' s', 1e-3)} "
            f"| {_both(sides, 'tpot_median_ms', '.0f', ' ms')} "
            f"| {_both(sides, 'running_most', '.0f')} "
            f"| {_both(sides, 'preemptions', '.0f')} | {_both(sides, 'failed', '.0f')} |"
        )
    return "\n".join([*lines, "", origin(result)])


def _both(
    sides: list[dict[str, float] | None],
    figure: str,
    form: str,
    unit: str = "",
    factor: float = 1.0,
) -> str:
    """A figure of stock and ours, a dash where a side was not run."""
    shown = [format(side[figure] * factor, form) if side else "-" for side in sides]
    return " / ".join(shown) + unit


def sides_table(result: dict[str, Any]) -> str:
    """Markdown: a row per case and side, with the tails."""
    lines = [
        "| requests | side | prompt tokens | requests/s | output tokens/s | TTFT, median / p99 "
        "| TPOT, median / p99 | at once, most / mean | preemptions | done / failed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        for side, runs in result["runs"][name].items():
            found = medians(result, name, side)
            if found is None:
                continue
            least, middle, most = runs[0]["prompt_tokens"]
            lines.append(
                f"| {case['about']} | {side} | {least:,} - {middle:,.0f} - {most:,} "
                f"| {found['requests_per_s']:.3f} | {found['output_tokens_per_s']:.1f} "
                f"| {found['ttft_median_ms'] / 1e3:.1f} / {found['ttft_p99_ms'] / 1e3:.1f} s "
                f"| {found['tpot_median_ms']:.0f} / {found['tpot_p99_ms']:.0f} ms "
                f"| {found['running_most']:.0f} / {found['running_mean']:.1f} "
                f"| {found['preemptions']:.0f} | {found['completed']:.0f} / {found['failed']:.0f} |"
            )
    pools = [
        f"`{name}` {pool['stock_bytes'] / MIB:.1f} MiB: {pool['stock']:,} blocks of stock vLLM, "
        f"{pool['ours']:,} of ours and {pool['table_bytes'] / MIB:.1f} MiB of tables, quota "
        f"{pool['quota_tokens']:,} tokens"
        for name, pool in result["pools"].items()
    ]
    return "\n".join([*lines, "", "Pools: " + "; ".join(pools) + ".", "", origin(result)])


def spent_table(result: dict[str, Any]) -> str:
    """Markdown: where a request waits and computes, and how much of a run is compression."""
    lines = [
        "| requests | side | a request waits | is prefilled | decodes | compression, of the run |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        for side, runs in result["runs"][name].items():
            if not runs or not sum(run["completed"] for run in runs):
                continue
            done = sum(run["completed"] for run in runs)
            each = [
                sum(run["spent"][f"{phase}_seconds"] for run in runs) / done
                for phase in ("queue", "prefill", "decode")
            ]
            seconds = sum(run["seconds"] for run in runs)
            share = sum(run["spent"]["compression_seconds"] for run in runs) / seconds
            shown = " | ".join(f"{value:.1f} s" for value in each)
            compression = f"{100 * share:.1f} %" if side == "ours" else "-"
            lines.append(f"| {case['about']} | {side} | {shown} | {compression} |")
    return "\n".join(lines)


def bars(result: dict[str, Any]) -> list[tuple[str, float | None, float, bool | None]]:
    """What was to be reached: name, measured, bar, and whether it is met; None if not measured."""
    ours = [medians(result, name, "ours") for name in result["cases"]]
    measured = [found for found in ours if found is not None]
    lost = sum(found["failed"] for found in measured) if measured else None
    preempted = sum(found["preemptions"] for found in measured) if measured else None
    rows = [("requests of ours that fail", lost, 0.0, None if lost is None else lost == 0)]
    met = None if preempted is None else preempted == 0
    rows.append(("preemptions of ours", preempted, 0.0, met))
    wanted = [(f"{name}: requests at once", name, "running_most", LEAST_AT_ONCE) for name in BURSTS]
    for name, least in (LEAST_THROUGHPUT | dict.fromkeys(POOL_OF_ALL, LEAST_OF_ALL)).items():
        wanted.append((f"{name}: output tokens/s", name, "output_tokens_per_s", least))
    for about, name, figure, least in wanted:
        found = ratio(result, name, figure)
        rows.append((f"{about}, ours / stock", found, least, found and found >= least))
    return rows


INTRODUCTION = """### Many requests at once

`vllm bench serve` against stock vLLM and this plugin in turn, both with the same bytes for their
pools; of ours come off what blocks have beside keys and values, page tables and probe banks. How to
run it, tails, and which bars are met:
[docs/performance.md](docs/performance.md#many-requests-at-once)."""


def bars_table(result: dict[str, Any]) -> str:
    """Markdown: a row per bar."""
    lines = ["| bar | measured | wanted | met |", "|---|---|---|---|"]
    for about, found, wanted, is_met in bars(result):
        shown = NOT_MEASURED if found is None else f"{found:.2f}" if wanted else f"{found:.0f}"
        limit = f"at least {wanted:.2f}" if wanted else "0"
        answer = NOT_MEASURED if is_met is None else "yes" if is_met else "no"
        lines.append(f"| {about} | {shown} | {limit} | {answer} |")
    return "\n".join(lines)


def origin(result: dict[str, Any]) -> str:
    """Command, commit, machine, model."""
    about = result["about"]
    shape = ", ".join(f"{name} {value}" for name, value in about["model"].items())
    rounds = max(len(runs) for sides in result["runs"].values() for runs in sides.values())
    return (
        f"`{about['command']}` at {about['commit']}, {about['machine']}; Qwen2.5-VL with random "
        f"weights ({shape}), {about['dtype']}, pages of {about['page_tokens']} tokens, chunks of "
        f"{about['chunk_tokens']}; {'one round' if rounds == 1 else f'medians of {rounds} rounds'}."
    )


def write(result: dict[str, Any], repository: Path, results: Path) -> None:
    """The tables between the markers of README and docs, and the plot. Mutates the files."""
    picture = f"![many requests at once](benchmarks/results/{plot.NAME})"
    section = "\n\n".join([INTRODUCTION, ratio_table(result), picture])
    bench_table.replace(repository / "README.md", "bench_load", section)
    full = "\n\n".join(table(result) for table in (sides_table, bars_table, spent_table))
    bench_table.replace(repository / "docs" / "performance.md", "bench_load", full)
    plot.draw(result, results)
