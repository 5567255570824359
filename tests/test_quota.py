"""Quota arithmetic: hand-computed cases, and the bound by simulation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.page_simulation import PageSimulation, quotas
from vllm_budgetkv.quota import Quota


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
@given(quotas(), st.integers(1, 4), st.data())
def test_pages_never_exceed_the_quota(quota: Quota, heads: int, data: st.DataObject) -> None:
    """With any split of the budget over heads."""
    simulation = PageSimulation(quota, heads, data)

    def compress(layer: int) -> None:
        total = quota.budget_tokens * heads
        row = simulation.lens[layer]
        for head in range(heads - 1):
            row[head] = data.draw(st.integers(0, min(row[head], quota.max_head_tokens, total)))
            total -= row[head]
        row[-1] = min(row[-1], quota.max_head_tokens, total)

    simulation.run(compress)
