"""Chunks of a replay: hand-computed cases, and the bound by simulation."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.arithmetic.page_simulation import quotas
from vllm_budgetkv.arithmetic.quota import MIN_BUDGET_PAGES, Quota, ceil_div
from vllm_budgetkv.arithmetic.recall import Recall
from vllm_budgetkv.arithmetic.replayed import most_chunk_tokens, replay_stops

NUMBERS = {
    "blocks": 12,
    "page_tokens": 8,
    "num_layers": 3,
    "chunk_tokens": 24,
    "decode_interval_tokens": 8,
}
RECALL = Recall(
    num_heads=1,
    all_heads=4,
    page_words=512,
    code_words=1,
    slots_share=0.5,
    max_index_share=0.5,
)


def most_stops(quota: Quota, prompt_tokens: int, found_tokens: int) -> list[int]:
    """Where the chunks of a prefill end in front of what is found."""
    stops, stop = [], 0
    while (stop := quota.next_stop(stop, prompt_tokens)) <= found_tokens:
        stops.append(stop)
    return stops


@pytest.mark.parametrize(("layer", "first", "later"), [(0, 240, 96), (1, 202, 96), (2, 123, 51)])
def test_room_of_each_layer(layer: int, first: int, later: int) -> None:
    """B = 72 of 96 tokens in pages of 8, L = 3: 288 - 79, 158 or 237; the table has 30 pages."""
    quota = Quota(**NUMBERS, recall=RECALL)
    assert (quota.budget_tokens, quota.table_width_pages) == (72, 30)
    assert most_chunk_tokens(quota, layer) == (first, later)


@pytest.mark.parametrize(
    ("layer", "found", "stops"),
    [
        (0, 0, [8, 24, 48, 72, 96, 120, 144, 168, 192, 216, 240, 264]),
        (0, 240, [240, 264]),
        (0, 264, [168, 264]),
        (2, 130, [120, 144, 168, 192, 216, 240, 264]),
        (2, 240, [87, 138, 189, 240, 264]),
        (2, 264, [111, 162, 213, 264]),
    ],
)
def test_stops_of_a_layer(layer: int, found: int, stops: list[int]) -> None:
    quota = Quota(**NUMBERS, recall=RECALL)
    of_prefill = most_stops(quota, 300, 270)
    assert list(replay_stops(quota, layer, of_prefill, found)) == stops


@settings(max_examples=300, deadline=None)
@given(quotas(), st.integers(0, 40), st.integers(1, 4), st.integers(1, 2000), st.integers(0, 999))
def test_the_quota_holds_whatever_heads_keep(
    quota: Quota, pinned_tokens: int, num_heads: int, found_tokens: int, seed: int
) -> None:
    chance = random.Random(seed)
    if quota.budget_tokens - pinned_tokens >= MIN_BUDGET_PAGES * quota.page_tokens:
        quota = replace(quota, pinned_tokens=pinned_tokens)
    quota = replace(quota, recall=chance.choice([None, RECALL]))
    prompt_tokens = quota.tokens + found_tokens
    stops = most_stops(quota, prompt_tokens, chance.randint(1, prompt_tokens - 1))
    lens = [[0] * num_heads for _ in range(quota.num_layers)]
    for layer in range(quota.num_layers):
        seen_tokens = 0
        for stop in replay_stops(quota, layer, stops, found_tokens):
            lens[layer] = [held + stop - seen_tokens for held in lens[layer]]
            seen_tokens = stop
            check_pages(quota, lens)
            if quota.compresses_after(stop, prompt_tokens):
                lens[layer] = survivors(quota, lens[layer], chance)
        assert not stops or seen_tokens == stops[-1]


def check_pages(quota: Quota, lens: list[list[int]]) -> None:
    pages = [ceil_div(held, quota.page_tokens) for row in lens for held in row]
    assert sum(pages) <= quota.blocks * quota.block_pages * quota.num_layers * len(lens[0])
    assert max(pages) <= quota.table_width_pages


def survivors(quota: Quota, held: list[int], chance: random.Random) -> list[int]:
    """As uneven as can be, and with a page for a token alone where there is a choice."""
    left = quota.budget_tokens * len(held)
    kept = []
    for tokens in chance.sample(held, len(held)):
        most = min(tokens, quota.max_chosen_tokens, left)
        if chance.random() < 0.5:
            most = min(most, most // quota.page_tokens * quota.page_tokens + 1)
        kept.append(most)
        left -= most
    return [min(a + quota.pinned_tokens, b) for a, b in zip(kept, held, strict=True)]


@settings(max_examples=200, deadline=None)
@given(quotas(), st.integers(1, 2000), st.integers(0, 3000))
def test_few_chunks_that_end_where_those_of_a_prefill_do(
    quota: Quota, found_tokens: int, joined_tokens: int
) -> None:
    quota = replace(quota, recall=RECALL)
    stops = most_stops(quota, quota.tokens + found_tokens, found_tokens)
    joined = [stop for stop in stops if stop <= joined_tokens]
    for layer in range(quota.num_layers):
        found = list(replay_stops(quota, layer, stops, joined_tokens))
        own = found[: len(found) - len(stops) + len(joined)]
        assert found[len(own) :] == stops[len(joined) :]
        assert own[-1:] == joined[-1:]
        assert all(a < b for a, b in pairwise([0, *own]))
        # one for each that a prefill has at most, the page in front of its first left out
        assert len(own) <= max(1, ceil_div(joined[-1], quota.chunk_tokens)) if joined else not own
