"""Host memory that keeps nothing, or that the machine has not, is refused with both numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from vllm_budgetkv.start import host_memory
from vllm_budgetkv.start.config import BudgetConfig


def engine(workers: int = 1, cache_dtype: str = "auto") -> Any:
    """Two layers of 3 KV heads of 64 in bfloat16: 1,536 bytes a token, pages of 16."""
    model = SimpleNamespace(
        get_num_layers=lambda parallel: 2,
        get_num_kv_heads=lambda parallel: 3,
        get_head_size=lambda: 64,
        dtype=torch.bfloat16,
    )
    parallel = SimpleNamespace(world_size=workers, data_parallel_size_local=1)
    cache = SimpleNamespace(block_size=16, cache_dtype=cache_dtype)
    return SimpleNamespace(model_config=model, parallel_config=parallel, cache_config=cache)


def config(size: str | None) -> BudgetConfig:
    return BudgetConfig(policy="hybrid", page_quota=9, host_memory=size)


@pytest.fixture
def four_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=4 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_bytes_of_a_token() -> None:
    assert host_memory.token_bytes(engine()) == 2 * 2 * 3 * 64 * 2
    assert host_memory.token_bytes(engine(cache_dtype="fp8")) == 2 * 2 * 3 * 64


@pytest.mark.usefixtures("four_gib_free")
def test_what_is_free_is_taken() -> None:
    host_memory.check(engine(), config("4GiB"))
    host_memory.check(engine(workers=2), config("2GiB"))
    host_memory.check(engine(), config(None))


@pytest.mark.usefixtures("four_gib_free")
def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(ValueError, match="is 4.5 GiB, but 4.0 GiB of .* are free: lower it"):
        host_memory.check(engine(), config("4.5GiB"))
    with pytest.raises(ValueError, match="for each of 2 workers is 6.0 GiB"):
        host_memory.check(engine(workers=2), config("3GiB"))


def test_less_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no block of 16 tokens, which takes 24,576 bytes"):
        host_memory.check(engine(), config("20KiB"))
