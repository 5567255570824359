"""Groups of layers with recurrent state beside ours: what a request holds, publishes and finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import RequestStatus

from tests.scheduler.engine_core import BLOCK_TOKENS, BUDGET, Core, configure

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

STATE_GROUPS = 3
QUOTA_TOKENS = BUDGET["page_quota"] * BLOCK_TOKENS
LONG, SHORT = 250, 60


def make(qwen2: Path, mode: str, policy: str = "window") -> VllmConfig:
    config = configure(qwen2, policy, enable_prefix_caching=mode == "align")
    config.cache_config.mamba_cache_mode = mode
    return config


@pytest.fixture(scope="module", params=["align", "none"])
def config(request: pytest.FixtureRequest, qwen2: Path) -> VllmConfig:
    return make(qwen2, request.param)


@pytest.fixture(scope="module")
def aligned(qwen2: Path) -> VllmConfig:
    return make(qwen2, "align")


def held(core: Core) -> tuple[int, int]:
    """Most blocks under the quota, and most of state in one group, of any request now."""
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert [isinstance(m, MambaManager) for m in managers] == [True] * STATE_GROUPS + [False]
    counts = [
        max((sum(not b.is_null for b in blocks) for blocks in m.req_to_blocks.values()), default=0)
        for m in managers
    ]
    return counts[-1], max(counts[:-1])


def test_the_quota_is_of_our_group_alone(config: VllmConfig) -> None:
    """State is held beside it: one block, or the last two while states are kept at block ends."""
    core = Core(config, state_groups=STATE_GROUPS)
    for name in ("a", "b"):
        core.add(name, LONG, output_tokens=30)
    most, most_state = 0, 0
    while core.scheduler.has_unfinished_requests():
        core.step()
        blocks, state = held(core)
        most, most_state = max(most, blocks), max(most_state, state)
    assert most == BUDGET["page_quota"]
    assert 1 <= most_state <= (2 if config.cache_config.mamba_cache_mode == "align" else 1)
    assert core.scheduler._blocks_beside == STATE_GROUPS * (
        2 if config.cache_config.mamba_cache_mode == "align" else 1
    )


def test_chunks_end_where_they_did(config: VllmConfig) -> None:
    """Those of a prompt that is compressed, whatever vLLM wants for states that it would keep."""
    alone, beside = Core(config), Core(config, state_groups=STATE_GROUPS)
    for core in (alone, beside):
        core.add("r", LONG, output_tokens=30)
        core.run()
    assert beside.ends["r"] == alone.ends["r"]
    assert beside.tokens == alone.tokens


def test_all_blocks_come_back(config: VllmConfig) -> None:
    """Behind requests that end, that are aborted, and that were preempted."""
    core = Core(config, state_groups=STATE_GROUPS)
    pool = core.scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks()
    for name, tokens in (("a", LONG), ("b", LONG), ("c", SHORT)):
        core.add(name, tokens, output_tokens=30)
    for _ in range(8):
        core.step()
    core.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.run()
    assert len(core.tokens["a"]) == len(core.tokens["c"]) == 30
    assert pool.get_num_free_blocks() == before


@pytest.mark.parametrize(
    ("first_output", "finds"), [(4, True), (QUOTA_TOKENS, False)], ids=["fits", "may-outgrow"]
)
def test_what_a_request_publishes(aligned: VllmConfig, first_output: int, finds: bool) -> None:
    """Keys and state of what fits; nothing of what is or may be compressed, in no group."""
    core = Core(aligned, state_groups=STATE_GROUPS)
    core.add("first", SHORT, output_tokens=first_output)
    core.run()
    published = core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    assert bool(len(published)) == finds
    core.add("second", SHORT)
    core.run()
    assert bool(core.cached_tokens["second"]) == finds


def test_a_look_ahead_publishes_nothing(qwen2: Path) -> None:
    """It has state of its own, of other positions than its parent's."""
    core = Core(make(qwen2, "align", "hybrid"), state_groups=STATE_GROUPS)
    core.add("r", LONG)
    core.run()
    assert core.tokens == {"r": [0, 1, 2, 3]}
    assert len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) == 0


def test_where_nothing_is_compressed_vllm_cuts_chunks(qwen2: Path) -> None:
    """The bug: cut at --kv-chunk-tokens, which are less than a block, a prompt waited for ever for
    a chunk that ends where vLLM keeps a state."""
    roomy = {"page_quota": 40, "chunk_tokens": 4}
    config = configure(qwen2, "window", max_model_len=128, budget=roomy, enable_prefix_caching=True)
    config.cache_config.mamba_cache_mode = "align"
    core = Core(config, state_groups=STATE_GROUPS)
    assert not core.scheduler.quota.compresses
    core.add("r", SHORT)
    for _ in range(20):
        core.step()
    assert core.tokens == {"r": [0, 1, 2, 3]}
