"""Pictures whose tokens attend both ways: stock vLLM that sees them so answers as Transformers
does, and engines under a quota answer as both.

Pictures are longer than a block and shorter than one. They are no longer than a window: vLLM lets
those attend to earlier tokens only, and Transformers does not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.e2e import both_ways, picture_models
from tests.e2e.conftest import MODELS
from tests.e2e.devices import ON_GPU, RUNNER_MODULES, STOCK_BACKEND
from tests.e2e.engines import run, run_each, tokens_of

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_TOKENS = 32
ENGINE: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "block_size": BLOCK_TOKENS,
    "limit_mm_per_prompt": {"image": 8},
    **both_ways.UNCUT,
}
TOLERANCE = 1e-5

# longer than the window in front of a picture
LONG = {"text": "What does the sign say? " * 20}
QUESTION = {"text": "Which letter does the sign show?"}


def image(number: int, width: int = 112) -> dict[str, Any]:
    return {"image": number, "size_pixels": [width, 112]}


TWO = [LONG, image(2), {"text": "next"}, image(3, 168), QUESTION]
REQUESTS: list[dict[str, Any]] = [
    {"name": "one", "content": [image(1), QUESTION]},
    {"name": "two", "content": TWO, "arrives": 1},
    {"name": "three", "content": [image(4), {"text": "first"}, image(5), image(6), LONG, QUESTION]},
    {"name": "text", "content": [LONG], "arrives": 3},
    # after the end of the second: its keys may be there still, those of a part of a picture too
    {"name": "again", "content": TWO, "arrives": 14},
]
ASKED = [{**request, "logprobs": 5, "max_tokens": 8} for request in REQUESTS]
# runs of `run_each`
BOTH = {"budget": None, "requests": ASKED, "both_ways": True}
CAUSAL = {"budget": None, "requests": ASKED[:-1]}
BUDGET = {"policy": "hybrid", "page_quota": 40, "chunk_tokens": 96, "check_ledger": True}
FITS = {"budget": BUDGET, "requests": ASKED}
TIGHT = {
    **BUDGET,
    "page_quota": 5,
    "decode_interval_tokens": 16,
    "window_tokens": 16,
}
QUOTA_TOKENS = TIGHT["page_quota"] * BLOCK_TOKENS


def long_requests(count: int) -> list[dict[str, Any]]:
    """Prompts of more than ten times the quota, with pictures that multiples of a chunk cut."""
    return [
        {
            "name": f"r{number}",
            "content": [
                part
                for place in range(6)
                for part in (image(10 * number + place), {"text": f"Sign {number} says? " * 36})
            ],
            "max_tokens": 24,
        }
        for number in range(count)
    ]


def check_bound(answer: dict[str, Any]) -> None:
    """Nobody held more than the quota, and nothing is left of anybody."""
    assert max(answer["held"].values()) == TIGHT["page_quota"]
    assert answer["engine"]["leftovers"] == 0
    for found in answer["answers"].values():
        assert found["prompt_tokens"] >= 10 * QUOTA_TOKENS
        assert len(found["tokens"]) == 24


def check_same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    """Hold an engine of ours against a run `BOTH`: all tokens, and how likely the likeliest were.

    Raises:
        AssertionError: they differ, with the name of the request and by how much.
    """
    assert tokens_of(ours) == tokens_of(stock)
    for name, expected in stock["answers"].items():
        found = ours["answers"][name]
        assert found["prompt_tokens"] == expected["prompt_tokens"], name
        pairs = zip(found["logprobs"], expected["logprobs"], strict=True)
        worst = max(
            abs(told[token] - likely)
            for told, step in pairs
            for token, likely in step.items()
            if token in told
        )
        assert worst <= TOLERANCE, f"{name}: log-probabilities differ by {worst:.1e}"


def errors_of(answer: dict[str, Any], reference: tuple[Any, Any]) -> dict[str, float]:
    """How far log-probabilities are from those of Transformers, by name of the request."""
    worst = {}
    for request in [one for one in REQUESTS if one["name"] in answer["answers"]]:
        found = answer["answers"][request["name"]]
        num_prompt, expected = picture_models.log_probabilities(
            *reference, request["content"], found["tokens"]
        )
        assert found["prompt_tokens"] == num_prompt
        worst[request["name"]] = max(
            abs(likely - expected[place, int(token)].item())
            for place, step in enumerate(found["logprobs"])
            for token, likely in step.items()
        )
        if worst[request["name"]] <= TOLERANCE:
            assert expected.argmax(dim=-1).tolist() == found["tokens"]
    return worst


@pytest.fixture(scope="module")
def models() -> dict[int, Path]:
    return {size: picture_models.build_gemma3(MODELS, size) for size in (16, 64)}


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, models: dict[int, Path]
) -> dict[str, dict[str, Any]]:
    """Of the larger pictures: as vLLM shall see them, as it does by itself, and under quotas."""
    tight = {"budget": TIGHT, "requests": long_requests(2)}
    runs = {"both": BOTH, "causal": CAUSAL, "fits": FITS, "tight": tight}
    return run_each(tmp_path_factory.mktemp("pictures"), models[64], runs, **ENGINE)


def check_as_transformers(answer: dict[str, Any], model: Path, runner: str) -> None:
    assert answer["engine"]["backends"] == [STOCK_BACKEND]
    assert answer["engine"]["runner"] == RUNNER_MODULES[runner]
    errors = errors_of(answer, picture_models.load(model))
    assert set(errors) == {request["name"] for request in REQUESTS}
    assert max(errors.values()) <= TOLERANCE, errors
    assert len({tuple(tokens) for tokens in tokens_of(answer).values()}) == len(REQUESTS) - 1
    # an equal prompt begins with what the first one left
    assert answer["answers"]["again"]["cached_tokens"] >= 2 * BLOCK_TOKENS


@pytest.mark.engine
def test_stock_answers_as_transformers_does(
    answers: dict[str, Any], models: dict[int, Path]
) -> None:
    check_as_transformers(answers["both"], models[64], "v1")


@pytest.mark.engine
def test_so_it_does_under_the_other_model_runner(tmp_path: Path, models: dict[int, Path]) -> None:
    """Which says itself where pictures are; with pictures that are shorter than a block."""
    runs = {"both": BOTH, "fits": FITS}
    found = run_each(tmp_path, models[16], runs, runner="v2", **ENGINE)
    check_as_transformers(found["both"], models[16], "v2")
    check_same(found["fits"], found["both"])
    assert found["fits"]["engine"]["backends"] == ["BUDGETKV", STOCK_BACKEND]


@pytest.mark.engine
def test_a_quota_above_need_changes_nothing(answers: dict[str, Any]) -> None:
    """In full layers, which are ours, and in those with windows, which are vLLM's."""
    check_same(answers["fits"], answers["both"])
    assert answers["fits"]["engine"]["backends"] == ["BUDGETKV", STOCK_BACKEND]
    assert answers["fits"]["answers"]["again"]["cached_tokens"] >= 2 * BLOCK_TOKENS


