"""Quota arithmetic: hand-computed cases, and the bound by simulation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.arithmetic.page_simulation import PageSimulation, quotas
from vllm_budgetkv.arithmetic.quota import Quota, good_batch_tokens, least_batch_tokens


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
    message = rf"at least {smallest} blocks .* or lower --kv-"
    with pytest.raises(ValueError, match=message):
        make_quota(blocks=blocks)
    assert make_quota(blocks=smallest).budget_tokens >= 32


def test_the_message_names_what_takes_the_room() -> None:
    with pytest.raises(ValueError, match="lower --kv-decode-interval-tokens"):
        make_quota(blocks=128, decode_interval_tokens=100_000)


def test_smallest_quota_is_tight() -> None:
    smallest = make_quota().min_blocks
    with pytest.raises(ValueError, match="too small"):
        make_quota(blocks=smallest - 1)


@pytest.mark.parametrize(
    ("num_tokens", "prompt_tokens", "blocks"),
    [(0, 1, 0), (1, 1, 1), (16, 1, 1), (17, 1, 2), (2048, 1, 128), (2049, 1, 128), (1, 2048, 1),
     (1, 2049, 128), (5000, 2049, 128)],
)  # fmt: skip
def test_blocks_for(num_tokens: int, prompt_tokens: int, blocks: int) -> None:
    assert make_quota().blocks_for(num_tokens, prompt_tokens) == blocks


@pytest.mark.parametrize(
    ("num_tokens", "prompt_tokens", "blocks"),
    [(1, 1, 1), (544, 1, 1), (545, 1, 2), (2176, 1, 4), (9000, 1, 4), (1, 2176, 1), (1, 2177, 4)],
)
def test_blocks_of_many_pages(num_tokens: int, prompt_tokens: int, blocks: int) -> None:
    """A block of 34 pages is a block, and N of the bound is still that of a page."""
    quota = make_quota(blocks=4, block_pages=34)
    assert quota.blocks_for(num_tokens, prompt_tokens) == blocks
    assert quota.budget_tokens == 4 * 34 * 16 - 37 - 46 - 16
    assert quota.min_blocks == 1
    assert quota.next_stop(0, 5000) == 16
    assert quota.table_width_pages >= 4 * 34


def test_room_of_a_batch() -> None:
    assert least_batch_tokens(1024, 1) == 1024
    assert least_batch_tokens(1024, 256) == 1279
    assert good_batch_tokens(2048, 1024, 256) == 2303
    assert good_batch_tokens(2400, 1024, 256) == 2400
    assert good_batch_tokens(512, 1024, 256) == 1279


@pytest.mark.parametrize(
    ("seen", "prompt", "compresses"),
    [(1949, 5000, False), (1950, 5000, True), (2048, 2048, False), (2049, 2049, True)],
    ids=["within-budget", "beyond-budget", "fits", "last-chunk"],
)
def test_compresses_after(seen: int, prompt: int, compresses: bool) -> None:
    assert make_quota().compresses_after(seen, prompt) is compresses


@pytest.mark.parametrize(
    ("start", "prompt", "compacts"),
    [
        (2047, 100, False),
        (2048, 100, True),
        (2093, 100, False),
        (2094, 100, True),
        (2048, 2048, True),
        (2048, 2049, False),
        (2049, 2049, False),
        (2094, 2049, False),
        (2095, 2049, True),
        (2141, 2049, True),
    ],
    ids=["below", "full", "grown", "interval", "prompt-fills", "in-prompt", "prompt-ends", "grows",
         "grown-long", "again"],
)  # fmt: skip
def test_compacts_before(start: int, prompt: int, compacts: bool) -> None:
    assert make_quota().compacts_before(start, prompt) is compacts


@pytest.mark.parametrize(
    ("start", "prompt", "stop"),
    [
        (0, 5000, 16),
        (16, 5000, 1024),
        (1024, 5000, 2048),
        (1500, 5000, 2048),
        (4096, 5000, 5000),
        (5000, 5000, 5046),
        (5010, 5000, 5046),
        (5046, 5000, 5092),
        (0, 2000, 1024),
        (700, 2000, 1724),
        (1024, 2000, 2000),
        (2000, 2000, 2048),
        (100, 100, 1124),
        (2048, 100, 2094),
    ],
    ids=["page", "chunk", "next", "aligned", "end", "output", "rest", "interval", "fits",
         "not-aligned", "prompt-end", "quota", "no-longer-than-a-chunk", "behind-the-quota"],
)  # fmt: skip
def test_next_stop(start: int, prompt: int, stop: int) -> None:
    assert make_quota().next_stop(start, prompt) == stop


@pytest.mark.parametrize(
    ("start", "prompt", "stop"), [(5000, 5000, 5001), (2048, 100, 2049), (2000, 100, 2048)]
)
def test_output_that_decode_reads_in_part_is_read_by_decode_again(
    start: int, prompt: int, stop: int
) -> None:
    assert make_quota(retrieves=True).next_stop(start, prompt) == stop


def test_a_policy_that_keeps_everything_never_compresses() -> None:
    quota = make_quota(compresses=False, blocks=4)
    assert quota.budget_tokens == 64
    assert not quota.compresses_after(64, 1000)
    assert not quota.compacts_before(64, 40)
    assert quota.table_width_pages == 4


@settings(max_examples=300, deadline=None)
@given(quotas(), st.integers(1, 4), st.data())
def test_pages_never_exceed_the_quota(quota: Quota, heads: int, data: st.DataObject) -> None:
    """With any split of the budget over heads, beside tokens that all of them keep."""
    most_pinned = (quota.blocks - quota.min_blocks) * quota.block_tokens
    quota = replace(quota, pinned_tokens=data.draw(st.integers(0, most_pinned)))
    simulation = PageSimulation.drawn(quota, heads, data)

    def compress(layer: int) -> None:
        total = quota.budget_tokens * heads
        row = simulation.lens[layer]
        for head in range(heads):
            pinned = min(row[head], quota.pinned_tokens)
            most = min(row[head] - pinned, quota.max_chosen_tokens, total)
            chosen = most if head == heads - 1 else data.draw(st.integers(0, most))
            row[head] = pinned + chosen
            total -= chosen

    simulation.run(compress, output_tokens=2 * quota.decode_interval_tokens + 3)


@settings(max_examples=200, deadline=None)
@given(quotas(), st.integers(-60, 60), st.integers(0, 200))
def test_compactions_are_counted_as_they_fall(quota: Quota, beyond: int, outputs: int) -> None:
    """Of prompts that fit and that do not."""
    prompt_tokens = max(1, quota.tokens + beyond)
    seen_tokens = prompt_tokens + outputs
    starts = range(prompt_tokens, seen_tokens)
    expected = sum(quota.compacts_before(start, prompt_tokens) for start in starts)
    assert quota.compactions(seen_tokens, prompt_tokens) == expected


def compressions(quota: Quota, prompt_tokens: int, output_tokens: int) -> list[int]:
    """Tokens seen at each compression of a request, written out."""
    ends = [*range(0, prompt_tokens, quota.chunk_tokens), prompt_tokens]
    first = quota.tokens
    seen = []
    if prompt_tokens > quota.tokens:
        seen = [end for end in ends if end > quota.budget_tokens]
        first = prompt_tokens + quota.decode_interval_tokens
    return seen + [*range(first, prompt_tokens + output_tokens, quota.decode_interval_tokens)]


@settings(max_examples=300, deadline=None)
@given(quotas(), st.integers(-60, 300), st.integers(0, 200), st.booleans(), st.integers(0, 999))
def test_a_request_is_compressed_at_the_same_points_however_it_is_cut(
    quota: Quota, beyond_tokens: int, output_tokens: int, retrieves: bool, seed: int
) -> None:
    """Decoded or computed again in chunks of any size, and never above the quota on the way."""
    quota = replace(quota, retrieves=retrieves)
    prompt_tokens = max(1, quota.tokens + beyond_tokens)
    chance = random.Random(seed)
    simulation = PageSimulation(quota, 1, prompt_tokens, chance, keeps_stops=True)

    def compress(layer: int) -> None:
        simulation.lens[layer] = [min(simulation.lens[layer][0], quota.budget_tokens)]

    simulation.run(compress, output_tokens)
    assert simulation.compressed == compressions(quota, prompt_tokens, output_tokens)
