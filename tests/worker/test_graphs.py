"""What vLLM's model runners are told of batches in which every request has one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_budgetkv.worker.graphs import keep_chunks_out


@pytest.mark.parametrize("has_chunks", [False, True])
def test_runner_v1(has_chunks: bool) -> None:
    runner = SimpleNamespace(_is_uniform_decode=GPUModelRunner._is_uniform_decode)
    keep_chunks_out(runner, cache_with(has_chunks), is_v2=False)
    batch = {"uniform_decode_query_len": 1, "num_reqs": 3}
    ones = runner._is_uniform_decode(max_num_scheduled_tokens=1, num_tokens=3, **batch)
    assert ones is not has_chunks
    assert not runner._is_uniform_decode(max_num_scheduled_tokens=2, num_tokens=4, **batch)


@pytest.mark.parametrize("has_chunks", [False, True])
def test_runner_v2(has_chunks: bool) -> None:
    runner: Any = SimpleNamespace(gather_batch_req_state=lambda output, dummy_run: ("state", 1))
    keep_chunks_out(runner, cache_with(has_chunks), is_v2=True)
    assert runner.gather_batch_req_state(None, False) == ("state", None if has_chunks else 1)


def cache_with(has_chunks: bool) -> Any:
    return SimpleNamespace(has_chunks=has_chunks)
