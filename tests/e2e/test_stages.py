"""Two stages of a pipeline, each with half of the layers, its own pool and its own ledger."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.test_bound import ENGINE, QUOTA_BLOCKS, budget, check_bound
from tests.e2e.test_recall import records
from tests.e2e.test_reuse import by_name
from vllm_budgetkv.cache.trace import unpacked_bits

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

STAGES: dict[str, Any] = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
QUESTION = {"text": "Which letter?"}
FITS: list[dict[str, Any]] = [
    {"name": "short", "content": [QUESTION], "logprobs": 3},
    {"name": "mid", "content": [{"text": "What does it say? " * 20}], "logprobs": 3, "arrives": 1},
    {"name": "late", "content": [{"text": "And now? " * 12}], "logprobs": 3, "arrives": 5},
]
# each more than ten times its quota, and all four together four times the pool
LONG: list[dict[str, Any]] = [
    {
        "name": f"long{number}",
        "content": [{"text": f"Number {number}. " + "What does the sign say? " * 170}],
        "asks": {"kv_page_quota": QUOTA_BLOCKS},
        "max_tokens": 12,
    }
    for number in range(4)
]
VIDEOS: list[dict[str, Any]] = [
    {"name": "image", "content": [{"image": 1}, QUESTION], "max_tokens": 12},
    {"name": "text", "content": [{"text": "What does it say? " * 30}], "max_tokens": 8},
    {"name": "video", "content": [{"video": 30}, QUESTION], "max_tokens": 20},
    {"name": "again", "content": [{"video": 30}, QUESTION], "max_tokens": 20, "arrives": 9},
]


def logprobs_of(answer: dict[str, Any], name: str) -> list[dict[str, float]]:
    found = answer["answers"][name]["logprobs"]
    assert len(found) == 16
    return found


def kept_by_layer(trace: Path) -> dict[str, np.ndarray]:
    """By request, how many heads of each layer keep each token of the prompt, [L, P]."""
    found = {}
    for line in trace.read_text(encoding="utf-8").splitlines():
        story = json.loads(line)
        traced = story["trace"]
        shape = (*traced["shape"], traced["prompt_tokens"])
        kept = unpacked_bits(traced["kept"], shape).sum(axis=1)
        found[story["record"]["request_id"]] = kept
    return by_name(found)


def test_the_tokens_of_stock_and_four_long_prompts_at_once(
    tmp_path: Path, text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model runner V1, which serves stages on a CPU only if it compiles the model."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    report = tmp_path / "report.jsonl"
    options = budget("hybrid", page_quota=60, report_file=str(report))
    engine = {**ENGINE, "num_gpu_blocks_override": 124}
    two = run(
        tmp_path,
        text_model,
        [*FITS, *LONG],
        budget=options,
        enforce_eager=False,
        **STAGES,
        **engine,
    )
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    stock = run(tmp_path, text_model, FITS, stock=True)
    for name in (request["name"] for request in FITS):
        assert two["answers"][name]["tokens"] == stock["answers"][name]["tokens"]
        for ours, theirs in zip(logprobs_of(two, name), logprobs_of(stock, name), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    assert two["engine"]["leftovers"] == 0 and two["running_at_once"] >= 4
    assert two["num_lookaheads"] >= 4
    for request in LONG:
        said = two["answers"][request["name"]]["said"]
        assert said["prompt_tokens"] > 10 * QUOTA_BLOCKS * ENGINE["block_size"]
        assert said["peak_blocks"] == QUOTA_BLOCKS
        # the last stage speaks, of its own layer
        assert sum(said["heads"].values()) == 2
        assert len(two["answers"][request["name"]]["tokens"]) == request["max_tokens"]
    # one stage writes them; the last to end is written in a step that this engine has not
    reports = by_name(records(report))
    assert len(reports) == len(FITS) + len(LONG) - 1
    for name, record in reports.items():
        assert record["peak_blocks"] == two["answers"][name]["said"]["peak_blocks"]
        assert len(record["static_heads"]) == 1
    held = [most for name, most in two["held"].items() if name.startswith("long")]
    assert held == [QUOTA_BLOCKS] * len(LONG)


def test_stages_choose_what_one_worker_chooses(
    tmp_path: Path, vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a block more for the chunk of the one layer, whose budget is the same then.

    So the second stage, which never sees a token, turns its probe as a whole model does.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = budget("hybrid", chunk_tokens=16)
    report, trace = tmp_path / "report.jsonl", tmp_path / "trace.jsonl"
    two = run(
        tmp_path,
        vision_model,
        VIDEOS,
        budget={**options, "page_quota": QUOTA_BLOCKS + 1, "report_file": str(report)},
        runner="v2",
        **STAGES,
        **ENGINE,
    )
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    traced = {**options, "trace_file": str(trace)}
    one = run(tmp_path, vision_model, VIDEOS, budget=traced, **ENGINE)
    check_bound(one)
    assert max(two["held"].values()) == QUOTA_BLOCKS + 1
    assert tokens_of(two) == tokens_of(one)
    assert tokens_of(two)["video"] == tokens_of(two)["again"]
    said = {name: found["said"] for name, found in two["answers"].items()}
    assert said["video"]["full_cache_blocks"] > said["text"]["full_cache_blocks"] > QUOTA_BLOCKS + 1
    assert said["video"]["output_compactions"]
    of_stage, of_layers = by_name(records(report)), kept_by_layer(trace)
    for name in ("video", "text"):
        counts = np.sum([*of_stage[name]["kept_counts"].values()], axis=0)
        first, second = of_layers[name]
        assert np.array_equal(counts, second) and not np.array_equal(first, second)
