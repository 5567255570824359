"""Full attention beside layers with windows or chunks: the quota is that of the former."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import MODELS
from tests.e2e.devices import RUNNER_MODULES, STOCK_BACKEND
from tests.e2e.engines import run, run_each, tokens_of
from vllm_budgetkv.testing import sliding

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# windows of 64 tokens are two of vLLM's blocks for CPUs, and two pages of ours
BLOCK_TOKENS = 32
ENGINE: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "block_size": BLOCK_TOKENS,
}

LONG = [{"text": "What does the sign say? " * 40}]
REQUESTS: list[dict[str, Any]] = [
    {"name": "short", "content": [{"text": "Which letter?"}]},
    {"name": "long", "content": LONG, "arrives": 1},
    {"name": "other", "content": [{"text": "And now? " * 40}], "arrives": 2},
    # long after the first: its keys, in windows too, may be there still
    {"name": "again", "content": LONG, "arrives": 30},
]
FITS = {"policy": "hybrid", "page_quota": 40, "chunk_tokens": 100, "check_ledger": True}
TIGHT = {
    "page_quota": 5,
    "chunk_tokens": 96,
    "decode_interval_tokens": 16,
    "window_tokens": 16,
    "check_ledger": True,
}
# windows, chunks, soft caps, sinks: one of each
BOUND = ("gemma3", "llama4", "gemma2", "gpt_oss")
QUOTA_TOKENS = TIGHT["page_quota"] * BLOCK_TOKENS
QUESTION = "Which letter does the sign show?"


def long_requests(count: int = 4) -> list[dict[str, Any]]:
    """Prompts of ten times the quota, and outputs that are compacted."""
    texts = [f"What does sign {number} say? " * 190 + QUESTION for number in range(count)]
    return [
        {"name": f"r{number}", "content": [{"text": text}], "max_tokens": 24}
        for number, text in enumerate(texts)
    ]


def check_bound(answer: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    assert set(answer["held"].values()) == {TIGHT["page_quota"]}
    assert answer["engine"]["leftovers"] == 0
    for request in requests:
        found = answer["answers"][request["name"]]
        assert found["prompt_tokens"] >= 10 * QUOTA_TOKENS
        assert len(found["tokens"]) == request["max_tokens"]


@pytest.fixture(scope="module", params=sliding.FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a model answers: without us, above its need, and far below."""
    runs = {
        "stock": {"budget": None, "requests": REQUESTS},
        "fits": {"budget": FITS, "requests": REQUESTS},
        "tight": {"budget": {"policy": "hybrid", **TIGHT}, "requests": long_requests(2)},
    }
    if request.param not in BOUND:
        del runs["tight"]
    model = sliding.build(request.param, MODELS)
    answers = run_each(tmp_path_factory.mktemp(request.param), model, runs, **ENGINE)
    return {**answers, "full_layers": sliding.num_full_layers(request.param)}


def test_a_quota_above_need_changes_nothing(family: dict[str, Any]) -> None:
    """And what fits may begin with what an equal prompt left, in windows and full layers alike."""
    stock, ours = family["stock"], family["fits"]
    assert stock["engine"]["backends"] == [STOCK_BACKEND]
    assert ours["engine"]["backends"] == ["BUDGETKV", STOCK_BACKEND]
    assert ours["engine"]["sizes"]["quota"]["num_layers"] == family["full_layers"]
    tokens = tokens_of(ours)
    assert tokens == tokens_of(stock)
    assert tokens["long"] != tokens["other"] != tokens["short"]
    assert all(len(set(found)) > 3 for found in tokens.values())
    assert ours["answers"]["again"]["cached_tokens"] >= 2 * BLOCK_TOKENS


@pytest.mark.parametrize("family", BOUND, indirect=True)
def test_long_prompts_stay_inside_the_quota(family: dict[str, Any]) -> None:
    """With the ledger checked and what is free poisoned after every step."""
    check_bound(family["tight"], long_requests(2))
    assert family["tight"]["running_at_once"] == 2
    assert family["tight"]["num_lookaheads"]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_preempted_requests_come_back(tmp_path: Path, runner: str) -> None:
    """Four at once, in the prompt and in the output, their windows too; another is aborted.

    Under a policy that asks no question ahead, so that all four run from the start.
    """
    model, requests = sliding.build_gemma3(MODELS), long_requests()
    both = [*requests, {**requests[0], "name": "gone", "aborts": 9}]
    budget, engine = {"policy": "keydiff", **TIGHT}, {**ENGINE, "runner": runner}
    alone = run(tmp_path, model, requests[:1], budget=budget, **engine)
    answer = run(tmp_path, model, both, budget=budget, preempts=(6, 45), **engine)
    assert answer["engine"]["runner"] == RUNNER_MODULES[runner]
    assert "gone" not in tokens_of(answer) or len(answer["answers"]["gone"]["tokens"]) < 24
    assert tokens_of(answer)["r0"] == tokens_of(alone)["r0"]
    check_bound(answer, requests)
