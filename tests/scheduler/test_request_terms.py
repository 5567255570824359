"""What requests ask for themselves, in vLLM's engine core: admission, blocks, ends and refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.scheduler.engine_core import BLOCK_TOKENS, BUDGET, Core, configure
from tests.scheduler.test_scheduler import blocks_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

LONG, SHORT = 250, 20
QUOTA_BLOCKS = BUDGET["page_quota"]


@pytest.fixture(scope="module")
def config(qwen2: Path) -> VllmConfig:
    budget = {"max_page_quota": 20, "request_policies": "full,window"}
    return configure(qwen2, "hybrid", budget=budget)


def add(core: Core, name: str, prompt_tokens: int, output_tokens: int = 4, **asked: Any) -> None:
    request = core.make(name, [*range(prompt_tokens)], output_tokens=output_tokens)
    request.sampling_params.extra_args = asked or None
    core.scheduler.add_request(request)


def most_blocks(core: Core, name: str) -> int:
    return max(len(ids) for ids in blocks_of(core, name))


def test_each_holds_what_it_asked_for(config: VllmConfig) -> None:
    core = Core(config)
    add(core, "plain", LONG)
    add(core, "less", LONG, kv_page_quota=10)
    add(core, "more", LONG, kv_page_quota=20)
    add(core, "window", LONG, kv_policy="window", kv_page_quota=11)
    add(core, "full", LONG, kv_policy="full")
    core.run()
    full_blocks = -(-(LONG + 3) // BLOCK_TOKENS)
    expected = {"plain": QUOTA_BLOCKS, "less": 10, "more": 20, "window": 11, "full": full_blocks}
    assert {name: most_blocks(core, name) for name in expected} == expected
    assert core.ended == dict.fromkeys(expected, "length")
    assert core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 199


def test_only_who_looks_ahead_is_held_back(config: VllmConfig) -> None:
    core = Core(config)
    add(core, "plain", LONG)
    add(core, "off", LONG, kv_lookahead=0)
    add(core, "window", LONG, kv_policy="window")
    add(core, "full", LONG, kv_policy="full")
    assert list(core.scheduler.lookaheads.held) == ["plain"]
    core.run()


def test_a_look_ahead_has_its_parents_policy(config: VllmConfig) -> None:
    core = Core(config)
    add(core, "less", LONG, kv_page_quota=10, kv_pin="200:208", kv_transfer_params={"x": 1})
    (ahead,) = core.scheduler.waiting
    params = ahead.sampling_params
    assert params.extra_args == {"kv_page_quota": 10, "kv_pin": "200:208"}
    assert params.parent_prompt_tokens == LONG
    assert ahead.kv_transfer_params is None
    core.run()


def test_the_full_cache_shares_blocks_as_ever(config: VllmConfig) -> None:
    core = Core(config)
    add(core, "first", LONG, kv_policy="full")
    core.run()
    add(core, "again", LONG, kv_policy="full")
    add(core, "private", LONG)
    core.run()
    assert core.cached_tokens["again"] == (LONG - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert core.cached_tokens["private"] == 0


def test_the_full_cache_ends_where_the_pool_does(config: VllmConfig) -> None:
    """`--max-model-len` is 4,096, but this pool holds 39 blocks for it."""
    core = Core(config, pool_blocks=40)
    add(core, "long", LONG, output_tokens=1000, kv_policy="full")
    core.run()
    assert core.ended == {"long": "length"}
    assert len(core.tokens["long"]) == 39 * BLOCK_TOKENS - LONG


@pytest.mark.parametrize(
    "asked",
    [{"kv_page_quota": 21}, {"kv_policy": "snapkv"}, {"kv_pin": "0:251"}, {"kv_pin": "a"},
     {"kv_page_qouta": 3}],
)  # fmt: skip
def test_what_no_front_end_refused_ends_with_an_error(
    config: VllmConfig, asked: dict[str, Any]
) -> None:
    """As from a front end that does not know us; the engine and all others go on."""
    core = Core(config)
    add(core, "other", LONG)
    add(core, "bad", LONG, **asked)
    core.run()
    assert core.ended == {"other": "length", "bad": "error"}
    assert not core.scheduler.requests and not core.scheduler._manager._expected
    assert not core.scheduler.lookaheads.parents and not core.scheduler.lookaheads.held


def test_a_full_prompt_beyond_the_pool_ends_with_an_error(config: VllmConfig) -> None:
    core = Core(config, pool_blocks=30)
    add(core, "beyond", 29 * BLOCK_TOKENS, kv_policy="full")
    add(core, "other", LONG)
    core.run()
    assert core.ended == {"other": "length", "beyond": "error"}


def test_reuse_is_by_what_was_kept_in_front(qwen2: Path) -> None:
    """Keys and values behind another quota are other ones; a request may refuse them all."""
    budget = {"host_memory": "1GiB", "retrieval_ratio": 1.0, "probe_tokens": 32}
    budget |= {"max_page_quota": 20, "page_quota": 18}
    core = Core(configure(qwen2, "hybrid", budget=budget))
    add(core, "first", 400)
    core.run()
    add(core, "same", 400)
    core.run()
    add(core, "less", 400, kv_page_quota=17)
    core.run()
    add(core, "refuses", 400, kv_reuse=0)
    core.run()
    assert core.cached_tokens["same"] > 300
    assert core.cached_tokens["less"] == core.cached_tokens["refuses"] == 0
