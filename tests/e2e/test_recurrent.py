"""Full attention beside layers with recurrent state: the quota is that of the former.

bfloat16, as vLLM's kernels for CPUs demand of such models, so tokens may differ from stock's where
two are as likely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import MODELS
from tests.e2e.engines import run, run_budgets, tokens_of
from vllm_budgetkv.testing.recurrent import build_qwen3_5, build_qwen3_5_vl, build_qwen3_next

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# a block is as long as the state of a layer: 8 pages of 16 tokens, or 15 where vLLM has kernels for
# the processor (AVX-512 with bfloat16), which keep it in float32
BLOCK_PAGES = (8, 15)
LONGEST_BLOCK_TOKENS = 240
STOCK = {"dtype": "bfloat16", "max_num_seqs": 8, "max_num_batched_tokens": 256}
ENGINE = {**STOCK, "block_size": 16}
# nearer than that, a token's rounding may decide
TIE, NOISE = 0.15, 0.15

LONG = [{"text": "What does the sign say? " * 40}]
REQUESTS: list[dict[str, Any]] = [
    {"name": "short", "content": [{"text": "Which letter?"}]},
    {"name": "long", "content": LONG, "arrives": 1},
    {"name": "other", "content": [{"text": "And now? " * 40}], "arrives": 2},
    # long after the first: its state and its keys may be there still
    {"name": "again", "content": LONG, "arrives": 30},
]
FITS = {"policy": "hybrid", "page_quota": 4, "chunk_tokens": 100, "check_ledger": True}
TIGHT = {
    "page_quota": 1,
    "chunk_tokens": 96,
    "decode_interval_tokens": 16,
    "window_tokens": 16,
    "check_ledger": True,
}
QUESTION = "Which letter does the sign show?"


@pytest.fixture(scope="module", params=[build_qwen3_next, build_qwen3_5], ids=["next", "3_5"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.param(MODELS)


@pytest.fixture(scope="module")
def stock(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("stock"), model, asking(REQUESTS), stock=True, **STOCK)


def asking(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**request, "logprobs": 5} for request in requests]


def block_tokens_of(answer: dict[str, Any]) -> int:
    quota = answer["engine"]["sizes"]["quota"]
    assert quota["page_tokens"] == 16 and quota["block_pages"] in BLOCK_PAGES
    return quota["page_tokens"] * quota["block_pages"]


def check_close(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    """The same tokens, each as likely, up to one that stock finds as likely as another."""
    pairs = zip(ours["tokens"], stock["tokens"], ours["logprobs"], stock["logprobs"], strict=True)
    for place, (token, expected, found, likely) in enumerate(pairs):
        if token != expected:
            assert likely[str(expected)] - likely.get(str(token), -99.0) < TIE, place
            return
        assert abs(found[str(token)] - likely[str(token)]) < NOISE, place


def test_answers_depend_on_what_is_read(stock: dict[str, Any]) -> None:
    tokens = tokens_of(stock)
    assert tokens["long"] != tokens["other"] != tokens["short"]
    assert all(len(set(found)) > 3 for found in tokens.values())


@pytest.mark.parametrize(
    ("caches", "runner"),
    [(True, "v1"), (False, "v1"), (True, "v2")],
    ids=["align", "none", "align-v2"],
)
def test_a_quota_above_need_changes_nothing(
    tmp_path: Path, model: Path, stock: dict[str, Any], caches: bool, runner: str
) -> None:
    """And what fits may begin with what an equal prompt left, of keys and of state alike."""
    engine = {**ENGINE, "enable_prefix_caching": caches}
    answer = run(tmp_path, model, asking(REQUESTS), budget=FITS, runner=runner, **engine)
    assert "BUDGETKV" in answer["engine"]["backends"]
    block_tokens = block_tokens_of(answer)
    for name, found in answer["answers"].items():
        check_close(found, stock["answers"][name])
    cached_tokens = answer["answers"]["again"]["cached_tokens"]
    assert cached_tokens % block_tokens == 0 and bool(cached_tokens) == caches


def long_requests(count: int = 4) -> list[dict[str, Any]]:
    """Prompts of ten times the quota, and outputs that are compacted."""
    texts = [f"What does sign {number} say? " * 280 + QUESTION for number in range(count)]
    return [
        {"name": f"r{number}", "content": [{"text": text}], "max_tokens": 24}
        for number, text in enumerate(texts)
    ]


def check_bound(answer: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    assert set(answer["held"].values()) == {TIGHT["page_quota"]}
    assert answer["engine"]["leftovers"] == 0
    assert block_tokens_of(answer) <= LONGEST_BLOCK_TOKENS
    for request in requests:
        found = answer["answers"][request["name"]]
        assert found["prompt_tokens"] >= 10 * LONGEST_BLOCK_TOKENS
        assert len(found["tokens"]) == request["max_tokens"]


def test_four_at_once_stay_inside_the_quota(tmp_path: Path, model: Path) -> None:
    """Under every policy, with the ledger checked and what is free poisoned after every step."""
    requests = long_requests()
    budgets = [{"policy": policy, **TIGHT} for policy in ("hybrid", "keydiff", "snapkv")]
    answers = run_budgets(tmp_path, model, requests, budgets, **ENGINE)
    for policy, answer in answers.items():
        check_bound(answer, requests)
        assert answer["running_at_once"] == len(requests)
        assert bool(answer["num_lookaheads"]) == (policy == "hybrid")
    assert len({str(tokens_of(answer)) for answer in answers.values()}) == len(budgets)


@pytest.mark.parametrize("caches", [True, False], ids=["align", "none"])
def test_keys_and_state_are_computed_again(tmp_path: Path, model: Path, caches: bool) -> None:
    """Preempted in the prompt and in the output; another is aborted beside it."""
    (request,) = long_requests(1)
    budget = {"policy": "hybrid", **TIGHT}
    engine = {**ENGINE, "enable_prefix_caching": caches}
    alone = run(tmp_path, model, [request], budget=budget, **engine)
    aborted = {**request, "name": "gone", "aborts": 9}
    both = [request, aborted]
    answer = run(tmp_path, model, both, budget=budget, preempts=(6, 45), **engine)
    assert "gone" not in tokens_of(answer) or len(answer["answers"]["gone"]["tokens"]) < 24
    assert tokens_of(answer)["r0"] == tokens_of(alone)["r0"]
    check_bound(answer, [request])


PICTURES: list[dict[str, Any]] = [
    {"image": 1, "size_pixels": [256, 256]},
    {"text": "first"},
    {"image": 2, "size_pixels": [256, 320]},
]
SEEN: list[dict[str, Any]] = [
    {"name": "images", "content": [*PICTURES, {"text": "Which letter?"}]},
    {"name": "video", "content": [{"video": 8, "size_pixels": [128, 128]}, {"text": "Which?"}]},
]


def test_pictures_and_videos(tmp_path: Path) -> None:
    """Inside the quota stock's tokens; of eight large pictures, twelve times the quota, a block."""
    model, engine = build_qwen3_5_vl(MODELS), {**ENGINE, "max_num_batched_tokens": 512}
    stock = run(tmp_path, model, asking(SEEN), stock=True, **engine | {"block_size": 32})
    answer = run(tmp_path, model, asking(SEEN), budget=FITS, **engine)
    for name, found in answer["answers"].items():
        check_close(found, stock["answers"][name])
    large = [{"image": number, "size_pixels": [512, 768]} for number in range(8)]
    request = {"name": "r0", "content": [*large, {"text": QUESTION}], "max_tokens": 24}
    answer = run(tmp_path, model, [request], budget={"policy": "hybrid", **TIGHT}, **engine)
    check_bound(answer, [request])
    assert answer["num_lookaheads"] == 1
