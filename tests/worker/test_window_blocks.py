"""Blocks that a step gives to layers with windows hold nothing of ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.scheduler.spec import QuotaSpec
from vllm_budgetkv.worker.window_blocks import WindowBlocks

NUM_BLOCKS, BLOCK_PAGES, PAGE_BYTES = 40, 3, 256
SIZES: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
QUOTA = Quota(blocks=64, page_tokens=16, num_layers=2, chunk_tokens=256, decode_interval_tokens=64)
OURS = QuotaSpec.of(FullAttentionSpec(**SIZES), QUOTA)
WINDOW = SlidingWindowSpec(**SIZES | {"block_size": 32}, sliding_window=64)


def new(request_id: str, blocks: list[int], computed_tokens: int = 0) -> Any:
    return SimpleNamespace(
        req_id=request_id, block_ids=([1, 2], blocks), num_computed_tokens=computed_tokens
    )


def step(news: list[Any], grown: dict[str, tuple[Any, int]], resumed: set[str]) -> Any:
    cached = SimpleNamespace(
        req_ids=[*grown],
        new_block_ids=[blocks for blocks, _ in grown.values()],
        num_computed_tokens=[tokens for _, tokens in grown.values()],
        resumed_req_ids=resumed,
    )
    return SimpleNamespace(scheduled_new_reqs=news, scheduled_cached_reqs=cached)


def test_blocks_that_are_given_anew_are_cleared() -> None:
    """Not those of our group, nor those in which the cache found what others left."""
    raw = torch.full((NUM_BLOCKS * BLOCK_PAGES, PAGE_BYTES), 255, dtype=torch.uint8)
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in (OURS, WINDOW)]
    config: Any = SimpleNamespace(num_blocks=NUM_BLOCKS, kv_cache_groups=groups)
    blocks = WindowBlocks.of(raw, config)
    blocks.clear(step([], {"idle": (None, 64)}, set()))
    assert raw.all()
    news = [new("a", [3, 4]), new("hit", [0, 5, 6, 7], computed_tokens=96)]
    grown = {
        "grows": (([8], [9]), 320),
        "waits": (None, 64),
        "resumed": (([10], [11, 12, 13]), 64),
    }
    blocks.clear(step(news, grown, {"resumed"}))
    cleared = (raw.view(NUM_BLOCKS, -1) == 0).all(dim=1).nonzero().flatten().tolist()
    assert cleared == [3, 4, 7, 9, 13]
    assert (raw.view(NUM_BLOCKS, -1) == 255).all(dim=1).sum() == NUM_BLOCKS - len(cleared)
