"""Two ranks, each with half of the KV heads, its own pool and its own ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.test_bound import ENGINE, QUOTA_BLOCKS, budget, check_bound, mixed_requests
from tests.e2e.test_recall import recalling, records
from tests.e2e.test_reuse import by_name, questions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def test_two_ranks_stay_inside_the_quota(
    tmp_path: Path, vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    requests = mixed_requests()[2:6]
    window = budget("window")
    two = run(
        tmp_path,
        vision_model,
        requests,
        budget=window,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **ENGINE,
    )
    assert max(two["held"].values()) <= QUOTA_BLOCKS
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    one = run(tmp_path, vision_model, requests, budget=window, **ENGINE)
    assert tokens_of(two) == tokens_of(one)


def test_two_ranks_take_over_the_same(
    tmp_path: Path, vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a prompt begins with is decided once, for both."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    report = tmp_path / "report.jsonl"
    answer = run(
        tmp_path,
        vision_model,
        questions(),
        budget=recalling(report, "64MiB"),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **ENGINE,
    )
    check_bound(answer)
    found = by_name(records(report))
    (frames,) = found["first"]["frames"]
    stop_tokens = frames["offset"] + frames["length"]
    assert found["second"]["reused_tokens"] == found["again"]["reused_tokens"] == stop_tokens
    assert {found[name]["recall"] for name in ("first", "second", "again")} == {"on"}
    assert tokens_of(answer)["again"] == tokens_of(answer)["first"]
    said = {name: one["said"] for name, one in answer["answers"].items()}
    for name in ("first", "second", "again"):
        assert said[name]["recall"] == "on"
        assert said[name]["reused_tokens"] == found[name]["reused_tokens"]
        assert said[name]["peak_blocks"] == found[name]["peak_blocks"] == QUOTA_BLOCKS
    # rank 0 speaks for both, and has half of the heads
    assert sum(said["first"]["heads"].values()) == sum(found["first"]["heads"].values())
