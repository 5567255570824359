"""Every request stays inside its quota: read from the outside after every step of an engine."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, tokens_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

QUOTA_BLOCKS = 12
POOL_BLOCKS = 40
BLOCK_TOKENS = 8
LONG = 16 * POOL_BLOCKS * BLOCK_TOKENS
ENGINE = {
    "block_size": BLOCK_TOKENS,
    "num_gpu_blocks_override": POOL_BLOCKS,
    "max_model_len": LONG,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


def budget(policy: str, **options: Any) -> dict[str, Any]:
    return {
        "policy": policy,
        "page_quota": QUOTA_BLOCKS,
        "chunk_tokens": 24,
        "decode_interval_tokens": 8,
        "window_tokens": 8,
        "check_ledger": True,
        **options,
    }


def mixed_requests() -> list[dict[str, Any]]:
    """Eight requests: short and long text, images with text between, videos; long outputs too."""
    question = {"text": "Which letter?"}
    contents = [
        [{"text": "Hi"}],
        [{"text": "What does the sign say? " * 30}],
        [{"image": 1}, question],
        [{"image": 1}, {"text": "and"}, {"image": 2}, {"text": "and"}, {"image": 3}, question],
        [{"video": 16}, question],
        [{"video": 96}, question],
        [{"video": 24, "size_pixels": [168, 112]}, question],
        [{"text": "Look."}, {"video": 40, "seed": 3}, question],
    ]
    return [
        {"name": f"r{i}", "content": content, "max_tokens": 120 if i in (0, 4) else 12}
        for i, content in enumerate(contents)
    ]


def check_bound(answer: dict[str, Any]) -> None:
    assert answer["held"] and max(answer["held"].values()) <= QUOTA_BLOCKS
    assert answer["engine"]["num_blocks"] <= POOL_BLOCKS
    assert answer["engine"]["leftovers"] == 0


def same_requests() -> list[dict[str, Any]]:
    """Six times a video and a question, which come while others decode and are prefilled."""
    content = [{"video": 40, "seed": 7}, {"text": "Which letter?"}]
    return [
        {"name": f"same{i}", "content": content, "max_tokens": 16, "arrives": arrives}
        for i, arrives in enumerate((0, 2, 2, 2, 2, 60))
    ]


@pytest.mark.parametrize("policy", ["hybrid", "window"])
def test_mixed_requests_at_once(tmp_path: Path, vision_model: Path, policy: str) -> None:
    """All inside their quota; and the same question has one answer, whatever runs beside it."""
    requests = [*mixed_requests(), *same_requests()]
    # room for a chunk and a half, so that vLLM would cut many
    engine = {**ENGINE, "max_num_batched_tokens": 40}
    answer = run(tmp_path, vision_model, requests, budget=budget(policy), **engine)
    check_bound(answer)
    assert answer["running_at_once"] >= 3
    assert bool(answer["num_lookaheads"]) == (policy == "hybrid")
    longest = max(a["prompt_tokens"] for a in answer["answers"].values())
    assert longest > POOL_BLOCKS * BLOCK_TOKENS, "one prompt must not fit the whole pool"
    for request in requests:
        assert len(answer["answers"][request["name"]]["tokens"]) == request["max_tokens"]
    same = {tuple(tokens_of(answer)[request["name"]]) for request in same_requests()}
    assert len(same) == 1


def test_runner_v2_gives_the_same_compressed_answers(tmp_path: Path, vision_model: Path) -> None:
    requests = mixed_requests()[3:7]
    answers = [
        run(tmp_path, vision_model, requests, budget=budget("hybrid"), runner=runner, **ENGINE)
        for runner in ("v1", "v2")
    ]
    for answer in answers:
        check_bound(answer)
    assert tokens_of(answers[0]) == tokens_of(answers[1])


def random_requests(seed: int, num_scenarios: int) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Requests that arrive and are aborted at random, and the steps that preempt all of them."""
    chance = random.Random(seed)
    requests: list[dict[str, Any]] = []
    preempts, start = [], 0
    for scenario in range(num_scenarios):
        for number in range(chance.randint(2, 4)):
            content = chance.choice(mixed_requests())["content"]
            arrives = start + chance.randint(0, 6)
            request = {
                "name": f"s{scenario}-{number}",
                "content": content,
                "max_tokens": chance.randint(1, 20),
                "arrives": arrives,
            }
            if chance.random() < 0.3:
                request["aborts"] = arrives + chance.randint(0, 8)
            requests.append(request)
        if chance.random() < 0.6:
            preempts.append(start + chance.randint(1, 10))
        start += chance.randint(5, 25)
    return requests, tuple(preempts)


def check_complete(answer: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """All are inside their quota, and all that were not aborted have all of their tokens."""
    check_bound(answer)
    for request in requests:
        if "aborts" not in request:
            assert len(answer["answers"][request["name"]]["tokens"]) == request["max_tokens"]


def test_random_aborts_and_preemptions(tmp_path: Path, vision_model: Path) -> None:
    """Twenty scenarios in one engine: random arrivals, aborts and preemptions."""
    requests, preempts = random_requests(seed=5, num_scenarios=20)
    options = budget("hybrid")
    answer = run(tmp_path, vision_model, requests, budget=options, preempts=preempts, **ENGINE)
    check_complete(answer, requests)


def test_text_only_model_under_a_small_quota(tmp_path: Path, text_model: Path) -> None:
    requests = [
        {"name": "long", "content": [{"text": "What does the sign say? " * 60}], "max_tokens": 40},
        {"name": "short", "content": [{"text": "Hi"}], "max_tokens": 130},
    ]
    answer = run(tmp_path, text_model, requests, budget=budget("hybrid"), session=True, **ENGINE)
    check_bound(answer)
    assert answer["session"] == "error", "a streaming-input session is refused, not mishandled"
    assert [len(a["tokens"]) for a in answer["answers"].values()].count(130) == 1


def test_all_dynamic_with_every_page_read_equals_no_retrieval_at_all(
    tmp_path: Path, vision_model: Path
) -> None:
    """Reading all pages through the retrieval path must not change a token. No look-ahead here."""
    requests = mixed_requests()[4:6]
    forced = {"force_class": "dynamic", "lookahead": False}
    everything = budget("hybrid", retrieval_ratio=1.0, **forced)
    nearly = budget("hybrid", retrieval_ratio=0.999, **forced)
    answers = [
        run(tmp_path, vision_model, requests, budget=options, **ENGINE)
        for options in (everything, nearly)
    ]
    assert tokens_of(answers[0]) == tokens_of(answers[1])
    assert not any(answer["num_lookaheads"] for answer in answers)
