"""Equal pools, what is kept of a run, and the tables of `benchmarks.bench_load`; no engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import bench_load, metrics_page
from benchmarks.load import driving, plot, report
from benchmarks.load.cases import CASES, POOLS, Case, Pool
from benchmarks.load.pools import equal_blocks

if TYPE_CHECKING:
    from pathlib import Path

POOL = Pool(requests=2, longest_tokens=100, quota_tokens=64)
PAGE = """\
# HELP vllm:num_requests_running running
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_running_other 9.0
vllm:prefix_cache_hits_total 7.0
"""


def plan(slot_bytes: int) -> dict[str, Any]:
    return {
        "full_cache": {"block_bytes": 1000},
        "under_quota": {"block_bytes": 1100},
        "slot_bytes": slot_bytes,
        "quota": {"blocks": 2},
    }


@pytest.mark.parametrize(("slot_bytes", "ours"), [(0, 8), (100, 6), (1500, None)])
def test_both_sides_get_the_same_bytes(slot_bytes: int, ours: int | None) -> None:
    """2 requests of 4 blocks and the reserved one are 9,000 bytes; tables come off ours."""
    if ours is None:
        with pytest.raises(ValueError, match="bytes of tables"):
            equal_blocks(POOL, plan(slot_bytes), page_tokens=32, requests=16)
        return
    found = equal_blocks(POOL, plan(slot_bytes), page_tokens=32, requests=16)
    assert (found.stock, found.ours) == (9, ours)
    told = found.as_json()
    assert told["our_bytes"] <= told["stock_bytes"] == 9000
    assert told["our_bytes"] + found.our_block_bytes > 9000, "one block more would be too many"


@pytest.mark.parametrize(("name", "case"), CASES.items())
def test_a_case_fits_its_pool_and_is_a_command(name: str, case: Case, tmp_path: Path) -> None:
    assert case.pool in POOLS
    command = driving.client_command(
        case, "model", "http://here", seed=3, result=tmp_path / "a.json"
    )
    assert command[1:3] == ["bench", "serve"]
    given = dict(zip(command[3::1], command[4::1], strict=False))
    assert given["--seed"] == "3" and given["--num-prompts"] == str(case.prompts)
    assert given["--backend"] == ("openai-chat" if case.is_chat else "openai")
    words = int(given["--random-input-len"])
    if not case.is_chat:
        spread = json.loads(given["--random-range-ratio"])["input"]
        assert words * (1 + spread) + case.output_tokens <= POOLS[case.pool].longest_tokens
    if case.media:
        assert json.loads(given["--extra-body"])["media_io_kwargs"] == json.loads(case.media)
    assert (name == "video-fewer-frames") == (case.sides == ("stock",))


def test_metrics_are_summed_over_labels() -> None:
    assert metrics_page.total(PAGE, metrics_page.RUNNING) == 5
    assert metrics_page.total(PAGE, metrics_page.CACHED) == 7
    assert metrics_page.total(PAGE, metrics_page.PREEMPTIONS) == 0


def client_result(**changed: Any) -> dict[str, Any]:
    return dict.fromkeys(driving.FIGURES.values(), 1.0) | {
        "total_output_tokens": 64,
        "input_lens": [10, 30, 20],
        "errors": ["", "Bad Request", ""],
        **changed,
    }


class Counted:
    """A watch that has looked."""

    running = [1.0, 2.0, 2.0, 1.0]
    usage = 0.5

    def grown(self, name: str) -> float:
        return {metrics_page.PREEMPTIONS: 4.0, metrics_page.CACHED: 32.0}.get(name, 1.5)


def test_figures_of_a_run() -> None:
    found = driving.figures(client_result(), Counted())
    assert found["prompt_tokens"] == [10, 15, 20], "the failed one is left out"
    assert found["errors"] == ["Bad Request"]
    assert (found["running_most"], found["running_mean"]) == (2, 1.5)
    assert (found["preemptions"], found["cached_tokens"]) == (4, 32)
    assert found["spent"]["prefill_seconds"] == 1.5
    nothing = driving.figures(client_result(errors=["a", "b", "c"]), Counted())
    assert nothing["prompt_tokens"] == [0, 0, 0]


def run(throughput: float, **changed: Any) -> dict[str, Any]:
    return {
        "seconds": 10.0,
        "completed": 12,
        "failed": 0,
        "requests_per_s": throughput / 10,
        "output_tokens_per_s": throughput,
        "ttft_median_ms": 2000.0,
        "ttft_p99_ms": 9000.0,
        "tpot_median_ms": 20.0,
        "tpot_p99_ms": 90.0,
        "prompt_tokens": [4000, 4096.0, 4100],
        "errors": [],
        "running_most": 2,
        "running_mean": 1.5,
        "preemptions": 0,
        "spent": {f"{phase}_seconds": 6.0 for phase in ("queue", "prefill", "decode")}
        | {"compression_seconds": 0.5},
        **changed,
    }


def result() -> dict[str, Any]:
    names = ("burst-short", "all-short", "video-fewer-frames")
    return {
        "about": {
            "command": "python -m benchmarks.bench_load",
            "commit": "abc",
            "machine": "a machine",
            "model": {"layers": 2},
            "dtype": "bfloat16",
            "page_tokens": 32,
            "chunk_tokens": 1024,
        },
        "pools": {
            "two": {"stock_bytes": 2**20, "stock": 9, "ours": 8, "table_bytes": 0}
            | {"quota_tokens": 640}
        },
        "cases": {name: {"about": CASES[name].about} for name in names},
        "runs": {
            "burst-short": {
                "stock": [run(10.0, preemptions=3), run(30.0), run(20.0)],
                "ours": [run(40.0, running_most=9), run(50.0, running_most=11)],
            },
            "all-short": {"stock": [run(10.0)], "ours": [run(9.0, failed=1)]},
            "video-fewer-frames": {"stock": [run(10.0)]},
        },
    }


def test_medians_and_sums_over_rounds() -> None:
    found = report.medians(result(), "burst-short", "stock")
    assert found is not None
    assert (found["output_tokens_per_s"], found["preemptions"], found["completed"]) == (20, 3, 36)
    assert report.ratio(result(), "burst-short", "output_tokens_per_s") == pytest.approx(2.25)
    assert report.ratio(result(), "video-fewer-frames", "output_tokens_per_s") is None


def test_bars_tell_what_is_missed_and_what_was_not_measured() -> None:
    found = {about: (measured, is_met) for about, measured, _, is_met in report.bars(result())}
    assert found["requests of ours that fail"] == (1, False)
    assert found["preemptions of ours"] == (0, True)
    assert found["burst-short: requests at once, ours / stock"] == (5.0, True)
    assert found["burst-short: output tokens/s, ours / stock"] == (2.25, True)
    assert found["burst-long: output tokens/s, ours / stock"] == (None, None)
    assert found["all-short: output tokens/s, ours / stock"] == (0.9, False)
    lines = report.bars_table(result()).splitlines()
    assert lines[2] == "| requests of ours that fail | 1 | 0 | no |"
    assert "| not measured | at least 4.00 | not measured |" in "\n".join(lines)


def test_tables_have_a_row_per_case_and_per_side() -> None:
    lines = report.ratio_table(result()).splitlines()
    assert "| 20.0 / 45.0 | 2.25x | 2.0 / 2.0 s | 20 / 20 ms | 2 / 10 | 3 / 0 | 0 / 0 |" in lines[2]
    assert "| 10.0 / - | - |" in lines[4]
    assert "medians of 3 rounds." in lines[-1]
    full = report.sides_table(result())
    assert full.count("| stock |") == 3 and full.count("| ours |") == 2
    assert "`two` 1.0 MiB: 9 blocks of stock vLLM, 8 of ours" in full


def test_time_spent_is_of_a_request_and_compression_of_the_run() -> None:
    lines = report.spent_table(result()).splitlines()
    assert lines[2].endswith("| stock | 0.5 s | 0.5 s | 0.5 s | - |")
    assert lines[3].endswith("| ours | 0.5 s | 0.5 s | 0.5 s | 5.0 % |")
    assert len(lines) == 7


def test_writing_fills_markers_and_draws(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        text = "before\n<!-- bench_load:start -->\nold\n<!-- bench_load:stop -->\nafter\n"
        (tmp_path / name).write_text(text, encoding="utf-8")
    report.write(result(), tmp_path, tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "### Many requests at once" in readme
    assert "old" not in readme and readme.endswith("after\n") and plot.NAME in readme
    assert "| bar |" in (tmp_path / "docs/performance.md").read_text(encoding="utf-8")
    assert (tmp_path / plot.NAME).stat().st_size > 10_000


def test_quick_cases_are_short_and_are_not_kept() -> None:
    options = bench_load.parse_arguments(
        ["--quick", "--out", "elsewhere.json", "--cases", "burst-long"]
    )
    (case,) = bench_load.chosen_cases(options).values()
    assert (case.prompts, case.output_tokens) == (2, 8)
    assert case.about.endswith("256 out [2 requests] [8 out]")
    with pytest.raises(SystemExit):
        bench_load.parse_arguments(["--quick"])
