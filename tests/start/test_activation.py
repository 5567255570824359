"""What a configuration becomes: the size of its batch, and the one quota that is read by all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.scheduler.engine_core import configure
from vllm_budgetkv.start.activation import config_of, quota_of

if TYPE_CHECKING:
    from pathlib import Path

LARGE = {"page_quota": 300, "chunk_tokens": 4000}


@pytest.mark.parametrize(
    ("budget", "engine", "batch_tokens"),
    [
        (LARGE, {"max_num_seqs": 8}, 4007),
        (LARGE, {"max_num_seqs": 1}, 4000),
        (LARGE, {"max_num_seqs": None}, 4127),
        ({}, {"max_num_seqs": 8}, 2048),
        ({"chunk_tokens": 512, "page_quota": 60}, {"max_num_seqs": 8}, 2055),
        ({"chunk_tokens": 500, "page_quota": 60}, {"max_num_seqs": 8}, 2048),
        (LARGE, {"max_num_seqs": 8, "max_model_len": 3000}, 3007),
        (LARGE, {"max_num_seqs": 8, "max_num_batched_tokens": 4007}, 4007),
    ],
    ids=[
        "raised",
        "alone",
        "default",
        "room-already",
        "whole-chunks",
        "whole-chunks-already",
        "no-longer-than-the-model",
        "given",
    ],
)
def test_a_step_has_room_for_a_chunk_and_every_decode(
    qwen2: Path, budget: dict[str, Any], engine: dict[str, Any], batch_tokens: int
) -> None:
    config = configure(qwen2, budget=budget, **{"max_num_batched_tokens": None, **engine})
    assert config.scheduler_config.max_num_batched_tokens == batch_tokens


@pytest.mark.parametrize(
    ("budget", "engine", "message"),
    [
        (
            LARGE,
            {"max_num_batched_tokens": 4006},
            "no room for a chunk of 4000 tokens beside the 7 other .* at least 4007",
        ),
        (
            {},
            {"max_num_batched_tokens": 30},
            "--max-num-batched-tokens 30 .* --kv-chunk-tokens .now together at most 31",
        ),
        (
            {"chunk_tokens": 128},
            {"max_num_batched_tokens": 1024, "max_num_scheduled_tokens": 64},
            "--max-num-scheduled-tokens 64 has no room for a chunk of 128 tokens",
        ),
    ],
    ids=["one-less", "small", "scheduled"],
)
def test_a_batch_without_that_room_is_refused(
    qwen2: Path, budget: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(qwen2, budget=budget, **engine)


def test_a_policy_that_keeps_everything_leaves_the_batch_alone(qwen2: Path) -> None:
    budget = {"page_quota": None, "chunk_tokens": 4000}
    config = configure(qwen2, "full", budget=budget, max_num_batched_tokens=30)
    assert config.scheduler_config.max_num_batched_tokens == 30
    assert config.scheduler_config.long_prefill_token_threshold == 0


def test_a_chunk_longer_than_the_model_is_no_reason_to_refuse(qwen2: Path) -> None:
    """The message was vLLM's, about an option that nobody had set."""
    config = configure(qwen2, max_model_len=512, max_num_batched_tokens=None,
                       budget={"chunk_tokens": 1024, "page_quota": 60})  # fmt: skip
    assert quota_of(config).chunk_tokens == 512
    assert quota_of(config).blocks == 60


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [({"page_quota": 28}, 28), ({"page_quota": None, "quota_ratio": 0.1}, 51)],
    ids=["blocks", "ratio"],
)
def test_the_quota_stays_when_the_length_changes(
    qwen2: Path, budget: dict[str, Any], blocks: int
) -> None:
    """`--max-model-len auto`: each process took its own from the length that it saw."""
    config = configure(qwen2, max_model_len=4096, budget=budget)
    before = quota_of(config)
    config.model_config.max_model_len = 152
    assert quota_of(config) == before
    assert before.blocks == blocks


def test_a_section_without_options_is_the_default_policy() -> None:
    """A null section passed in the front end and ended the engine core and the workers."""
    config: Any = SimpleNamespace(additional_config={"budgetkv": None})
    assert config_of(config).policy == "full"