@pytest.mark.engine
def test_long_prompts_stay_inside_the_quota(answers: dict[str, Any]) -> None:
    """With the ledger checked and what is free poisoned after every step."""
    check_bound(answers["tight"])
    assert answers["tight"]["running_at_once"] == 2
    assert answers["tight"]["num_lookaheads"]


@pytest.mark.engine
def test_preempted_requests_come_back(tmp_path: Path, models: dict[int, Path]) -> None:
    """Four at once, in the prompt and in the output; one alone answers the same."""
    budget, requests = {**TIGHT, "policy": "keydiff"}, long_requests(4)
    alone = run(tmp_path, models[64], requests[:1], budget=budget, **ENGINE)
    answer = run(tmp_path, models[64], requests, budget=budget, preempts=(6, 45), **ENGINE)
    check_bound(answer)
    assert tokens_of(answer)["r0"] == tokens_of(alone)["r0"]


@pytest.mark.engine
@pytest.mark.skipif(ON_GPU, reason="vLLM's attention on a GPU sees pictures as they are")
def test_left_alone_it_answers_something_else(
    answers: dict[str, Any], models: dict[int, Path]
) -> None:
    """Or nothing would be proven: pictures matter to these models, and how they attend."""
    errors = errors_of(answers["causal"], picture_models.load(models[64]))
    assert errors.pop("text") <= TOLERANCE
    assert min(errors.values()) > 0.1, errors
    with pytest.raises(AssertionError):
        check_same(answers["causal"], answers["both"])


@pytest.mark.parametrize("window_tokens", [-1, 5])
def test_who_sees_whom(window_tokens: int) -> None:
    """One after another: earlier tokens in the window, and every token of the picture."""
    first, last = 6, 9
    allowed = both_ways.allowed_of(
        torch.arange(first + 1, last + 1), torch.arange(last + 1), first, window_tokens
    )
    for row, query in enumerate(range(first + 1, last + 1)):
        for key in range(last + 1):
            is_near = window_tokens < 0 or query - key < window_tokens
            expected = (key <= query and is_near) or first <= key <= last
            assert allowed[row, key] == expected


def step(num_computed: int, num_tokens: int) -> tuple[Any, ...]:
    """What `attend_both` is given of a prompt of so many tokens with a picture at 3 to 8."""
    generator = torch.Generator().manual_seed(num_tokens)
    stored = both_ways.Stored(torch.empty(4, 1, 4, 16))
    slots = torch.arange(num_tokens)
    stored.write(*torch.randn(2, num_tokens, 1, 8, generator=generator), slots)
    num_queries = num_tokens - num_computed
    metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, num_queries]),
        seq_lens=torch.tensor([num_tokens]),
        block_table=torch.arange(4)[None],
        mm_prefix_range={0: [(3, 8)]},
    )
    impl = SimpleNamespace(
        alibi_slopes=None,
        sinks=None,
        is_fp8_kv_cache=False,
        sliding_window=-1,
        scale=1.0,
        logits_soft_cap=0,
    )
    query = torch.randn(num_queries, 2, 8, generator=generator)
    return impl, query, stored, metadata, torch.full_like(query, torch.nan)


@pytest.mark.parametrize("num_computed", [0, 2, 5, 9])
def test_only_rows_of_pictures_are_computed(num_computed: int) -> None:
    """Those that this step computes: an equal prompt may have left the others."""
    impl, query, stored, metadata, output = step(num_computed, 11)
    both_ways.attend_both(impl, query, stored, metadata, output)
    is_inside = torch.tensor([3 <= place <= 8 for place in range(num_computed, 11)])
    assert torch.equal(output.isfinite().all(dim=(1, 2)), is_inside)


def test_a_picture_that_is_cut_is_an_error() -> None:
    impl, query, stored, metadata, output = step(0, 7)
    with pytest.raises(AssertionError, match="3 to 8 is cut at 7"):
        both_ways.attend_both(impl, query, stored, metadata, output)
