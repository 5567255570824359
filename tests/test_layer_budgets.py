"""Layer budgets: the pages of a request stay inside its quota while layers grow and shrink."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_budgetkv.layer_budgets import LayerBudgets
from vllm_budgetkv.quota import Quota, ceil_div


def test_a_layer_grows_only_by_what_others_gave_up() -> None:
    budgets = LayerBudgets([150, 110, 30], budget_tokens=100, max_head_tokens=200)
    assert [budgets.claim(layer) for layer in range(3)] == [100, 100, 30]
    assert [budgets.claim(layer) for layer in range(3)] == [150, 110, 30]
    assert [budgets.claim(layer) for layer in range(3)] == [150, 110, 30]


def test_a_layer_stays_below_the_limit_of_a_head() -> None:
    budgets = LayerBudgets([250, 20, 30], budget_tokens=100, max_head_tokens=200)
    for layer in (0, 1, 2):
        budgets.claim(layer)
    assert budgets.claim(0) == 200


@pytest.mark.parametrize(
    ("desired", "message"),
    [([150, 100, 51], "301 tokens in all.* at most 3 \\* 100"), ([150, 0, 30], "0 the least")],
    ids=["too-much", "nothing"],
)
def test_impossible_wishes_are_refused(desired: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerBudgets(desired, budget_tokens=100, max_head_tokens=200)


@st.composite
def wishes(draw: st.DrawFn, layers: int, budget_tokens: int) -> list[int]:
    """1 token or more per layer, L * B at most in all, above 2 * B for some."""
    left = layers * (budget_tokens - 1)
    desired = []
    for _ in range(layers):
        desired.append(1 + draw(st.integers(0, left)))
        left -= desired[-1] - 1
    return draw(st.permutations(desired))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([8, 16]),
    st.integers(1, 120),
    st.integers(1, 40),
    st.integers(0, 10),
    st.data(),
)
def test_pages_never_exceed_the_quota(
    layers: int, heads: int, page: int, chunk: int, interval: int, extra: int, data: st.DataObject
) -> None:
    """Prefill and decode with any budgets of layers and any split over heads; count head-pages."""
    numbers = {"page_tokens": page, "num_layers": layers, "chunk_tokens": chunk}
    loose = Quota(blocks=10**6, decode_interval_tokens=interval, **numbers)
    quota = Quota(blocks=loose.min_blocks + extra, decode_interval_tokens=interval, **numbers)
    desired = data.draw(wishes(layers, quota.budget_tokens))
    budgets = LayerBudgets(desired, quota.budget_tokens, quota.max_head_tokens)
    lens = [[0] * heads for _ in range(layers)]

    def check_pages() -> None:
        pages = sum(ceil_div(n, page) for row in lens for n in row)
        assert pages <= quota.blocks * layers * heads
        longest = max(n for row in lens for n in row)
        assert ceil_div(longest, page) <= quota.table_width_pages

    def compress(layer: int) -> None:
        total = budgets.claim(layer) * heads
        assert sum(budgets.caps) <= layers * quota.budget_tokens
        for head in range(heads):
            most = min(lens[layer][head], quota.max_head_tokens, total)
            greedy = data.draw(st.booleans())
            lens[layer][head] = most if greedy else data.draw(st.integers(0, most))
            total -= lens[layer][head]

    prompt = quota.tokens + data.draw(st.integers(1, 300))
    seen = 0
    while seen < prompt:
        step = min(data.draw(st.integers(1, chunk)), prompt - seen)
        seen += step
        for layer in range(layers):
            lens[layer] = [n + step for n in lens[layer]]
            check_pages()
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
        check_pages()
