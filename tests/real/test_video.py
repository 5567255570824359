"""A filmed video in a real engine: vLLM decodes it, and it stays inside its quota."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, tokens_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

BLOCK_TOKENS = 32
QUOTA_BLOCKS = 64
# `bikes.mp4` in cells of 28 x 28 pixels; two frames become one
FRAME_TOKENS = 23 * 10
ALL_TOKENS = 250 // 2 * FRAME_TOKENS
# vLLM takes two frames of each of the ten seconds, whatever `num_frames` says
SAMPLED_TOKENS = 20 // 2 * FRAME_TOKENS
TEXT_TOKENS = 64
ALL_FRAMES = {"video": {"video_backend": "opencv", "num_frames": -1}}
ENGINE: dict[str, Any] = {
    "block_size": BLOCK_TOKENS,
    "max_model_len": 32768,
    "max_num_seqs": 2,
    # without profiling also what the encoder may keep: the whole video
    "max_num_batched_tokens": 32768,
    "skip_mm_profiling": True,
}
BUDGET: dict[str, Any] = {
    "policy": "hybrid",
    "chunk_tokens": 256,
    "decode_interval_tokens": 16,
    "check_ledger": True,
}


def question_about(video: Path, name: str, num_tokens: int) -> dict[str, Any]:
    content = [{"video_file": str(video)}, {"text": "Which letter?"}]
    return {"name": name, "content": content, "max_tokens": num_tokens}


@pytest.mark.timeout(600)
def test_all_frames_stay_inside_the_quota(
    tmp_path: Path, qwen2_5_vl: Path, filmed: dict[str, Path]
) -> None:
    """The blocks are read from the outside after every step, the bytes from the report."""
    report = tmp_path / "report.jsonl"
    report.touch()
    budget = BUDGET | {"page_quota": QUOTA_BLOCKS, "report_file": str(report)}
    # the worker reports what has ended when the next request comes
    late = {"name": "late", "content": [{"text": "Hi"}], "max_tokens": 2, "arrives": 400}
    requests = [question_about(filmed["bikes"], "bikes", 40), late]
    answer = run(
        tmp_path, qwen2_5_vl, requests, budget=budget, media_io_kwargs=ALL_FRAMES, **ENGINE
    )
    found = answer["answers"]["bikes"]
    assert ALL_TOKENS < found["prompt_tokens"] < ALL_TOKENS + TEXT_TOKENS
    assert found["prompt_tokens"] > 14 * QUOTA_BLOCKS * BLOCK_TOKENS
    assert len(found["tokens"]) == 40
    assert answer["held"] and max(answer["held"].values()) <= QUOTA_BLOCKS
    record = json.loads(report.read_text(encoding="utf-8").splitlines()[0])
    assert record["prompt_tokens"] == found["prompt_tokens"]
    assert record["peak_blocks"] <= QUOTA_BLOCKS
    assert record["full_cache_blocks"] > 14 * QUOTA_BLOCKS
    assert record["kv_bytes"] < 1.25 * QUOTA_BLOCKS * record["block_bytes"]
    # the first chunks still fit
    assert record["compressions"] > 0.9 * ALL_TOKENS / BUDGET["chunk_tokens"]


@pytest.mark.timeout(600)
def test_a_quota_that_holds_the_video_changes_nothing(
    tmp_path: Path, qwen2_5_vl: Path, filmed: dict[str, Path]
) -> None:
    requests = [question_about(video, name, 24) for name, video in filmed.items()]
    fits = BUDGET | {"page_quota": SAMPLED_TOKENS // BLOCK_TOKENS + 8}
    stock = run(tmp_path, qwen2_5_vl, requests, stock=True, **ENGINE)
    ours = run(tmp_path, qwen2_5_vl, requests, budget=fits, **ENGINE)
    assert ours["engine"]["backends"] == ["BUDGETKV"]
    prompt_tokens = ours["answers"]["bikes"]["prompt_tokens"]
    assert SAMPLED_TOKENS < prompt_tokens < SAMPLED_TOKENS + TEXT_TOKENS
    assert tokens_of(ours)["bikes"] != tokens_of(ours)["carphone"], "nothing is seen"
    assert tokens_of(ours) == tokens_of(stock)
