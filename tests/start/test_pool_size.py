"""A pool that never holds one request at quota is refused in terms of the quota."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.scheduler.spec import QuotaSpec
from vllm_budgetkv.start import pool_size
from vllm_budgetkv.start.config import BudgetConfig
from vllm_budgetkv.start.request_rules import RequestRules

QUOTA = Quota(blocks=64, page_tokens=16, num_layers=4, chunk_tokens=256, decode_interval_tokens=64)
SIZES: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
# 63 tokens and 100 in flight
WINDOW = SlidingWindowSpec(**SIZES, sliding_window=64)
LAYOUT = PageLayout(16, 32, torch.float32)
BLOCK_BYTES = 4 * 2 * LAYOUT.page_bytes


def engine(override: int | None = None, recurrent_layers: int = 0) -> Any:
    model = SimpleNamespace(
        dtype=torch.float32,
        get_head_size=lambda: 32,
        get_num_kv_heads=lambda parallel_config: 2,
        is_hybrid=recurrent_layers > 0,
        max_model_len=4096,
        architectures=["Qwen3NextForCausalLM" if recurrent_layers else "LlamaForCausalLM"],
        get_num_layers=lambda parallel_config: 4 + recurrent_layers,
        hf_text_config=SimpleNamespace(
            layer_types=["full_attention"] * 4 + ["linear_attention"] * recurrent_layers
        ),
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=override, mamba_cache_mode="align", cache_dtype="auto"
        ),
    )


@pytest.mark.parametrize(
    ("override", "pool_bytes", "blocks"),
    [
        (None, None, None),
        (None, 65 * BLOCK_BYTES, 65),
        (None, 65 * BLOCK_BYTES - 1, 64),
        (7, None, 7),
        (7, 65 * BLOCK_BYTES, 7),
    ],
)
def test_blocks_of(override: int | None, pool_bytes: int | None, blocks: int | None) -> None:
    assert pool_size.blocks_of(engine(override), QUOTA, pool_bytes) == blocks


@pytest.mark.parametrize(
    ("pool_blocks", "requests"), [(0, 0), (1, 0), (20, 0), (21, 1), (100, 4), (101, 5)]
)
def test_requests_at_once(pool_blocks: int, requests: int) -> None:
    """One block of the pool is nobody's."""
    assert pool_size.requests_at_once(pool_blocks, 20) == requests


@pytest.mark.parametrize(("override", "pool_bytes"), [(None, None), (65, 0), (None, 1 << 40)])
def test_a_pool_that_may_hold_it(override: int | None, pool_bytes: int | None) -> None:
    pool_size.check(engine(override), QUOTA, pool_bytes)


@pytest.mark.parametrize(
    ("override", "pool_blocks", "advice"),
    [
        (64, 99, "set --kv-page-quota to at most 63, or give the pool 65 blocks"),
        (64, 99, r"raise --num-gpu-blocks-override$"),
        (None, 64, r"raise VLLM_CPU_KVCACHE_SPACE \(GiB\) or --kv-cache-memory-bytes$"),
        (None, 12, "of which vLLM reserves 1: set --kv-page-quota to at most 11, or"),
        # the smallest quota for these chunks is 11 blocks
        (None, 11, "of which vLLM reserves 1: give the pool 65 blocks"),
    ],
)
def test_refused_pools(override: int | None, pool_blocks: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice) as error:
        pool_size.check(engine(override), QUOTA, pool_blocks * BLOCK_BYTES)
    text = str(error.value)
    assert text.startswith("one request may hold 64 blocks of 16 tokens, but the pool has ")
    assert "max-model-len" not in text


def test_recurrent_state_has_blocks_of_its_own() -> None:
    """12 layers of state are 3 groups of 4, and a request holds 2 blocks of each."""
    mixed = engine(70, recurrent_layers=12)
    with pytest.raises(
        ValueError, match="64 blocks of 16 tokens and 6 of recurrent state"
    ) as error:
        pool_size.check(mixed, QUOTA, None)
    assert "set --kv-page-quota to at most 63, or give the pool 71 blocks" in str(error.value)
    pool_size.check(engine(71, recurrent_layers=12), QUOTA, None)


def test_windows_have_blocks_of_their_own() -> None:
    """Once the layers are known; before, the pool may be large enough."""
    windows = pool_size.Windows(blocks=20, block_bytes=2 * BLOCK_BYTES)
    pool_size.check(engine(70), QUOTA, None)
    with pytest.raises(ValueError, match="64 blocks of 16 tokens and 20 of windows") as error:
        pool_size.check(engine(84), QUOTA, None, windows=windows)
    assert "set --kv-page-quota to at most 63, or give the pool 85 blocks" in str(error.value)
    pool_size.check(engine(85), QUOTA, None, windows=windows)
    pool_size.check(engine(), QUOTA, 85 * 2 * BLOCK_BYTES, windows=windows)
    with pytest.raises(ValueError, match="but the pool has 84, of which"):
        pool_size.check(engine(), QUOTA, 85 * 2 * BLOCK_BYTES - 1, windows=windows)


def test_a_block_is_of_the_layers_of_a_group() -> None:
    """5 layers of state are padded to rather than split from 4: a block is of 5."""
    assert pool_size.block_bytes(engine(recurrent_layers=12), QUOTA) == BLOCK_BYTES
    assert pool_size.block_bytes(engine(recurrent_layers=5), QUOTA) == 5 * BLOCK_BYTES // 4
    long = replace(QUOTA, block_pages=34)
    assert pool_size.block_bytes(engine(recurrent_layers=12), long) == 34 * BLOCK_BYTES


def test_the_quota_that_is_advised_works() -> None:
    smaller = Quota(**{**vars(QUOTA), "blocks": 63})
    pool_size.check(engine(64), smaller, None)


def test_the_worker_checks_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_budgetkv.worker.worker import BudgetWorker

    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 64 * BLOCK_BYTES)
    worker: Any = BudgetWorker.__new__(BudgetWorker)
    worker.vllm_config = engine()
    worker.budget_config = BudgetConfig(policy="window", page_quota=QUOTA.blocks)
    fitting = {"window": replace(QUOTA, compresses=False)}
    worker.budget_rules = RequestRules(worker.budget_config, fitting)
    assert worker.determine_available_memory() == 64 * BLOCK_BYTES
    worker.budget_rules = RequestRules(worker.budget_config, {"window": QUOTA})
    ours = QuotaSpec.of(FullAttentionSpec(**SIZES), QUOTA)
    specs = {"w": WINDOW, **dict.fromkeys("abcd", ours)}
    monkeypatch.setattr(worker, "get_kv_cache_spec", lambda: specs)
    worker.vllm_config.max_in_flight_tokens = 100
    with pytest.raises(ValueError, match="and 12 of windows, but the pool has 64, of which vLLM"):
        worker.determine_available_memory()
