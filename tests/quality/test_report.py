"""Tables and plots of a small result: what is averaged, what is left out, where it is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.quality import plots, report
from benchmarks.quality.results import RunResult, save_plan

if TYPE_CHECKING:
    from pathlib import Path

ABOUT = {
    "command": "python -m benchmarks.quality.run",
    "machine": "a machine",
    "model": "model",
    "fingerprint": "f00",
    "suite_seed": 1,
    "page_tokens": 8,
}


def result(name: str, share: float | None, needle: str, count: str, **more: Any) -> RunResult:
    return RunResult(
        name=name,
        policy="full" if share is None else "hybrid",
        quota_share=share,
        length_tokens=more.pop("length_tokens", 2048),
        answers={"needle": needle, "count": count},
        static_share=[] if share is None else [[1.0, 0.5], [0.25, 0.0]],
        commit="abc",
        **more,
    )


RESULTS = [
    result("full", None, "1111111111", "1010101010"),
    result("hybrid", 0.05, "1111100000", "1111111111"),
    result("hybrid", 0.1, "1111111110", "0000000000"),
    result("window", 0.1, "1000000001", "0000000000"),
]


def test_a_task_that_the_full_cache_fails_is_left_out() -> None:
    assert report.solved_tasks(RESULTS, 2048) == ["needle"]
    assert report.left_out(RESULTS, 2048).endswith("below 90: counting (50).")


def test_quota_table() -> None:
    lines = report.quota_table(RESULTS, ABOUT).splitlines()
    assert lines[0] == "| policy | 5 % | 10 % |"
    assert lines[2] == "| full cache | 100 (72-100) | 100 (72-100) |"
    assert lines[3] == "| hybrid | 50 (24-76) | 90 (60-98) |"
    assert lines[4] == "| window | failed | 20 (6-51) |"
    assert "at abc, a machine; model model (f00), suite seed 1" in lines[-1]


def test_task_table_compares_with_hybrid() -> None:
    lines = report.task_table(RESULTS, ABOUT).splitlines()
    assert lines[0] == "| policy | needle | average | p against hybrid |"
    assert lines[3] == "| hybrid | 90 | 90 (60-98) |  |"
    # 8 of the 9 examples that differ go one way: 2 * (1 + 9) / 2 ** 9
    assert lines[4] == "| window | 20 | 20 (6-51) | 0.039 |"


def test_depth_table_has_a_row_per_policy_and_length() -> None:
    longer = [result("full", None, "11111", "11111", length_tokens=4096)]
    lines = report.depth_table([*RESULTS[:1], *RESULTS[2:], *longer], ABOUT).splitlines()
    assert lines[0].startswith("| policy | tokens | depth 0 | depth 0.25 |")
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| full", "2,048"],
        ["| full", "4,096"],
        ["| hybrid", "2,048"],
        ["| window", "2,048"],
    ]
    assert "| 50 (9-91) | 90 (60-98) |" in lines[4]


def test_what_8_bits_lose_is_told_against_the_same_in_16() -> None:
    full, hybrid = RESULTS[0], replace(RESULTS[2], block_bytes=2**16, peak_blocks=25.0)
    hybrid = replace(hybrid, quota_blocks=25)
    quantised = {"cache_dtype": "fp8", "block_bytes": 2**15}
    alike = replace(hybrid, answers=RESULTS[1].answers, **quantised)
    # of equal bytes: held against the tenth, which has fewer tokens
    more = replace(hybrid, quota_share=0.16015625, quota_blocks=41, peak_blocks=41.0, **quantised)
    lines = report.stored_table([full, hybrid, alike, more], ABOUT).splitlines()
    assert lines[2:6] == [
        "| full |  | 16 bits |  | 100 (72-100) |  |  |",
        "| hybrid | 10 %, 200 tokens | 16 bits | 1.56 MiB | 90 (60-98) |  |  |",
        "| hybrid | 10 %, 200 tokens | 8 bits | 0.781 MiB | 50 (24-76) | 4, 0 | 0.12 |",
        "| hybrid | 16 %, 328 tokens | 8 bits | 1.28 MiB | 90 (60-98) | 0, 0 | 1 |",
    ]
    assert lines[7].endswith("below 90: counting (50).")


def test_no_average_without_the_full_cache() -> None:
    with pytest.raises(ValueError, match="no result of the full cache at 2,048"):
        report.quota_table(RESULTS[1:], ABOUT)


def test_a_plan_whose_full_cache_failed_does_not_stop_the_report(tmp_path: Path) -> None:
    save_plan(tmp_path / "quality_main.json", ABOUT, RESULTS[1:])
    assert report.tables(tmp_path)["quality_quota"] == report.INCOMPLETE
    assert plots.draw(tmp_path) == []


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    document = tmp_path / "experiments.md"
    document.write_text(
        "before\n<!-- quality_quota:start -->old<!-- quality_quota:stop -->\nafter\n"
    )
    save_plan(tmp_path / "quality_main.json", ABOUT, RESULTS)
    report.write(tmp_path, document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| hybrid | 50 (24-76) | 90 (60-98) |" in text


def test_every_plan_has_its_plots(tmp_path: Path) -> None:
    for plan in ("main", "lengths", "budgets"):
        save_plan(tmp_path / f"quality_{plan}.json", ABOUT, RESULTS)
    files = plots.draw(tmp_path)
    assert [file.stem for file in files] == [f"quality_{name}" for name in plots.PLOTS]
    assert all(file.stat().st_size > 10_000 for file in files)


@pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.9, 0.1, 0.5], [0.52, 0.5, 0.51, 0.9]])
def test_labels_keep_their_order_and_distance(heights: list[float]) -> None:
    placed = plots.spread(heights, 0.05)
    ordered = sorted(placed)
    assert all(b - a > 0.049 for a, b in zip(ordered, ordered[1:], strict=False))
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    assert order == sorted(range(len(heights)), key=lambda i: placed[i])
