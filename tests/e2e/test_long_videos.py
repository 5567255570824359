"""Videos longer than vLLM's encoder keeps: in groups of frames, with the answers of whole ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import MODELS
from tests.e2e.engines import run, tokens_of
from vllm_budgetkv.testing.deepstack import build_qwen3_vl

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

BATCH_TOKENS = 512
# of a batch, and of the frames that it begins and ends in
ROOM_TOKENS = BATCH_TOKENS + 2048
ENGINE = {
    "max_num_batched_tokens": BATCH_TOKENS,
    "max_num_seqs": 4,
    "max_model_len": 8192,
    "limit_mm_per_prompt": {"image": 0, "video": 2},
}
# what vLLM's own encoder keeps then: a batch
SMALL = {"image": 0, "video": {"count": 2, "num_frames": 2, "width": 112, "height": 112}}
WHOLE = {"enable_mm_embeds": True}
QUOTA: dict[str, Any] = {
    "policy": "hybrid",
    "page_quota": 24,
    "chunk_tokens": 200,
    "check_ledger": True,
}
QUESTION = {"text": "Which letter?"}


def film(num_frames: int, seed: int = 0) -> dict[str, Any]:
    """64 tokens for each two frames."""
    return {"video": num_frames, "size_pixels": [224, 224], "seed": seed}


REQUESTS = [
    {"name": "long", "content": [{"text": "Look."}, film(100), QUESTION]},
    {"name": "two", "content": [film(30, 1), {"text": "and"}, film(17, 2), QUESTION], "arrives": 3},
    {"name": "again", "content": [film(30, 1), QUESTION], "arrives": 4},
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, vision_model: Path) -> dict[str, list[int]]:
    answer = run(tmp_path_factory.mktemp("stock"), vision_model, REQUESTS, stock=True, **ENGINE)
    assert set(answer["num_encoded"].values()) <= {1, 2}
    return tokens_of(answer)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_same_tokens_as_stock(
    tmp_path: Path, vision_model: Path, stock: dict[str, list[int]], runner: str
) -> None:
    """Nothing is compressed, so what is computed in groups must be what stock computes whole."""
    engine = {**ENGINE, "limit_mm_per_prompt": SMALL}
    answer = run(
        tmp_path, vision_model, REQUESTS, budget={"policy": "full"}, runner=runner, **engine
    )
    assert answer["engine"]["sizes"]["encoder_cache_tokens"] == ROOM_TOKENS
    assert max(answer["num_encoded"].values()) > 2
    assert answer["peak_encoder_tokens"] <= ROOM_TOKENS
    assert tokens_of(answer) == stock


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_compressed_as_if_it_were_whole(tmp_path: Path, vision_model: Path, runner: str) -> None:
    """Chunks end where they ended, and a preempted request computes its groups again."""
    groups, whole = (
        run(tmp_path, vision_model, REQUESTS, budget=QUOTA, runner=runner, preempts=(12,), **engine)
        for engine in (ENGINE, {**ENGINE, **WHOLE})
    )
    assert set(whole["num_encoded"].values()) <= {1, 2, 4}
    assert max(groups["num_encoded"].values()) > 4
    assert tokens_of(groups) == tokens_of(whole)
    assert set(groups["held"].values()) == set(whole["held"].values()) == {24}


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_what_a_prefix_covered_is_computed_again(
    tmp_path: Path, vision_model: Path, runner: str
) -> None:
    """The bug: vLLM sends workers no pixels of what a prefix covers. Preempted, its prefix gone, a
    request needs them, and the engine died on runner V1."""
    requests: list[dict[str, Any]] = [
        {"name": "first", "content": [film(30, 1), QUESTION], "max_tokens": 2},
        # takes the place of its groups in the encoder's cache
        {"name": "other", "content": [film(100), QUESTION], "arrives": 4, "max_tokens": 2},
        {
            "name": "second",
            "content": [film(30, 1), {"text": "And now?"}],
            "arrives": 20,
            "max_tokens": 20,
        },
    ]
    engine = {**ENGINE, "limit_mm_per_prompt": SMALL, "runner": runner}
    budget = {"policy": "full"}
    alone = run(tmp_path, vision_model, requests, budget=budget, **engine)
    again = run(tmp_path, vision_model, requests, budget=budget, preempts=(26,), **engine)
    assert alone["answers"]["second"]["cached_tokens"] > 500
    assert sum(again["num_encoded"].values()) > sum(alone["num_encoded"].values())
    assert tokens_of(again) == tokens_of(alone)


def test_text_between_frames(tmp_path: Path) -> None:
    """Qwen3-VL: times stand between the frames, and features of two layers beside each other."""
    model = build_qwen3_vl(MODELS)
    stock = run(tmp_path, model, REQUESTS, stock=True, **ENGINE)
    engine = {**ENGINE, "limit_mm_per_prompt": SMALL}
    groups = run(tmp_path, model, REQUESTS, budget={"policy": "full"}, **engine)
    assert max(groups["num_encoded"].values()) > 2 >= max(stock["num_encoded"].values())
    assert groups["peak_encoder_tokens"] <= ROOM_TOKENS
    assert tokens_of(groups) == tokens_of(stock)


def test_the_peak_is_flat_against_the_length(tmp_path: Path, vision_model: Path) -> None:
    peaks = {}
    for num_frames in (80, 120, 200):
        requests = [{"name": "film", "content": [film(num_frames), QUESTION], "max_tokens": 2}]
        answer = run(tmp_path, vision_model, requests, budget=QUOTA, **ENGINE)
        assert answer["answers"]["film"]["prompt_tokens"] > 32 * num_frames
        peaks[num_frames] = (answer["peak_encoder_tokens"], answer["peak_tower_tokens"])
    assert len(set(peaks.values())) == 1
    ((kept_tokens, made_tokens),) = set(peaks.values())
    assert kept_tokens <= ROOM_TOKENS
    # a chunk, and the groups that it begins and ends in
    assert made_tokens <= QUOTA["chunk_tokens"] + 2 * 256
