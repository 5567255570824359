"""Chunks that end between frames."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.worker.test_vision import feature
from vllm_budgetkv.quota import Quota
from vllm_budgetkv.scheduler.scheduler import BudgetScheduler

QUOTA = Quota(blocks=20, page_tokens=8, num_layers=2, chunk_tokens=64, decode_interval_tokens=8)
VIDEO = feature(10, 400, grid=(25, 8, 8))  # frames of 16 tokens from position 10
PROMPT_TOKENS = 420


@pytest.mark.parametrize(
    ("start", "num_tokens", "expected"),
    [
        (0, 64, 58),  # 10 of text and three frames
        (58, 64, 64),  # ends between frames by itself
        (60, 64, 62),
        (58, 10, 10),  # no frame fits
        (0, 8, 8),  # text alone
        (380, 40, 40),  # the rest of the prompt
        (394, 20, 20),  # behind the last frame
        (0, 410, 410),
    ],
)
def test_a_chunk_ends_behind_its_last_whole_frame(
    start: int, num_tokens: int, expected: int
) -> None:
    scheduler = SimpleNamespace(_quota=QUOTA)
    request = SimpleNamespace(
        num_tokens=PROMPT_TOKENS,
        num_prompt_tokens=PROMPT_TOKENS,
        num_computed_tokens=start,
        mm_features=[VIDEO],
    )
    assert BudgetScheduler._mamba_block_aligned_split(scheduler, request, num_tokens) == expected


def test_a_prompt_that_fits_is_not_cut() -> None:
    request = SimpleNamespace(num_tokens=100, num_prompt_tokens=100, num_computed_tokens=0)
    scheduler = SimpleNamespace(_quota=QUOTA)
    assert BudgetScheduler._mamba_block_aligned_split(scheduler, request, 64) == 64
