"""A plan beside a real start: what `plan` counts is what the engine has and holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import engines
from tests.e2e.engines import VISION, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import RunPlan

pytestmark = pytest.mark.engine

POOL_BYTES = 2_200_000
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
    "block_size": 32,
    "kv_cache_memory_bytes": POOL_BYTES,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
}
SERVER = [
    *("--dtype", "float32", "--block-size", "32", "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(POOL_BYTES), "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "512"),
    *("--limit-mm-per-prompt", json.dumps(VISION["limit_mm_per_prompt"])),
    *("--kv-page-quota", str(QUOTA_BLOCKS), "--kv-chunk-tokens", "64"),
    *("--kv-decode-interval-tokens", "16", "--no-kv-lookahead"),
]


@pytest.fixture(autouse=True)
def no_other_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the variable goes before `kv_cache_memory_bytes`."""
    monkeypatch.delitem(engines.ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def requests(count: int) -> list[dict[str, Any]]:
    """So many of a video and a question, all at once; no video is another's, nothing is shared."""
    question = {"text": "Which letter?"}
    return [
        {"name": f"r{i}", "content": [{"video": 96, "seed": i}, question], "max_tokens": 12}
        for i in range(count)
    ]


def tokens_of_a_request(answer: dict[str, Any]) -> str:
    found = answer["answers"].values()
    (tokens,) = {item["prompt_tokens"] + len(item["tokens"]) for item in found}
    return str(tokens)


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
    assert stock["requests_at_once"] == answer["running_at_once"] == 2


def test_host_memory(tmp_path: Path, qwen2_5_vl: Path, plan_of: RunPlan) -> None:
    budget = BUDGET | {"host_memory": "3MiB"}
    answer = run(tmp_path, qwen2_5_vl, requests(1), budget=budget, **ENGINE)
    plan = plan_of("--model", str(qwen2_5_vl), *SERVER, "--kv-host-memory", "3MiB")
    assert plan["host_memory"]["blocks"] == answer["engine"]["sizes"]["host_blocks"] > 0
