"""Layer budgets: the pages of a request stay inside its quota while layers grow and shrink."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.arithmetic.page_simulation import PageSimulation, quotas
from vllm_budgetkv.arithmetic.layer_budgets import LayerBudgets

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.quota import Quota


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
@given(quotas(), st.integers(1, 4), st.data())
def test_pages_never_exceed_the_quota(quota: Quota, heads: int, data: st.DataObject) -> None:
    """With any budgets of layers and any split over heads."""
    desired = data.draw(wishes(quota.num_layers, quota.budget_tokens))
    budgets = LayerBudgets(desired, quota.budget_tokens, quota.max_head_tokens)
    simulation = PageSimulation.drawn(quota, heads, data)

    def compress(layer: int) -> None:
        total = budgets.claim(layer) * heads
        assert sum(budgets.caps) <= quota.num_layers * quota.budget_tokens
        row = simulation.lens[layer]
        for head in range(heads):
            most = min(row[head], quota.max_head_tokens, total)
            row[head] = most if data.draw(st.booleans()) else data.draw(st.integers(0, most))
            total -= row[head]

    simulation.run(compress, output_tokens=2 * quota.decode_interval_tokens + 3)
