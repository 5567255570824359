"""Tables of what was measured on the pretrained model."""

from __future__ import annotations

from benchmarks.real.report import every_task_table
from benchmarks.real.results import RunResult

ABOUT = {
    "command": "python -m benchmarks.real.run --plan some",
    "machine": "a machine",
    "model": "a model",
    "fingerprint": "0123",
    "suite_seed": 1,
    "page_tokens": 16,
}


def result(name: str, share: float | None, **marks: str) -> RunResult:
    return RunResult(
        name=name,
        policy="full" if share is None else "hybrid",
        quota_share=share,
        length_tokens=2048,
        right=marks,
        logprobs={task: [-0.5, -1.0] for task in marks},
        commit="abc",
    )


def test_a_task_that_not_all_were_asked_is_left_out() -> None:
    """The bug: a plan whose full cache answered a third task had no table, and no run a report."""
    results = [result("full", None, sign="11", signs="10"), result("hybrid", 0.1, sign="01")]
    table = every_task_table(results, ABOUT).splitlines()
    assert table[0] == "| policy | quota | one sign | mean log-probability |"
    assert table[2:4] == [
        "| full |  | 100; -0.75 | -0.75 |",
        "| hybrid | 10 % | 50; -0.75 | -0.75 |",
    ]
