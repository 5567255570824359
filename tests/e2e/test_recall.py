"""Recall from host memory in a real engine: inside the quota, on both runners, whatever happens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.test_bound import (
    ENGINE,
    budget,
    check_bound,
    check_complete,
    mixed_requests,
    random_requests,
    same_requests,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

SCENARIOS = 30
# 256 bytes a token of one head, 4 heads: 1,024 tokens, room for one of the longest prompts
HOST_MEMORY = "1MiB"


def recalling(report: Path, host_memory: str) -> dict[str, Any]:
    return budget("hybrid", host_memory=host_memory, report_file=str(report))


def records(report: Path) -> dict[str, dict[str, Any]]:
    lines = report.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {record["request_id"]: record for record in found}


def test_both_runners_give_the_same_answers(tmp_path: Path, vision_model: Path) -> None:
    """Others than without recall; the same for a question however much runs beside it."""
    requests = [*mixed_requests()[4:7], *same_requests()]
    plain = run(tmp_path, vision_model, requests, budget=budget("hybrid"), **ENGINE)
    answers = []
    for runner in ("v1", "v2"):
        report = tmp_path / f"{runner}.jsonl"
        options = recalling(report, "64MiB")
        answer = run(tmp_path, vision_model, requests, budget=options, runner=runner, **ENGINE)
        check_bound(answer)
        same = {tuple(tokens_of(answer)[request["name"]]) for request in same_requests()}
        assert len(same) == 1
        for record in records(report).values():
            fits = record["prompt_tokens"] <= 12 * 8
            assert record["recall"] == ("not needed" if fits else "on")
            assert (record["moved_tokens"] > 0) != fits
        answers.append(tokens_of(answer))
    assert answers[0] == answers[1]
    assert answers[0] != tokens_of(plain)


def test_a_prompt_is_read_as_with_the_full_cache(tmp_path: Path, vision_model: Path) -> None:
    """The first token of each answer, which sees the prompt as its chunks did, is stock's."""
    requests = [request | {"max_tokens": 1} for request in mixed_requests()]
    own = ("block_size", "num_gpu_blocks_override")
    engine = {name: value for name, value in ENGINE.items() if name not in own}
    stock = tokens_of(run(tmp_path, vision_model, requests, stock=True, **engine))
    options = recalling(tmp_path / "report.jsonl", "64MiB")
    answers = []
    for reads in ("all", "none"):
        reading = options | {"recall_prefill": reads}
        answer = run(tmp_path, vision_model, requests, budget=reading, **ENGINE)
        check_bound(answer)
        answers.append(tokens_of(answer))
    assert answers[0] == stock
    assert answers[1] != stock


def test_random_arrivals_aborts_and_preemptions(tmp_path: Path, vision_model: Path) -> None:
    """Host memory is short, so that some requests go without; every answer is complete."""
    requests, preempts = random_requests(seed=11, num_scenarios=SCENARIOS)
    report = tmp_path / "report.jsonl"
    answer = run(
        tmp_path,
        vision_model,
        requests,
        budget=recalling(report, HOST_MEMORY),
        preempts=preempts,
        # prompts are rendered long before they are sent, and the cache forgets what an abort held
        mm_processor_cache_gb=0,
        **ENGINE,
    )
    check_complete(answer, requests)
    states = {record["recall"] for record in records(report).values()}
    assert states >= {"on", "no room", "not needed"}
