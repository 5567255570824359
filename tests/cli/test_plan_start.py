"""A plan beside a real start: what `plan` counts is what the engine has and holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import VISION, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import RunPlan

pytestmark = pytest.mark.engine

POOL_BYTES = 1_200_000
QUOTA_BLOCKS = 20
BUDGET = {
    "policy": "hybrid",
    "page_quota": QUOTA_BLOCKS,
    "chunk_tokens": 64,
    "decode_interval_tokens": 16,
    # a look-ahead would be one more request
    "lookahead": False,
}
ENGINE = {
    "block_size": 16,
    "kv_cache_memory_bytes": POOL_BYTES,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
}
SERVER = [
    *("--dtype", "float32", "--block-size", "16", "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(POOL_BYTES), "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "512"),
    *("--limit-mm-per-prompt", json.dumps(VISION["limit_mm_per_prompt"])),
    *("--kv-page-quota", str(QUOTA_BLOCKS), "--kv-chunk-tokens", "64"),
    *("--kv-decode-interval-tokens", "16", "--no-kv-lookahead"),
]
OUTPUT_TOKENS = 12


def requests(count: int) -> list[dict[str, Any]]:
    """So many of a video and a question, all at once."""
    content = [{"video": 96, "seed": 7}, {"text": "Which letter?"}]
    return [
        {"name": f"r{i}", "content": content, "max_tokens": OUTPUT_TOKENS} for i in range(count)
    ]


def tokens_of_a_request(answer: dict[str, Any]) -> str:
    (prompt_tokens,) = {found["prompt_tokens"] for found in answer["answers"].values()}
    return str(prompt_tokens + OUTPUT_TOKENS)


def test_under_a_quota(tmp_path: Path, qwen2_5_vl: Path, plan_of: RunPlan) -> None:
    report = tmp_path / "report.jsonl"
    budget = BUDGET | {"report_file": str(report)}
    answer = run(tmp_path, qwen2_5_vl, requests(6), budget=budget, **ENGINE)
    tokens = tokens_of_a_request(answer)
    plan = plan_of("--model", str(qwen2_5_vl), "--tokens", tokens, *SERVER)
    ours, sizes = plan["under_quota"], answer["engine"]["sizes"]
    assert ours["block_bytes"] == sizes["block_bytes"]
    assert ours["token_bytes"] * ENGINE["block_size"] == sizes["block_bytes"]
    assert ours["pool_blocks"] == answer["engine"]["num_blocks"]
    for name in ("blocks", "page_tokens", "chunk_tokens", "compresses"):
        assert plan["quota"][name] == sizes["quota"][name]
    assert plan["quota"]["budget_tokens"] == sizes["budget_tokens"]
    assert plan["encoder"]["cache_tokens"] == sizes["encoder_cache_tokens"]
    # what was held, and by how many at once
    assert set(answer["held"].values()) == {ours["blocks"]}
    assert ours["requests_at_once"] == answer["running_at_once"] == 3
    records = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    assert {r["kv_bytes"] for r in records} == {ours["bytes"] + plan["slot_bytes"]}


def test_a_full_cache(tmp_path: Path, qwen2_5_vl: Path, plan_of: RunPlan) -> None:
    answer = run(tmp_path, qwen2_5_vl, requests(3), stock=True, **ENGINE)
    tokens = tokens_of_a_request(answer)
    plan = plan_of("--model", str(qwen2_5_vl), "--tokens", tokens, *SERVER)
    stock, sizes = plan["full_cache"], answer["engine"]["sizes"]
    assert stock["block_bytes"] == sizes["block_bytes"]
    assert stock["pool_blocks"] == answer["engine"]["num_blocks"]
    assert set(answer["held"].values()) == {stock["blocks"]}
    assert stock["requests_at_once"] == answer["running_at_once"] == 1


def test_host_memory_and_weights(tmp_path: Path, qwen2_5_vl: Path, plan_of: RunPlan) -> None:
    budget = BUDGET | {"host_memory": "3MiB"}
    answer = run(tmp_path, qwen2_5_vl, requests(1), budget=budget, **ENGINE)
    server = ["--model", str(qwen2_5_vl), *SERVER, "--kv-host-memory", "3MiB"]
    plan, sizes = plan_of(*server), answer["engine"]["sizes"]
    assert plan["host_memory"]["blocks"] == sizes["host_blocks"]
    # the same without a pool, which weights are subtracted from
    start = server.index("--kv-cache-memory-bytes")
    on_gpu = plan_of(*server[:start], *server[start + 2 :], "--gpu-memory", "8GiB")
    assert on_gpu["pool"]["shares"]["weights"]["bytes"] == sizes["weight_bytes"]
