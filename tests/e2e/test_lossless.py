"""A quota that holds prompt and output changes nothing: stock vLLM's tokens, float32, greedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.devices import RUNNER_MODULES, STOCK_BACKEND
from tests.e2e.engines import run, tokens_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

IMAGES = [
    {"image": 1},
    {"text": "first"},
    {"image": 2, "size_pixels": [168, 112]},
    {"text": "next"},
]
REQUESTS: list[dict[str, Any]] = [
    {"name": "text", "content": [{"text": "Which letter does the sign show?"}]},
    {"name": "images", "content": [*IMAGES, {"image": 3}, {"text": "Which letter?"}]},
    {"name": "video", "content": [{"video": 16}, {"text": "Which letter?"}], "arrives": 2},
    {"name": "late", "content": [{"image": 5}, {"text": "And here?"}], "arrives": 6},
]
TEXT_REQUESTS = [
    {"name": "short", "content": [{"text": "Which letter?"}]},
    {"name": "long", "content": [{"text": "What does the sign say? " * 40}], "arrives": 1},
    {"name": "seeded", "content": [{"text": "Which letter?"}], "seed": 7},
    {"name": "seeded long", "content": [{"text": "And now? " * 60}], "arrives": 1, "seed": 7},
]
FITS = {"policy": "hybrid", "page_quota": 40, "chunk_tokens": 40, "check_ledger": True}
CHUNKS = {"max_num_batched_tokens": 48, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, vision_model: Path) -> dict[str, list[int]]:
    answer = run(tmp_path_factory.mktemp("stock"), vision_model, REQUESTS, stock=True, **CHUNKS)
    assert answer["engine"]["backends"] == [STOCK_BACKEND]
    assert answer["running_at_once"] >= 3
    return tokens_of(answer)


def test_answers_depend_on_what_is_seen(stock: dict[str, list[int]]) -> None:
    """Otherwise equal tokens would prove nothing."""
    assert len({tuple(tokens) for tokens in stock.values()}) == len(stock)
    assert all(len(set(tokens)) > 3 for tokens in stock.values())


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("budget", [{"policy": "full"}, FITS], ids=["full", "hybrid"])
def test_same_tokens_as_stock(
    tmp_path: Path, vision_model: Path, stock: dict[str, list[int]], budget: Any, runner: str
) -> None:
    answer = run(tmp_path, vision_model, REQUESTS, budget=budget, runner=runner, **CHUNKS)
    assert answer["engine"]["backends"] == ["BUDGETKV"]
    assert answer["engine"]["runner"] == RUNNER_MODULES[runner]
    assert tokens_of(answer) == stock


def test_without_a_policy_nothing_of_ours_is_on_the_path(
    tmp_path: Path, vision_model: Path, stock: dict[str, list[int]]
) -> None:
    answer = run(tmp_path, vision_model, REQUESTS, **CHUNKS)
    assert answer["engine"]["backends"] == [STOCK_BACKEND]
    assert "budgetkv" not in answer["engine"]["worker"]
    assert "Budget" not in answer["engine"]["scheduler"]
    assert tokens_of(answer) == stock


def test_default_compiled_mode(
    tmp_path: Path, vision_model: Path, stock: dict[str, list[int]]
) -> None:
    answer = run(tmp_path, vision_model, REQUESTS, budget=FITS, enforce_eager=False, **CHUNKS)
    assert tokens_of(answer) == stock


def test_text_only_model(tmp_path: Path, text_model: Path) -> None:
    """Stock gets no chunks: with a seed they killed the engine on a CPU, stock or not."""
    stock = run(tmp_path, text_model, TEXT_REQUESTS, stock=True)
    ours = run(tmp_path, text_model, TEXT_REQUESTS, budget=FITS, **CHUNKS)
    assert ours["answers"]["seeded long"]["prompt_tokens"] > 2 * CHUNKS["max_num_batched_tokens"]
    assert tokens_of(ours) == tokens_of(stock)


def test_fitting_requests_keep_prefix_caching(tmp_path: Path, vision_model: Path) -> None:
    """The second of two equal prompts reads cached blocks, and answers the same."""
    content = [{"video": 16}, {"text": "Which letter?"}]
    requests = [
        {"name": "first", "content": content, "max_tokens": 8},
        {"name": "second", "content": content, "max_tokens": 8, "arrives": 30},
    ]
    answer = run(tmp_path, vision_model, requests, budget=FITS)
    first, second = (answer["answers"][name] for name in ("first", "second"))
    assert first["cached_tokens"] == 0 and second["cached_tokens"] >= 64
    assert first["tokens"] == second["tokens"]
