"""Quota arithmetic: hand-computed cases, and the bound by simulation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_budgetkv.quota import Quota, ceil_div


def make_quota(**changes: object) -> Quota:
    numbers = {
        "blocks": 128,
        "page_tokens": 16,
        "num_layers": 28,
        "chunk_tokens": 1024,
        "decode_interval_tokens": 46,
    }
    return Quota(**{**numbers, **changes})


def test_budget_of_the_design_example() -> None:
    """L = 28, T = 1024, R = 46, Q * N = 2048 leaves B = 2048 - 37 - 46 - 16."""
    assert make_quota().budget_tokens == 1949


def test_compression_after_the_forward_would_leave_far_less() -> None:
    one_layer = make_quota(num_layers=1)
    assert one_layer.budget_tokens == 2048 - 1024 - 46 - 16


@pytest.mark.parametrize("blocks", [0, 1, 7])
def test_too_small_a_quota_names_the_smallest(blocks: int) -> None:
    smallest = make_quota(blocks=1000).min_blocks
    with pytest.raises(ValueError, match=f"at least {smallest} or lower --kv-chunk-tokens"):
        make_quota(blocks=blocks)
    assert make_quota(blocks=smallest).budget_tokens >= 32


def test_smallest_quota_is_tight() -> None:
    smallest = make_quota().min_blocks
    with pytest.raises(ValueError, match="too small"):
        make_quota(blocks=smallest - 1)


@pytest.mark.parametrize(
    ("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (2048, 128), (2049, 128)]
)
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert make_quota().blocks_for(num_tokens) == blocks


@pytest.mark.parametrize(
    ("seen", "prompt", "compresses"),
    [(1949, 5000, False), (1950, 5000, True), (2048, 2048, False), (2049, 2049, True)],
    ids=["within-budget", "beyond-budget", "fits", "last-chunk"],
)
def test_compresses_after(seen: int, prompt: int, compresses: bool) -> None:
    assert make_quota().compresses_after(seen, prompt) is compresses


def test_decode_compaction() -> None:
    quota = make_quota()
    assert not quota.compacts_before_decode(0, held_tokens=2047)
    assert quota.compacts_before_decode(0, held_tokens=2048)
    assert not quota.compacts_before_decode(45, held_tokens=None)
    assert quota.compacts_before_decode(46, held_tokens=None)


def test_a_policy_that_keeps_everything_never_compresses() -> None:
    quota = make_quota(compresses=False, blocks=4)
    assert quota.budget_tokens == 64
    assert not quota.compresses_after(64, 1000)
    assert not quota.compacts_before_decode(1000, held_tokens=64)
    assert quota.table_width_pages == 4


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 200),
    st.integers(1, 80),
    st.integers(0, 20),
    st.data(),
)
def test_pages_never_exceed_the_quota(
    layers: int, heads: int, page: int, chunk: int, interval: int, extra: int, data: st.DataObject
) -> None:
    """Simulate prefill and decode with any split of the budget over heads; count head-pages."""
    numbers = {"page_tokens": page, "num_layers": layers, "chunk_tokens": chunk}
    loose = Quota(blocks=10**6, decode_interval_tokens=interval, **numbers)
    quota = Quota(blocks=loose.min_blocks + extra, decode_interval_tokens=interval, **numbers)
    limit_pages = quota.blocks * layers * heads
    lens = [[0] * heads for _ in range(layers)]

    def pages() -> int:
        return sum(ceil_div(n, page) for row in lens for n in row)

    def compress(layer: int) -> None:
        total = quota.budget_tokens * heads
        for head in range(heads - 1):
            most = min(lens[layer][head], quota.max_head_tokens, total)
            lens[layer][head] = data.draw(st.integers(0, most))
            total -= lens[layer][head]
        lens[layer][-1] = min(lens[layer][-1], quota.max_head_tokens, total)

    prompt = quota.tokens + data.draw(st.integers(1, 300))
    seen = 0
    while seen < prompt:
        step = min(data.draw(st.integers(1, chunk)), prompt - seen)
        seen += step
        for layer in range(layers):
            lens[layer] = [n + step for n in lens[layer]]
            assert pages() <= limit_pages
            if quota.compresses_after(seen, prompt):
                compress(layer)
    grown = 0
    for _ in range(2 * interval + 3):
        if quota.compacts_before_decode(grown, None):
            for layer in range(layers):
                compress(layer)
            grown = 0
        for layer in range(layers):
            lens[layer] = [n + 1 for n in lens[layer]]
        grown += 1
        assert pages() <= limit_pages
    longest = max(n for row in lens for n in row)
    assert ceil_div(longest, page) <= quota.table_width_pages
