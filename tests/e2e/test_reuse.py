"""A second question on what host memory keeps: no second prefill, the answer of one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.test_bound import ENGINE, check_bound, check_complete, random_requests
from tests.e2e.test_recall import HOST_MEMORY, recalling, records

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

SCENARIOS = 30


def ask(name: str, text: str, arrives: int = 0, video: int = 3) -> dict[str, Any]:
    content = [{"text": "Look."}, {"video": 60, "seed": video}, {"text": text}]
    return {"name": name, "content": content, "max_tokens": 12, "arrives": arrives}


def questions() -> list[dict[str, Any]]:
    """Between two questions on a video another one takes its place in the encoder's cache."""
    return [
        ask("first", "Which letter?"),
        ask("other", "Which letter?", arrives=60, video=4),
        ask("second", "What is the digit beside the sign?", arrives=120),
        ask("again", "Which letter?", arrives=180),
        ask("once more", "Which letter?", arrives=240),
        # a request is reported in the step behind its last
        {"name": "last", "content": [{"text": "Hi"}], "max_tokens": 4, "arrives": 300},
    ]


def by_name(found: dict[str, Any]) -> dict[str, Any]:
    """By the name of a request instead of its id in the engine."""
    return {request_id.rsplit("-", 1)[0]: one for request_id, one in found.items()}


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_second_question_starts_behind_the_video(
    tmp_path: Path, vision_model: Path, runner: str
) -> None:
    report = tmp_path / "report.jsonl"
    options = recalling(report, "64MiB")
    answer = run(tmp_path, vision_model, questions(), budget=options, runner=runner, **ENGINE)
    check_bound(answer)
    found = by_name(records(report))
    (frames,) = found["first"]["frames"]
    stop_tokens = frames["offset"] + frames["length"]
    reused = {name: record["reused_tokens"] for name, record in found.items()}
    # of another video two pages are the same: the template's
    expected = {"first": 0, "other": 16}
    expected |= dict.fromkeys(("second", "again", "once more"), stop_tokens)
    assert {name: reused[name] for name in expected} == expected
    cached = {name: one["cached_tokens"] for name, one in answer["answers"].items()}
    assert cached == {**reused, "last": 0}
    encoded = by_name(answer["num_encoded"])
    # a video of 480 tokens is two groups of frames
    assert encoded == {"first": 2, "other": 2}, "the vision tower ran once for a video"
    alone = run(
        tmp_path,
        vision_model,
        questions(),
        budget=options | {"reuse": False},
        runner=runner,
        **ENGINE,
    )
    assert {one["cached_tokens"] for one in alone["answers"].values()} == {0}
    mine, theirs = tokens_of(answer), tokens_of(alone)
    assert mine["again"] == mine["once more"] == mine["first"] == theirs["first"]
    # it holds nothing until what stays is chosen, so nothing is dropped before
    assert found["again"]["compressions"] < found["first"]["compressions"]


def test_random_arrivals_aborts_and_preemptions(tmp_path: Path, vision_model: Path) -> None:
    """Many ask about what others wrote, or are writing; host memory is short."""
    requests, preempts = random_requests(seed=12, num_scenarios=SCENARIOS)
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
    found = records(report).values()
    assert sum(record["reused_tokens"] > 0 for record in found) > SCENARIOS // 3
