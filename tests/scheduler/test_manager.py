"""The quota manager over vLLM's own block pool: every count stops at the quota."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.terms import Terms
from vllm_budgetkv.scheduler.manager import Expectation, QuotaManager
from vllm_budgetkv.scheduler.spec import QuotaSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_TOKENS, QUOTA_BLOCKS, POOL_BLOCKS = 8, 6, 30


def make_quota(blocks: int = QUOTA_BLOCKS) -> Quota:
    return Quota(
        blocks=blocks,
        page_tokens=BLOCK_TOKENS,
        num_layers=4,
        chunk_tokens=16,
        decode_interval_tokens=4,
    )


QUOTA = make_quota()


def terms_of(quota: Quota) -> Terms:
    return Terms(policy="window", quota=quota)


def stock_spec() -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.float32
    )


def make_manager() -> QuotaManager:
    """A manager with a pool of 29 usable blocks; vLLM keeps one as its null block."""
    pool = BlockPool(POOL_BLOCKS, enable_caching=True, hash_block_size=BLOCK_TOKENS)
    return QuotaManager(
        QuotaSpec.of(stock_spec(), QUOTA),
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK_TOKENS,
    )


def expect(
    manager: QuotaManager, request_id: str, prompt_tokens: int, *, is_private: bool = True
) -> None:
    manager.expect(request_id, Expectation(terms_of(QUOTA), prompt_tokens, is_private))


def need(manager: QuotaManager, request_id: str, num_tokens: int) -> int:
    """Blocks that the request needs more, as the scheduler asks."""
    return manager.get_num_blocks_to_allocate(request_id, num_tokens, [], 0, 0, num_tokens)


def grow(manager: QuotaManager, request_id: str, num_tokens: int) -> int:
    """Blocks that the request gets for `num_tokens` tokens in all."""
    return len(manager.allocate_new_blocks(request_id, num_tokens, num_tokens))


def held(manager: QuotaManager, request_id: str) -> int:
    return len(manager.req_to_blocks[request_id])


def make_request(request_id: str, prompt: Sequence[int]) -> Request:
    init_none_hash(sha256)
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )


def cached_blocks(manager: QuotaManager, request: Request) -> int:
    """Leading blocks of a request that another one would find in the prefix cache."""
    (found,), _ = manager.find_longest_cache_hit(
        request.block_hashes,
        len(request.prompt_token_ids or ()),
        [0],
        manager.block_pool,
        manager.kv_cache_spec,
        drop_eagle_block=False,
        alignment_tokens=BLOCK_TOKENS,
    )
    return len(found)


@pytest.mark.parametrize(
    ("num_tokens", "blocks"),
    [(1, 1), (8, 1), (9, 2), (47, 6), (48, 6), (49, 6), (56, 6), (5000, 6)],
)
def test_need_and_growth_stop_at_the_quota(num_tokens: int, blocks: int) -> None:
    manager = make_manager()
    expect(manager, "r", 1)
    assert need(manager, "r", num_tokens) == blocks
    assert grow(manager, "r", num_tokens) == blocks == held(manager, "r")
    assert need(manager, "r", num_tokens) == 0


def test_growth_token_by_token_is_ordinary_paging_up_to_the_quota() -> None:
    manager = make_manager()
    expect(manager, "r", 1)
    for num_tokens in range(1, 200):
        wanted = need(manager, "r", num_tokens)
        assert grow(manager, "r", num_tokens) == wanted
        assert held(manager, "r") == min(-(-num_tokens // BLOCK_TOKENS), QUOTA_BLOCKS)


@pytest.mark.parametrize(
    ("prompt_tokens", "first_tokens", "blocks"),
    [(48, 8, 1), (49, 8, 6), (49, 49, 6), (5000, 1, 6)],
    ids=["fits", "one-more", "all-at-once", "long"],
)
def test_a_long_request_takes_its_whole_quota_at_once(
    prompt_tokens: int, first_tokens: int, blocks: int
) -> None:
    manager = make_manager()
    expect(manager, "r", prompt_tokens)
    assert need(manager, "r", first_tokens) == blocks
    assert grow(manager, "r", first_tokens) == blocks


def test_a_long_request_never_needs_more_than_it_took() -> None:
    manager = make_manager()
    expect(manager, "r", 1000)
    grow(manager, "r", 16)
    free_blocks = manager.block_pool.get_num_free_blocks()
    for num_tokens in range(16, 2000, 37):
        assert need(manager, "r", num_tokens) == 0
        assert grow(manager, "r", num_tokens) == 0
    assert manager.block_pool.get_num_free_blocks() == free_blocks


@pytest.mark.parametrize(
    ("is_private", "published"), [(False, 4), (True, 0)], ids=["fits", "private"]
)
def test_only_requests_that_fit_publish_their_blocks(is_private: bool, published: int) -> None:
    manager = make_manager()
    request = make_request("r", range(36))
    expect(manager, "r", 36, is_private=is_private)
    grow(manager, "r", 36)
    manager.cache_blocks(request, 36, replay_boundaries=())
    assert cached_blocks(manager, make_request("other", range(36))) == published
    manager.free("r")
    assert cached_blocks(manager, make_request("other", range(36))) == published


def test_a_published_prefix_is_found_and_counted() -> None:
    manager = make_manager()
    expect(manager, "first", 36, is_private=False)
    grow(manager, "first", 36)
    manager.cache_blocks(make_request("first", range(36)), 36, replay_boundaries=())
    blocks = manager.req_to_blocks["first"][:4]
    expect(manager, "second", 40, is_private=False)
    wanted = manager.get_num_blocks_to_allocate("second", 40, blocks, 32, 32, 40)
    assert wanted == 1, "four of its five blocks are in use by the first"
    manager.add_local_computed_blocks("second", blocks, 32, 0)
    assert grow(manager, "second", 40) == 1
    assert manager.req_to_blocks["second"][:4] == blocks


def test_a_request_is_forgotten_when_it_ends() -> None:
    """A later request with the same id is judged by its own length."""
    manager = make_manager()
    expect(manager, "r", 1000)
    manager.forget("r")
    expect(manager, "r", 8)
    assert need(manager, "r", 8) == 1
    manager.forget("never seen")


def test_a_preempted_request_grows_as_it_did_at_first() -> None:
    """Its output is computed again, but it is compressed where it was and needs no more before."""
    manager = make_manager()
    expect(manager, "r", 40)
    grown = [grow(manager, "r", num_tokens) for num_tokens in (16, 40, 48, 60, 90)]
    manager.free("r")
    assert grown == [2, 3, 1, 0, 0]
    assert [grow(manager, "r", num_tokens) for num_tokens in (16, 40, 48, 60, 90)] == grown


def test_every_request_has_its_own_quota() -> None:
    """Two of different quotas in one pool are counted, each by its own."""
    manager = make_manager()
    for name, blocks in (("small", 5), ("large", 9)):
        manager.expect(name, Expectation(terms_of(make_quota(blocks)), 1000, is_private=True))
        assert need(manager, name, 8) == grow(manager, name, 8) == blocks
    manager.req_to_blocks["small"] += manager.block_pool.get_new_blocks(1)
    with pytest.raises(RuntimeError, match="request small holds 6 blocks, its quota is 5"):
        grow(manager, "small", 8)
    assert grow(manager, "large", 2000) == 0


def test_the_bound_is_asserted() -> None:
    """A block more than the quota, wherever it comes from, is an error and not a habit."""
    manager = make_manager()
    expect(manager, "r", 1000)
    grow(manager, "r", 8)
    manager.req_to_blocks["r"] += manager.block_pool.get_new_blocks(1)
    with pytest.raises(RuntimeError, match="request r holds 7 blocks, its quota is 6"):
        grow(manager, "r", 8)


def test_blocks_return_to_the_pool() -> None:
    manager = make_manager()
    free_blocks = manager.block_pool.get_num_free_blocks()
    for name in ("a", "b", "c", "d"):
        expect(manager, name, 1000)
        grow(manager, name, 24)
    assert manager.block_pool.get_num_free_blocks() == free_blocks - 4 * QUOTA_BLOCKS
    for name in ("c", "a", "d", "b"):
        manager.free(name)
    assert manager.block_pool.get_num_free_blocks() == free_blocks


def test_the_spec_pays_for_the_whole_head_page() -> None:
    spec = QuotaSpec.of(stock_spec(), QUOTA)
    layout = PageLayout(BLOCK_TOKENS, 32, torch.float32)
    assert spec.page_size_bytes == 2 * layout.page_bytes > stock_spec().page_size_bytes
    assert not spec.uses_slot_mapping
    assert QuotaSpec.merge([spec, spec]) == spec


def test_vllm_finds_the_manager_by_the_spec() -> None:
    spec = QuotaSpec.of(stock_spec(), QUOTA)
    assert KVCacheSpecRegistry.get_manager_class(spec) is QuotaManager
    assert KVCacheSpecRegistry.get_manager_class(stock_spec()) is FullAttentionManager


def test_layers_with_other_quotas_do_not_merge() -> None:
    specs = [QuotaSpec.of(stock_spec(), make_quota(blocks)) for blocks in (6, 7)]
    with pytest.raises(AssertionError, match="equal specs"):
        QuotaSpec.merge(specs)
