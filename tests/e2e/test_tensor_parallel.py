"""Two ranks, each with half of the KV heads, its own pool and its own ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.test_bound import ENGINE, QUOTA_BLOCKS, budget, mixed_requests

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
