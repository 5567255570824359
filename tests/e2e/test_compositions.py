"""What deployments use beside a quota: adapters, structured output, several answers, logprobs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import MODELS
from tests.e2e.engines import run_each, tokens_of
from vllm_budgetkv.testing.adapters import Adapter, build_adapter

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

QUESTION = {"text": "Which letter?"}
LONG = [{"video": 96}, QUESTION]
SHORT = [{"image": 1}, QUESTION]
WORDS = {"choice": ["left", "right"]}
SCHEMA = {
    "json": {
        "type": "object",
        "properties": {"sign": {"type": "string", "enum": ["A", "B"]}},
        "required": ["sign"],
        "additionalProperties": False,
    }
}
FITS = {"policy": "hybrid", "page_quota": 40, "chunk_tokens": 40, "check_ledger": True}
QUOTA_BLOCKS = 5
SMALL = {
    "policy": "hybrid",
    "page_quota": QUOTA_BLOCKS,
    "chunk_tokens": 24,
    "decode_interval_tokens": 8,
    "window_tokens": 8,
    "check_ledger": True,
}
ENGINE = {
    "num_gpu_blocks_override": 200,
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


@pytest.fixture(scope="module")
def adapters(vision_model: Path) -> list[Adapter]:
    return [build_adapter(MODELS, vision_model, seed) for seed in (1, 2)]


def crowd(adapters: list[Adapter], content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One prompt for the model and each adapter, and what else a client may ask of it."""
    asked: dict[str, dict[str, Any]] = {
        "plain": {"logprobs": 3},
        "first": {"adapter": str(adapters[0].folder), "logprobs": 3},
        "second": {"adapter": str(adapters[1].folder), "logprobs": 3},
        "two": {"n": 2, "seed": 7},
        "word": {"structure": WORDS},
        "object": {"structure": SCHEMA, "adapter": str(adapters[0].folder), "max_tokens": 40},
    }
    return [{"name": name, "content": content, **fields} for name, fields in asked.items()]


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, vision_model: Path, adapters: list[Adapter]
) -> dict[str, Any]:
    short, long = crowd(adapters, SHORT), crowd(adapters, LONG)
    runs = {
        "stock": {"budget": None, "requests": [*short]},
        "fits": {"budget": FITS, "requests": [*short]},
        "small": {"budget": SMALL, "requests": long},
    }
    # a slot more than adapters: on a CPU vLLM takes the last slot for rows without an adapter
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    return run_each(tmp_path_factory.mktemp("crowd"), vision_model, runs, **lora, **ENGINE)


def test_what_fits_is_answered_as_stock_answers(answers: dict[str, Any]) -> None:
    ours, stock = answers["fits"]["answers"], answers["stock"]["answers"]
    assert tokens_of(answers["fits"]) == tokens_of(answers["stock"])
    assert ours["two"]["all_tokens"] == stock["two"]["all_tokens"]
    assert len({tuple(tokens) for tokens in stock["two"]["all_tokens"]}) == 2
    assert len({tuple(stock[name]["tokens"]) for name in ("plain", "first", "second")}) == 3
    for name in ("plain", "first", "second"):
        for told, expected in zip(ours[name]["logprobs"], stock[name]["logprobs"], strict=True):
            assert told == pytest.approx(expected, abs=1e-5)


def test_a_long_prompt_has_all_of_it_inside_its_quota(answers: dict[str, Any]) -> None:
    found = answers["small"]
    assert max(found["held"].values()) == QUOTA_BLOCKS and found["engine"]["leftovers"] == 0
    assert found["num_lookaheads"] >= 3
    said = found["answers"]
    assert said["word"]["text"] in WORDS["choice"]
    assert json.loads(said["object"]["text"])["sign"] in ("A", "B")
    assert len({tuple(tokens) for tokens in said["two"]["all_tokens"]}) == 2
    assert all(len(step) >= 3 for step in said["plain"]["logprobs"])


def test_an_adapter_answers_as_a_model_that_has_it_in_its_weights(
    tmp_path: Path, answers: dict[str, Any], adapters: list[Adapter]
) -> None:
    """The look-ahead too runs with its request's adapter: what it keeps is the same."""
    requests = [{"name": "merged", "content": LONG, "logprobs": 3}]
    runs = {"small": {"budget": SMALL, "requests": requests}}
    merged = run_each(tmp_path, adapters[0].merged, runs, **ENGINE)["small"]["answers"]["merged"]
    found = answers["small"]["answers"]["first"]
    assert found["tokens"] == merged["tokens"]
    assert found["said"]["kept_tokens_per_head"] == merged["said"]["kept_tokens_per_head"]
    for told, expected in zip(found["logprobs"], merged["logprobs"], strict=True):
        assert told == pytest.approx(expected, abs=1e-4)
